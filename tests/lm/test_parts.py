"""A question that exceeds the budget of tokens goes through the model in parts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import prepared

from llm_attack.harness.requests import encode, questions_of

LIMIT = "400000000"  # bytes


@pytest.mark.parametrize("loss", ["sequence", "choice", "margin"])
@pytest.mark.sampled(3)
def test_parts_are_the_whole(exact, build, loss):
    """Losses, gradients and answers, in float64, whatever the limit."""
    lm = exact(attack="fgsm", loss=loss, context="shared", packing="off")
    requests = build("demo_hellaswag", 2).instances
    questions = questions_of(requests, encode(lm, requests), lm.settings)
    engine = lm.engine
    (whole, *rest) = engine.batches(questions, 100, 10**6)
    assert not rest
    pack = engine.pack(whole)
    with torch.no_grad():
        x = prepared(engine.scorer, pack, engine.threat).x
    found = []
    for limit in (10**6, 2 * pack.input_ids.shape[1], 1):
        pack = replace(pack, limit=limit)
        at = prepared(engine.scorer, pack, engine.threat)
        answers, clean = at.answers(x + 0.01).log_prob, at.clean
        found.append((clean.loss, clean.gradient, clean.scores.log_prob, answers))
        assert len(engine.scorer._forwards(pack)) == {10**6: 1, 1: len(pack.input_ids)}.get(
            limit, len(pack.input_ids) // 2
        )
    for parts in found[1:]:
        for part, of_whole in zip(parts, found[0], strict=True):
            torch.testing.assert_close(part, of_whole, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_memory_is_that_of_a_part():
    """64 choices of 2,000 tokens, in a memory that is not enough for all at once."""
    script = str(Path(__file__).with_name("many_choices.py"))
    done = [
        subprocess.run([sys.executable, script, tokens, LIMIT], capture_output=True, text=True)
        for tokens in ("8000", "1000000")
    ]
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].returncode != 0
    assert "allocate memory" in done[1].stderr
