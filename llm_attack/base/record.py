"""Writes files whole, and collects the versions, hardware and times for a run's record."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llm_attack import __version__
from llm_attack.base.failures import NotWritten, look
from llm_attack.base.redact import redacted

if TYPE_CHECKING:
    import pandas as pd

# The end of the name of a file that is being written.
DRAFT = ".llm-attack"

# A formula begins with one of these in its plain form (NFKC); the last one is a minus sign, U+2212.
# https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = "=+-@\u2212"
# These may end a cell, as a comma does, if a spreadsheet is set so or guesses.
_CELLS = re.compile("([;|\t\n])")
# Some readers take these as ends of lines, and csv does not quote them.
_LINES = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")


class Stopwatch(dict[str, float]):
    """Seconds by the work that took them."""

    def __init__(self, before: Mapping[str, float] = MappingProxyType({})) -> None:
        super().__init__(before)
        self._last = time.perf_counter()

    def lap(self, name: str) -> float:
        """Adds the time since the last lap to `name`, and returns it."""
        now = time.perf_counter()
        since, self._last = now - self._last, now
        self[name] = self.get(name, 0.0) + since
        return since


def draft_of(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f".{path.name}{DRAFT}")


@contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """Yields a draft beside `path`, and moves it to `path` at the end unless the context raises.

    The draft is flushed to the disk before that. So the file is whole even if the process is killed
    or the power fails. If `path` is a link, the link is replaced, and not its target.

    Raises:
        NotWritten: the system refuses to write.
    """
    look()  # a waiting signal stops here, where nothing is half done
    draft = draft_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)  # a process that died left it
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise NotWritten(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, even if the process is killed or the disk is full."""
    with whole_or_not(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, without secrets, whole or not at all.

    NaN and infinity become null, because JSON has no number for them.
    """
    text = json.dumps(
        finite(redacted(content)),
        indent=2,
        default=lambda value: redacted(str(value)),
        allow_nan=False,
    )
    write_text(path, text + "\n")


def finite(value: Any) -> Any:
    """`value` with None in place of every number that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def without_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """Puts an apostrophe before texts that a spreadsheet would compute; for CSV.

    A spreadsheet may split a text at a tab, a semicolon, a bar or a new line, so each part is
    checked. Invisible characters before a formula do not hide it.
    """
    texts = frame.select_dtypes(exclude="number")
    return frame.assign(**{name: list(map(_without_formula, texts[name])) for name in texts})


def as_csv(frame: pd.DataFrame, float_format: str) -> str:
    """A frame as CSV, `without_formulas`. Equal frames give equal text."""
    text = without_formulas(frame).to_csv(
        index=False, float_format=float_format, lineterminator="\n"
    )
    return str(text)


def _without_formula(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = _CELLS.split(_LINES.sub("\n", value))
    text = "".join(f"'{part}" if _is_formula(part) else part for part in parts)
    return f"'{text}" if len(parts) > 1 and not _seen(parts[0]) else text


def _is_formula(part: str) -> bool:
    return unicodedata.normalize("NFKC", _seen(part)[:1]) in {*_FORMULA}


def _seen(part: str) -> str:
    """The part from the first character that is not a blank, a control, a format or a quote."""
    skipped = (i for i, c in enumerate(part) if c != '"' and unicodedata.category(c)[0] not in "ZC")
    return part[next(skipped, len(part)) :]


def versions() -> dict[str, str]:
    """Versions of the software that the numbers depend on."""
    names = ("torch", "transformers", "lm-eval", "accelerate", "datasets", "numpy")
    python = platform.python_version()
    return {"llm-attack": __version__, "python": python, **{n: version(n) for n in names}}


def git_revision() -> str | None:
    """The commit that the package runs from; None if it does not run from its own checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here)]
    try:
        # the commit of another project, in whose checkout this is installed, would say nothing
        for words in (["ls-files", "--error-unmatch", Path(__file__).name], ["rev-parse", "HEAD"]):
            done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=10)
            if done.returncode:
                return None
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def hardware() -> dict[str, Any]:
    """Processor, cores, torch's threads and accelerators of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _processor() -> str:
    """The processor's name if the system says it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
