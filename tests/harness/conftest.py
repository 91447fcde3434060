"""Shared by the tests of the harness."""

import pytest
from sketched import sketch
from trials import remember


@pytest.fixture(scope="session", autouse=True)
def quick(one_index):
    """For all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        remember(patch)
        yield


@pytest.fixture(scope="module", autouse=True)
def sketched():
    """No test here looks at figures."""
    with pytest.MonkeyPatch.context() as patch:
        sketch(patch)
        yield
