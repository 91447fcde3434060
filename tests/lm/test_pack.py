"""Packs hold every token, every prediction and every shared prefix of their questions."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_attack.attacks import keys_for
from llm_attack.lm.packing.batches import batched, of_rows, of_tree
from llm_attack.lm.packing.pack import pack_rows, pack_trees
from llm_attack.lm.packing.questions import Question, Request
from llm_attack.lm.packing.trie import build

TOKEN = st.integers(0, 3)  # few, so that prefixes are shared by chance
SEQUENCES = st.lists(st.lists(TOKEN, min_size=1, max_size=7), min_size=1, max_size=6)


@st.composite
def requests(draw):
    tokens = draw(st.lists(TOKEN, min_size=2, max_size=7))
    return Request(tuple(tokens), draw(st.integers(1, len(tokens) - 1)))


@st.composite
def asked(draw):
    rows = draw(st.lists(st.lists(requests(), min_size=1, max_size=4), min_size=1, max_size=5))
    return [Question(r, [[i] for i in range(len(r))]) for r in rows]


def prefixes(sequences):
    return {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}


@given(SEQUENCES)
def test_nodes_of_a_trie_are_prefixes(sequences):
    trie = build(sequences)
    names = {}
    for sequence, path in zip(sequences, trie.paths, strict=True):
        assert trie.tokens[path].tolist() == sequence
        assert trie.depth[path].tolist() == list(range(len(sequence)))
        for i, node in enumerate(path.tolist()):
            assert names.setdefault(node, tuple(sequence[: i + 1])) == tuple(sequence[: i + 1])
    assert len(names) == len(set(names.values())) == len(trie) == len(prefixes(sequences))
    for i, name in names.items():
        before = [j for j in range(len(trie)) if j <= i < trie.end[j]]
        assert [names[j] for j in before] == [name[: k + 1] for k in range(len(name))]
    assert trie.keys(3) == [keys_for(3, names[i]) for i in range(len(trie))]


def test_a_trie_of_nothing():
    trie = build([[], []])
    assert len(trie) == 0 and trie.keys(0) == []
    assert {values.dtype for values in (trie.tokens, trie.depth, trie.end, *trie.paths)} == {
        np.dtype(np.int64)
    }


@given(asked(), st.booleans(), st.sampled_from([pack_rows, pack_trees]))
def test_tokens_and_predictions(questions, whole, make):
    pack = make(questions, pad=9, whole=whole)
    rows = [
        (i if make is pack_trees else None, r) for i, q in enumerate(questions) for r in q.requests
    ]
    flat = pack.input_ids.flatten()
    assert torch.equal(pack.input_ids == 9, ~pack.mask)
    for entries, everything in ((pack.watched, whole), (pack.scored, False)):
        assert entries.positions.tolist() == sorted(set(entries.positions.tolist()))
        assert pack.mask.flatten()[entries.positions].all()
        for i, (row, r) in enumerate(rows):
            mine = entries.request == i
            n = len(r.tokens) - 1 if everything else r.n_continuation
            assert tuple(entries.target[mine].tolist()) == r.tokens[len(r.tokens) - n :]
            continued = [k >= n - r.n_continuation for k in range(n)]
            assert entries.continuation[mine].tolist() == continued
            at = entries.positions[entries.slot[mine]]
            assert tuple(flat[at].tolist()) == r.tokens[len(r.tokens) - n - 1 : -1]
            assert set((at // pack.input_ids.shape[1]).tolist()) == {i if row is None else row}
    for name, values in vars(pack.scored).items():
        if name not in ("positions", "slot"):
            assert torch.equal(values, getattr(pack.watched, name)[pack.kept])


@given(asked())
def test_rows(questions):
    pack = pack_rows(questions, pad=9)
    for i, r in enumerate(pack.requests):
        n = len(r.tokens) - 1
        assert pack.input_ids[i, :n].tolist() == list(r.tokens[:-1])
        assert pack.mask[i].sum() == n
    assert pack.inputs.attention(torch.float32) is None


@given(asked())
def test_tree_attends_to_prefixes_and_itself(questions):
    pack = pack_trees(questions, pad=9)
    seen = pack.inputs.attention(torch.float32)[:, 0] == 0
    assert pack.inputs.attention(torch.float64).dtype == torch.float64
    assert ((pack.inputs.attention(torch.float32) < -1e38) == ~seen[:, None]).all()
    for row, question in enumerate(questions):
        trie = question.trie
        length = seen.shape[1]
        expected = torch.eye(length, dtype=torch.bool)
        for path in trie.paths:
            for k, node in enumerate(path):
                expected[node, path[:k]] = True
        assert torch.equal(seen[row], expected)
        assert pack.depth[row, : len(trie)].tolist() == trie.depth.tolist()


@given(asked())
def test_shared_rows_have_a_node_per_prefix(questions):
    pack = pack_rows(questions, shared=True)
    names, row = {}, 0
    for q, question in enumerate(questions):
        for r in question.requests:
            for c in range(len(r.tokens) - 1):
                names.setdefault((q, r.tokens[: c + 1]), set()).add(int(pack.node[row, c]))
            row += 1
    assert all(len(nodes) == 1 for nodes in names.values())
    assert len({n for nodes in names.values() for n in nodes}) == len(names) == len(pack.first)
    assert torch.equal(pack.node.flatten()[pack.first], torch.arange(len(pack.first)))


@given(asked(), st.integers(0, 9))
def test_keys_depend_on_the_request_or_the_prefix_alone(questions, seed):
    alone = pack_rows(questions).keys(seed)
    assert alone.tolist() == [keys_for(seed, r.tokens) for q in questions for r in q.requests]
    rows, trees = pack_rows(questions, shared=True), pack_trees(questions)
    of_rows, of_trees = rows.keys(seed)[rows.node], trees.keys(seed)
    row = 0
    for q, question in enumerate(questions):
        for r, path in zip(question.requests, question.trie.paths, strict=True):
            expected = [keys_for(seed, r.tokens[: c + 1]) for c in range(len(path))]
            assert of_rows[row, : len(path)].tolist() == expected
            assert of_trees[q, path].tolist() == expected
            row += 1


@pytest.mark.parametrize("shape", ["rows", "shared", "trees"])
def test_a_pack_goes_to_a_device_as_a_whole(shape):
    questions = [Question([Request((1, 2, 3), 1), Request((1, 2, 4, 5), 2)], [[0], [1]])]
    pack = (
        pack_trees(questions) if shape == "trees" else pack_rows(questions, shared=shape[0] == "s")
    )
    moved = pack.to(torch.device("meta"))
    assert moved.questions is pack.questions
    for field in fields(pack):
        there, here = getattr(moved, field.name), getattr(pack, field.name)
        if field.name in ("flat", "twins"):
            assert there is None or all(
                value.is_meta for value in vars(there).values() if isinstance(value, torch.Tensor)
            )
        elif field.name in ("scored", "watched"):
            assert all(value.is_meta for value in vars(there).values())
        elif isinstance(here, torch.Tensor):
            assert there.is_meta and there.shape == here.shape
        else:
            assert there == here


@given(asked(), st.integers(1, 9), st.integers(1, 60), st.sampled_from([of_rows, of_tree]))
def test_batched(questions, rows, tokens, shape):
    found = batched([[q] for q in questions], shape, rows, tokens)
    assert sorted(id(q) for b in found for q in b) == sorted(map(id, questions))
    for batch in found:
        height = sum(shape(q).rows for q in batch)
        length = max(shape(q).length for q in batch)
        assert len(batch) == 1 or (height <= rows and height * length <= tokens)
    lengths = [shape(q).length for b in found for q in b]
    assert lengths == sorted(lengths, reverse=True)
    again = batched([[q] for q in questions[::-1]], shape, rows, tokens)
    content = [[q.requests for q in b] for b in found]
    assert [[q.requests for q in b] for b in again] == content


@pytest.mark.parametrize("make", [pack_rows, pack_trees])
def test_batches_take_up_what_they_say(make):
    questions = [Question([Request((1, 2, 3), 1), Request((1, 2, 4, 5), 2)], [[0], [1]])]
    shape = (of_tree if make is pack_trees else of_rows)(questions[0])
    assert make(questions).input_ids.shape == (shape.rows, shape.length)
    assert shape.tokens == (3 if make is pack_trees else 6)


@pytest.mark.parametrize("make", [pack_rows, pack_trees])
def test_unless_told(make):
    """Padding is token 0, the continuations alone are watched, nothing is shared between rows."""
    requests = [Request((1, 2, 3), 1), Request((4, 5, 6, 7, 8), 2)]
    pack = make([Question([r], [[i]]) for i, r in enumerate(requests)])
    assert pack.input_ids[~pack.mask].tolist() == [0, 0]
    assert pack.watched is pack.scored and pack.node is None
