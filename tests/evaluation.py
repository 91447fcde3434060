"""`llm_attack.evaluate` with the settings of its plan in the form that users type."""

import re

from llm_attack import Plan, evaluate


def evaluated(model, tasks, *, output=None, progress="bar", **settings):
    return evaluate(Plan(model, tasks, **settings), output=output, progress=progress)


_PROGRESS = re.compile(
    r"looking up the tasks|loading .*|building the requests|reading the answers|judging"
    r"|[\d,]+ of [\d,]+ requests.*|\{\"event\": \"(stage|progress)\".*"
)


def said(err):
    """The lines on the standard error but for those that say how far a run is."""
    return [line for line in err.splitlines() if not _PROGRESS.fullmatch(line)]
