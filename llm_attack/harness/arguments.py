"""Checks the names and values of arguments, because lm-eval's `hf` ignores wrong ones."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_attack.base import declare
from llm_attack.base.declare import SettingSpec
from llm_attack.base.errors import UsageError, did_you_mean, invalid
from llm_attack.lm.settings import AttackSettings, EngineSettings

__all__ = ["check_names", "simple_parse_args_string"]

# Keyword arguments that `from_pretrained` reads without naming them in its signature.
_FROM_PRETRAINED = [
    "adapter_kwargs",
    "adapter_name",
    "attn_implementation",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "code_revision",
    "device_map",
    "device_mesh",
    "experts_implementation",
    "key_mapping",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
    "load_in_4bit",
    "load_in_8bit",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_state_dict",
    "proxies",
    "quantization_config",
    "resume_download",
    "state_dict",
    "torch_dtype",
    "tp_size",
    "use_auth_token",
    "use_flash_attention_2",
    "use_kernels",
    "variant",
]

_DTYPES = ("bfloat16", "float16", "float32", "float64", "half", "float", "double")
_COUNTS = ("max_length", "max_batch_size")
_TEXTS = ("delta", "gguf_file", "offload_folder", "peft", "subfolder")
_BATCH_SIZE = re.compile(r"[1-9][0-9]*|auto(:[0-9]+(\.[0-9]+)?)?")
_ROWS = "an integer, 1 or more, or auto"
_BACKENDS = ("default", "causal", "seq2seq")


def known_names() -> list[str]:
    """All arguments of `attacked-hf`, except the attributes of the model's own config."""
    names = [*declare.names(AttackSettings), *declare.names(EngineSettings)]
    for function in (HFLM.__init__, PreTrainedModel.from_pretrained):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                names.append(name)
    return [n for n in dict.fromkeys([*names, *_FROM_PRETRAINED]) if n not in ("self", "cls")]


def check_names(names: Iterable[str], config: PretrainedConfig | None = None) -> None:
    """Refuses unknown argument names.

    Args:
        names: names of the arguments that were given.
        config: config of the model. Arguments may override its attributes. If it is not loaded yet,
            a name is refused only if it looks like a known one.

    Raises:
        UsageError: the message names the argument and the closest known one.
    """
    known = known_names()
    for name in names:
        if name in known or (config is not None and hasattr(config, name)):
            continue
        meant = get_close_matches(name, known, n=1, cutoff=0.75)
        if not meant and config is None:
            continue
        hint = did_you_mean(meant[0] if meant else None)
        raise UsageError(
            f"{name}: is no argument of attacked-hf, hf, from_pretrained or the model's"
            f" configuration{hint}"
        )


def check_values(arguments: dict[str, Any]) -> None:
    """Refuses values that lm-eval's `hf` would misread, or would fail at only later.

    Raises:
        UsageError: the message names the argument and the allowed values.
    """
    for name, parameter in inspect.signature(HFLM.__init__).parameters.items():
        value = arguments.get(name)
        if name == "batch_size" and name in arguments and value is None:
            raise invalid(name, value, _ROWS)
        if value is None or name == "trust_remote_code":  # see `trusted`
            continue
        right, allowed = _judged(name, value, str(parameter.annotation))
        if not right:
            raise invalid(name, value, allowed)


def _judged(name: str, value: Any, annotation: str) -> tuple[bool, str | Sequence[str]]:
    """Whether a value of an argument of `hf` is allowed, and the allowed values."""
    if name == "batch_size":
        plain = isinstance(value, (int, str))
        return plain and _BATCH_SIZE.fullmatch(str(value)) is not None, _ROWS
    if name == "tokenizer":
        right = isinstance(value, (str, PreTrainedTokenizerBase))
        return right, "a name, a folder or a tokenizer of transformers"
    if name in _TEXTS:
        return isinstance(value, str), "a text"
    if name == "chat_template_args":
        return isinstance(value, dict), "a dictionary"
    if name.endswith("dtype"):
        dtypes = [*_DTYPES, *["auto"] * (name == "dtype")]
        return str(value).removeprefix("torch.") in dtypes, dtypes
    if name in _COUNTS:
        return SettingSpec("", int, minimum=1).allows(value), "an integer, 1 or more"
    if name == "backend":
        return value in _BACKENDS, _BACKENDS
    boolean = "bool" in annotation and "str" not in annotation
    return not boolean or isinstance(value, bool), ("True", "False")


def check_string(arguments: str) -> None:
    """Refuses parts of a string of arguments that lm-eval reads otherwise than a person does.

    These are numbers that only Python reads as numbers, like `steps=1_0`, and repeated names.

    Raises:
        UsageError: the message names the argument.
    """
    pairs = [part.partition("=") for part in arguments.split(",") if part.strip()]
    given = [declare.underscored(name.strip()) for name, _, _ in pairs]
    for name, (_, _, value) in zip(given, pairs, strict=True):
        if given.count(name) > 1:
            raise UsageError(f"{name}={value}: must be given only once")
        if not declare.is_plain(value.strip()) and _is_number(value):
            raise invalid(name, value, "a number in plain digits, such as 10")


def _is_number(text: str) -> bool:
    try:
        return bool(text.isnumeric() or [float(text)])
    except ValueError:
        return False


def trusted(value: Any) -> bool:
    """Whether a value of `trust_remote_code`, which may be a text, means yes.

    Raises:
        UsageError: it means neither yes nor no.
    """
    text = str(value).lower()
    if text not in ("true", "1", "yes", "false", "0", "no", "none"):
        raise invalid("trust_remote_code", value, ("True", "False"))
    return text in ("true", "1", "yes")
