"""Weights from libraries of quantisation: special tensors that support few functions."""

import pytest
import torch

from llm_attack.base.errors import UsageError
from llm_attack.harness.hashes import weights
from llm_attack.harness.loading import check_finite


class Packed(torch.Tensor):
    """Integers and a scale, as of torchao; it can be detached and multiplied with, no more."""

    @staticmethod
    def __new__(cls, values, scale):
        shape = values.shape
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def dequantize(self):
        return self.values * self.scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"Packed: {function}")


def layer(values, scale):
    made = torch.nn.Module()
    packed = Packed(torch.tensor(values, dtype=torch.int8), torch.tensor(scale))
    made.weight = torch.nn.Parameter(packed, requires_grad=False)
    return made


def test_finite_or_not():
    check_finite("it", layer([1, 2], 0.5))
    with pytest.raises(UsageError, match="2 values of the weight weight are NaN or infinite"):
        check_finite("it", layer([1, 2], float("nan")))


def test_hashes():
    same, other, scaled = layer([1, 2], 0.5), layer([1, 3], 0.5), layer([1, 2], 0.25)
    assert weights(same) == weights(layer([1, 2], 0.5))
    assert len({weights(of) for of in (same, other, scaled)}) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(make, build, config):
    """Its gradients are those of its functions."""
    quantisation = pytest.importorskip("torchao.quantization")
    model = make(attack="none").model
    quantisation.quantize_(model, getattr(quantisation, config)())
    lm = make(pretrained=model, tokenizer=make(attack="none").tokenizer, attack="fgsm")
    assert lm.warnings == []
    weights(lm.model)
    requests = build("demo_piqa", 2).instances
    clean = make(pretrained=model, tokenizer=lm.tokenizer, attack="none")
    attacked, plain = (of.loglikelihood(requests, disable_tqdm=True) for of in (lm, clean))
    assert sum(a[0] for a in attacked) < sum(a[0] for a in plain) - 1


@pytest.mark.filterwarnings("ignore")
def test_torchao_without_a_gradient(make):
    quantisation = pytest.importorskip("torchao.quantization")
    model = make(attack="none").model
    quantisation.quantize_(model, quantisation.Int8DynamicActivationInt8WeightConfig())
    tokenizer = make(attack="none").tokenizer
    with pytest.raises(UsageError, match=r"attack=fgsm: cannot .* fails \(.*does not require grad"):
        make(pretrained=model, tokenizer=tokenizer, attack="fgsm")
