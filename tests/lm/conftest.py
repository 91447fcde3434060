"""The definitions that tests compare with."""

import pytest
from reference import Reference
from sketched import sketch


@pytest.fixture(scope="session", autouse=True)
def quick(one_index):
    """For all tests here, which look at no figures."""
    with pytest.MonkeyPatch.context() as patch:
        sketch(patch)
        yield


@pytest.fixture(scope="session")
def reference():
    return Reference("demo")
