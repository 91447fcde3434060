"""A finished run and its folder: the frames, the record, and functions that read them.

The module needs neither torch nor lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from llm_attack.suite.analysis import perturbations, tokens
from llm_attack.suite.analysis.calibration import calibration, judged
from llm_attack.suite.analysis.certified import SMOOTHING
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

# The subfolder of a run's folder for lm-eval's own results.
LM_EVAL = "lm_eval"
FRAMES = ("questions", "samples")
TRACE = "trace"  # the frame that only runs with `trace` have
CERTIFICATES = "certificates"  # a frame of runs that certified questions
TOKENS = "tokens"  # a frame of runs with attacks that choose tokens
# Zstandard compresses repetitions better than Parquet's dictionaries: half of Snappy's bytes.
_SMALL = {"compression": "zstd", "compression_level": 9, "use_dictionary": False}

# The parts of run.json that other code relies on. Older records lack those of `_PARTS_SINCE`.
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
        lm_eval: lm-eval's own results for each condition; empty if the run was read from a folder.
        judged: the result of `worst`, if it is known already.
        traced: the result of `trace`, if it is known already.
        folder: the folder of the run; None if it is not stored.
        certificates: a row per question and sigma (`analysis.certified`); None if the run certified
            nothing.
        changed: a row per question and attack that chooses tokens (`run.tokens.frame`); None if the
            run has no such attack.
    """

    table: pd.DataFrame
    samples: pd.DataFrame
    questions: pd.DataFrame
    run: dict[str, Any]
    lm_eval: dict[str, dict[str, Any]]
    judged: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    traced: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    folder: Path | None = field(default=None, repr=False, compare=False)
    certificates: pd.DataFrame | None = None
    changed: pd.DataFrame | None = None

    def worst(self) -> pd.DataFrame:
        """The samples with the worst case over the attacks of each amplitude added."""
        return with_worst(self.samples, self.run) if self.judged is None else self.judged

    def calibration(self) -> pd.DataFrame:
        """Confidence and accuracy by task and condition; see `analysis.calibration`."""
        return calibration(judged(self.samples))

    def figure(self, name: str, *, paper: bool = False) -> Figure:
        """Draws a figure of the run, which you can show, change or save.

        Args:
            name: bars, curves, margins or cosines.
            paper: whether to draw for a paper, one column wide and with letters of 8 points.

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
        """The perturbation of each token of a task under a condition, and its effect.

        Args:
            task: name of the task.
            condition: name of the condition, such as `fgsm@0.01`.

        Raises:
            UsageError: the run has no folder, or did not save perturbations.
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
        except Exception as error:  # see `_read`
            raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error

    @property
    def conditions(self) -> dict[str, Condition]:
        """Every condition by its name, worst cases included."""
        return conditions_of(self.samples, self.run)


def save_frames(folder: Path, **frames: pd.DataFrame) -> None:
    """Writes each frame as `name`.parquet, whole or not at all. Equal frames give equal files."""
    for name, frame in frames.items():
        path = folder / f"{name}.parquet"
        # no path is passed: Arrow takes only paths in UTF-8, and pandas 2 looks up a file's path
        content = frame.to_parquet(None, index=False, write_page_checksum=True, **_SMALL)
        with whole_or_not(path) as draft:
            draft.write_bytes(content)


def _whole_or_missing(column: Any) -> bool:
    return is_integer_dtype(column) or bool(column.isna().all())


# The columns of a stored frame, and a test of whether the type of each is right.
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
# More columns, in runs with tasks that generate or score whole texts.
_COLUMNS_OF_TEXTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "questions": {"target": lambda _: True, "n_bytes": _whole_or_missing},
    "samples": {
        "request": is_string_dtype,
        **dict.fromkeys(("text", "parts_none", "parts_token"), lambda _: True),
        **dict.fromkeys(("parts_at", "parts_from"), _whole_or_missing),
    },
}
# Default values of columns that older runs lack.
_COLUMNS_SINCE: dict[str, dict[str, Any]] = {
    "questions": {"cluster": None},
    "samples": {
        **{"critical_epsilon": np.nan, "first_order": np.nan, "hookpoint": EMBED},
        "cluster": None,
    },
}
_OF_CERTIFICATES = (
    *("task", "doc_id", "cluster", "smoothing", "sigma", "n_choices", "gold", "selection_votes"),
    *("votes", "vote", "hits", "p_lower", "radius", "abstained", "right"),
)
_UNIQUE = {"questions": ["task", "doc_id"], "samples": ["task", "doc_id", "condition"]}


def load_frames(folder: Path) -> dict[str, pd.DataFrame]:
    """The frames of a finished run.

    Raises:
        UsageError: `folder` has no finished run, or a file cannot be read or is not of a run.
    """
    folder = as_path("folder", folder)
    frames = {}
    for name in FRAMES:
        path = folder / f"{name}.parquet"
        frames[name] = _read(folder, name)
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


def _read(folder: Path, name: str) -> pd.DataFrame:
    path = folder / f"{name}.parquet"
    try:
        with path.open("rb") as file:
            return pd.read_parquet(file, page_checksum_verification=True)
    except FileNotFoundError:
        raise UsageError(
            f"{folder}: has no {path.name}; must be the folder of a finished run"
        ) from None
    except Exception as error:  # what a damaged file raises depends on the damage
        raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error


def _fault(frame: pd.DataFrame, name: str) -> str | None:
    """The first fault of a stored frame; None if it is whole."""
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
    # any other column is one of these under a damaged name
    known = {*schema, BROKEN_BY}
    return next((f"has a column {column}" for column in frame if column not in known), None)


def _lengths(column: pd.Series) -> list[int] | None:
    """The lengths of the lists in a column; None if it holds something else."""
    try:
        return list(map(len, column))
    except TypeError:
        return None


def load(folder: Path, equivalence: float | None = None) -> Result:
    """Reads a finished run.

    Args:
        folder: the folder of the run.
        equivalence: the equivalence margin (`with_equivalence`); None: the run's own.

    Raises:
        UsageError: `folder` has no finished run, or a file cannot be read.
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
        raise UsageError(f"{path}: the entry {CHECKS} is damaged; must be as a run wrote it")
    run = {**run, "model_name": run.get("model_name") or run["model"]}
    frames = load_frames(folder)
    run = {"conditions": frames["samples"].attrs.pop(CONDITIONS, {}), **run}
    samples = with_worst(frames["samples"], run)
    table = summarise(samples, run.get("attacks"), run.get("of_tasks"))
    within = run.get("equivalence") if equivalence is None else equivalence
    table = flagged(with_equivalence(table, within), {"": run})
    run = run | {"equivalence": within}
    content = table, frames["samples"], frames["questions"], run
    of_questions = _certificates(Path(folder), run, frames["questions"])
    of_tokens = _tokens(Path(folder), frames["samples"], frames["questions"])
    more: Any = {"certificates": of_questions, "changed": of_tokens}
    return Result(*content, {}, samples, folder=Path(folder), **more)


def _certificates(
    folder: Path, run: dict[str, Any], questions: pd.DataFrame
) -> pd.DataFrame | None:
    """The certificates of a finished run; None if it certified nothing.

    Raises:
        UsageError: the file is missing, cannot be read or is not of this run.
    """
    if SMOOTHING not in run:
        return None
    return _of_run(folder, CERTIFICATES, _OF_CERTIFICATES, questions)


def _tokens(folder: Path, samples: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame | None:
    """The changed tokens of a finished run; None if none of its attacks chooses tokens.

    Raises:
        UsageError: the file is missing, cannot be read or is not of this run.
    """
    if not tokens.chooses(samples):
        return None
    return _of_run(folder, TOKENS, tokens.COLUMNS, questions)


def _of_run(
    folder: Path, name: str, columns: Sequence[str], questions: pd.DataFrame
) -> pd.DataFrame:
    """A frame about questions of a finished run."""
    frame = _read(folder, name)
    missing = [column for column in columns if column not in frame]
    if missing:
        raise _foreign(folder, name, f"has no column {missing[0]}")
    pairs = frame[_UNIQUE["questions"]].drop_duplicates()
    if frame.empty or len(pairs.merge(questions[_UNIQUE["questions"]])) < len(pairs):
        raise _foreign(folder, name, "has other questions than questions.parquet")
    return frame


def _foreign(folder: Path, name: str, fault: str) -> UsageError:
    path = folder / f"{name}.parquet"
    return UsageError(f"{path}: {fault}; must be the folder of a finished run")


def lm_eval_of(result: Result) -> dict[str, dict[str, Any]]:
    """lm-eval's own results by condition. From a folder they are without samples."""
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
    """Renames the files of a run that cannot be read whole, and returns the new paths."""
    renamed = []
    for path in [
        folder / "run.json",
        *(folder / f"{name}.parquet" for name in (*FRAMES, CERTIFICATES, TOKENS)),
    ]:
        if path.exists():
            renamed.append(path.replace(path.with_name(f"{path.name}.unreadable")))
    return renamed
