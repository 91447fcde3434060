"""Shared by the tests of the harness."""

import pytest
from sketched import sketch


@pytest.fixture(scope="session", autouse=True)
def quick(one_index):
    """For all tests here, which look at no figures."""
    with pytest.MonkeyPatch.context() as patch:
        sketch(patch)
        yield
