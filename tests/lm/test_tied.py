"""A table of embeddings that moves as a whole: its closed form, and the model that it makes."""

import pytest
import torch
from test_passes import packed, recorded, settings
from test_smoothing import CHOICES, CONTEXTS, MODEL, batch_of, margin

from llm_attack.attacks import Attack
from llm_attack.attacks.cells import Cells
from llm_attack.attacks.formats import Format
from llm_attack.base.errors import UsageError
from llm_attack.harness.requests import encode, questions_of
from llm_attack.lm.engine.tied import fit, tokens_of
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.settings import AttackSettings


def tied(cells="int4", **more):
    return AttackSettings("tied_rounding", cells=cells, loss="margin", **{"steps": 3, **more})


@pytest.fixture(scope="module")
def asked(build):
    return build("demo_arc_easy", 3).instances


def slopes():
    """By token, the gradient of the sum of all margins of a linear model."""
    found = {}
    for context, choices in zip(CONTEXTS, CHOICES, strict=True):
        gold, wrong = choices if margin(context, choices) > 0 else choices[::-1]
        for token in context:
            of_token = MODEL.head.weight[wrong] - MODEL.head.weight[gold]
            found[token] = found.get(token, 0) + of_token
    return dict(sorted(found.items()))


def test_the_worst_table_of_a_linear_model():
    """The end of each cell to which the gradient points, summed over occurrences and questions."""
    attack = Attack("tied_rounding", 1.0, cells="int4", steps=2, step_size=1.0)
    table = fit(attack, lambda: iter([batch_of(point=True)]))
    expected = slopes()
    assert table.ids.tolist() == [*expected]
    slope = torch.stack([*expected.values()])
    cells = Cells.of(Format.of("int4"), MODEL.embed.weight[table.ids])
    assert torch.equal(table.rows, torch.where(slope > 0, cells.high, cells.low))
    gain = (slope * (table.rows - cells.x)).sum()
    start, first, second = table.losses
    assert first - start == pytest.approx(float(gain), rel=1e-12) and second == first


def test_tokens_that_do_not_move_are_not_in_the_table():
    attack = Attack("tied_rounding", 1.0, cells="int4", steps=1)
    table = fit(attack, lambda: iter([batch_of("not_first", point=True)]))
    assert table.ids.tolist() == sorted({t for context in CONTEXTS for t in context[1:]})
    batch = batch_of("not_first", point=True)
    point = table.point(batch)
    _, moves = tokens_of(batch)
    assert torch.equal(point[~moves], batch.x[~moves])
    assert (point[moves] != batch.x[moves]).any(-1).all()


def test_tokens_that_the_fit_has_not_seen_stay():
    attack = Attack("tied_rounding", 1.0, cells="int4", steps=1)
    batch = batch_of(point=True)
    table = fit(attack, lambda: iter([batch]))
    fewer = table._replace(ids=table.ids[::2].contiguous(), rows=table.rows[::2])
    tokens, _ = tokens_of(batch)
    kept, point = torch.isin(tokens, fewer.ids), fewer.point(batch)
    assert kept.any() and not kept.all()
    assert torch.equal(point[kept], table.point(batch)[kept])
    assert torch.equal(point[~kept], batch.x[~kept])


def drawn(seed, positions="all"):
    attack = Attack("tied_random_rounding", 1.0, cells="int4")
    return fit(attack, lambda: iter([batch_of(positions, point=True)]), seed)


def test_a_drawn_table_has_the_ends_of_the_cells():
    """Fair draws, which depend on the seed and on the token alone."""
    table = drawn(1)
    low, high = table.cells.low, table.cells.high
    assert ((table.rows == low) | (table.rows == high)).all() and table.losses == []
    moves = low < high
    up = (table.rows == high)[moves].double()
    assert abs(up.mean() - 0.5) < 4 * 0.5 / len(up) ** 0.5
    fewer = drawn(1, "not_first")  # other tokens
    kept = torch.isin(table.ids, fewer.ids)
    assert 0 < len(fewer.ids) < len(table.ids) and torch.equal(fewer.rows, table.rows[kept])
    assert not torch.equal(drawn(2).rows, table.rows)
    assert not torch.equal(table.rows[0] == low[0], table.rows[1] == low[1])


def fitted(lm, asked, rows):
    lm.use(tied())
    questions = questions_of(asked, encode(lm, asked), lm.settings)
    batches = lm.batches(questions, rows)
    lm.fit(batches)
    (table,) = lm.engine.tables.values()
    return table


@pytest.fixture(scope="module")
def table(exact, asked):
    return fitted(exact(), asked, 1000)


def test_a_table_has_the_codes_of_the_clean_one_and_raises_the_loss(table):
    format = Format.of("int4")
    cells = Cells.of(format, table.cells.x)
    assert ((cells.low <= table.rows) & (table.rows <= cells.high)).all()
    assert torch.equal(Cells.of(format, table.rows).rounded, cells.rounded)
    assert max(table.losses) > table.losses[0] and len(table.losses) == 4


@pytest.mark.parametrize("packing", ["tree", "off"])
def test_batches_and_their_layout_do_not_matter(packing, table, exact, asked):
    other = fitted(exact(packing=packing), asked, 1)
    assert torch.equal(other.ids, table.ids)
    assert torch.allclose(other.rows, table.rows, rtol=0, atol=1e-12)
    assert other.losses == pytest.approx(table.losses, rel=1e-9)


def test_answers_are_those_of_a_model_with_these_weights(table, make, asked):
    lm = make(dtype="float64", softmax_dtype="float64")  # whose weights it changes
    lm.use(tied())
    pack = packed(lm, asked)
    lm.engine.tables[lm.engine.attacks[0]] = table
    with frozen(lm.model):
        computed = lm.engine.compute(pack)
    assert recorded(computed) == [(3 + 1 + 1, 3)]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[table.ids] = table.rows
    lm.use(settings("none", loss="margin"))
    (expected,) = lm.engine.compute(packed(lm, asked)).scores
    assert torch.allclose(computed.scores[0].log_prob, expected.log_prob, rtol=0, atol=1e-9)


def test_other_hookpoints_are_refused(make):
    with pytest.raises(UsageError, match="tied_rounding: must be given with a causal model and"):
        make().use(tied(hookpoint="model.layers.1"))
