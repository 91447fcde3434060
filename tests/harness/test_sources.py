"""Which questions share a source, from the documents of tasks."""

import pytest

from llm_attack.harness.sources import clusters


def docs(n, **fields):
    return [{"question": f"{i}?", **{k: of(i) for k, of in fields.items()}} for i in range(n)]


@pytest.mark.parametrize("field", ["source_id", "fact1", "subject", "passage", "article", "goal"])
def test_fields(field):
    """Numbers in the order of appearance; the same where the text is."""
    found = clusters(docs(40, **{field: lambda i: f"text {i * 7 % 10}"}))
    assert found[:10] == list(range(10)) and found == found[:10] * 4


def test_twins_have_the_same_options_in_any_order():
    twins = docs(
        24,
        option1=lambda i: f"{'bad' if i % 2 else 'good'} {i // 2}",
        option2=lambda i: f"{'good' if i % 2 else 'bad'} {i // 2}",
    )
    assert clusters(twins) == [i // 2 for i in range(24)]


def test_what_tells_nothing():
    """No such field, not in all, of too few values, empty, of another type."""
    none = [None] * 20
    assert clusters(docs(20)) == none
    assert clusters(docs(20, option1=str)) == none
    assert clusters(docs(20, source_id=lambda i: "ab"[i % 2])) == none
    assert clusters([*docs(19, fact1=str), {"question": ""}]) == none
    assert clusters([*docs(19, fact1=str), {"subject": "x"}]) == none
    assert clusters(docs(20, fact1=lambda i: "")) == none
    assert clusters(docs(20, fact1=lambda i: i)) == none
    assert clusters([object()] * 20) == none and clusters([]) == []
