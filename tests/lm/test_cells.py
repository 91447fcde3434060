"""Attacks in rounding cells on language models: against a model with a rounded table."""

import pytest
import torch
from test_passes import STEPS, packed, recorded, run, settings

from llm_attack.attacks.cells import Cells
from llm_attack.attacks.formats import Format
from llm_attack.attacks.settings import ROUNDINGS
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.settings import AttackSettings

# (forwards, backwards) of each attack alone.
ALONE = {
    "rounding": (1, 0),
    "random_rounding": (1, 0),
    "fgsm_rounding": (2, 1),
    "worst_rounding": (STEPS + 1, STEPS),
}


def rounding(name, cells="int4", loss="choice", **more):
    return AttackSettings(name, cells=cells, loss=loss, steps=STEPS, **more)


@pytest.fixture(scope="module")
def asked(build):
    return build("demo_arc_easy", 2).instances


def test_the_table_has_every_rounding():
    assert [*ALONE] == [name for name, kind in ROUNDINGS.items() if not kind.tied]


@pytest.mark.parametrize("name", ALONE)
def test_passes(name, make, asked):
    counts, computed = run(make(), asked, [rounding(name)])
    assert counts == ALONE[name]
    assert recorded(computed) == [ALONE[name]]


def test_passes_of_all_roundings_in_two_formats(make, asked):
    conditions = [rounding(name, cells) for name in ALONE for cells in ("int8", "int4")]
    counts, computed = run(make(), asked, [settings("none"), *conditions])
    shared = 1 + 2 * (1 + 1 + 1 + STEPS)  # one gradient at the clean point for all
    assert counts == (shared, 1 + 2 * (STEPS - 1))
    assert recorded(computed)[1:] == [ALONE[name] for name in ALONE for _ in "84"]


@pytest.mark.parametrize("cells", ["int8", "int4-asym-g32", "nf4", "bfloat16"])
def test_rounding_gives_the_answers_of_a_model_with_a_rounded_table(cells, make, asked):
    lm = make(dtype="float64", softmax_dtype="float64")  # whose weights it changes
    lm.use(rounding("rounding", cells))
    with frozen(lm.model):
        (found,) = lm.engine.compute(packed(lm, asked)).scores
    weight = lm.model.get_input_embeddings().weight
    rounded = Cells.of(Format.of(cells), weight).rounded
    with torch.no_grad():
        weight.copy_(rounded)
    lm.use(settings("none"))
    (expected,) = lm.engine.compute(packed(lm, asked)).scores
    assert torch.allclose(found.log_prob, expected.log_prob, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["random_rounding", "fgsm_rounding"])
def test_the_layout_does_not_matter_and_the_points_stay_in_the_cells(name, exact, asked):
    found = []
    for packing in ("tree", "off"):
        lm = exact(packing=packing)
        lm.use(rounding(name))
        pack = packed(lm, asked)
        with frozen(lm.model):
            batch = next(iter(lm.engine.prepared(pack, needs(lm)).values()))
            end = batch.ending(batch.attack(lm.engine.attacks[0]))
        cells = batch.cells("int4")
        assert ((cells.low <= end.x) & (end.x <= cells.high)).all()
        found.append(end.scores.log_prob)
    assert torch.allclose(*found, rtol=0, atol=1e-7)


def needs(lm):
    from llm_attack.lm.engine.clean import Needs

    return Needs.of(lm.engine.attacks)


def test_signs_that_are_drawn_have_no_way_and_the_roundings_own_way_is_its_own(exact, asked):
    """The cosine with the actual rounding, whose errors are independent of the draws."""
    lm = exact()
    names = ("rounding", "random_rounding")
    lm.use(*(rounding(name, "int8") for name in names))
    with frozen(lm.model):
        (_, result), *_ = lm.engine.answers(lm.batches(*questions(lm, asked)))
    own, drawn = (of_attack.report() for of_attack in result.diagnostics)
    assert own["rounding_rms"] == pytest.approx(own["noise_rms"], rel=1e-9)
    assert own["rounding_cosine"] is None
    n = result.diagnostics[1].elements
    assert abs(drawn["rounding_cosine"]) < 6 / n**0.5
    assert drawn["half_cell_rms"] == own["half_cell_rms"]


def questions(lm, asked):
    from llm_attack.harness.requests import encode, questions_of

    return questions_of(asked, encode(lm, asked), lm.settings), 1000
