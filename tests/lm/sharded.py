"""Answers of the bundled model under several conditions, to compare processes.

As a script, under torchrun with two processes, each process has half of all weights. The first one
prints the answers.
"""

import json

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_attack.demo import MODEL_PATH
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.tasks import tasks_path

TASK = "demo_arc_easy"
SETTINGS = [
    {"attack": "none"},
    {"attack": "bim", "epsilon": "0.3rms", "steps": 3},
    {"attack": "fgsm", "epsilon": "0.3rms", "loss": "choice"},
    {"attack": "fgsm", "epsilon": "0.3rms", "hookpoint": "model.layers.1"},
]


def network():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH).float()


def answers(model):
    """For each of the settings, the log-likelihoods of the requests."""
    given = {"tokenizer": AutoTokenizer.from_pretrained(MODEL_PATH), "batch_size": 8}
    given["device"] = "cpu"
    how = {"limit": 3, "bootstrap_iters": 0}
    how["task_manager"] = TaskManager(include_path=str(tasks_path()))
    found = []
    for settings in SETTINGS:
        lm = AttackedHFLM(model, **given, **settings)
        results = simple_evaluate(lm, tasks=[TASK], **how)
        if results is not None:  # lm-eval returns them in the first process
            samples = results["samples"][TASK]
            found.append([float(ll) for sample in samples for ll, _ in sample["filtered_resps"]])
    return found


def divided(model):
    """The model, divided by FSDP2: each block, the embedding, and the rest."""
    torch.distributed.init_process_group("gloo")
    for part in (*model.model.layers, model.model.embed_tokens, model):
        fully_shard(part, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = answers(divided(network()))
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
