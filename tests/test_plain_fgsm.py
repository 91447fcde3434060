"""The plain FGSM of the benchmarks computes the same as the default attack."""

import sys

import pytest
import torch
from shown import ROOT

from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import encode

sys.path.insert(0, str(ROOT / "benchmarks"))
import plain_fgsm
from lm_eval.api.instance import Instance


def test_it_is_the_default_attack():
    lm = AttackedHFLM("demo", attack="fgsm", epsilon=0.05, dtype="float64", softmax_dtype="float64")
    texts = [("the cat", " sat"), ("the cat", " ran away"), ("a dog and a", " cat are here")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts * 4)]
    encoded = [(r.tokens, r.n_continuation) for r in encode(lm, requests)]
    plain = plain_fgsm.answers(lm.model.requires_grad_(False), encoded, 0.05)
    ours = lm.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in plain]
    torch.testing.assert_close(
        torch.tensor([x for x, _ in ours]), torch.tensor([x for x, _ in plain]), rtol=0, atol=1e-6
    )
    clean = AttackedHFLM("demo", attack="none", dtype="float64").loglikelihood(requests)
    assert all(a < b - 0.01 for (a, _), (b, _) in zip(ours, clean, strict=True))
    assert plain[0][0] == pytest.approx(plain[3][0], abs=1e-6)
