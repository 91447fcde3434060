"""Reports a run's conditions to lm-eval's own loggers: Weights & Biases, Trackio and the hub.

Each condition is a separate evaluation, like one call of `lm_eval`. In W&B and Trackio it is a run
with the name of the condition, in the group of the model. On the hub it is a separate model.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from lm_eval import loggers

from llm_attack.base.errors import UsageError, hint, invalid
from llm_attack.base.failures import Attempts, one_line
from llm_attack.harness.arguments import check_string, simple_parse_args_string
from llm_attack.harness.judge import as_json

# Our arguments, the classes of lm-eval behind them, and the packages that these need.
CLASSES = {
    "wandb_args": ("WandbLogger", "wandb"),
    "trackio_args": ("TrackioLogger", "trackio"),
    "hf_hub_log_args": ("EvaluationTracker", "huggingface_hub"),
}
_PAIRS = "key=value,..., such as project=robustness"
_STEP = "step"  # an argument that lm-eval reads itself


class Loggers:
    """The loggers that a user asks for.

    Args:
        model: name of the model.
        given: the typed value of each key of `CLASSES`; None: not asked for.

    Raises:
        UsageError: a value cannot be read, its logger is not installed, or the logger refuses it.
    """

    def __init__(self, model: str, given: Mapping[str, str | None]) -> None:
        self.model = model
        self.given = {name: _parsed(name, text) for name, text in given.items() if text is not None}
        if "hf_hub_log_args" in self.given and os.environ.get("HF_TOKEN"):  # lm_eval does the same
            self.given["hf_hub_log_args"].setdefault("token", os.environ["HF_TOKEN"])
        for name, arguments in self.given.items():
            _check(name, arguments)

    def log(self, results: Mapping[str, dict[str, Any]], group: str = "") -> list[str]:
        """Gives lm-eval's results under each condition to all loggers.

        Args:
            results: results by condition, with `samples` if they are known.
            group: the group in W&B and Trackio, unless the user gives one; empty: the model's name.

        Returns:
            A line for each failure.
        """
        attempts = Attempts()
        for condition, result in results.items():
            of_samples = result.get("samples", {})
            for name, arguments in self.given.items():
                with attempts(f"{name}, of {condition}"):
                    log = _hub if name == "hf_hub_log_args" else _tracked
                    log(
                        name,
                        self._named(name, arguments, condition, group),
                        _plain(result),
                        of_samples,
                    )
        return attempts.lines

    def _named(
        self, name: str, arguments: Mapping[str, Any], condition: str, group: str
    ) -> dict[str, Any]:
        if name == "hf_hub_log_args":
            return {**arguments, "model": f"{group or self.model}@{condition}"}
        prefix = f"{arguments['name']}-" if "name" in arguments else ""
        return {"group": group or self.model, **arguments, "name": f"{prefix}{condition}"}


def _parsed(name: str, text: str) -> dict[str, Any]:
    parts = [part for part in text.split(",") if part.strip()]
    if not parts or any("=" not in part for part in parts):
        raise invalid(name, text, _PAIRS)
    try:
        check_string(text)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    return dict(simple_parse_args_string(text))


def _check(name: str, arguments: Mapping[str, Any]) -> None:
    kind, package = CLASSES[name]
    shown = ",".join(f"{k}={v}" for k, v in arguments.items() if k != "token")
    if not hasattr(loggers, kind):
        raise UsageError(f"{name}={shown}: needs a later lm-eval, because this one has no {kind}")
    if find_spec(package) is None:
        raise UsageError(f"{name}={shown}: needs the package {package}; pip install {package}")
    known = _known(name)
    unknown = next((key for key in arguments if key not in known), None)
    if unknown is not None:
        raise UsageError(
            f"{name}={unknown}=...: must be an argument of {_called(name)}{hint(unknown, known)}"
        )
    try:
        if name == "hf_hub_log_args":
            loggers.EvaluationTracker(**arguments)
        if name == "wandb_args" and not _is_logged_in(arguments):
            raise ValueError("no API key is configured; WANDB_MODE=offline needs none")
    except Exception as error:  # a server may check the identity of the user
        raise UsageError(
            f"{name}={shown}: is refused by {_called(name)} ({one_line(error)})"
        ) from (error)


def _is_logged_in(arguments: Mapping[str, Any]) -> bool:
    """Whether W&B accepts a run without asking for a key in the terminal."""
    import wandb

    mode = arguments.get("mode") or os.environ.get("WANDB_MODE") or "online"
    if mode in ("offline", "disabled", "dryrun"):
        return True
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return bool(wandb.api.api_key)  # earlier releases


def _called(name: str) -> str:
    kind, package = CLASSES[name]
    return f"lm-eval's {kind}" if name == "hf_hub_log_args" else f"{package}.init"


def _known(name: str) -> list[str]:
    kind, package = CLASSES[name]
    if name == "hf_hub_log_args":
        return [*inspect.signature(getattr(loggers, kind)).parameters]
    module = __import__(package)
    return [*inspect.signature(module.init).parameters, _STEP]


def _plain(result: Mapping[str, Any]) -> dict[str, Any]:
    """Results without samples, functions, secrets and paths of this machine."""
    plain: dict[str, Any] = json.loads(as_json(dict(result)))
    return plain


def _tracked(
    name: str, arguments: dict[str, Any], results: dict[str, Any], samples: Mapping[str, Any]
) -> None:
    """Writes a run of W&B or Trackio."""
    logger = getattr(loggers, CLASSES[name][0])(arguments)
    try:
        logger.post_init(results)
        logger.log_eval_result()
        if samples:
            logger.log_eval_samples(dict(samples))
    finally:
        finish: Callable[[], None] = getattr(logger, "finish", None) or logger.run.finish
        finish()


def _hub(
    name: str, arguments: dict[str, Any], results: dict[str, Any], samples: Mapping[str, Any]
) -> None:
    """Writes the files of `lm_eval`, into `output_path` if it is given, and to the hub."""
    model = arguments.pop("model")
    with tempfile.TemporaryDirectory() as nowhere, _failures() as failed:
        tracker = loggers.EvaluationTracker(**{"output_path": nowhere, **arguments})
        tracker.general_config_tracker.log_experiment_args(
            model_source="attacked-hf",
            model_args={"pretrained": model},
            system_instruction=None,
            chat_template=None,
            fewshot_as_multiturn=False,
        )
        tracker.save_results_aggregated(results=results, samples=dict(samples) or None)
        for task, of_task in samples.items():
            tracker.save_results_samples(task_name=task, samples=[dict(s) for s in of_task])
        if tracker.push_results_to_hub or tracker.push_samples_to_hub:
            tracker.recreate_metadata_card()
    if failed:
        raise OSError("; ".join(failed))


@contextmanager
def _failures() -> Iterator[list[str]]:
    """Collects failures of lm-eval's tracker, which logs them and raises nothing."""
    log = logging.getLogger(loggers.EvaluationTracker.__module__)
    failed: list[str] = []

    class Handler(logging.Handler):
        """Keeps each warning, and the next line, which has the reason."""

        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("Could not"):
                failed.append(text)
            elif failed and record.levelno == logging.INFO and "(" not in failed[-1]:
                failed[-1] += f" ({text})"

    handler, level = Handler(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    propagated, log.propagate = log.propagate, False
    try:
        yield failed
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagated
