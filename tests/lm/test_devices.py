"""A model in parts, on several devices or in several processes: each is computed in its place.

The machine may have only one processor. torch's fake tensors know their devices and have no
content, and refuse to compute with tensors on different ones. `meta` is the second device.
"""

import copy
import json
import os
import socket
import subprocess
import sys

import pytest
import sharded
import torch
import torch._functorch.config as functorch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from networks import CPU, asked, network, tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from llm_attack.attacks import Attack
from llm_attack.base.errors import UsageError
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen, resolve
from llm_attack.lm.settings import AttackSettings

META = torch.device("meta")
QUESTIONS = asked()
ATTACKS = [
    Attack("none"),
    Attack("random", 0.01),
    Attack("fgsm", 0.01),
    Attack("pgd", 0.01, steps=2),
    Attack("apgd", 0.01, steps=3),
]


@pytest.fixture
def split():
    """A Llama without content: the first of two blocks on the CPU, what follows on the other."""
    config = network("llama").config  # made before, and shared
    with functorch.patch(fake_tensor_allow_meta=True), FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config).eval()
        for part in (model.model.layers[1], model.model.norm, model.lm_head):
            for module in part.modules():
                for name, p in module.named_parameters(recurse=False):
                    there = torch.empty(p.shape, device=META)
                    module._parameters[name] = torch.nn.Parameter(there)
            # as accelerate puts them there, which `parallelize=True` of lm-eval does
            add_hook_to_module(part, AlignDevicesHook(execution_device=META))
        yield model


@pytest.mark.parametrize("hookpoint", [None, "model.layers.1"], ids=["first", "second"])
@pytest.mark.parametrize("longest_tree", [0, 99])
@pytest.mark.parametrize("threat", [ThreatModel(), ThreatModel("choice", shared=True)], ids=str)
@pytest.mark.sampled(4)
def test_everything_meets_on_one_device(split, threat, longest_tree, hookpoint):
    """Point, perturbation and scores are where the model begins, wherever the hookpoint is."""
    scorer = Scorer(split, resolve(split, hookpoint))
    scorer.nearest = None  # picks tokens by their content
    engine = Engine(scorer, ATTACKS, threat, CPU, Layout(longest_tree=longest_tree))
    (batch,) = engine.batches(QUESTIONS, 8, 1000)
    with frozen(split):
        found = engine.compute(engine.pack(batch))
    assert [scores.log_prob.device for scores in found.scores] == [CPU] * len(ATTACKS)
    assert found.alignment.device == CPU
    assert {p.device.type for p in split.parameters()} == {"cpu", "meta"}


def test_parts_on_disk(make, build, tmp_path):
    """`parallelize=True` as lm-eval reads it, two blocks of four on disk: nothing changes.

    Also with trees, and with a hookpoint in a block that is on disk.
    """
    requests = build("demo_arc_easy", 3).instances
    places = {f"model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(4)}
    places |= {f"model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    split = {"parallelize": True, "device_map": {**places, "lm_head": "cpu"}}
    inside = {"attack": "fgsm", "loss": "choice", "hookpoint": "model.layers.2"}
    whole, parts = (
        make(attack="none", dtype="float32", **options)
        for options in ({}, {**split, "offload_folder": str(tmp_path)})
    )
    assert {p.device.type for p in parts.model.parameters()} == {"cpu", "meta"}
    for condition in ({"attack": "none"}, {"attack": "bim", "steps": 3}, inside):
        for lm in (whole, parts):
            lm.use(AttackSettings(**condition))
        expected, found = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (whole, parts))
        assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)


@pytest.mark.slow
def test_divided_by_fsdp2():
    """Two processes, each with half of all weights: their answers are those of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"-m torch.distributed.run --nproc_per_node 2 --master_port {port} {sharded.__file__}"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    words = [sys.executable, *launch.split()]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for divided, whole in zip(found, sharded.answers(sharded.network()), strict=True):
        assert divided == pytest.approx(whole, abs=1e-4)


class FSDPModule(torch.nn.Module):
    """Named like torch's classes, which need several processes."""


class FullyShardedDataParallel(torch.nn.Module):
    """As above."""


def divided_by(kind):
    model = copy.deepcopy(network("llama"))
    model.model.norm.add_module("divided", kind())
    return {"pretrained": model, "tokenizer": tokenizer(), "attack": "fgsm"}


def test_settings_of_a_divided_model(make):
    """Nothing reads its weights outside of a forward, and no process halves a batch alone."""
    layout = make(**divided_by(FSDPModule)).engine.layout
    assert not layout.once and not layout.divides
    with pytest.raises(UsageError, match="gradient_dtype=bfloat16: must be left out with fully_sh"):
        make(**divided_by(FSDPModule), gradient_dtype="bfloat16")
    with pytest.raises(UsageError, match=r"FullyShardedDataParallel \(FSDP1\) is not supported"):
        make(**divided_by(FullyShardedDataParallel))
