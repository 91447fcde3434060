"""What the tests of the suite share."""

import pytest
from invented import build


@pytest.fixture
def frames():
    """The function that makes samples and questions of a run that never was."""
    return build
