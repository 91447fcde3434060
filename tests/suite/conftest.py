"""What the tests of the suite share."""

import pytest
from invented import build
from processes import RUN, Command, computed, contents


@pytest.fixture(scope="session", autouse=True)
def quick(one_index):
    """For all tests here."""


@pytest.fixture
def frames():
    """The function that makes samples and questions of a run that never was."""
    return build


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """(files, number of batches) of `RUN` without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    command = Command(folder, *RUN)
    assert command.wait() == 0, command.err
    return contents(folder / "run"), computed(folder)
