"""Tables of a run and of two runs: for the terminal, in Markdown, and as CSV.

The numbers come from `llm_attack.suite.analysis.summary`. This module turns them into text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llm_attack.attacks.settings import condition_name
from llm_attack.base.record import without_formulas, write_text
from llm_attack.stats import ALPHA
from llm_attack.suite.analysis.outcomes import ACC, CHOICE, LOWER
from llm_attack.suite.analysis.summary import (
    BELOW,
    INDISTINGUISHABLE,
    MEAN,
    OF_TASK,
    SEVERAL,
    TOO_FEW,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

GUESSES, WORSE, UNCHANGED, EQUIVALENT = "†", "‡", "§", "≈"
FEW, WARNED = "°", "¶"
_TEST = f"Holm over tasks, {ALPHA:g}"
_MARKS = {
    GUESSES: f"{INDISTINGUISHABLE} (exact test, {_TEST})",
    WORSE: f"{BELOW} (exact test, {_TEST})",
    FEW: f"{TOO_FEW}: a model half-way from guessing to perfect would be missed as well",
    UNCHANGED: f"not distinguishable from none (McNemar test, {_TEST}; for the mean, stratified)",
    EQUIVALENT: f"equivalent to none within ±{{within:g}} points (two one-sided tests, {_TEST})",
    WARNED: "see the warning of this condition",
}


# Notes for scores that are not accuracy.
OF_SCORES = [
    "score: name of the metric in lm-eval. If its values are not 0 or 1, intervals are those of a"
    " mean, and tests against none are randomization tests of paired differences instead of"
    " McNemar's",
    "drop: how much worse the score is, in hundredths, also if lower is better. Only scores that"
    " judge the preferred choice have a baseline and a test against guessing",
]

# Rows under the mean accuracies: name, column and number format.
_DROP, _GOLD = "mean drop, points", "p(gold) drop"
_MEANS = [
    (_DROP, "drop", ".1f"),
    ("detectable, points", "detectable", ".1f"),
    ("right → wrong", "lost", "d"),
    ("wrong → right", "gained", "d"),
    (_GOLD, "gold_probability_drop", ".1f"),
    ("likelihood, nats", "log_likelihood_change", "+.2f"),
    ("gold margin, nats", "margin_change", "+.2f"),
    ("epsilon", "epsilon", ".4g"),
    ("signal/noise, dB", "snr_db", ".1f"),
]


_LONG = 40  # letters, of a text that is no number with its interval


@dataclass(frozen=True)
class Cells:
    """A table as text: heading and rows, left column first, and notes that explain it."""

    heading: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """The table in Markdown, with one line for each note below it."""
        rule = ["---", *["---:"] * (len(self.heading) - 1)]
        rows = [[_cell(text) for text in row] for row in (self.heading, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"

    def rich(self, title: str = "") -> Table:
        """The table for rich: intervals on their own lines, a rule above the means.

        If there is too little room, names in the first column and long texts are folded.
        """
        from rich.box import HORIZONTALS
        from rich.table import Table
        from rich.text import Text

        form: Any = {"title_justify": "left", "caption_justify": "left", "padding": (0, 1, 0, 0)}
        caption = Text("\n".join(self.notes))
        table = Table(title=title and Text(title), caption=caption, box=HORIZONTALS, **form)
        table.add_column(self.heading[0], overflow="fold")
        for heading, *cells in zip(self.heading[1:], *(row[1:] for row in self.rows), strict=True):
            long = max(map(len, cells), default=0) > _LONG
            broken = Text(re.sub(" |(?=@)", "\n", heading))
            table.add_column(broken, justify="left" if long else "right", no_wrap=not long)
        for before, row in zip([self.heading, *self.rows], self.rows, strict=False):
            if row[0] == MEAN and before[0] != MEAN:
                table.add_section()
            table.add_row(*(Text(cell.replace(" (", "\n").rstrip(")")) for cell in row))
        return table


def accuracies(
    table: pd.DataFrame,
    metric: str = "acc",
    conditions: Sequence[str] | None = None,
    intervals: bool = True,
    warnings: Sequence[str] = (),
) -> Cells:
    """A row per task, their mean and its drop; a column per condition; the baseline.

    Args:
        table: the result of `summarise`.
        metric: `acc` or `acc_norm`. Tests, marks and drop always refer to `acc`.
        conditions: the conditions to show; default: all.
        intervals: whether to show intervals.
        warnings: further sentences for the reader.
    """
    conditions = table["condition"].unique() if conditions is None else conditions
    rows, marks = [], set()
    scored = metric == "acc" and "score" in table
    for task, group in table.groupby("task", sort=False):
        of_condition = {row["condition"]: row for row in group.to_dict("records")}
        cells = [str(task), *([score_of(group)] if scored else []), f"{group['n'].iloc[0]}"]
        for row in (of_condition[condition] for condition in conditions):
            mark = _marks(row) if metric == "acc" else ""
            mark += WARNED if row["condition"] in warned(warnings) else ""
            marks |= set(mark)
            accuracy = _number(row[metric], ".3f") + mark
            cells.append(accuracy + (_interval(row, metric, "{:.3f}–{:.3f}") if intervals else ""))
        rows.append([*cells, _number(group["baseline"].iloc[0], ".3f")])
    some = table[table["condition"].isin(conditions)]
    under = means(some, intervals) if metric == "acc" else {}
    empty = [""] * (2 if scored else 1)
    rows += [[name, *empty, *(values[c] for c in conditions), ""] for name, values in under.items()]
    name = "mean of each task's score" if scored else metric
    shown = f"{name} (95 % interval)" if intervals else name
    notes = [f"{shown}; n: questions; baseline: accuracy of random guesses"]
    if scored:
        notes += OF_SCORES
    if "gold margin, nats" in under:
        notes.append("detectable: the smallest drop that this many questions show with power 0.8")
        notes.append(
            "p(gold): share of the right choices in the likelihood of all choices, in points"
        )
        change = (
            "change against none of the log-likelihood, and of the margin of the right choice"
            " over the best wrong one"
        )
        notes.append(f"nats: {change}; means over questions")
    within = table["within"].iloc[0] if "within" in table else np.nan
    notes += [
        f"{mark} {meaning.format(within=within)}"
        for mark, meaning in _MARKS.items()
        if mark in marks
    ]
    notes += [f"warning: {sentence}" for sentence in warnings]
    heading = ["task", *(["score"] if scored else []), "n", *conditions, "baseline"]
    return Cells(heading, rows, notes)


def score_of(rows: pd.DataFrame) -> str:
    """The score of a task's rows, in words."""
    score, kind, better = (rows[key].iloc[0] for key in ("score", "kind", "better"))
    if pd.isna(kind) or score == SEVERAL:
        return str(score)
    said = [str(kind)] * (kind != CHOICE) + ["lower is better"] * (better == LOWER)
    return f"{score} ({', '.join(said)})" if said else str(score)


def named_by_score(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the score to the name of each task that has another score than acc."""
    if "score" not in table:
        return table
    plain = (table["score"] == ACC) & (table["kind"] == CHOICE)
    named = [f"{task} {score_of(table.loc[[i]])}" for i, task in table["task"].items()]
    return table.assign(task=table["task"].where(plain, named))


def of_whole_tasks(table: pd.DataFrame) -> Cells | None:
    """lm-eval's scores that only a whole task has; None if there are none.

    Args:
        table: the result of `summarise`.
    """
    conditions, rows = list(table["condition"].unique()), []
    for column in (name for name in table if name.startswith(OF_TASK)):
        for task, group in table[table[column].notna()].groupby("task", sort=False):
            values = group.set_index("condition")[column].reindex(conditions)
            name = column.removeprefix(OF_TASK)
            rows.append([str(task), name, *(_number(value, ".3f") for value in values)])
    if not rows:
        return None
    notes = [
        "lm-eval computes these scores from all questions of a task at once. A single question"
        " has no value, so there is no interval and no test. If a task has no other score, the"
        " table of scores shows acc for it, which is 1 if the likeliest choice is right"
    ]
    return Cells(["task", "score", *conditions], rows, notes)


def warned(warnings: Sequence[str]) -> set[str]:
    """The texts before the colon of warnings; for some warnings, that is a condition."""
    return {sentence.partition(": ")[0] for sentence in warnings}


def means(table: pd.DataFrame, intervals: bool = True) -> dict[str, dict[str, str]]:
    """Rows under the accuracies: name -> condition -> text. Rows without values are left out.

    Args:
        table: the result of `summarise`.
        intervals: whether drops have intervals.
    """
    mean = table[table["task"] == MEAN].set_index("condition")
    shown = {
        name: {condition: _number(x, form) for condition, x in mean[column].items()}
        for name, column, form in _MEANS
    }
    for condition, row in zip(mean.index, mean.to_dict("records"), strict=True):
        for name, column in ((_DROP, "drop"), (_GOLD, "gold_probability_drop")):
            ends = _interval(row, column, "{:.1f} to {:.1f}") if intervals else ""
            shown[name][condition] += ends
    some = {name: mean[column].notna().any() for name, column, _ in _MEANS}
    attacked = mean[mean["attack"] != "none"]
    in_names = map(condition_name, attacked["attack"], map("{:g}".format, attacked["epsilon"]))
    some["epsilon"] = list(in_names) != list(attacked.index)
    return {name: values for name, values in shown.items() if some[name]}


def changes(table: pd.DataFrame) -> Cells | None:
    """The changes under every attack on every task; None without `none` or an attack.

    Args:
        table: the result of `summarise`.
    """
    rows = [
        [
            *(str(row[key]) for key in ("task", "condition")),
            *(_number(row[key], "d") for key in ("n", "clusters", "lost", "gained")),
            f"{row['drop']:.1f}{_interval(row, 'drop', '{:.1f} to {:.1f}')}",
            _number(row["p_mcnemar_holm"], ".2g"),
            f"{row['gold_probability_drop']:.1f}"
            f"{_interval(row, 'gold_probability_drop', '{:.1f} to {:.1f}')}",
            _number(row["p_gold_probability"], ".2g"),
        ]
        for row in table[table["drop"].notna()].to_dict("records")
    ]
    if not rows:
        return None
    notes = [
        "clusters: number of sources of the questions; intervals and tests allow for them. Drops"
        " are in percentage points, with paired 95 % intervals",
        "p: exact test of the changed answers, by the signs of clusters (McNemar's if no"
        f" questions share a source), {_TEST.partition(',')[0]}",
        "p(gold): share of the right choices in the likelihood of all choices; p of p(gold):"
        " paired t-test",
    ]
    if "score" in table:
        notes += OF_SCORES
    heading = ["task", "condition", "n", "clusters", "right → wrong", "wrong → right", "drop", "p"]
    return Cells([*heading, "p(gold) drop", "p of p(gold)"], rows, notes)


def comparison(frame: pd.DataFrame, names: tuple[str, str], notes: Iterable[str] = ()) -> Cells:
    """Two runs side by side: a row per task and condition.

    Args:
        frame: the result of `paired` or `with_equivalence`.
        names: names of the runs.
        notes: more notes, such as the result of `unshared`.
    """
    rows, also = [], "p_equivalence_holm" in frame
    for row in frame.to_dict("records"):
        difference = _number(row["difference"], "+.1f")
        difference += _interval(row, "difference", "{:+.1f} to {:+.1f}")
        of_runs = [_number(row[key], ".3f") for key in ("acc_a", "acc_b")]
        p_value = _number(row["p_mcnemar_holm"], ".2g")
        counts = [_number(row[key], "d") for key in ("n", "left_out")]
        scored = [score_of(pd.DataFrame([row]))] if "score" in frame else []
        p_values = [p_value, *([_number(row["p_equivalence_holm"], ".2g")] if also else [])]
        place = [row["task"], *scored, row["condition"]]
        rows.append([*place, *counts, *of_runs, difference, *p_values])
    explained = [
        f"a: {names[0]}; b: {names[1]}; difference: b minus a, percentage points (95 % interval)",
        "p: exact McNemar test, Holm over tasks; for the mean, stratified by task",
        "n: questions that both runs asked in the same words; left out: questions that only one"
        " run asked",
    ]
    heading = ["condition", "n", "left out", "a", "b", "difference", "p"]
    heading = ["task", *(["score"] if "score" in frame else []), *heading]
    if "score" in frame:
        explained += OF_SCORES[:1]
    if also:
        heading.append(f"p(±{frame['within'].iloc[0]:g})")
        explained.append(
            f"{heading[-1]}: two one-sided tests; small if a and b are within the limit"
        )
    return Cells(heading, rows, [*explained, *notes])


@dataclass(frozen=True)
class RunTable:
    """A run as rich prints it: its accuracies, with their intervals if there is room.

    If not, it prints as many conditions side by side as fit, and the others below.

    Args:
        table: the result of `summarise`.
        title: title above the table.
        warnings: further sentences for the reader.
    """

    table: pd.DataFrame
    title: str
    warnings: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        full = accuracies(self.table, warnings=self.warnings).rich(self.title)
        if _width(full, console) <= options.max_width:
            yield full
            return
        names = list(self.table["condition"].unique())
        notes = accuracies(self.table, intervals=False, warnings=self.warnings).notes
        for rows in range(1, len(names) + 1):
            parts = [list(part) for part in np.array_split(names, rows)]
            cells = [accuracies(self.table, "acc", part, False, self.warnings) for part in parts]
            cells = [replace(c, notes=notes if c is cells[-1] else []) for c in cells]
            tables = [c.rich("" if i else self.title) for i, c in enumerate(cells)]
            if max(_width(table, console) for table in tables) <= options.max_width:
                break
        yield from tables


def _width(table: Table, console: Console) -> int:
    """The width of `table` with unlimited room."""
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def markdown_of_run(table: pd.DataFrame, warnings: Sequence[str] = ()) -> str:
    """The content of `table.md`: acc, acc_norm if a task has it, and `changes`."""
    text = accuracies(table, warnings=warnings).markdown()
    also = table
    if "score" in table:
        also = table[table["acc_norm"].notna() & (table["score"] != "acc_norm")]
    if also["acc_norm"].notna().any():
        text += "\n" + accuracies(also, "acc_norm").markdown()
    more = [of_whole_tasks(table), changes(table)]
    return "\n".join([text, *(cells.markdown() for cells in more if cells is not None)])


def csv(frame: pd.DataFrame) -> str:
    """A frame of `summarise` or `paired` as CSV; equal frames give equal text."""
    frame = without_formulas(frame)
    for column in frame.select_dtypes("float"):
        form = ".6g" if column.startswith(("p_", "epsilon", "median")) else ".6f"
        frame[column] = [_number(value, form, "") for value in frame[column]]
    return str(frame.to_csv(index=False, lineterminator="\n"))


def save(table: pd.DataFrame, folder: Path, warnings: Sequence[str] = ()) -> None:
    """Writes `table.csv`, and `table.md` for the first hookpoint, into `folder`."""
    write_text(folder / "table.csv", csv(table))
    first = table[table["hookpoint"] == table["hookpoint"].iloc[0]]
    write_text(folder / "table.md", markdown_of_run(first, warnings))


def _cell(text: str) -> str:
    """Escapes text for one cell of Markdown."""
    return " ".join(text.replace("\\", r"\\").replace("|", r"\|").splitlines())


def _marks(row: dict[str, Any]) -> str:
    mark = {INDISTINGUISHABLE: GUESSES, BELOW: WORSE, TOO_FEW: FEW}.get(row["verdict"], "")
    # null, for `none` and for means, compares false
    mark += UNCHANGED if row["p_mcnemar_holm"] > ALPHA else ""
    return mark + (EQUIVALENT if row.get("p_equivalence_holm", np.nan) <= ALPHA else "")


def _interval(row: dict[str, Any], key: str, form: str) -> str:
    ends = row[f"{key}_low"], row[f"{key}_high"]
    return "" if pd.isna(ends[0]) else f" ({form.format(*ends)})"


def _number(value: float, form: str, missing: str = "–") -> str:
    return missing if pd.isna(value) else format(value, form)
