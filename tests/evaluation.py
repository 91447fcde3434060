"""`llm_attack.evaluate` with the settings of its plan as they are typed."""

from llm_attack import Plan, evaluate


def evaluated(model, tasks, *, output=None, progress="bar", **settings):
    return evaluate(Plan(model, tasks, **settings), output=output, progress=progress)
