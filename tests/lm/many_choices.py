"""A question of 64 choices of 2,000 tokens through a small Llama, within a limit of memory.

    python tests/lm/many_choices.py TOKENS_OF_A_FORWARD BYTES

The limit does not include the memory of the imports. The script prints how much the peak grows.
"""

import resource
import sys
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_attack.lm.engine.clean import Needs, clean_pass
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question, Request

CHOICES, LENGTH = 64, 2000


def main(limit: int, more: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 50}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=LENGTH)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    scorer = Scorer(model, model.get_input_embeddings())
    tokens = torch.randint(0, 50, (CHOICES, LENGTH)).tolist()
    requests = [Request(tuple(of), 5) for of in tokens]
    gold = [i == 0 for i in range(CHOICES)]
    question = Question(requests, [[i] for i in range(CHOICES)], gold)
    pack = replace(pack_rows([question], shared=True), limit=limit)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
    clean = clean_pass(scorer, pack, ThreatModel("choice", shared=True), Needs(gradient=True))
    assert clean.gradient.isfinite().all() and clean.gradient.any()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
