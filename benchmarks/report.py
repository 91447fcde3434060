"""Processor time of `llm-attack report` and `compare` on runs as large as the six benchmarks.

    python benchmarks/report.py --repeats 3

The runs are made from results/demo/choice. Its questions are repeated until each task has as many
as the benchmark that it represents (17,195 together). Its answers with a little noise represent
other amplitudes and other models. Times are user and system time of separate processes, so they
include imports. Modules are compiled before, as in an installed package.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import pandas as pd

from llm_attack.suite.results import save_frames

DEMO = Path(__file__).parents[1] / "results" / "demo" / "choice"
SIZES = {
    "demo_arc_challenge": 1172,
    "demo_arc_easy": 2376,
    "demo_hellaswag": 10042,
    "demo_openbookqa": 500,
    "demo_piqa": 1838,
    "demo_winogrande": 1267,
}
# name of a condition: the condition of the demo whose answers it has, and their noise in nats
CONDITIONS = {
    "none": ("none", 0.0),
    "random@0.003": ("none", 0.2),
    "random@0.01": ("random@0.01", 0.0),
    "fgsm@0.001": ("fgsm@0.01", 3.0),
    "fgsm@0.003": ("fgsm@0.01", 1.0),
    "fgsm@0.01": ("fgsm@0.01", 0.0),
    "bim@0.003": ("bim@0.01", 1.0),
    "bim@0.01": ("bim@0.01", 0.0),
}


def enlarged(folder: Path, share: float = 1.0, seed: int = 0) -> None:
    """Writes a run of `SIZES` questions under `CONDITIONS`.

    Args:
        folder: the folder of the run.
        share: share of the questions, which is the same for runs of several models.
        seed: seed of the noise on all answers. Another seed represents another model.
    """
    frames = {name: pd.read_parquet(DEMO / f"{name}.parquet") for name in ("questions", "samples")}
    questions, rng = frames["questions"], np.random.default_rng(seed)
    parts = []
    for task, size in SIZES.items():
        of_task = questions[questions["task"] == task]
        place = np.arange(max(1, round(share * size)))
        some = of_task.iloc[place % len(of_task)]
        parts.append(some.assign(_of=some["doc_id"], doc_id=place))
    many = pd.concat(parts, ignore_index=True)
    known = frames["samples"].set_index(["condition", "task", "doc_id"])
    rows = []
    for condition, (like, noise) in CONDITIONS.items():
        some = known.loc[like].loc[list(zip(many["task"], many["_of"], strict=True))]
        attack, _, epsilon = condition.partition("@")
        noise += 0.3 * bool(seed)
        answers = [of + rng.normal(0, noise, len(of)) for of in some["log_likelihoods"]]
        best = np.array([int(np.argmax(of)) for of in answers])
        golds = zip(best, some["gold"], strict=True)
        rows.append(
            some.reset_index(drop=True).assign(
                **{"task": many["task"], "doc_id": many["doc_id"], "condition": condition},
                **{"attack": attack, "epsilon": float(epsilon or 0), "prediction": best},
                **{"log_likelihoods": answers, "acc": [float(i in gold) for i, gold in golds]},
            )
        )
    samples = pd.concat(rows, ignore_index=True)[list(frames["samples"].columns)]
    # so no two questions have the same text
    texts = many["question"] + " (" + many["doc_id"].astype(str) + ")"
    many = many.assign(question=texts)[list(questions.columns)]
    run = json.loads((DEMO / "run.json").read_text("utf-8"))
    of_attacks = {}
    for condition, (like, _) in CONDITIONS.items():
        told, epsilon = run["attacks"][like], float(condition.partition("@")[2] or 0.01)
        own = {"condition": condition, "epsilon": epsilon, "epsilon_absolute": epsilon}
        of_attacks[condition] = {**told, **own, "attack": condition.partition("@")[0]}
    model = f"model-{seed}" if seed else run["model"]
    folder.mkdir(parents=True)
    save_frames(folder, questions=many, samples=samples)
    text = json.dumps({**run, "attacks": of_attacks, "model": model})
    (folder / "run.json").write_text(text, "utf-8")


def seconds(*words: str) -> float:
    """User and system time of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "llm_attack", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@click.command(context_settings={"show_default": True})
@click.option("--repeats", default=3, help="Of which the median is shown, and the range.")
@click.option("--models", default=30, help="Of the comparison.")
@click.option("--share", default=0.1, help="Of the questions, that each model was asked.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the runs, new.")
def main(repeats: int, models: int, share: float, keep: Path | None) -> None:
    """Processor time of reading finished runs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as nowhere:
        folder = keep or Path(nowhere) / "runs"
        if not folder.exists():
            enlarged(folder / "large")
            shutil.copytree(DEMO, folder / "demo")
            for i in range(1, models + 1):
                enlarged(folder / f"model-{i}", share, i)
        several = [str(folder / f"model-{i}") for i in range(1, models + 1)]
        pair = [str(folder / name) for name in ("large", "demo")]
        commands = {
            "report, large": ("report", pair[0]),
            "report, demo": ("report", pair[1]),
            f"compare, {models} models": ("compare", *several, "-o", str(folder / "models.csv")),
            "compare, large with itself": ("compare", pair[0], pair[0]),
        }
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(nowhere) / "compiled")
        found: dict[str, list[float]] = {name: [] for name in commands}
        for words in commands.values():
            seconds(*words)
        for _ in range(repeats):
            for name, words in commands.items():
                found[name].append(seconds(*words))
    for name, times in found.items():
        print(f"{name}: {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    main()
