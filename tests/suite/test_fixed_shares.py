"""Perturbations that were found before, in runs that several processes share."""

import pandas as pd
import pytest
from processes import Command, contents

from llm_attack.suite.analysis.outcomes import gold_margin

HOW = ["--model", "demo", "--limit", "8", "--device", "cpu", "--loss", "choice"]
RUN = ["run", *HOW, "--batch_size", "2", "--progress", "json", "-o", "run", "--attacks", "none"]
FIND = {
    "stored": [
        *("run", *HOW, "--tasks", "demo_piqa", "--attacks", "none,fgsm", "--epsilons", "0.3rms"),
        *("--save_perturbations", "--path_points", "0", "-o", "found"),
    ],
    "universal": [
        *("universal", *HOW, "--tasks", "demo_piqa", "--attacks", "bim", "--epsilons", "0.3rms"),
        *("--steps", "4", "-o", "found"),
    ],
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[*FIND])
def command(request, tmp_path_factory):
    """The arguments of a run with perturbations that another command found."""
    folder = tmp_path_factory.mktemp(request.param)
    found = Command(folder, *FIND[request.param])
    assert found.wait() == 0, found.err
    tasks = "demo_piqa,demo_winogrande" if request.param == "universal" else "demo_piqa"
    return [*RUN, "--tasks", tasks, "--perturbation", folder / "found"]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The files of one process. The perturbation moves the answers."""
    folder = tmp_path_factory.mktemp("alone")
    one = Command(folder, *command)
    assert one.wait() == 0, one.err
    samples = pd.read_parquet(folder / "run" / "samples.parquet")
    margin = gold_margin(samples).groupby(samples["attack"]).mean()
    assert margin["fixed"] < margin["none"] - 0.1 and len(margin) == 4
    return contents(folder / "run")


def test_processes(command, alone, tmp_path):
    """Two processes with a share each leave what one leaves."""
    both = [Command(tmp_path, *command, "--shard", f"{i}/2") for i in (1, 2)]
    for one in both:
        assert one.wait() == 0, one.err
    assert contents(tmp_path / "run") == alone


def test_workers_of_ray(command, alone, tmp_path):
    """A worker loads the perturbation itself."""
    pytest.importorskip("ray", reason="pip install 'llm-attack[ray]'")
    run = Command(tmp_path, *command, "--ray", "local", "--ray_workers", "2")
    assert run.wait() == 0, run.err
    assert contents(tmp_path / "run") == alone
