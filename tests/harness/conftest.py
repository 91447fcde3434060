"""Shared by the tests of the harness."""

import pytest
from sketched import sketch
from trials import remember


@pytest.fixture(scope="session", autouse=True)
def quick(one_index):
    """For all tests here, which look at no figures and try the bundled model many times."""
    with pytest.MonkeyPatch.context() as patch:
        sketch(patch)
        remember(patch)
        yield
