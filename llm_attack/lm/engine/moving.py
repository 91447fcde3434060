"""The tokens of a batch that attacks may perturb, in the order of saved perturbations."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_attack.lm.packing.pack import Pack


def moving(pack: Pack) -> Tensor:
    """(N,) flat indices into the point of the tokens that may move, question by question.

    The tokens of a question are in the order of its trie's nodes.
    """
    device, length = pack.input_ids.device, pack.input_ids.shape[1]
    sizes = [len(question.trie) for question in pack.questions]
    if pack.first is not None:  # the nodes of all questions, one question after the other
        index = torch.arange(sum(sizes))
    else:  # a row for each question
        index = torch.cat([row * length + torch.arange(n) for row, n in enumerate(sizes)])
    index = index.to(device)
    return index if pack.moves is None else index[pack.moves.flatten()[index]]
