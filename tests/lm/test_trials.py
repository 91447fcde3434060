"""What tests share: a changed model is noticed, and is tried as every other is."""

import pytest
import torch
from trials import _identity


def test_a_shared_model_that_changed_is_noticed(reused):
    how = {"batch_size": 7}  # of a model that no other test has
    reused(attack="none", **how).model.lm_head.weight.data[0] += 1
    with pytest.raises(AssertionError, match="an earlier test changed the model"):
        reused(attack="fgsm", **how)


def test_models_that_differ_are_others(make):
    ways = {}, {}, {"attn_implementation": "eager"}
    one, same, eager = (make(attack="fgsm", **how) for how in ways)
    first = _identity(one.engine.scorer)
    assert first == _identity(same.engine.scorer) and first[0] is not None
    assert _identity(eager.engine.scorer) != first
    with torch.no_grad():
        same.model.lm_head.weight[0] += 1
    assert _identity(same.engine.scorer) != first
    one.model.lm_head.register_forward_hook(lambda *_: None)
    assert _identity(one.engine.scorer) == (None,)
