"""Steps before a model is loaded: they find its kind, set the device, and set how errors appear."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from llm_attack.base.device import check_device
from llm_attack.base.errors import UsageError, invalid, report_usage_errors


def source_of(pretrained: Any) -> Any:
    """Turns `pretrained` into a text or a model.

    Raises:
        UsageError: it is not a text, path or model; or its weights do not support gradients.
    """
    if isinstance(pretrained, (str, os.PathLike)):
        return os.fspath(pretrained)
    if not isinstance(pretrained, torch.nn.Module) or not hasattr(pretrained, "config"):
        raise invalid("pretrained", pretrained, "a model id, a path or a model of transformers")
    if any(weight.is_inference() for weight in pretrained.parameters()):
        raise UsageError(
            "pretrained: the model was made under torch.inference_mode, so it has no gradients;"
            " must be made outside of it"
        )
    return pretrained


def set_device(arguments: dict[str, Any]) -> None:
    """Sets the argument `device` if it is not given, and checks it."""
    if arguments.get("device") is None:
        arguments["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    device = arguments["device"] = str(arguments["device"])
    # lm-eval's command line sets cuda:0 by default
    if device != "cuda:0" or not _lm_eval_runs() or any(device in word for word in sys.argv):
        check_device(device)


def report_if_lm_eval_runs() -> None:
    """Shows errors in one line without a traceback, if this process is lm-eval's command."""
    if _lm_eval_runs():
        report_usage_errors()


def _lm_eval_runs() -> bool:
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    return "lm_eval.__main__" in sys.modules or getattr(main, "name", None) == "lm_eval.__main__"
