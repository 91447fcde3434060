"""Shared by the tests of the suite."""

import shutil

import pytest
from invented import build
from processes import RUN, Command, computed, contents
from sketched import sketch
from trials import remember

# They look at what is drawn.
DRAWN = {"test_figures", "test_layers", "test_odd_frames", "test_saving"}


@pytest.fixture(scope="session", autouse=True)
def quick(one_index):
    """For all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        remember(patch)
        yield


@pytest.fixture(scope="module", autouse=True)
def sketched(request):
    """Elsewhere figures are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in DRAWN and request.path.parent.name != "report":
            sketch(patch)
        yield


@pytest.fixture
def frames():
    """The function that makes samples and questions of a run that never was."""
    return build


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Where `RUN` has been."""
    folder = tmp_path_factory.mktemp("whole")
    command = Command(folder, *RUN)
    assert command.wait() == 0, command.err
    return folder


@pytest.fixture(scope="session")
def whole(uninterrupted):
    """(files, number of batches) of `RUN` without an interruption."""
    return contents(uninterrupted / "run"), computed(uninterrupted)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The files of `RUN` with its figures, as a process that no test has changed writes them."""
    folder = tmp_path_factory.mktemp("drawn")
    command = Command(folder, *RUN, DRAWN="1")
    assert command.wait() == 0, command.err
    return contents(folder / "run")


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A folder of the test's own where `RUN` has been: `run`, `out`, `err` and `computed`."""
    return shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
