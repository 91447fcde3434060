"""What the documentation shows, runs."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def one_task(monkeypatch):
    """The example's settings, with fewer questions."""
    import llm_attack
    from llm_attack.suite import commands

    def fewer(*args, **settings):
        return commands.evaluate(*args, **{**settings, "limit": 6, "progress": "quiet"})

    monkeypatch.setitem(vars(llm_attack), "evaluate", fewer)


def test_library(one_task):
    evaluation, attack = blocks("library.md")
    names = {}
    exec(evaluation, names)
    assert set(names["table"].index.get_level_values("condition")) == {
        "none",
        "random@0.005",
        "random@0.01",
        "fgsm@0.005",
        "fgsm@0.01",
    }
    assert len(names["samples"]) == 6 * 5
    assert {"question", "choices"} <= set(names["samples"])
    assert list(names["wide"]) == sorted(names["table"].index.unique("condition"))
    exec(attack, names)
    assert 0 < (names["attacked"] - names["x"]).abs().max() <= 8 / 255 + 1e-6
