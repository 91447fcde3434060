"""Shares of a run, and models that are divided over several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import transformers
from processes import RUN, Command, contents

from llm_attack import Plan, evaluate
from llm_attack.attacks import ATTACKS
from llm_attack.base.errors import UsageError
from llm_attack.suite.run.execute import Processes

ROOT = Path(__file__).parents[2]

# Every attack, in as few steps as show something.
EVERY = {
    **{"model": "demo", "tasks": "demo_piqa", "limit": 2, "loss": "choice", "device": "cpu"},
    **{"attacks": list(ATTACKS), "epsilons": "0.3rms", "steps": 3, "rounds": 3, "queries": 5},
}
MEMBER = f"""
import sys
from llm_attack import Plan, evaluate

result = evaluate(Plan(**{EVERY!r}, model_args="tp_plan=auto"), progress="quiet")
if result is not None:
    result.samples.to_parquet("samples.parquet")
    print(result.run["fingerprint"]["weights"])
"""


@pytest.mark.slow
def test_shares(tmp_path, whole):
    """Two commands, one of them of an array of Slurm's, a share each, leave what one leaves."""
    files, _ = whole
    first = Command(tmp_path, *RUN, "--shard", "1/2")
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    slurm = {"SLURM_ARRAY_TASK_ID": "2", "SHARES": "2", "PATH": found}
    words = [ROOT / "examples/slurm.sh", *RUN[1:]]
    done = subprocess.run(
        ["bash", *words], cwd=tmp_path, env={**os.environ, **slurm}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert first.wait() == 0, first.err
    assert contents(tmp_path / "run") == files


def processes(monkeypatch, **options):
    found = {name: options.pop(name) for name in ("RANK", "WORLD_SIZE") if name in options}
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, str(value))
    return Processes.of(Plan("demo", "demo_piqa", **options))


def test_which_process(monkeypatch):
    assert processes(monkeypatch) == (0, 1, 0)
    assert processes(monkeypatch, RANK=2, WORLD_SIZE=3) == (2, 3, 0)
    assert processes(monkeypatch, shard="3/4") == (2, 4, 0)
    split = {"model_args": "tp_plan=auto"}
    assert processes(monkeypatch, RANK=1, WORLD_SIZE=2, **split) == (0, 1, 1)
    assert processes(monkeypatch, RANK=1, WORLD_SIZE=2, shard="2/3", **split) == (1, 3, 1)
    assert not processes(monkeypatch, RANK=1, WORLD_SIZE=2, **split).first
    with pytest.raises(UsageError, match="shard=1/2: must not be given with WORLD_SIZE=2"):
        processes(monkeypatch, RANK=1, WORLD_SIZE=2, shard="1/2")
    for shard in ("0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"):
        with pytest.raises(UsageError, match=f"shard='{shard}': must be i/n"):
            processes(monkeypatch, shard=shard)


@pytest.mark.slow
@pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 has no tensor parallelism on a CPU"
)
def test_tensor_parallel(tmp_path):
    """Half of the model in each of two processes: every attack and gradient is that of the whole.

    To float32 rounding, which the order of sums changes; where the gradient vanishes, rounding may
    decide a sign, which moves an answer by what one coordinate of many does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "member.py").write_text(MEMBER)
    launch = f"-m torch.distributed.run --nproc_per_node 2 --master_port {port} member.py"
    done = subprocess.run(
        [sys.executable, *launch.split()],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone = evaluate(Plan(**EVERY), progress="quiet")
    one, two = alone.samples, pd.read_parquet(tmp_path / "samples.parquet")
    assert one["condition"].tolist() == two["condition"].tolist()
    assert set(one["attack"]) == set(ATTACKS)
    for column in ("log_likelihoods", "cosine", "first_order", "critical_epsilon"):
        of_one, of_two = (np.hstack(run[column].to_numpy()).astype(float) for run in (one, two))
        np.testing.assert_allclose(of_one, of_two, rtol=2e-3, atol=2e-3, err_msg=column)
    clean = [run[run["attack"] == "none"] for run in (one, two)]
    of_one, of_two = (np.hstack(run["log_likelihoods"].to_numpy()) for run in clean)
    np.testing.assert_allclose(of_one, of_two, rtol=1e-5)
    # which hash the whole weights, wherever their parts are
    assert alone.run["fingerprint"]["weights"] == done.stdout.split()[-1]
