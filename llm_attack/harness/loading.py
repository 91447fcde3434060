"""What a checkpoint lacks, or has that no number can come of, is an error or a warning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from llm_attack.errors import UsageError
from llm_attack.failures import one_line

_SHOWN = 3  # names of weights in a message


class Unfit:
    """A transformers Auto class whose `from_pretrained` notes which weights did not fit.

    The loader says so in its log alone, and goes on with layers that it has drawn at random.

    Attributes:
        missing: names of the model's weights that the checkpoint does not have, or not of their
            shape. Weights tied to others are not missing.
        unexpected: names of the checkpoint's weights that the model does not have.
    """

    def __init__(self, auto: Any) -> None:
        self._auto = auto
        self.missing: list[str] = []
        self.unexpected: list[str] = []

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        found = self._auto.from_pretrained(*args, output_loading_info=True, **kwargs)
        if not isinstance(found, tuple):  # code of the model's own
            return found
        model, info = found
        mismatched = (entry[0] for entry in info.get("mismatched_keys", ()))
        self.missing += sorted({*info["missing_keys"], *mismatched})
        self.unexpected += sorted(info["unexpected_keys"])
        return model

    def sentences(self) -> list[str]:
        """What did not fit, a sentence each."""
        parts = {
            "weights that the checkpoint lacks, drawn at random": self.missing,
            "weights of the checkpoint that the model has no place for": self.unexpected,
        }
        return [f"{what}: {len(names)} ({_some(names)})" for what, names in parts.items() if names]


@contextmanager
def noting(lm: Any) -> Iterator[Unfit]:
    """While it lasts, what `lm`, lm-eval's `hf`, loads is noted; random layers are always the same.

    Yields:
        What did not fit.
    """
    auto = lm.AUTO_MODEL_CLASS
    lm.AUTO_MODEL_CLASS = unfit = Unfit(auto)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield unfit
    finally:
        lm.AUTO_MODEL_CLASS = auto


def check_finite(pretrained: Any, model: torch.nn.Module) -> None:
    """Refuses weights that are NaN or infinite, with which every answer is arbitrary.

    Raises:
        UsageError: naming the first of them.
    """
    for name, weight in model.named_parameters():
        # of one byte and less (quantised) there is no isfinite
        if weight.is_floating_point() and not weight.is_meta and weight.itemsize > 1:
            bad = int((~_isfinite(weight)).sum())
            if bad:
                raise UsageError(
                    f"pretrained={pretrained}: {bad} values of the weight {name} are not finite;"
                    " must be a model whose weights are numbers"
                )


def _isfinite(weight: torch.Tensor) -> torch.Tensor:
    """Also of tensors that libraries of quantisation make, which know few of torch's functions."""
    try:
        return weight.isfinite()
    except NotImplementedError:
        values: Any = getattr(weight, "dequantize", None)
        return torch.ones(1, dtype=torch.bool) if values is None else values().isfinite()


def check_float64(model: Any, tokens: torch.Tensor) -> None:
    """Refuses float64 where the model's kernels do; of experts there are some that do not.

    Raises:
        UsageError: naming what was raised, and `experts_implementation=eager` if that mends it.
    """
    if model.dtype != torch.float64:
        return
    error = _refusal(model, tokens)
    if error is None:
        return
    before, hint = getattr(model.config, "_experts_implementation", None), ""
    if before not in (None, "eager"):
        model.set_experts_implementation("eager")
        if _refusal(model, tokens) is None:
            hint = "; must go with experts_implementation=eager"
        model.set_experts_implementation(before)
    raise UsageError(f"dtype=float64: the model refuses it ({one_line(error)}){hint}") from error


def _refusal(model: Any, tokens: torch.Tensor) -> RuntimeError | None:
    try:
        with torch.no_grad():
            model(input_ids=tokens)
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise
        return error
    return None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
