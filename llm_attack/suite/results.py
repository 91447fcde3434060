"""What a finished run is, and its folder: the frames, the record, and reading them.

Needs neither torch nor lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import is_integer_dtype, is_numeric_dtype, is_string_dtype

from llm_attack.base.errors import UsageError, as_path, invalid
from llm_attack.base.failures import one_line
from llm_attack.base.record import whole_or_not
from llm_attack.base.redact import redacted
from llm_attack.lm.settings import EMBED
from llm_attack.suite.analysis import perturbations
from llm_attack.suite.analysis.calibration import calibration
from llm_attack.suite.analysis.conditions import CONDITIONS, Condition
from llm_attack.suite.analysis.equivalence import with_equivalence
from llm_attack.suite.analysis.flags import CHECKS, flagged
from llm_attack.suite.analysis.outcomes import BROKEN_BY, with_scores
from llm_attack.suite.analysis.perturbations import Perturbations
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.analysis.worst import conditions as conditions_of
from llm_attack.suite.analysis.worst import with_worst
from llm_attack.suite.report import figures
from llm_attack.suite.report.layout import paper_style, print_style, unit_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The subfolder of lm-eval's own results in that of a run.
LM_EVAL = "lm_eval"
FRAMES = ("questions", "samples")
TRACE = "trace"  # the name of the frame that only runs with `trace` have
# Zstandard finds what repeats better than Parquet's dictionaries do: half of Snappy's bytes.
_SMALL = {"compression": "zstd", "compression_level": 9, "use_dictionary": False}

# Parts of run.json that the rest relies on, and those that earlier records have not.
_PARTS_SINCE: dict[str, type] = {
    "model_name": str,
    "warnings": list,
    "equivalence": float,
    "of_tasks": dict,
    CHECKS: list,
}
_RECORD: dict[str, type] = {
    "command": str,
    **dict.fromkeys(("settings", "attacks", "fingerprint"), dict),
    "model": str,
    **_PARTS_SINCE,
}


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        table: accuracies and tests, a row per task and condition; see `summary.summarise`.
        samples: a row per question and condition; see docs/files.md.
        questions: a row per question; see docs/files.md.
        run: the content of run.json: settings, versions, hardware, timings, and for each condition
            its resolved settings with its diagnostics (`attacks`).
        lm_eval: for each condition, lm-eval's own results; empty if the run was read from a folder.
        judged: the result of `worst`, if it is known already.
        traced: the result of `trace`, if it is known already.
        folder: where it is stored; None: nowhere.
    """

    table: pd.DataFrame
    samples: pd.DataFrame
    questions: pd.DataFrame
    run: dict[str, Any]
    lm_eval: dict[str, dict[str, Any]]
    judged: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    traced: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    folder: Path | None = field(default=None, repr=False, compare=False)

    def worst(self) -> pd.DataFrame:
        """The samples, with the worst case over the attacks of each amplitude added."""
        return with_worst(self.samples, self.run) if self.judged is None else self.judged

    def calibration(self) -> pd.DataFrame:
        """Confidence and accuracy by task and condition; see `analysis.calibration`."""
        return calibration(self.samples)

    def figure(self, name: str, *, paper: bool = False) -> Figure:
        """Draws a figure of the run, which you can show, change or save.

        Args:
            name: bars, curves, margins or cosines.
            paper: whether it has the width of a column, and letters of 8 points.

        Raises:
            UsageError: there is no such figure, or the run has no data for it.
        """
        if name not in figures.FIGURES:
            raise invalid("figure", name, figures.FIGURES)
        first = self.table["hookpoint"].iloc[0]
        table = self.table[self.table["hookpoint"] == first]
        samples = self.worst()
        samples = samples[samples["hookpoint"] == first]
        with paper_style() if paper else print_style():
            drawn = figures.FIGURES[name](samples, table, unit_of(self.run))
        if drawn is None:
            raise UsageError(f"figure={name}: the run has no data for it")
        return drawn

    def perturbations(self, task: str, condition: str) -> Perturbations:
        """What was added to each token of a task under a condition, and what it did.

        Args:
            task: its name.
            condition: its name, such as `fgsm@0.01`.

        Raises:
            UsageError: the run has no folder, or did not save them.
        """
        if self.folder is None:
            raise UsageError(
                "perturbations: the run has no folder; must have one, as with evaluate(output=...)"
            )
        return perturbations.read(self.folder, task, condition)

    @property
    def trace(self) -> pd.DataFrame:
        """Loss and margin at every step: a row for each question, condition and step.

        docs/files.md has its columns.

        Raises:
            UsageError: the run did not keep them, or the file cannot be read.
        """
        if self.traced is not None:
            return self.traced
        if not (self.run.get("settings") or {}).get("trace") or self.folder is None:
            raise UsageError("trace: the run did not keep it; must be one with trace=True")
        path = self.folder / f"{TRACE}.parquet"
        try:
            return pd.read_parquet(path)
        except (OSError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error

    @property
    def conditions(self) -> dict[str, Condition]:
        """Every condition by its name, worst cases included."""
        return conditions_of(self.samples, self.run)


def save_frames(folder: Path, **frames: pd.DataFrame) -> None:
    """Writes each frame as `name`.parquet, whole or not at all; equal frames give equal files."""
    for name, frame in frames.items():
        path = folder / f"{name}.parquet"
        # not by its name: Arrow takes only names in UTF-8, and pandas 2 looks up that of a file
        content = frame.to_parquet(None, index=False, write_page_checksum=True, **_SMALL)
        with whole_or_not(path) as draft:
            draft.write_bytes(content)


def _whole_or_missing(column: Any) -> bool:
    return is_integer_dtype(column) or bool(column.isna().all())


# What of a stored frame the rest relies on: column -> whether it holds numbers, lists or text.
_SCHEMA: dict[str, dict[str, Callable[[Any], bool]]] = {
    "questions": {
        **dict.fromkeys(("task", "doc_hash", "question"), is_string_dtype),
        "n_choices": is_integer_dtype,
        **dict.fromkeys(("doc_id", "gold", "choices", "lengths"), lambda _: True),
        "cluster": _whole_or_missing,
    },
    "samples": {
        **dict.fromkeys(("task", "condition", "attack", "hookpoint"), is_string_dtype),
        **dict.fromkeys(("epsilon", "n_choices", "prediction", "acc"), is_numeric_dtype),
        **dict.fromkeys(("doc_id", "gold", "log_likelihoods", "cosine"), lambda _: True),
        **dict.fromkeys(("prediction_norm", "acc_norm"), lambda _: True),
        **dict.fromkeys(("critical_epsilon", "first_order"), lambda _: True),
        "cluster": _whole_or_missing,
        **dict.fromkeys(("score", "kind", "better"), is_string_dtype),
    },
}
# What only runs with tasks that generate or score whole texts have.
_COLUMNS_OF_TEXTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "questions": {"target": lambda _: True, "n_bytes": _whole_or_missing},
    "samples": {
        "request": is_string_dtype,
        **dict.fromkeys(("text", "parts_none", "parts_token"), lambda _: True),
        **dict.fromkeys(("parts_at", "parts_from"), _whole_or_missing),
    },
}
# What earlier runs have not.
_COLUMNS_SINCE: dict[str, dict[str, Any]] = {
    "questions": {"cluster": None},
    "samples": {
        **{"critical_epsilon": np.nan, "first_order": np.nan, "hookpoint": EMBED},
        "cluster": None,
    },
}
_UNIQUE = {"questions": ["task", "doc_id"], "samples": ["task", "doc_id", "condition"]}


def load_frames(folder: Path) -> dict[str, pd.DataFrame]:
    """The frames of a finished run.

    Raises:
        UsageError: there is none in `folder`, or a file of it cannot be read or is not of a run.
    """
    folder = as_path("folder", folder)
    frames = {}
    for name in FRAMES:
        path = folder / f"{name}.parquet"
        try:
            with path.open("rb") as file:
                frames[name] = pd.read_parquet(file, page_checksum_verification=True)
        except FileNotFoundError:
            raise UsageError(
                f"{folder}: has no {path.name}; must be the folder of a finished run"
            ) from None
        except (OSError, TypeError, ValueError) as error:  # TypeError: of a damaged dtype
            raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error
        if name == "samples" and {"task", "acc"} <= {*frames[name]}:
            frames[name] = with_scores(frames[name])
        frames[name] = frames[name].assign(
            **{
                column: default
                for column, default in _COLUMNS_SINCE[name].items()
                if column not in frames[name]
            }
        )
        fault = _fault(frames[name], name)
        if fault:
            raise UsageError(f"{path}: {fault}; must be the folder of a finished run")
    pairs = frames["samples"][_UNIQUE["questions"]].drop_duplicates()
    if len(pairs.merge(frames["questions"][_UNIQUE["questions"]])) < len(pairs):
        raise UsageError(f"{folder}: samples.parquet has questions that questions.parquet lacks")
    return frames


def _fault(frame: pd.DataFrame, name: str) -> str | None:
    """What a stored frame lacks, if anything."""
    if frame.empty:
        return "has no rows"
    of_texts = _COLUMNS_OF_TEXTS[name]
    if next(iter(of_texts)) not in frame:
        of_texts = {}
    of_columns = _fault_of_columns(frame, _SCHEMA[name] | of_texts)
    if of_columns is not None:
        return of_columns
    if frame.duplicated(_UNIQUE[name]).any():
        return f"{', '.join(_UNIQUE[name])} are the same in two rows"
    if name == "samples":
        with_choices = frame[frame["n_choices"] > 0] if "request" in frame else frame
        if not (
            _lengths(with_choices["log_likelihoods"]) == with_choices["n_choices"].tolist()
            and with_choices["prediction"].between(0, with_choices["n_choices"] - 1).all()
        ):
            return "does not have one answer for each choice"
    return None


def _fault_of_columns(frame: pd.DataFrame, schema: dict[str, Callable[[Any], bool]]) -> str | None:
    for column, allows in schema.items():
        if column not in frame:
            return f"has no column {column}"
        if not allows(frame[column]):
            return f"its column {column} holds {frame[column].dtype}"
    # one of the others under a damaged name
    known = {*schema, BROKEN_BY}
    return next((f"has a column {column}" for column in frame if column not in known), None)


def _lengths(column: pd.Series) -> list[int] | None:
    """Of the lists in a column; None where it holds something else."""
    try:
        return list(map(len, column))
    except TypeError:
        return None


def load(folder: Path, equivalence: float | None = None) -> Result:
    """A finished run.

    Args:
        folder: of the run.
        equivalence: of `with_equivalence`, in place of what the run was told with.

    Raises:
        UsageError: there is none in `folder`, or a file of it cannot be read.
    """
    path = as_path("folder", folder) / "run.json"
    try:
        run = redacted(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(
            f"{folder}: has no run.json; must be the folder of a finished run"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read ({one_line(error)}); must be the folder of a finished run"
        ) from error
    for name, kind in _RECORD.items():
        part = run.get(name) if isinstance(run, dict) else None
        if not isinstance(part, kind) and (part is not None or name not in _PARTS_SINCE):
            raise UsageError(
                f"{path}: the entry {name} is {type(part).__name__}, not {kind.__name__}; must be"
                " the folder of a finished run"
            )
    whole = (isinstance(c, dict) and {"name", "passed"} <= {*c} for c in run.get(CHECKS) or ())
    if not all(whole):
        raise UsageError(
            f"{path}: the entry {CHECKS} is damaged; must be the folder of a finished run"
        )
    run = {**run, "model_name": run.get("model_name") or run["model"]}
    frames = load_frames(folder)
    run = {"conditions": frames["samples"].attrs.pop(CONDITIONS, {}), **run}
    samples = with_worst(frames["samples"], run)
    table = summarise(samples, run.get("attacks"), run.get("of_tasks"))
    within = run.get("equivalence") if equivalence is None else equivalence
    table = flagged(with_equivalence(table, within), {"": run})
    run = run | {"equivalence": within}
    own, questions = frames["samples"], frames["questions"]
    return Result(table, own, questions, run, {}, samples, folder=Path(folder))


def lm_eval_of(result: Result) -> dict[str, dict[str, Any]]:
    """lm-eval's own results by condition: as judged, or without samples from a finished folder."""
    if result.lm_eval or result.folder is None:
        return result.lm_eval
    paths = {
        name: result.folder / LM_EVAL / f"results_{name}.json"
        for name in result.samples["condition"].unique()
    }
    return {
        str(name): json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def set_aside(folder: Path) -> list[Path]:
    """Renames the files of a run one of which cannot be read; returns where they are now."""
    renamed = []
    for path in [folder / "run.json", *(folder / f"{name}.parquet" for name in FRAMES)]:
        if path.exists():
            renamed.append(path.replace(path.with_name(f"{path.name}.unreadable")))
    return renamed
