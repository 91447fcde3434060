"""A run for a paper: figures as PDF, a table in LaTeX with its caption, and BibTeX entries.

Figures have the width of a column, letters of 8 points and whole fonts. The table needs the package
booktabs. Special characters in the names of tasks and models are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from llm_attack.base.errors import invalid
from llm_attack.base.record import whole_or_not
from llm_attack.lm.losses import LOSSES
from llm_attack.lm.settings import EMBED
from llm_attack.lm.units import ABSOLUTE
from llm_attack.stats import ALPHA
from llm_attack.suite.analysis.conditions import Condition, of_run
from llm_attack.suite.analysis.flags import in_words
from llm_attack.suite.analysis.outcomes import BINARY, CHOICE
from llm_attack.suite.analysis.summary import BELOW, INDISTINGUISHABLE, MEAN, TOO_FEW
from llm_attack.suite.analysis.worst import WORST
from llm_attack.suite.report.tables import Cells, score_of
from llm_attack.suite.report.words import ATTACK_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "tex")
INTERVALS = ("below", "beside", "none")
HEAD = "% llm-attack: needs \\usepackage{booktabs}"  # the first line of our LaTeX files
CITATION = "llm_attack.bib"
_ABREAST = 5  # most conditions of the table; if there are more, it has one of each attack

# Characters that LaTeX takes as commands, and dashes and signs that some fonts lack.
_SPECIAL = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"–": "--", "−": "$-$", "→": r"$\rightarrow$", "±": r"$\pm$", "∞": r"$\infty$"},
    **{"†": r"\dag{}", "‡": r"\ddag{}", "§": r"\S{}", "¶": r"\P{}", "≈": r"$\approx$"},
    "°": r"$^\circ$",
    "\xa0": "~",
}

_MARKS = {INDISTINGUISHABLE: r"\dag", BELOW: r"\ddag", TOO_FEW: r"\circ", "": r"\S"}

_BALLS = {
    "linf": r"$\ell_\infty$ ball of radius $\epsilon$ round each embedding",
    "l2": r"$\ell_2$ ball of radius $\epsilon$ round all embeddings of a question",
    "l2_token": r"$\ell_2$ ball of radius $\epsilon$ round the embedding of each token",
}
_UNITS = {
    ABSOLUTE: "in the units of the embeddings",
    "rms": "in units of the root mean square of the embedding matrix (RMS)",
    "token_norm": "in units of the mean norm of a token's embedding",
    "neftune": "in units of NEFTune",
}

BIBTEX = r"""@software{llm_attack,
  author  = {{the llm\_attack authors}},
  title   = {llm\_attack: Adversarial attacks on the embeddings of language models,
             as a plugin of lm-evaluation-harness},
  version = {VERSION},
  license = {MIT},
}

@misc{zhang2022uncertainty,
  author        = {Zhang, Jun-Jie and Zhang, Dong-Xiao and Chen, Jian-Nan and Pang, Long-Gang
                   and Meng, Deyu},
  title         = {On the Uncertainty Principle of Neural Networks},
  year          = {2022},
  eprint        = {2205.01493},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2205.01493},
}
"""


def formats_of(given: str | None) -> tuple[str, ...]:
    """The formats in a comma-separated list.

    Raises:
        UsageError: a name is no format.
    """
    formats = tuple(part.strip() for part in given.split(",")) if given else ()
    for name in formats:
        if name not in FORMATS:
            raise invalid("format", name, FORMATS)
    return formats


def escaped(text: object) -> str:
    """Text for LaTeX, without unprintable characters."""
    plain = " ".join(str(text).split())
    return "".join(
        _SPECIAL.get(character, character if character.isprintable() else "") for character in plain
    )


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the table: all conditions, or each attack's largest epsilon."""
    rows = table.drop_duplicates("condition")
    if len(rows) > _ABREAST:
        last = rows.sort_values("epsilon", kind="stable").drop_duplicates("attack", keep="last")
        rows = rows[rows["condition"].isin(last["condition"])]
    return table[table["condition"].isin(rows["condition"])]


def table_of_run(table: pd.DataFrame, run: Mapping[str, Any], intervals: str = "below") -> str:
    """A run as a table of LaTeX: tasks, mean and drop, a column for each condition.

    Args:
        table: the result of `summarise`.
        run: the content of `run.json`.
        intervals: place of the intervals: `below` the numbers, `beside` them, or `none`.
    """
    few, known = shown(table), of_run(run, table)
    conditions = list(few["condition"].unique())
    heads = [_head(known[name]) for name in conditions]
    lines = [_row(["Task", *(head for head, _ in heads), "Guessing"])]
    lines.append(_row(["", *(amplitude for _, amplitude in heads), ""]))
    lines.append(r"\midrule")
    marks: set[str] = set()
    for task, rows in few.groupby("task", sort=False):
        if task == MEAN and few["task"].nunique() == 2:
            continue  # the mean of one task
        row_of = {row["condition"]: row for row in rows.to_dict("records")}
        counts = "kind" not in rows or rows["kind"].isin([CHOICE, BINARY]).all()
        factor, digits = (100, 1) if counts else (1, 3)
        cells, ends = [], []
        for name in conditions:
            row = row_of[name]
            mark = _marks(row)
            marks |= set(mark)
            value = _number(factor * row["acc"], digits)
            cells.append(value + (f"$^{{{''.join(mark)}}}$" if mark else ""))
            low, high = row["acc_low"], row["acc_high"]
            ends.append(
                "" if pd.isna(low) else f"{factor * low:.{digits}f}--{factor * high:.{digits}f}"
            )
        name = escaped(task if task != MEAN else "Mean")
        name += f" ({escaped(score_of(rows))})" if "score" in rows and task != MEAN else ""
        baseline = _number(factor * rows["baseline"].iloc[0], digits)
        lines += [r"\midrule"] if task == MEAN else []
        lines += _with_ends(name, cells, ends, intervals, [baseline])
    lines += _drops(few, conditions, intervals)
    text = caption(table, run, marks, intervals)
    return _float(conditions, lines, text, run)


def _drops(few: pd.DataFrame, conditions: Sequence[str], intervals: str) -> list[str]:
    mean = few[few["task"] == MEAN].set_index("condition")
    if mean["drop"].isna().all():
        return []
    cells, ends = [], []
    for name in conditions:
        row = mean.loc[name]
        cells.append(_number(row["drop"], 1))
        ends.append(
            ""
            if pd.isna(row["drop_low"])
            else f"{_number(row['drop_low'], 1)} to {_number(row['drop_high'], 1)}"
        )
    return _with_ends("Drop (points)", cells, ends, intervals, [""])


def _with_ends(
    name: str, cells: Sequence[str], ends: Sequence[str], intervals: str, last: Sequence[str]
) -> list[str]:
    """A row with its intervals beside the numbers, or in a second row."""
    if intervals == "beside":
        cells = [f"{a} ({b})" if b else a for a, b in zip(cells, ends, strict=True)]
    lines = [_row([name, *cells, *last])]
    if intervals == "below" and any(ends):
        small = [rf"{{\scriptsize {interval}}}" if interval else "" for interval in ends]
        lines.append(_row(["", *small, *[""] * len(last)]))
    return lines


def table_of_cells(cells: Cells, title: str, intervals: str = "beside") -> str:
    """A comparison of runs as a table of LaTeX. The notes become the caption.

    Args:
        cells: the result of `tables.comparison` or `models.cells`.
        title: start of the caption, and source of the label.
        intervals: place of the intervals in the cells: `beside` the numbers, or `none`.
    """
    rows = cells.rows
    if intervals == "none":
        rows = [[re.sub(r" \([^()]*( to |–)[^()]*\)$", "", text) for text in row] for row in rows]
    lines = [_row(map(escaped, cells.heading)), r"\midrule"]
    lines += [_row(map(escaped, row)) for row in rows]
    said = [escaped(note[:1].upper() + note[1:]) for note in [title, *cells.notes]]
    said.append(r"Made with llm\_attack~\cite{llm_attack}")
    run = {"model_name": title}
    return _float(cells.heading[1:-1], lines, ". ".join(said) + ".", run)


def caption(
    table: pd.DataFrame,
    run: Mapping[str, Any],
    marks: Iterable[str] = (),
    intervals: str = "below",
    title: str | None = None,
) -> str:
    """A caption in LaTeX: model, tasks, n, threat model, amplitudes, and tests.

    Args:
        table: the result of `summarise`.
        run: the content of `run.json`.
        marks: the marks in the table, which the caption explains.
        intervals: see `table_of_run`.
        title: title of a figure, which has no drop; None for the table.
    """
    settings: Mapping[str, Any] = run.get("settings") or {}
    tasks = table[table["task"] != MEAN]
    sizes = tasks.drop_duplicates("task").set_index("task")["n"]
    shots = settings.get("num_fewshot")
    what = "Score" if "score" in table else "Accuracy in percent"
    names = [escaped(task) for task in sizes.index]
    if sizes.nunique() == 1:
        on = f"{_listed(names)}, $n = {sizes.iloc[0]}$ questions{' each' if len(names) > 1 else ''}"
    else:
        on = _listed([f"{task} ($n = {n}$)" for task, n in zip(names, sizes, strict=True)])
    said = [
        f"{what if title is None else escaped(title)} of"
        f" {escaped(run.get('model_name') or run.get('model') or 'the model')} on {on}"
        + (f", {shots} shots" if shots else "")
    ]
    known = of_run(run, table)
    attacks = [attack for name, attack in known.items() if attack.attack not in ("none", WORST)]
    attacks = [attack for attack in attacks if attack.name in set(table["condition"])]
    said += _threat(attacks, settings, "texts" in run) if attacks else []
    if len(shown(table)) < len(table) and title is None:
        said.append("For each attack, the largest amplitude of the run is shown")
    drop = title is None and table["drop"].notna().any()
    if drop:
        said.append("Drop: percentage points lost to the attack, mean over tasks")
    if intervals != "none":
        said.append(
            "Intervals: 95\\,\\%"
            + (", Wilson's for counts" if "score" in table else ", Wilson's")
            + (", paired for the drop" if drop else "")
        )
    meanings = {
        r"\dag": f"{INDISTINGUISHABLE} (exact test)",
        r"\ddag": f"{BELOW} (exact test)",
        r"\circ": TOO_FEW,
        r"\S": "not distinguishable from no attack (exact McNemar test)",
    }
    if unsound := in_words(run):
        said.append(f"Failed checks of model and attack: {escaped(unsound)}")
    of_marks = [f"$^{{{mark}}}$ {text}" for mark, text in meanings.items() if mark in set(marks)]
    if of_marks:
        said.append("; ".join(of_marks) + f"; all at the level {ALPHA:g}, Holm over tasks")
    said.append(r"Made with llm\_attack~\cite{llm_attack}")
    return ". ".join(said) + "."


def _threat(
    attacks: Sequence[Condition], settings: Mapping[str, Any], texts: bool = False
) -> list[str]:
    """Sentences on threat model and amplitudes; `texts` says whether tasks have no choices."""

    def values(name: str) -> list[Any]:
        return list(dict.fromkeys(x.get(name) for x in attacks if x.get(name) is not None))

    balls = [_BALLS.get(str(norm), escaped(norm)) for norm in values("norm") or ["linf"]]
    loss = str(settings.get("loss"))
    gold = LOSSES[loss].gold if loss in LOSSES else None
    knows = {True: ", which knows the answer", False: ", which does not know the answer", None: ""}
    places = [str(place) for place in values("hookpoint") if place != EMBED]
    where = f" at {_listed([escaped(place) for place in places])}" if places else ""
    named = f"\\texttt{{{escaped(loss)}}}{knows[gold]}"
    parts = [f"Threat model: white box{where}, {_listed(balls)}, loss {named}"]
    context = values("context")
    if context:
        each = {"own": "one for each choice", "shared": "one for what the choices share"}
        each["own"] += ", prompt or text" if texts else ""
        parts[0] += f"; perturbations: {_listed([each.get(str(c), escaped(c)) for c in context])}"
    positions = [p for p in values("positions") if p != "all"]
    parts[0] += f"; perturbed positions: {escaped(_listed(positions))}" if positions else ""
    by_unit: dict[str, list[str]] = {}
    for one in attacks:
        size = f"{one.get('epsilon'):g}" if one.get("epsilon") is not None else ""
        sizes = by_unit.setdefault(str(one.get("epsilon_unit") or ABSOLUTE), [])
        sizes += [size] if size and size not in sizes else []
    amplitudes = [
        f"{_listed(sizes)} {_UNITS.get(unit, escaped(unit))}" for unit, sizes in by_unit.items()
    ]
    parts.append(f"Amplitudes $\\epsilon$: {'; '.join(amplitudes)}")
    steps = sorted({int(x.get("steps")) for x in attacks if x.get("steps")})
    parts += [f"Iterative attacks take {_listed([f'{n}' for n in steps])} steps"] if steps else []
    return parts


def figures_of_run(names: Mapping[str, str], table: pd.DataFrame, run: Mapping[str, Any]) -> str:
    """The figures as floats of LaTeX.

    Args:
        names: file names without suffix, and the titles of the figures.
        table: the result of `summarise`.
        run: the content of `run.json`.
    """
    parts = []
    for name, title in names.items():
        text = caption(table, run, intervals="none", title=title)
        parts += [
            r"\begin{figure}[t]",
            r"  \centering",
            rf"  \includegraphics[width=\columnwidth]{{{name}.pdf}}",
            rf"  \caption{{{text}}}",
            rf"  \label{{fig:{_label(run)}-{name}}}",
            r"\end{figure}",
            "",
        ]
    return "\n".join([r"% llm-attack: needs \usepackage{graphicx}", *parts])


def bibtex(run: Mapping[str, Any]) -> str:
    """The entries to cite: the program, in the version of the run, and the paper."""
    from llm_attack import __version__

    version = (run.get("versions") or {}).get("llm-attack", __version__)
    return BIBTEX.replace("VERSION", str(version))


def save_pdf(figure: Figure, path: Path, title: str) -> None:
    """Writes a figure. Call it inside `paper_style`. Equal figures give equal files."""
    dateless: Any = {"CreationDate": None, "Title": title}
    with whole_or_not(path) as draft:
        figure.savefig(draft, format="pdf", metadata=dateless)


def _float(columns: Sequence[str], lines: Sequence[str], text: str, run: Mapping[str, Any]) -> str:
    """A table over both columns of a page. In one-column layouts, `table*` equals `table`."""
    body = [
        HEAD,
        r"\begin{table*}[t]",
        r"  \centering",
        r"  \small",
        r"  \setlength{\tabcolsep}{4pt}",
        rf"  \caption{{{text}}}",
        rf"  \label{{tab:{_label(run)}}}",
        rf"  \begin{{tabular}}{{@{{}}l{'r' * (len(columns) + 1)}@{{}}}}",
        r"    \toprule",
        *(f"    {line}" for line in lines),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(body) + "\n"


def _label(run: Mapping[str, Any]) -> str:
    name = str(run.get("model_name") or run.get("model") or "run")
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "run"


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _head(condition: Condition) -> tuple[str, str]:
    """The two lines above a column: the attack, and its amplitude."""
    if condition.attack == "none":
        return "No attack", ""
    size = str(condition.amplitude or "").replace("rms", " RMS")
    name = ATTACK_NAMES.get(condition.attack, condition.attack.upper())
    name = "Worst case" if condition.attack == WORST else name
    return escaped(name), escaped(size)


def _marks(row: Mapping[Any, Any]) -> list[str]:
    marks = [_MARKS[row["verdict"]]] if row["verdict"] in _MARKS else []
    # null, for `none` and for means without a test, compares false
    return marks + ([_MARKS[""]] if row["p_mcnemar_holm"] > ALPHA else [])


def _number(value: float, digits: int) -> str:
    if pd.isna(value):
        return "--"
    text = f"{value:.{digits}f}"
    return f"$-${text[1:]}" if text.startswith("-") else text


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
