"""Gradients that are not those of the model are refused or reported; right ones never."""

import copy
import json
import re
import tempfile
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from networks import ARCHITECTURES, CPU, network, scorer_of, single
from torch import nn
from versions import TRANSFORMERS

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.engine.gradient import examine
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.network.hook import frozen
from llm_attack.suite import doctor
from llm_attack.suite.studies.sanity import NOT_APPLICABLE

TEXT = torch.randint(3, 64, (30,), generator=torch.Generator().manual_seed(0)).tolist()


def found_of(model):
    with frozen(model):
        return examine(scorer_of(model), TEXT, CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.sampled(8)
def test_right_gradients(name, dtype):
    """Of every architecture; also behind routers that jump, and with half of the digits."""
    if name == "mpt" and dtype == torch.float64 and TRANSFORMERS.major < 5:
        pytest.skip("MPT of transformers 4 does not run in float64")
    model = network(name) if dtype == torch.float64 else single(name).to(dtype)
    found = found_of(model)
    assert (found.fault, found.warning) == ("", "")
    assert "by finite differences" in found.figure


# -- linear layers that do not do what they say ----------------------------------------------------


class Linear(nn.Module):
    """A layer of a network, to be spoilt."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x):
        return self.layer(x)


class Repacked(Linear):
    """At its first forward without gradients its weights are made others, whose kernel has none."""

    def forward(self, x):
        if not torch.is_grad_enabled() and not self.calls:
            self.layer.weight.data.mul_(1.01)
            self.calls += 1
        return self.layer(x).detach() if self.calls else self.layer(x)


class Two(Linear):
    """Without gradients its weights are rounded."""

    def forward(self, x):
        if torch.is_grad_enabled():
            return self.layer(x)
        return nn.functional.linear(x, self.layer.weight.bfloat16().to(x.dtype))


class Detached(Linear):
    def forward(self, x):
        return self.layer(x).detach()


class Turned(Linear):
    """With a gradient that points the other way."""

    def forward(self, x):
        y = self.layer(x)
        return 2 * y.detach() - y


class Crowded(Linear):
    """Where there are many tokens its kernel is another, without a gradient."""

    def forward(self, x):
        y = self.layer(x)
        return y.detach() if x.shape[:-1].numel() > 60 else y


class Scaled(Linear):
    def forward(self, x):
        y = self.layer(x)
        return y + (y - y.detach())


class Noisy(Linear):
    def forward(self, x):
        y = self.layer(x)
        return y + 0.05 * y.std() * torch.randn_like(y)


class Stateful(Linear):
    """Its weights grow with every call."""

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * 1.02**self.calls


class Rounded(Linear):
    """Its inputs in 127 steps, behind a straight-through estimator."""

    def forward(self, x):
        step = x.detach().abs().amax(-1, keepdim=True) / 127
        return self.layer(x + ((x / step).round() * step - x).detach())


def spoilt(kind, name="llama", head=False):
    """A network whose linear layers are of that kind: all but the head, or the head alone."""
    model = copy.deepcopy(single(name))
    last = model.get_output_embeddings()
    for parent in [*model.modules()]:
        for child, layer in [*parent.named_children()]:
            if isinstance(layer, nn.Linear) and (layer is last) == head:
                setattr(parent, child, kind(layer))
    return model


@pytest.mark.parametrize(
    "kind, head, fault",
    [
        (Repacked, False, "which is not the gradient of its loss: slopes"),
        (
            Two,
            False,
            "because logits differ by .* between forward passes with and without gradients",
        ),
        (Detached, False, "which is not the gradient of its loss: slopes"),
        (Turned, True, "which is not the gradient of its loss: slopes"),
        (Scaled, False, "which is not the gradient of its loss: slopes"),
        (Crowded, False, r"differs by \d+% between batches of 1 and of 16 rows"),
        (Crowded, True, r"because the backward pass fails \(.*grad"),
        (Detached, True, r"because the backward pass fails \(.*grad"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_wrong_gradients_are_refused(kind, head, fault, name):
    found = found_of(spoilt(kind, name, head))
    assert re.search(fault, found.fault), found


@pytest.mark.parametrize(
    "kind, head, warning",
    [
        (Scaled, True, "the gradient differs from the slope of the loss by 50%"),
        (Noisy, False, "differ by .* from call to call"),
        (Stateful, False, "differ by .* from call to call"),
    ],
)
def test_doubtful_ones_are_told(kind, head, warning):
    found = found_of(spoilt(kind, head=head))
    assert found.fault == "" and re.search(warning, found.warning), found


def test_a_straight_through_estimator_is_not_refused():
    """It is what an attack on a quantised model should follow (Athalye et al. 2018)."""
    assert found_of(spoilt(Rounded)).fault == ""


@pytest.mark.parametrize("room", [1, 5, 40])
@pytest.mark.sampled(3)
def test_less_memory_takes_more_forwards(monkeypatch, room):
    """The finding is the same, and no batch is larger than there is room for."""
    logits, rows = Scorer.logits, []

    def limited(self, pack, *args):
        rows.append(len(pack.input_ids))
        if rows[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits(self, pack, *args)

    whole = found_of(network("llama"))  # in float64: batches of another size round otherwise
    monkeypatch.setattr(Scorer, "logits", limited)
    assert found_of(network("llama")).figure == whole.figure
    assert max(rows) > room >= sorted(rows)[0]
    assert found_of(spoilt(Detached)).fault


# -- a run says it ---------------------------------------------------------------------------------


@pytest.fixture
def spoils(monkeypatch):
    """Has the demo loaded with a hook on the linear layers of its blocks."""

    def by(hook):
        create = AttackedHFLM._create_model

        def spoilt(self, *args, **kwargs):
            create(self, *args, **kwargs)
            for layer in self.model.model.layers.modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_hook(hook)

        monkeypatch.setattr(AttackedHFLM, "_create_model", spoilt)

    return by


def detached(layer, inputs, output):
    return output.detach()


def noisy(layer, inputs, output):
    return output + 0.05 * output.std() * torch.randn_like(output)


def test_attacked_hf_refuses(spoils, make):
    spoils(detached)
    with pytest.raises(UsageError, match=r"attack=bim: cannot follow the gradient .* which is not"):
        make(attack="bim")
    assert make(attack="random").warnings == []  # which takes none


RUN = ["run", "--model", "demo", "--tasks", "demo_piqa", "--limit", "3", "--device", "cpu"]


def test_a_run_refuses(spoils, tmp_path):
    spoils(detached)
    out = tmp_path / "out"
    done = CliRunner().invoke(main, [*RUN, "--attacks", "none,random,fgsm", "-o", str(out)])
    assert done.exit_code == 2 and not out.exists(), done.output
    assert "which is not the gradient of its loss: slopes" in done.stderr
    assert "must be an attack without gradients (none, random," in done.stderr
    done = CliRunner().invoke(main, [*RUN, "--attacks", "none,random,blocks"])
    assert done.exit_code == 0, done.output


def test_a_run_tells(spoils, tmp_path):
    """In the table, the report, and run.json."""
    spoils(noisy)
    done = CliRunner().invoke(main, [*RUN, "--attacks", "none,fgsm", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (sentence,) = json.loads((tmp_path / "run.json").read_text())["warnings"]
    assert "from call to call" in sentence
    assert f"warning: {sentence}" in (tmp_path / "table.md").read_text()
    assert sentence in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_doctor_tells(spoils):
    spoils(detached)
    words = ["doctor", "--model", "demo", "--tasks", "demo_piqa", "--limit", "2", "--queries", "2"]
    done = CliRunner().invoke(main, [*words, "--device", "cpu", "--progress", "quiet"])
    assert done.exit_code == 1, done.output
    assert "fails: the gradient is that of the model as it runs; which is not" in done.stdout


def test_the_doctor_tells_where_there_is_none(monkeypatch):
    """No attack can be carried out; what can be said is said, and the exit code is 1."""
    create = AttackedHFLM._create_model

    def spoilt(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self.model.lm_head.register_forward_hook(detached)

    monkeypatch.setattr(AttackedHFLM, "_create_model", spoilt)
    words = ["doctor", "--model", "demo", "--tasks", "demo_piqa", "--limit", "2", "--queries", "2"]
    done = CliRunner().invoke(main, [*words, "--device", "cpu", "--progress", "quiet"])
    assert done.exit_code == 1, done.output
    lines = done.stdout.splitlines()
    assert (
        "fails: the gradient is that of the model as it runs; because the backward pass fails"
        in done.stdout
    )
    assert any("not applicable: " in of and "does not require grad" in of for of in lines)
    assert lines[-1] == "1 of 3 checks fail"


@pytest.mark.parametrize(
    "config, kernels, reason",
    [
        ({"bits": 4}, None, "quantised weights do not compute in float64"),
        (None, RuntimeError("no float64 here"), "float64 fails here .*no float64 here"),
    ],
)
def test_a_check_that_cannot_be_made(make, monkeypatch, config, kernels, reason):
    lm = make(attack="fgsm")
    lm.model.config.quantization_config = config

    def refuse():
        raise kernels

    monkeypatch.setattr(lm.model, "double", refuse)
    check = doctor.finite_differences(SimpleNamespace(lm=lm))
    assert check.verdict == NOT_APPLICABLE and re.search(reason, check.figure)
    assert lm.model.dtype == torch.float32


# -- libraries of kernels --------------------------------------------------------------------------


def llama_with(config):
    """A small llama in float32 that is loaded with quantised weights."""
    model = copy.deepcopy(single("llama"))
    made = type(model)(type(model.config)(**{**model.config.to_dict(), **WIDE}))
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return (
            type(made)
            .from_pretrained(
                folder, quantization_config=config, device_map="cpu", dtype=torch.float32
            )
            .eval()
        )


WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes():
    """On processors with bfloat16 its 4-bit kernel has no gradient; elsewhere it is right."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    four = llama_with(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32))
    converts = any(getattr(m, "support_avx512bf16_for_cpu", False) for m in four.modules())
    assert bool(found_of(four).fault) == converts
    assert found_of(llama_with(BitsAndBytesConfig(load_in_8bit=True))).fault == ""
