"""Are the pages easy to read? `make prose` measures their sentences and looks for bad habits.

It does the same for the docstrings of the package, and for the texts that the program prints:
errors, warnings, notes and help. `rules.yaml` has the limits, and the constructions that we avoid.

The check sees only form. Read a page aloud as well, because it cannot judge sense.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RULES = yaml.safe_load((HERE / "rules.yaml").read_text("utf-8"))

# A full stop in these does not end a sentence.
_SHORT = re.compile(r"\b(Figs?|Eqs?|e\.g|i\.e|al|vs|cf|No|approx)\.(?=\s)")
_END = re.compile(r"(?<=[.!?])[\"”’)\]]*\s+(?=[^\sa-z])")
_WORD = re.compile(r"\S*\w\S*")
# Years, and the numbers of figures and tables, are names. All other numerals are data.
_NAMES = re.compile(r"\b(Figs?\.|Table|Section|arXiv) \d+(\.\d+)?|\b(19|20)\d\d\b")
_NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,.]*")

# In a docstring: the name of a section, an entry of a section, an item of a list, a span of code.
_SECTION = re.compile(r"[A-Z]\w*:")
_ENTRY = re.compile(r"[\w*`][\w*`.,= ]*?:(?: |$)")
_ITEM = re.compile(r"(- |\d\. )(`[^`]*`(, `[^`]*`)*: )?")
_CODE = re.compile(r"`[^`]*`")

# The texts that a user sees: the argument of these calls, and every `help`.
_SHOWN = {"UsageError": 0, "invalid": 2, "setting": 1, "warning": 0, "not_applicable": 1}


def pages() -> list[Path]:
    """Every page that we write by hand; the changelog lists changes and is not prose."""
    named = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md")
    return [*named, *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """The path of a page in the checkout."""
    return page.relative_to(ROOT).as_posix()


@dataclass
class Measures:
    """What was found on one page."""

    lengths: list[int] = field(default_factory=list)
    paragraph: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Words a sentence."""
        return sum(self.lengths) / max(len(self.lengths), 1)


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; a code span is one word."""
    protected = _SHORT.sub(lambda found: found[0].replace(".", "\0"), text)
    return [part.replace("\0", ".") for part in _END.split(protected) if _WORD.search(part)]


def measure(text: str) -> Measures:
    """The sentences, paragraphs and bad habits of a Markdown text; code and headings are left out.

    Cells of tables count for the longest sentence and for the constructions, and for nothing else.
    """
    found = Measures()
    limits = RULES["limits"]
    for is_cell, paragraph in _paragraphs(text):
        parts = sentences(paragraph)
        lengths = [len(_WORD.findall(part)) for part in parts]
        for part, length in zip(parts, lengths, strict=True):
            if length > limits["sentence"]:
                found.faults.append(f"{length} words in a sentence: {part}")
            found.faults += [f"{fault}: {part}" for fault in _constructions(part)]
        if is_cell:
            continue
        found.lengths += lengths
        found.paragraph = max(found.paragraph, sum(lengths))
        if sum(lengths) > limits["paragraph"]:
            found.faults.append(f"{sum(lengths)} words in a paragraph: {paragraph[:80]} ...")
        for part in parts:
            numbers = len(_NUMBER.findall(_NAMES.sub("", part)))
            if numbers > limits["numbers"]:
                found.faults.append(f"{numbers} numbers in a sentence, make a table: {part}")
    if found.mean > limits["mean"]:
        found.faults.append(f"{found.mean:.1f} words a sentence on the average")
    return found


def messages(source: str) -> list[str]:
    """The texts of a Python source that a user sees; a value in them counts as one word."""
    shown = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call):
            at = _SHOWN.get(getattr(call.func, "attr", getattr(call.func, "id", "")))
            given = [] if at is None else call.args[at : at + 1]
            given += [keyword.value for keyword in call.keywords if keyword.arg == "help"]
            shown += [text for text in map(_written, given) if text]
    return shown


def _written(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_written(part) or "`value`" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def docstrings(source: str) -> list[str]:
    """The docstrings of a Python source, those of attributes included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else ():
            value = part.value if isinstance(part, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.append(inspect.cleandoc(value.value))
    return found


def entries(docstring: str) -> list[str]:
    """The paragraphs of a docstring, and the items of its lists and sections without their names.

    Tables and indented code are left out. A span of code is one word.
    """
    parts, section, new, code = [""], False, True, False
    for line in docstring.splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text and not indent:
            section = _SECTION.fullmatch(text) is not None
        code = bool(indent) and not section and (new or code)
        name = _ITEM.match(text) or (section and indent == 4 and _ENTRY.match(text))
        new = not text or (section and not indent)
        if new or name:
            parts.append("")
        if not (new or code or text.startswith("|")):
            parts[-1] += f" {text[name.end() :] if name else text}"
    return [_CODE.sub("`code`", part.strip()) for part in parts if part]


def faults_of(source: str) -> list[str]:
    """The long sentences and bad habits in the texts and docstrings of a Python source."""
    found = []
    for text in messages(source):
        for part in sentences(text):
            found += [*_too_long(part), *(f"{fault}: {part}" for fault in _constructions(part))]
    for text in (entry for docstring in docstrings(source) for entry in entries(docstring)):
        for part in sentences(text):
            against = [*_constructions(part), *_constructions(part, "docstrings")]
            found += [*_too_long(part), *(f"{fault}: {part}" for fault in against)]
    return found


def _too_long(sentence: str) -> list[str]:
    length = len(_WORD.findall(sentence))
    return [f"{length} words in a sentence: {sentence}"] * (length > RULES["limits"]["sentence"])


def _paragraphs(text: str) -> list[tuple[bool, str]]:
    """(is it a cell of a table, its text) of all paragraphs, items of lists and cells."""
    parts, around = [], ""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "inline" and around != "heading_open":
            words = []
            for child in token.children or ():
                if child.type == "code_inline":
                    words.append("`code`")
                elif child.type in ("softbreak", "hardbreak"):
                    words.append(" ")
                elif child.type == "text":
                    words.append(child.content)
            parts.append((around in ("td_open", "th_open"), "".join(words)))
        around = token.type
    return parts


def _constructions(sentence: str, rules: str = "avoid") -> list[str]:
    """The rules of `rules.yaml` that a sentence breaks."""
    against = []
    for rule in RULES[rules]:
        if re.search(rule["pattern"], sentence, 0 if rule.get("case") else re.IGNORECASE):
            against.append(f"avoid {rule['name']} ({rule['instead']})")
    return against


def main(names: list[str]) -> int:
    """Prints a row and the faults of each page; returns 1 if there are faults."""
    chosen = [ROOT / name for name in names] or pages()
    failed = False
    print(f"{'page':32} sentences  mean  longest  paragraph  faults")
    for page in chosen:
        of = measure(page.read_text("utf-8"))
        longest = max(of.lengths, default=0)
        print(
            f"{name_of(page):32} {len(of.lengths):9} {of.mean:5.1f} {longest:8}"
            f" {of.paragraph:10} {len(of.faults):7}"
        )
        for fault in of.faults:
            print(f"    {fault}")
            failed = True
    for source in () if names else sorted((ROOT / "llm_attack").rglob("*.py")):
        for fault in faults_of(source.read_text("utf-8")):
            print(f"{source.relative_to(ROOT).as_posix()}: {fault}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
