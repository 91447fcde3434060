"""`llm-attack run --revisions`: checkpoints of one training under the same attacks.

Does robustness fall while accuracy rises? Each checkpoint is a run in its own folder. One table and
one figure show all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from llm_attack.base.declare import listed
from llm_attack.base.drawing import draw
from llm_attack.base.errors import UsageError, hint
from llm_attack.base.failures import Attempts
from llm_attack.base.folder import claim
from llm_attack.base.record import write_text
from llm_attack.stats import mean_of
from llm_attack.suite.analysis import critical
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.plan import Plan
from llm_attack.suite.report import tables
from llm_attack.suite.report.figures import look
from llm_attack.suite.report.layout import handles, legend, print_style
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.results import Result
from llm_attack.suite.studies import models

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "revisions"  # of the table and the figure
_FILES = tuple(f"{NAME}.{form}" for form in ("csv", "png", "svg"))
# The panels below accuracy: prefix of their columns, and label of their axis.
_PANELS = {"critical": "median critical\nepsilon, RMS", "cosine": "cosine"}


# Names that git accepts for branches and tags, part by part (git check-ref-format). A hash is one,
# too.
_PART = re.compile(
    r"(?![.@]$|\.|.*\.\.|.*@\{|.*\.lock$|.*\.$)[^\x00-\x20\x7f~^:?*\[\\/\ud800-\udfff]+"
)
# The folder of a model, or of adapters, has one of these.
_CONFIGS = ("config.json", "adapter_config.json")
_LONGEST = 255  # bytes of a file's name


def plans(plan: Plan, revisions: str) -> dict[str, Plan]:
    """A plan for each revision, by the name of its folder.

    Args:
        plan: the plan for all revisions.
        revisions: names, separated by commas. They are subfolders if the model is a local folder (a
            trainer writes checkpoints there), and else revisions on the hub. Characters that a
            folder's name cannot have, such as the slash of a branch, are percent-encoded.

    Raises:
        UsageError: a name appears twice, is no subfolder, or no possible name of a revision; or the
            model is neither a folder nor on a hub.
    """
    given = listed(revisions)
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None or not given:
        raise UsageError(
            f"revisions={revisions}: must name each checkpoint once, such as step1000,step2000"
        )
    if "revision" in plan.model_args:
        raise UsageError(
            f"revisions={revisions}: must not be given with model_args=revision="
            f"{plan.model_args['revision']}"
        )
    local = Path(plan.model)
    if local.is_dir():
        _check_subfolders(given, local)
        of_each = {name: replace(plan, model=str(local / name)) for name in given}
    else:
        if plan.model == "demo" or local.exists():
            raise UsageError(
                f"revisions={revisions}: needs a model on a hub, or a local folder with these"
                f" subfolders; {plan.model} is neither"
            )
        for name in given:
            if not all(map(_PART.fullmatch, name.split("/"))):
                raise UsageError(
                    f"revisions={name!r}: must be the name of a branch or a tag, or a hash"
                )
        of_each = {
            quote(name, safe=""): replace(plan, model_args={**plan.model_args, "revision": name})
            for name in given
        }
    for folder in of_each:
        if folder in _FILES or len(folder.encode()) > _LONGEST:
            raise UsageError(
                f"revisions={folder}: must be a possible name of a folder, with at most"
                f" {_LONGEST} bytes and none of {', '.join(_FILES)}"
            )
    return of_each


def _check_subfolders(given: Iterable[str], local: Path) -> None:
    there = sorted(path.name for path in local.iterdir() if path.is_dir())
    for name in given:
        if name not in there:
            shown = name if name.isprintable() else ascii(name)
            text = f"must be a folder in {local}{hint(name, there)}"
            raise UsageError(f"revisions={shown}: {text}")
        if not any((local / name / config).is_file() for config in _CONFIGS):
            raise UsageError(
                f"revisions={name}: must be a folder with a model; {local / name} has no"
                f" {' and no '.join(_CONFIGS)}"
            )


def equal(runs: Mapping[str, Result]) -> list[str]:
    """A sentence for each revision with the same weights as an earlier one.

    Args:
        runs: runs by the names of the revisions.
    """
    before: dict[Any, str] = {}
    sentences = []
    for name, run in runs.items():
        mark = run.run["fingerprint"]
        weights = mark.get("weights")
        first = before.setdefault((weights, mark.get("config")), name)
        if weights and first != name:
            sentences.append(
                f"{name} has the same weights as {first} ({weights}): they are one checkpoint"
            )
    return sentences


def along(runs: Mapping[str, Result]) -> pd.DataFrame:
    """The frame of `models.across` for revisions, with more columns.

    The new columns are:

    - `attack`: the name of the condition's attack
    - `step`: the last number in the revision's name, or its place in the list if not all names have
      a number
    - `critical`, `critical_low`, `critical_high`: only for searches, the epsilon at which half of
      the clean accuracy is left, in RMS of the embeddings; see `critical.robustness`
    - `cosine`, `cosine_low`, `cosine_high`: the cosine of embeddings and gradient, mean over tasks
    - `weights`: the hash of the weights

    Args:
        runs: runs by the names of the revisions.

    Raises:
        UsageError: see `models.across`.
    """
    frame = models.across(runs)
    numbers = [re.findall(r"\d+", name) for name in runs]
    steps = [int(digits[-1]) if all(numbers) else i for i, digits in enumerate(numbers)]
    step = dict(zip(runs, steps, strict=True))
    cosine = {name: _cosine(run.samples) for name, run in runs.items()}
    halves = {name: _halves(run.samples) for name, run in runs.items()}
    attacks = next(iter(runs.values())).conditions
    rows = []
    for row in frame.to_dict("records"):
        name = row["model"]
        half = halves[name].get(row["condition"], (np.nan,) * 4)
        in_rms = row["epsilon_relative"] / half[0]
        values = [value * in_rms for value in half[1:]]
        measured = _named("critical", values) | _named("cosine", cosine[name])
        known = {"attack": attacks[row["condition"]].attack, "step": step[name]}
        weights = runs[name].run["fingerprint"].get("weights", "")
        rows.append({**row, **known, **measured, "weights": weights})
    return pd.DataFrame(rows)


def _named(name: str, values: Sequence[float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _halves(samples: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    """For each search, the largest epsilon, and the epsilon that leaves half of the accuracy."""
    table = critical.robustness(samples)
    if table.empty:
        return {}
    mean = table[table["task"] == MEAN]
    columns = mean[["epsilon_max", "median", "median_low", "median_high"]].to_numpy(float)
    return {name: tuple(values) for name, values in zip(mean["condition"], columns, strict=True)}


def _cosine(samples: pd.DataFrame) -> tuple[float, ...]:
    """Mean over tasks of the questions' cosines, and its interval; NaN if there are none."""
    once = samples.drop_duplicates(["task", "doc_id"]).dropna(subset="cosine")
    tasks = [(task["cosine"], np.arange(len(task))) for _, task in once.groupby("task")]
    return tuple(mean_of(tasks)[:3]) if tasks else (np.nan,) * 3


def figure(frame: pd.DataFrame) -> Figure:
    """Clean and attacked accuracy against the step, with 95 % intervals as bands.

    Panels below show the critical epsilon and the cosine, if the runs have them.

    Args:
        frame: the result of `along`.
    """
    from matplotlib.figure import Figure

    below = [name for name in _PANELS if frame[name].notna().any()]
    with print_style():
        drawn = Figure(figsize=(3.5, 2.2 + 1.1 * len(below)))
        ratios = {"height_ratios": [2, *[1] * len(below)]}
        grid = drawn.subplots(1 + len(below), 1, squeeze=False, sharex=True, gridspec_kw=ratios)
        top, *others = grid[:, 0]
        clean = frame.drop_duplicates("model").assign(attack="none")
        _line(top, clean, "clean", "none")
        for condition, rows in frame.groupby("condition", sort=False):
            _line(top, rows, "acc", str(condition))
        top.set(ylim=(0, 1.03), ylabel="accuracy")
        for name, axes in zip(below, others, strict=True):
            if name == "cosine":
                _line(axes, clean, name, "none")
                axes.axhline(0, color="k", lw=0.5)
            else:
                for condition, rows in frame[frame[name].notna()].groupby("condition", sort=False):
                    _line(axes, rows, name, str(condition))
                axes.set_ylim(bottom=0)
            axes.set_ylabel(_PANELS[name])
        grid[-1, 0].set_xlabel("step")
        legend(drawn, handles(top))
    return drawn


def _line(axes: Axes, rows: pd.DataFrame, name: str, condition: str) -> None:
    """A curve with its band."""
    rows = rows.sort_values("step")
    like = look(str(rows["attack"].iloc[0]))
    form: Any = {"color": like.colour, "marker": like.marker, "ls": like.line, "ms": 2, "lw": 1}
    axes.plot(rows["step"], rows[name], label=condition, **form)
    ends = (rows[f"{name}_{end}"].to_numpy(float) for end in ("low", "high"))
    axes.fill_between(rows["step"], *ends, color=like.colour, alpha=0.2, lw=0)


def cells(frame: pd.DataFrame, more: Iterable[str] = ()) -> Cells:
    """The table of `models.cells`, for revisions.

    Args:
        frame: the result of `along`.
        more: further notes, such as the result of `equal`.
    """
    plain = models.cells(frame, more)
    heading = ["condition", "revision", *plain.heading[2:]]
    note = (
        "revisions of one training are not independent models; the intervals of rank correlations"
        " treat them as if they were"
    )
    return Cells(heading, plain.rows, [*plain.notes, note])


def save(frame: pd.DataFrame, folder: Path) -> list[str]:
    """Writes `revisions.csv` and the figure `revisions` into `folder`.

    Returns:
        A line if the figure cannot be drawn.
    """
    write_text(folder / f"{NAME}.csv", tables.csv(frame))
    attempts = Attempts()
    with print_style():
        draw(folder, NAME, lambda: figure(frame), attempts)
    return attempts.lines


def check(folder: Path, revisions: Iterable[str]) -> None:
    """Raises `UsageError` if `folder` holds anything but files of `save` and revisions' runs."""
    ours = {*revisions, *_FILES}
    claim(folder, lambda names: ours >= set(names))
