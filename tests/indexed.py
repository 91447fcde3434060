"""Task managers that know few of lm-eval's thousands of tasks, which take seconds to index."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FAMILIES = (
    "arc glue gsm8k hellaswag lambada openbookqa piqa super_glue truthfulqa wikitext winogrande"
)


def know_few(patch: Any) -> None:
    """Task managers know these families and the project's tasks, which are indexed once.

    Args:
        patch: sets attributes, as pytest's `MonkeyPatch` does.
    """
    try:
        from lm_eval.tasks._index import TaskIndex
    except ImportError:  # of an older lm-eval, which has another
        return
    from llm_attack.harness.tasks import tasks_path

    build, defaults = TaskIndex.build, Path(find_spec("lm_eval.tasks").origin).parent
    once = functools.cache(lambda *paths: build(paths))
    folders = {
        defaults: [defaults / family for family in FAMILIES.split()],
        tasks_path(): [tasks_path()],
    }

    def quick(paths, **options):
        index = {}
        for path in paths:
            known = not options and path in folders
            index |= once(*folders[path]) if known else build([path], **options)
        return index

    patch.setattr(TaskIndex, "build", staticmethod(quick))
