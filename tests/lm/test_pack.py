"""Packs hold what was asked: every token, every prediction, every shared prefix."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_attack.lm.pack import pack_rows
from llm_attack.lm.questions import Question, Request, batches

TOKEN = st.integers(0, 3)  # few, so that prefixes are shared by chance


@st.composite
def requests(draw):
    tokens = draw(st.lists(TOKEN, min_size=2, max_size=7))
    return Request(tuple(tokens), draw(st.integers(1, len(tokens) - 1)))


@st.composite
def asked(draw):
    rows = draw(st.lists(st.lists(requests(), min_size=1, max_size=4), min_size=1, max_size=5))
    return [Question(r, [[i] for i in range(len(r))]) for r in rows]


@given(asked())
def test_rows(questions):
    pack = pack_rows(questions, pad=9)
    rows = [r for q in questions for r in q.requests]
    length = pack.input_ids.shape[1]
    for i, r in enumerate(rows):
        n = len(r.tokens) - 1
        assert pack.input_ids[i].tolist() == [*r.tokens[:-1], *[9] * (length - n)]
        assert pack.mask[i].tolist() == [True] * n + [False] * (length - n)
        for entries, wanted in (
            (pack.entries, r.tokens[1:]),
            (pack.entries.of_continuations(), r.tokens[-r.n_continuation :]),
        ):
            mine = entries.request == i
            assert tuple(entries.target[mine].tolist()) == tuple(wanted)
            at = entries.positions[entries.slot[mine]]
            columns = range(n - len(wanted), n)
            assert at.tolist() == [i * length + c for c in columns]


@given(asked())
def test_nodes_are_prefixes(questions):
    """Two tokens are one node just when they stand in one question behind equal prefixes."""
    pack = pack_rows(questions)
    names = {}
    row = 0
    for q, question in enumerate(questions):
        for r in question.requests:
            for c in range(len(r.tokens) - 1):
                names.setdefault((q, r.tokens[: c + 1]), set()).add(int(pack.node[row, c]))
            row += 1
    assert all(len(nodes) == 1 for nodes in names.values())
    assert len({n for nodes in names.values() for n in nodes}) == len(names) == len(pack.first)
    assert torch.equal(pack.node.flatten()[pack.first], torch.arange(len(pack.first)))


@given(asked())
def test_node_keys_depend_on_the_prefix_alone(questions):
    together = pack_rows(questions)
    keys = together.node_keys(3)[together.node]
    row = 0
    for question in questions:
        alone = pack_rows([question])
        n = alone.input_ids.shape
        mine = keys[row : row + n[0], : n[1]]
        assert torch.equal(mine[alone.mask], alone.node_keys(3)[alone.node][alone.mask])
        row += n[0]


@given(asked(), st.integers(1, 9))
def test_batches(questions, rows):
    found = batches(questions, rows)
    assert sorted(id(q) for b in found for q in b) == sorted(map(id, questions))
    sizes = [sum(len(q.requests) for q in b) for b in found]
    assert all(s <= rows or len(b) == 1 for s, b in zip(sizes, found, strict=True))
    longest = [q.longest for b in found for q in b]
    assert longest == sorted(longest, reverse=True)
    again = batches(questions[::-1], rows)
    content = [[q.requests for q in b] for b in found]
    assert [[q.requests for q in b] for b in again] == content
