"""The definitions that tests compare with."""

import pytest
from reference import Reference


@pytest.fixture(scope="session", autouse=True)
def quick(one_index):
    """For all tests here."""


@pytest.fixture(scope="session")
def reference():
    return Reference("demo")
