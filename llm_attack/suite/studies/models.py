"""Many models under the same attacks: is the more accurate one more vulnerable?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.lm.settings import EMBED
from llm_attack.stats import Mean, rank_correlation
from llm_attack.suite.analysis.flags import CHECKS, FAILED, in_words
from llm_attack.suite.analysis.outcomes import with_scores
from llm_attack.suite.analysis.summary import MEAN, summarise
from llm_attack.suite.analysis.worst import with_worst
from llm_attack.suite.report.figures import look
from llm_attack.suite.report.layout import handles, legend, legible, panels, print_style
from llm_attack.suite.report.tables import Cells, score_of
from llm_attack.suite.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUESTION = ["task", "doc_id", "doc_hash"]
# The columns of `summarise` by which models are compared.
_MEASURED = [
    *("acc", "acc_low", "acc_high", "drop", "drop_low", "drop_high", "detectable"),
    *("p_mcnemar", "lost", "gained", "gold_probability_drop", "gold_probability_drop_low"),
    "gold_probability_drop_high",
]
EVEN = 0.02  # relative epsilons that differ by less count as equal
# The looks of these attacks distinguish models in figures.
_LOOKS = ("fgsm", "bim", "random", "pgd", "ost", "illc", "apgd", "mifgsm", "blocks", "gaussian")
FEWEST = 4  # models; with fewer, a rank correlation has no interval


def names(folders: Sequence[Path], runs: Sequence[Result]) -> list[str]:
    """Names of the models; if two have the same name, those of their folders."""
    named = [name_of(result.run) for result in runs]
    return named if len(set(named)) == len(named) else [str(folder) for folder in folders]


def name_of(run: Mapping[str, Any]) -> str:
    """A model's name, with its revision and adapter, because these make it another model.

    Args:
        run: the content of `run.json`.
    """
    name = str(run.get("model_name") or run.get("model"))
    arguments = (run.get("settings") or {}).get("model_args") or {}
    for argument, sign in (("revision", "@"), ("subfolder", "/"), ("peft", "+"), ("delta", "+")):
        value = arguments.get(argument) if isinstance(arguments, Mapping) else None
        short = (
            str(value).rstrip("/").rpartition("/")[2]
            if argument in ("peft", "delta")
            else str(value)
        )
        if value and short not in name:
            name += f"{sign}{short}"
    return name


def across(runs: Mapping[str, Result]) -> pd.DataFrame:
    """A row per condition and model, on the questions that all models were asked.

    Args:
        runs: runs by the names of the models.

    Returns:
        The conditions that all runs have in addition to `none`, in the order of the first run. They
            are the same attack with the same settings (`conditions.Condition`). Columns:

        - `condition`, `model`
        - `n`: number of questions
        - `epsilon_relative`: amplitude in units of the RMS of the model's embeddings (or of the
          activations, at another hookpoint)
        - `clean`, `clean_low`, `clean_high`: accuracy under `none`
        - `acc`, `drop`, ...: columns of `summarise`, for the mean over tasks

    Raises:
        UsageError: the runs share no question, or no condition in addition to `none`.
    """
    names, differing = _shared(runs)
    asked = [result.questions[_QUESTION].astype({"doc_id": str}) for result in runs.values()]
    shared = asked[0]
    for questions in asked[1:]:
        shared = shared.merge(questions)
    if shared.empty:
        raise UsageError("compare: the runs share no question: tasks or prompts differ")
    conditions = [name for name in names if name != "none"]
    if not conditions or "none" not in names:
        why = "".join(f"; {sentence}" for sentence in differing)
        what = "condition beside none" if "none" in names else "condition none"
        raise UsageError(f"compare: the runs share no {what}{why}")
    kept = pd.MultiIndex.from_frame(shared[["task", "doc_id"]])
    tables, scores = {}, {}
    for name, result in runs.items():
        samples = result.samples
        places = samples[["task", "doc_id"]].astype({"doc_id": str})
        some = samples[pd.MultiIndex.from_frame(places).isin(kept)]
        table = result.table
        if len(some) < len(samples) or result.run.get("of_tasks"):
            table = summarise(with_worst(some, result.run), result.run.get("attacks"))
        renamed = {of_runs[name]: known for known, of_runs in names.items()}
        table = table[(table["task"] == MEAN) & table["condition"].isin(renamed)]
        tables[name] = table.set_index(table["condition"].map(renamed))
        if tables[name]["acc"].isna().all():
            raise UsageError(f"compare: the scores of the tasks of {name} have no mean")
        of_tasks = with_scores(some.drop_duplicates("task"))
        scores[name] = dict(zip(of_tasks["task"], of_tasks["score"], strict=True))
        if scores[name] != next(iter(scores.values())):
            raise UsageError(
                f"compare: {name} has other scores of the tasks than {next(iter(scores))}; must be"
                " the same"
            )
    rows = []
    for condition, (name, table) in itertools.product(conditions, tables.items()):
        clean, here = table.loc["none"], table.loc[condition]
        rms = rms_of(runs[name].run["attacks"], here["hookpoint"])
        rows.append(
            {
                **{"condition": condition, "model": name, "n": here["n"]},
                "epsilon_relative": here["epsilon"] / rms,
                **({"score": score_of(here.to_frame().T)} if "score" in table else {}),
                **{f"clean{end}": clean[f"acc{end}"] for end in ("", "_low", "_high")},
                **{key: here[key] for key in _MEASURED},
            }
        )
    frame = pd.DataFrame(rows)
    if any(CHECKS in result.run for result in runs.values()):
        frame[FAILED] = [in_words(runs[model].run) for model in frame["model"]]
    return frame


def _shared(runs: Mapping[str, Result]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The conditions that all runs share, and a sentence for each name with several meanings.

    Returns:
        (name in the first run -> model -> name in its run, the sentences).
    """
    (first, here), *others = ((name, result.conditions) for name, result in runs.items())
    shared, sentences = {}, []
    for name, condition in here.items():
        of_runs = {first: name}
        for model, there in others:
            same = next((other for other, known in there.items() if known == condition), None)
            if same is not None:
                of_runs[model] = same
            elif name in there:
                differing = ", ".join(
                    f"{setting}={x} in {first} and {setting}={y} in {model}"
                    for setting, x, y in condition.differences(there[name])
                )
                sentences.append(f"{name} is not the same in all runs: {differing}")
        if len(of_runs) == len(runs):
            shared[name] = of_runs
    return shared, sentences


def unshared(runs: Mapping[str, Result]) -> list[str]:
    """A sentence for each condition that `across` leaves out because the runs differ in it."""
    return _shared(runs)[1]


def rms_of(attacks: Mapping[str, Any], hookpoint: str) -> float:
    """The root mean square at a hookpoint, as a run recorded it; NaN if it did not."""
    for info in attacks.values():
        if (info.get("hookpoint") or EMBED) == hookpoint:
            return info.get("embedding_rms") or info.get("hookpoint_rms") or np.nan
    return np.nan


def trends(frame: pd.DataFrame) -> pd.DataFrame:
    """The rank correlation of clean accuracy and drop over models, for each condition.

    Args:
        frame: the result of `across`.

    Returns:
        Columns `condition`, `models` (their number), `even` (whether the epsilon relative to the
            RMS is the same for all), and `correlation`, `low`, `high`, `p` from `rank_correlation`.
            These four need at least `FEWEST` models.
    """
    rows = []
    for condition, rows_of in frame.groupby("condition", sort=False):
        relative = rows_of["epsilon_relative"]
        even = relative.notna().all() and np.ptp(relative) <= EVEN * relative.mean()
        correlation = Mean(*4 * (np.nan,))
        if len(rows_of) >= FEWEST:
            correlation = rank_correlation(rows_of["clean"], rows_of["drop"])
        rows.append(
            {
                **{"condition": condition, "models": len(rows_of), "even": bool(even)},
                **dict(zip(("correlation", "low", "high", "p"), correlation, strict=True)),
            }
        )
    return pd.DataFrame(rows)


def cells(frame: pd.DataFrame, more: Iterable[str] = ()) -> Cells:
    """The table: a row per condition and model, and the trend of each condition in the notes.

    Args:
        frame: the result of `across`.
        more: further notes, such as the result of `unshared`.
    """
    rows = [
        [
            *(row["condition"], row["model"], f"{row['n']}", f"{row['epsilon_relative']:.3g}"),
            f"{row['clean']:.3f} ({row['clean_low']:.3f}–{row['clean_high']:.3f})",
            f"{row['acc']:.3f} ({row['acc_low']:.3f}–{row['acc_high']:.3f})",
            f"{row['drop']:.1f} ({row['drop_low']:.1f} to {row['drop_high']:.1f})",
        ]
        for row in frame.to_dict("records")
    ]
    notes = [
        "mean over tasks, on the questions that all models answered; epsilon in RMS of the"
        " embeddings; drop in points; 95 % intervals"
    ]
    if "score" in frame:
        named = ", ".join(frame["score"].unique())
        notes.append(f"score instead of accuracy: {named}; drop: how much worse, in hundredths")
    if FAILED in frame:
        of_models = frame.drop_duplicates("model").set_index("model")[FAILED]
        notes += [f"failed checks of {model}: {text}" for model, text in of_models.items() if text]
    for row in trends(frame).to_dict("records"):
        fair = "" if row["even"] else "; epsilons differ relative to the RMS"
        if np.isnan(row["correlation"]):
            said = (
                f"no rank correlation: too few models ({row['models']}), or all numbers are equal"
            )
        else:
            said = (
                f"rank correlation of clean accuracy and drop {row['correlation']:+.2f}"
                f" ({row['low']:+.2f} to {row['high']:+.2f}), p = {row['p']:.2g}"
            )
        notes.append(f"{row['condition']}: {said}{fair}")
    heading = ["condition", "model", "n", "epsilon", "clean", "attacked", "drop"]
    return Cells(heading, rows, [*notes, *more])


def figure(frame: pd.DataFrame) -> Figure:
    """Drop against clean accuracy, a panel per condition, a point per model, with intervals.

    Args:
        frame: the result of `across`.
    """
    with print_style():
        drawn, grid = panels(list(frame["condition"].unique()))
        of_trend = trends(frame).set_index("condition")
        models = list(frame["model"].unique())
        looks = [look(name) for name in _LOOKS]
        for condition, axes in grid.items():
            rows = frame[frame["condition"] == condition].set_index("model")
            for model, like in zip(models, itertools.cycle(looks), strict=False):
                row = rows.loc[model]
                ends = [[row[key] - row[f"{key}_low"]] for key in ("clean", "drop")]
                tops = [[row[f"{key}_high"] - row[key]] for key in ("clean", "drop")]
                form: Any = {"color": like.colour, "marker": like.marker, "ms": 3, "lw": 0.6}
                axes.errorbar(
                    [row["clean"]],
                    [row["drop"]],
                    xerr=[ends[0], tops[0]],
                    yerr=[ends[1], tops[1]],
                    label=legible(model),
                    ls="",
                    **form,
                )
            axes.axhline(0, color="k", lw=0.5)
            trend = of_trend.loc[condition]
            if np.isfinite(trend["correlation"]):
                text = f"ρ = {trend['correlation']:+.2f}"
                axes.text(0.04, 0.95, text, transform=axes.transAxes, va="top", size=6)
        drawn.supxlabel("accuracy without an attack")
        drawn.supylabel("drop, points")
        entries = handles(next(iter(grid.values())))
        legend(drawn, entries)
    return drawn
