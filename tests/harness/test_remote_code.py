"""Models whose own code lets the longest row of a forward decide the frequencies of all rows."""

import json
import logging
import shutil

import pytest
from lm_eval.api.instance import Instance
from published import EQUAL, FAMILIES, REFUSED, alone, checkpoint

from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH

# As in the code of Qwen's first models: the base grows with the length beyond a limit.
CODE = """
import torch
from transformers import LlamaForCausalLM

KEEPS = {keeps}


class Rotary(torch.nn.Module):
    def __init__(self, limit, width, base=10000.0):
        super().__init__()
        self.limit, self.width, self.base, self.longest = limit, width, base, 0

    def forward(self, x, position_ids):
        length = x.shape[1]
        self.longest = max(self.longest, length) if KEEPS else length
        alpha = max(1.0, 2.0 * self.longest / self.limit - 1.0)
        base = self.base * alpha ** (self.width / (self.width - 2))
        powers = torch.arange(0, self.width, 2, device=x.device) / self.width
        angles = position_ids[..., None] / base**powers
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = Rotary({limit}, config.head_dim)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """own(limit, keeps): a folder with the bundled model and code of its own."""

    def made(limit, keeps=False):
        folder = tmp_path_factory.mktemp("own") / f"model{limit}{keeps}"
        shutil.copytree(MODEL_PATH, folder)
        (folder / "own.py").write_text(CODE.format(limit=limit, keeps=keeps))
        known = json.loads((folder / "config.json").read_text())
        known |= {"auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
        (folder / "config.json").write_text(json.dumps(known))
        return str(folder)

    return made


@pytest.mark.parametrize("attack", ["none", "fgsm"])
def test_the_longest_row_decides(own, make, build, caplog, attack):
    """Every answer is that of the request alone, and a warning names the lengths."""
    folder = own(12)
    requests = build("demo_piqa", 3).instances
    # with context=own and deterministic, every request is a batch of its own
    options = {"pretrained": folder, "attack": attack, "trust_remote_code": True}
    alone = make(deterministic=True, **options).loglikelihood(requests, disable_tqdm=True)
    with caplog.at_level(logging.WARNING):
        lm = make(**options)
        together = lm.loglikelihood(requests, disable_tqdm=True)
    assert "rows: only of equal length share a forward" in caplog.text
    assert [v for v, _ in together] == pytest.approx([v for v, _ in alone], abs=1e-3)


def test_rows_that_share_a_forward_differ(own, make, build, monkeypatch):
    """Without the trial the answers are wrong, so the test above shows something."""
    monkeypatch.setattr("llm_attack.lm.engine.engine.own_code", lambda model: False)
    requests = build("demo_piqa", 3).instances
    options = {"pretrained": own(12), "attack": "none", "trust_remote_code": True}
    alone, together = (
        make(deterministic=exact, **options).loglikelihood(requests, disable_tqdm=True)
        for exact in (True, False)
    )
    assert max(abs(a - b) for (a, _), (b, _) in zip(alone, together, strict=True)) > 0.01


def test_within_the_limit(own, make, build, caplog):
    lm = make(pretrained=own(1000), attack="none", trust_remote_code=True)
    plain = make(attack="none")
    requests = build("demo_piqa", 3).instances
    with caplog.at_level(logging.WARNING):
        found, expected = (x.loglikelihood(requests, disable_tqdm=True) for x in (lm, plain))
    assert "rows: only" not in caplog.text
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)


def test_frequencies_that_stay(own, make):
    """As in older code of Llama: a long forward changes all later ones. The model is refused."""
    lm = make(pretrained=own(60, keeps=True), attack="none", trust_remote_code=True)
    texts = ["the red ball is on the", "the red ball is on the " * 15]
    requests = [
        Instance("loglikelihood", {}, (text, " table"), i, ("demo_piqa", i, 1))
        for i, text in enumerate(texts)
    ]
    with pytest.raises(UsageError, match=r"mixes requests, because a request of \d+ tokens .* aft"):
        lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_code_as_published(family, make, build, caplog, tmp_path):
    """Answers are those of each request alone, by the network's own code; or it is refused.

    Trees are off for all, because none takes their mask.
    """
    folder, (_, verdict) = checkpoint(tmp_path / family, family), FAMILIES[family]
    requests = build("demo_piqa", 3).instances
    if verdict == REFUSED:
        requests[0].arguments = (" ".join([requests[0].args[0]] * 5), requests[0].args[1])
    options = {"pretrained": folder, "dtype": "float32", "trust_remote_code": True}
    with caplog.at_level(logging.WARNING):
        lm = make(attack="none", **options)
        if verdict == REFUSED:
            with pytest.raises(UsageError, match="mixes requests, because a request of"):
                lm.loglikelihood(requests, disable_tqdm=True)
            return
        found = lm.loglikelihood(requests, disable_tqdm=True)
    assert "packing: off" in caplog.text
    assert ("rows: only of equal length" in caplog.text) == (verdict == EQUAL)
    expected = alone(folder, [r.args for r in requests])
    assert [v for v, _ in found] == pytest.approx(expected, abs=1e-4)
    found, expected = (
        make(attack="fgsm", deterministic=exact, **options).loglikelihood(
            requests, disable_tqdm=True
        )
        for exact in (False, True)
    )
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-3)
