"""The cost of generated texts: reading the prompts, and the time of a step of generation."""

from __future__ import annotations

import time

import torch

from llm_attack.harness.generation import Prompts
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.questions import Question, Request


def as_read(prompts: Prompts) -> Batch:
    """The batch that reads the prompts, and the prediction of the last token of each."""
    questions = []
    for question in prompts.questions:
        tokens = question.requests[0].tokens
        questions.append(Question([Request((*tokens, tokens[-1]), 1)], question.answers))
    return Batch(questions, trees=False)


def seconds_of_step(lm: AttackedHFLM, prompts: Prompts) -> float:
    """Measures the seconds of a step of generation, from a longer and a shorter text.

    Args:
        lm: the model.
        prompts: the batch of prompts to continue.
    """
    few, more = 1, min(9, prompts.most)
    if more <= few:
        return 0.0
    tokens = [list(question.requests[0].tokens) for question in prompts.questions]
    longest = max(map(len, tokens))
    rows = torch.tensor([[of[0]] * (longest - len(of)) + of for of in tokens]).to(lm.device)
    seconds = []
    for n in (few, few, more):  # the first one warms up
        start = time.perf_counter()
        how = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            lm.model.generate(rows, attention_mask=torch.ones_like(rows), **how)[0, -1].item()
        seconds.append(time.perf_counter() - start)
    return max(0.0, seconds[2] - seconds[1]) / (more - few)
