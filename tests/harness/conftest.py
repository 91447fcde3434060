"""Shared by the tests of the harness."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick(one_index):
    """For all tests here."""
