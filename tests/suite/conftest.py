"""What the tests of the suite share."""

import os
from pathlib import Path

import pytest
from invented import build
from processes import RUN, Command, computed, contents


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


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data and models; tests that need it are skipped without."""
    path = os.environ.get("LLM_ATTACK_TEST_DATA")
    if not path:
        pytest.skip("LLM_ATTACK_TEST_DATA is not set: no real data on this machine")
    return Path(path)
