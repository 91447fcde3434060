"""Checks that an attack changes nothing of a model."""

from contextlib import contextmanager

import torch


def state(model):
    """All that an attack must leave alone: hooks and mode, flags and gradients, tensors."""
    hooks = [
        (name, dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training)
        for name, m in model.named_modules()
    ]
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return hooks, flags, {name: t.detach().clone() for name, t in tensors.items()}


@contextmanager
def unchanged(model):
    """Asserts it of what is done inside, also if that raises."""
    before = state(model)
    try:
        yield
    finally:
        after = state(model)
        assert before[:2] == after[:2]
        assert before[2].keys() == after[2].keys()
        assert all(torch.equal(t, after[2][name]) for name, t in before[2].items())
