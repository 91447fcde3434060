"""`deterministic=True`: a question has the same bits, whatever else is asked."""

import random

import pytest
import torch
from evaluation import evaluated

from llm_attack.lm.network.reproducible import reproducible

CASES = [
    {"attack": "none"},
    {"attack": "bim", "steps": 3, "epsilon": "0.3rms"},
    {"attack": "fgsm", "loss": "choice", "epsilon": "0.3rms"},
]


@pytest.fixture
def threads():
    """How many there are is set back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ask(lm, requests):
    return lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.sampled(2)
def test_bits_of_a_question(make, build, threads, settings):
    """Batch size, order, limit and threads are others; the numbers are not."""
    requests = build("demo_arc_easy", 4).instances
    lm = make(**settings, deterministic=True, batch_size=64)
    whole = dict(zip(map(id, requests), ask(lm, requests), strict=True))
    shuffled = random.Random(0).sample(requests, len(requests))
    torch.set_num_threads(3 - min(torch.get_num_threads(), 2))
    again = make(**settings, deterministic=True, batch_size=1)
    assert again.signal == lm.signal
    for part in (shuffled, [r for r in requests if r.doc_id == 2]):
        assert ask(again, part) == [whole[id(r)] for r in part]


@pytest.mark.parametrize("loss", ["sequence", "choice"])
def test_what_is_computed_together(make, build, monkeypatch, loss):
    """One question at a time, or one request where each is perturbed by itself; one thread."""
    lm = make(attack="fgsm", loss=loss, deterministic=True, batch_size=64)
    seen, compute = [], lm.engine.compute

    def noted(pack):
        seen.append((len(pack.questions), torch.get_num_threads(), pack.end))
        assert torch.are_deterministic_algorithms_enabled()
        return compute(pack)

    monkeypatch.setattr(lm.engine, "compute", noted)
    requests = build("demo_arc_easy", 3).instances
    found = ask(lm, requests)
    assert len(seen) == (3 if loss == "choice" else len(requests))
    assert set(seen) == {(1, 1, None)}
    assert not torch.are_deterministic_algorithms_enabled()
    others = [ll for ll, _ in ask(make(attack="none"), requests)]
    clean = ask(make(attack="none", deterministic=True), requests)
    assert [ll for ll, _ in clean] == pytest.approx(others, abs=1e-4)
    assert found != clean


def test_shares_and_batches_of_a_run(tmp_path):
    """Two processes with batches of 64, and one with batches of 1."""
    how = {"attacks": "none,fgsm", "limit": 4, "device": "cpu", "deterministic": True}
    how |= {"progress": "quiet", "epsilons": "0.3rms"}
    one = evaluated("demo", "demo_piqa", batch_size=1, output=tmp_path / "one", **how)
    for share in ("2/2", "1/2"):
        two = evaluated("demo", "demo_piqa", shard=share, output=tmp_path / "two", **how)
    columns = ["task", "doc_id", "condition", "log_likelihoods"]
    listed = [r.samples[columns].astype(str).values.tolist() for r in (one, two)]
    assert listed[0] == listed[1]


def test_it_leaves_nothing_behind(threads):
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError), reproducible(True):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()
    with reproducible(False):
        assert torch.get_num_threads() == 2
