"""Checks before and after a model is loaded: arguments, packages, weights that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub.errors import HFValidationError
from transformers import BitsAndBytesConfig

from llm_attack.base.device import check_device
from llm_attack.base.errors import UsageError, closest, invalid
from llm_attack.base.failures import one_line
from llm_attack.harness.gguf import names_in
from llm_attack.harness.patches import replaced
from llm_attack.harness.quantised import dequantised
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.network.pairs import read

_SHOWN = 3  # number of weights that a message names

# Arguments of `hf`, and the package that each needs.
_PACKAGES = {"peft": "peft", "autogptq": "auto_gptq", "gptqmodel": "gptqmodel"}
_EXCLUSIVE = [
    *(("peft", "delta"), ("autogptq", "gptqmodel"), ("tp_plan", "parallelize")),
    *((other, "dequantize") for other in ("autogptq", "gptqmodel", "tp_plan")),
]
_BITS = ("load_in_4bit", "load_in_8bit")
_OF_BITS = ("bnb_4bit_", "llm_int8_")  # prefixes of the options for these

# Names of modules for images and sound begin so in checkpoints that also read text.
_MEDIA = ("audio", "image", "multi_modal", "multimodal", "speech", "video", "vision", "visual")

# Arguments that `hf` silently ignores if the model is already loaded.
_OF_LOADING = [
    *("delta", "dequantize", "dtype", "gguf_file", "parallelize", "peft", "quantization_config"),
    *("subfolder", "tp_plan", *_BITS),
]


def check_arguments(source: Any, arguments: dict[str, Any]) -> None:
    """Refuses arguments that `hf` could not use or would ignore, before anything is loaded.

    Raises:
        UsageError: the message names the argument.
    """
    nothing = (type(None), bool, str)
    given = {k: v for k, v in arguments.items() if not isinstance(v, nothing) or v}
    if not isinstance(source, str):
        same = ("auto", str(source.dtype), str(source.dtype).removeprefix("torch."))
        for name in _OF_LOADING:
            if name in given and not (name == "dtype" and str(given[name]) in same):
                raise UsageError(
                    f"{name}={given[name]}: must be left out if pretrained is a loaded model"
                )
    for one, other in _EXCLUSIVE:
        if one in given and other in given:
            raise UsageError(f"{other}={given[other]}: must not be given with {one}={given[one]}")
    for name, package in _PACKAGES.items():
        if name in given:
            _check_package(f"{name}={given[name]}", package)
    if arguments.get("enable_thinking") and arguments.get("think_end_token") is None:
        raise UsageError(
            "enable_thinking=True: needs think_end_token, the token that ends the thinking"
        )


def settle_loaded(model: Any, arguments: dict[str, Any]) -> None:
    """Sets the arguments of a loaded model: its device, and a copy of its tokenizer.

    The tokenizer is copied because lm-eval adds a padding token if there is none.

    Raises:
        UsageError: another device was given.
    """
    if isinstance(model, str):
        return
    given = arguments.get("device")
    if given is not None:
        check_device(given)
        device = torch.device(given)
        if device.type != model.device.type or device.index not in (None, model.device.index):
            raise UsageError(
                f"device={given}: must be left out, or be {model.device}, the device of the"
                " loaded model"
            )
    arguments["device"] = str(model.device)
    if "tokenizer" in arguments and not isinstance(arguments["tokenizer"], str):
        arguments["tokenizer"] = copy.deepcopy(arguments["tokenizer"])


@contextmanager
def untouched(source: Any) -> Iterator[None]:
    """While the context lasts, lm-eval's `hf` does not change the mode or tie weights of a model.

    If the configuration says so, `hf` would replace the output layer by the embedding, even if the
    caller has trained them separately.
    """
    if isinstance(source, str):
        yield
        return
    with frozen(source):
        source.tie_weights = lambda: None
        try:
            yield
        finally:
            del source.tie_weights


def quantization(arguments: dict[str, Any]) -> Any:
    """Removes the arguments about quantisation from `arguments`, and makes one config of them.

    From release 5 on, transformers accepts only `quantization_config`. Here `load_in_4bit=True` and
    `load_in_8bit=True` still work, with the options that belong to them.

    Returns:
        `quantization_config`, or None.

    Raises:
        UsageError: two of them are given, or an option without them; or bitsandbytes is missing.
    """
    given = arguments.pop("quantization_config", None)
    bits = {name: arguments.pop(name) for name in _BITS if name in arguments}
    for name, value in bits.items():
        if not isinstance(value, bool):
            raise invalid(name, value, ("True", "False"))
    wanted = [f"{name}=True" for name, value in bits.items() if value]
    options = {name: arguments.pop(name) for name in [*arguments] if name.startswith(_OF_BITS)}
    if options and not wanted:
        name, value = next(iter(options.items()))
        raise UsageError(f"{name}={value}: needs load_in_4bit=True or load_in_8bit=True")
    if not wanted:
        return given
    if len(wanted) > 1 or given is not None:
        other = wanted[1] if wanted[1:] else "quantization_config"
        raise UsageError(f"{other}: must not be given with {wanted[0]}")
    _check_package(wanted[0], "bitsandbytes")
    return BitsAndBytesConfig(**bits, **options)


def _check_package(argument: str, package: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"{argument}: needs the package {package}, which is not installed")


def not_loaded(given: dict[str, Any], configured: bool, error: Exception) -> UsageError:
    """The error for a model that cannot be loaded. It names the exception, and guesses no cause.

    Args:
        given: the arguments, `pretrained` first.
        configured: whether the model's configuration could be read, so the model exists.
        error: the exception.
    """
    pretrained, gguf_file = given["pretrained"], given.get("gguf_file")
    shown = {k: v for k, v in given.items() if k not in ("device", "batch_size") and v is not None}
    plain = (str, int, float, dict)  # a model or a tokenizer is shown by its class
    text = ", ".join(
        f"{name}={value if isinstance(value, plain) else type(value).__name__}"
        for name, value in shown.items()
    )
    text += f": cannot be loaded ({one_line(error)})"
    there = names_in(pretrained)
    path = Path(str(pretrained))
    if gguf_file is not None:
        if shown.keys() <= {"pretrained", "gguf_file"}:
            text += (
                "; must be a whole GGUF file of an architecture and quantisation that transformers"
                " reads"
            )
    elif there and not configured:
        text += f"; the folder has GGUF files: gguf_file={there[0]}"
    elif not path.is_dir() and not configured and isinstance(error, (OSError, HFValidationError)):
        text += (
            "; must be a model id on a hub that can be reached, a local folder, or demo, the"
            " bundled model (pretrained=demo)"
        )
        meant = closest(path.name, names_in(path.parent))
        text += f"; did you mean {path.with_name(meant)}?" if meant else ""
    return UsageError(text)


class Unfit:
    """A transformers Auto class whose `from_pretrained` notes which weights did not fit.

    The loader only logs them, and continues with random layers.

    Attributes:
        missing: names of the model's weights that the checkpoint does not have, or has in another
            shape. Weights that are tied to others are not missing.
        unexpected: names of the checkpoint's weights that the model does not have.
        dequantize: whether full-precision weights replace quantised ones.
    """

    def __init__(self, auto: Any) -> None:
        self._auto = auto
        self.dequantize = False
        self.missing: list[str] = []
        self.unexpected: list[str] = []

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        loaded = self._auto.from_pretrained(*args, output_loading_info=True, **kwargs)
        if not isinstance(loaded, tuple):  # the model's own code
            return dequantised(loaded) if self.dequantize else loaded
        model, info = loaded
        mismatched = (entry[0] for entry in info.get("mismatched_keys", ()))
        self.missing += sorted({*info["missing_keys"], *mismatched})
        self.unexpected += sorted(info["unexpected_keys"])
        return dequantised(model) if self.dequantize else model

    def left_out(self, config: Any, model: Any) -> list[str]:
        """A sentence on the weights for images and sound, if the model is only the text part.

        They count as unexpected no longer. lm-eval's `hf` loads such a part of some checkpoints.

        Args:
            config: the configuration of the checkpoint.
            model: the loaded model.
        """
        kinds = [f"{kind}_config" for kind in ("audio", "vision")]
        if not any(hasattr(config, kind) and not hasattr(model.config, kind) for kind in kinds):
            return []
        media = [n for n in self.unexpected if any(p.startswith(_MEDIA) for p in n.split("."))]
        self.unexpected = [name for name in self.unexpected if name not in media]
        text = f"only the text part of the checkpoint was loaded, without {len(media)} weights"
        return [f"{text} ({_some(media)})"] if media else []

    def sentences(self) -> list[str]:
        """The weights that did not fit, one sentence for each kind."""
        parts = {
            "weights that are missing in the checkpoint and were drawn at random": self.missing,
            "weights of the checkpoint that the model does not use": self.unexpected,
        }
        return [f"{what}: {len(names)} ({_some(names)})" for what, names in parts.items() if names]


@contextmanager
def noting(lm: Any) -> Iterator[Unfit]:
    """While the context lasts, notes which weights of `lm`, lm-eval's `hf`, do not fit.

    Random layers are the same in every run.

    Yields:
        The weights that did not fit.
    """
    unfit = Unfit(lm.AUTO_MODEL_CLASS)
    with replaced(lm, AUTO_MODEL_CLASS=unfit), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield unfit


def check_finite(pretrained: Any, model: torch.nn.Module) -> None:
    """Refuses weights that are NaN or infinite, because every answer would be arbitrary.

    Raises:
        UsageError: the message names the first of them.
    """
    for name, weight in model.named_parameters():
        # types of one byte or less (quantised) have no isfinite
        if weight.is_floating_point() and not weight.is_meta and weight.itemsize > 1:
            bad = int((~_isfinite(weight)).sum())
            if bad:
                raise UsageError(
                    f"pretrained={pretrained}: {bad} values of the weight {name} are NaN or"
                    " infinite; must be a model with finite weights"
                )


def _isfinite(weight: torch.Tensor) -> torch.Tensor:
    """`isfinite` that also works for quantised tensors, which support few functions of torch."""
    try:
        return weight.isfinite()
    except NotImplementedError:
        values: Any = getattr(weight, "dequantize", None)
        return torch.ones(1, dtype=torch.bool) if values is None else values().isfinite()


def check_float64(model: Any, tokens: torch.Tensor) -> None:
    """Refuses float64 if the model's kernels do not support it, as some kernels for experts.

    Raises:
        UsageError: the message names the error, and `experts_implementation=eager` if that helps.
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
            hint = "; needs experts_implementation=eager"
        model.set_experts_implementation(before)
    raise UsageError(f"dtype=float64: the model raises {one_line(error)}{hint}") from error


def _refusal(model: Any, tokens: torch.Tensor) -> RuntimeError | None:
    try:
        with torch.no_grad():
            read(model, tokens)
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise
        return error
    return None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
