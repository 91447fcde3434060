"""Bad input: one line that names the argument, the value and what is allowed; exit code 2."""

import json
import subprocess
import sys

import pytest
import torch
from forks import run_module
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.tasks import tasks_path


@pytest.mark.parametrize(
    ("given", "taken"), [("no", False), ("0", False), ("true", True), (True, True), (None, False)]
)
def test_remote_code_is_run_when_told_so(given, taken, monkeypatch):
    """A text is true in Python, whatever it says."""
    seen = {}

    def stop(self, source, **arguments):
        seen.update(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(HFLM, "__init__", stop)
    with pytest.raises(KeyboardInterrupt):
        AttackedHFLM("demo", trust_remote_code=given)
    assert seen["trust_remote_code"] is taken


@pytest.mark.parametrize("device", ["gpu", "cpu:7", "cuda:99"])
def test_devices_that_are_not_there(make, device):
    """lm-eval would compute on the CPU, and say so in its log."""
    with pytest.raises(UsageError, match=f"device={device}: must be one of cpu"):
        make(device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda:0")
@pytest.mark.parametrize("words", [["lm_eval"], ["lm_eval", "--device", "cuda:0"]])
def test_the_device_that_lm_evals_command_line_makes_up(make, monkeypatch, words):
    """Without a word of the user's it is cuda:0, which stands for whatever is there."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", sys)
    monkeypatch.setattr("llm_attack.harness.start.report_usage_errors", lambda: None)
    if len(words) == 1:
        assert make(device="cuda:0").device.type == "cpu"
        return
    with pytest.raises(UsageError, match="device=cuda:0: must be one of cpu"):
        make(device="cuda:0")


def test_known_arguments_are_taken(make):
    lm = make(attn_implementation="eager", use_cache=False, max_length=32, add_bos_token=False)
    assert lm.model.config._attn_implementation == "eager"
    assert lm.max_length == 32


def test_command_line_of_lm_eval(tmp_path):
    """There, too, it is one line and no traceback."""
    arguments = ["--model", "attacked-hf", "--model_args", "pretrained=demo,attack=bimm"]
    tasks = ["--tasks", "demo_piqa", "--include_path", str(tasks_path())]
    done = run_module("lm_eval", *arguments, *tasks, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "error: attack=bimm: must be one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_gold_labels_is_said_before_anything_is_computed(make, build, monkeypatch):
    lm = make(loss="choice")
    monkeypatch.setattr(lm.engine, "compute", None)
    requests = build("demo_piqa", 1).instances
    rolling = type(requests[0])("loglikelihood_rolling", {}, ("text",), 0)
    rolling.task_name = "wikitext"
    with pytest.raises(UsageError, match="task wikitext is not a multiple-choice task"):
        lm.loglikelihood_rolling([rolling])


@pytest.mark.parametrize("name", ["no-such/model", "/no/such/folder", "not a name"])
def test_model_that_cannot_be_loaded(make, name):
    with pytest.raises(UsageError, match=rf"pretrained={name}: cannot be loaded .*pretrained=demo"):
        make(pretrained=name)


@pytest.mark.slow  # in a process whose libraries look for the cache elsewhere
def test_unreachable_hub(tmp_path):
    """With an empty cache and no network the default model cannot be had."""
    done = subprocess.run(
        [sys.executable, "-m", "llm_attack", "run", "--tasks", "demo_piqa"],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "error: pretrained=TinyLlama/TinyLlama_v1.1: cannot be loaded" in done.stderr
    assert "pretrained=demo" in done.stderr and "Traceback" not in done.stderr


def test_tokenizer_without_special_tokens(make, tmp_path):
    vocabulary = json.loads((MODEL_PATH / "tokenizer.json").read_text())["model"]["vocab"]
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"tokenizer=.*no BOS and no EOS.*prefix_token_id="):
        make(tokenizer=str(tmp_path))
    assert make(tokenizer=str(tmp_path), prefix_token_id=1).prefix_token_id == 1
