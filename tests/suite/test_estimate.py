"""The estimate of a run: FLOP as torch counts them, passes as the engine makes them."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from llm_attack.attacks import Attack
from llm_attack.cli import main
from llm_attack.harness.requests import by_question, encode, questions_of
from llm_attack.lm.engine.clean import Needs, clean_pass
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.prefix import start
from llm_attack.lm.settings import AttackSettings
from llm_attack.suite.run.cost import Sizes, passes
from llm_attack.suite.run.estimate import Calibration, Counts

ATTACKS = [
    *[("none", {}), ("random", {}), ("fgsm", {}), ("bim", {"steps": 3}), ("pgd", {"steps": 2})],
    *[("apgd", {"steps": 2, "restarts": 2}), ("apgdt", {"steps": 2}), ("illc", {"steps": 2})],
    *[("blocks", {"queries": 4}), ("fmn", {"steps": 3}), ("ost", {})],
]

# A product that torch counts only where it is not in place.
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}


@pytest.fixture(scope="module")
def asked(build):
    return build("demo_arc_easy", 2).instances


def pack_of(lm, requests):
    questions = questions_of(requests, encode(lm, requests), lm.settings)
    (batch,) = lm.batches(questions, 1000)
    return lm.engine.pack(batch), batch


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.sampled(2)
def test_passes_are_those_of_the_engine(reused, asked, apart):
    """All attacks at once, which share the clean gradient, and each alone; counted at the head."""
    lm = reused(attn_implementation="eager", **({"gradient_dtype": "bfloat16"} if apart else {}))
    every = [
        AttackSettings(name, loss="choice", **more)
        for name, more in ATTACKS
        if not (apart and name == "fmn")
    ]
    forwards, backwards = [], []

    def look(module, args, output):
        forwards.append(output.requires_grad)
        if output.requires_grad:
            output.register_hook(lambda _: backwards.append(1))

    for chosen in (every, *([one] for one in every)):
        lm.use(*chosen)
        pack, _ = pack_of(lm, asked)
        forwards.clear(), backwards.clear()
        models = {scorer.model for scorer in (lm.engine.scorer, *lm.engine.slopes.values())}
        handles = [m.get_output_embeddings().register_forward_hook(look) for m in models]
        with frozen(lm.model):
            lm.engine.compute(pack)
        for handle in handles:
            handle.remove()
        others = max(len(q.gold) for q in pack.questions) - 1
        estimated = passes(lm.engine.attacks, others, apart=bool(lm.engine.slopes))
        assert len(backwards) == estimated.gradients == sum(forwards)
        without = estimated.losses + estimated.answers + estimated.clean
        assert forwards.count(False) == without


def test_the_smallest_amplitude_costs_no_more_than_its_rounds():
    """What `critical` needs depends on the question; the estimate is below the bound."""
    attack = Attack("critical", 0.1, steps=3, rounds=5)
    found = passes([attack], 3)
    assert found.gradients <= 1 + 5 * 3
    assert found.gradients > 1 + 3 + 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", ["sequence", "choice"])
@pytest.mark.sampled(2)
def test_flop_are_those_that_torch_counts(reused, asked, loss, checkpointing):
    lm = reused(
        attack="bim",
        steps=2,
        loss=loss,
        attn_implementation="eager",
        gradient_checkpointing=checkpointing,
    )
    pack, batch = pack_of(lm, asked)
    counts = Counts()
    todo = passes(lm.engine.attacks, 3)
    once = lm.engine.scorer.takes_twins
    assert once == (loss == "sequence" and not checkpointing)
    counts.add(pack, Sizes.of(lm.model, checkpointing), todo, once)
    # torch recomputes a block up to what its backward needs, not the product behind that
    last = sum(b.mlp.down_proj.weight.numel() for b in lm.model.model.layers) * checkpointing
    expected = counts.flop - 2 * last * pack.input_ids.numel() * todo.gradients
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, torch.no_grad():
        lm.engine.compute(pack)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
    assert counts.tokens_packed == batch.tokens
    assert counts.tokens_asked == sum(len(r.inputs) for r in encode(lm, asked))
    assert len(by_question(asked)) == 2


def test_flop_of_what_is_behind_a_prefix(reused, asked):
    """The prefix once, and pairs with its tokens for all that is behind it."""
    lm = reused(attack="fgsm", loss="choice", attn_implementation="eager")
    _, batch = pack_of(lm, asked)
    question = batch.questions[0]
    pack = lm.engine.pack(Batch([question], batch.trees, len(start(question, None))))
    assert len(pack.prefix) > 9
    lm.engine.scorer.nearest = None  # of so few tokens no small part
    counts = Counts()
    counts.add(pack, Sizes.of(lm.model), passes(lm.engine.attacks, 3))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.engine.compute(pack)
    assert counter.get_total_flops() == pytest.approx(counts.flop, rel=0.02)
    assert counts.tokens_packed == pack.input_ids.numel()


def test_activations_are_counted_whoever_computes_the_blocks(reused, asked):
    """At least the inputs of norms, of attention and of the gate, of each block and token."""
    lm = reused(attack="fgsm", loss="choice")
    pack, _ = pack_of(lm, asked)
    config, scorer = lm.model.config, lm.engine.scorer
    least = 5 * config.hidden_size + 2 * config.intermediate_size
    least *= config.num_hidden_layers * pack.input_ids.numel() * lm.model.dtype.itemsize
    assert scorer.stack is not None
    counted = []
    for stack in (scorer.stack, None):
        scorer.stack = stack
        calibration = Calibration(lm.engine, Sizes.of(lm.model), gradients=True)
        with frozen(lm.model):
            calibration.measure(pack)
        counted.append(calibration.bytes)
    assert least <= counted[0] <= counted[1]


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm_attack.suite.run.estimate.SECONDS", 0.0)
    command = "run --model demo --tasks demo_piqa --limit 3 --device cpu -o out --dry-run"
    done = CliRunner().invoke(main, [*command.split(), "--attacks", "none,fgsm"])
    assert done.exit_code == 0, done.output
    assert list(Path().iterdir()) == []
    cells = [line.split("│")[1:3] for line in done.output.splitlines() if "│" in line]
    shown = {label.strip(): value.strip() for label, value in cells if label.strip()}
    assert (shown["questions"], shown["requests"]) == ("3", "6")
    assert {"tokens", "FLOP", "time", "memory"} <= set(shown)
    # the clean pass with its gradient, and a forward at the attacked point
    assert shown["passes"] == "2 forward, 1 backward for each question"


def test_flop_saved_by_computing_once(reused, asked):
    """The difference alone, to the last product: of the head it is small beside the blocks."""
    lm = reused(attack="fgsm", attn_implementation="eager")
    pack, _ = pack_of(lm, asked)
    sizes, scorer, watched = Sizes.of(lm.model), lm.engine.scorer, len(pack.watched.positions)
    counted = {}
    for once in (False, True):
        scorer.takes_twins = once
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, frozen(lm.model):
            clean = clean_pass(scorer, pack, lm.engine.threat, Needs(gradient=True))
        assert clean.gradient.shape == clean.x.shape
        counted[once] = counter.get_total_flops()
    saved = sizes.gradient(pack, watched) - sizes.gradient(pack, watched, once=True)
    assert counted[False] - counted[True] == saved > 0
