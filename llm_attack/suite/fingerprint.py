"""Fingerprints of runs: the same fingerprint, the same numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel

from llm_attack.errors import UsageError
from llm_attack.folder import check_same, strangers
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import Instance
from llm_attack.record import versions, write_json
from llm_attack.redact import redacted, without_secrets
from llm_attack.suite.plan import Plan
from llm_attack.suite.store import MARK, STORE

_DIGITS = 16  # of a SHA-256, in hexadecimal


def of_run(
    plan: Plan,
    lm: AttackedHFLM,
    requests: Sequence[Instance],
    tokens: Iterable[Any],
    batches: Sequence[Any],
) -> dict[str, Any]:
    """All that results depend on; secrets are no part of it.

    Args:
        plan: with the settings of attacks and tasks.
        lm: the model.
        requests: of all tasks.
        tokens: what the model reads for them.
        batches: which of them are computed together.
    """
    tasks: dict[str, Any] = {}
    for request in requests:
        content = json.dumps([request.doc_id, request.idx, *request.args]).encode()
        name = str(request.task_name)
        tasks.setdefault(name, hashlib.sha256()).update(content)
    settings = plan.settings() | {"model_args": without_secrets(plan.model_args)}
    settings = redacted({k: v for k, v in settings.items() if k not in ("tasks", "include_path")})
    return {
        **settings,
        **of_model(lm),
        "tasks": {name: digest.hexdigest()[:_DIGITS] for name, digest in tasks.items()},
        "tokens": _digest(map(json.dumps, tokens)),
        "batches": _digest([json.dumps(batches)]),
    }


def of_model(lm: AttackedHFLM) -> dict[str, Any]:
    """The part of the model, and of what computes it."""
    return {
        "weights": weights(lm.model),
        "config": _digest([_config(lm.model)]),
        "dtype": str(lm.model.dtype),
        "device": lm.device.type,
        "versions": versions(),
    }


def weights(model: torch.nn.Module) -> str:
    """Hash of what was loaded: names, types, shapes and bytes of parameters and buffers.

    Not of files: which of a folder's, or of a GGUF file's, are read is for the loader to decide. A
    tensor without data (on the device `meta`) counts by its name, type and shape. Takes 2.5 s
    of one core for 1.07e9 parameters in float32, 1.4 s in bfloat16.
    """
    return _digest(part for item in model.state_dict().items() for part in _parts(*item))


def _config(model: PreTrainedModel) -> str:
    """What the model makes of its weights: all of its configuration that is not a name."""
    known = model.config.to_dict()
    names = ("_name_or_path", "transformers_version", "architectures")
    rest = {key: value for key, value in known.items() if key not in names}
    return json.dumps(rest, default=str, sort_keys=True)


def _parts(name: str, tensor: torch.Tensor) -> Iterator[Any]:
    yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
    if hasattr(tensor, "full_tensor"):  # a part of it is here: the processes put it together
        tensor = tensor.full_tensor()
    if hasattr(tensor, "__tensor_flatten__"):  # of a library of quantisation: tensors inside of it
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{inner}", getattr(tensor, inner))
    elif not tensor.is_meta:
        yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:_DIGITS]


def kept(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of the run in `folder`, finished or not; None: there is none.

    Raises:
        UsageError: there is something else.
    """
    for path in (folder / STORE / MARK, folder / "run.json"):
        try:
            return {**json.loads(path.read_text(encoding="utf-8"))["fingerprint"]}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(
                f"output={folder}: {path.relative_to(folder)} there is not of a run of this"
                " version; must be another folder"
            ) from None
    return None


def check(folder: Path, mark: dict[str, Any]) -> None:
    """Compares `mark` with that of the run in `folder`, if there is one.

    Raises:
        UsageError: it is another run, and the message says what differs; or batches have no mark.
    """
    found = kept(folder)
    if found is None:
        _check_batches(folder)
    else:
        check_same(folder, found, plain(mark))


def keep(folder: Path, mark: dict[str, Any]) -> None:
    """Marks the unfinished run in `folder`, unless it has this mark already.

    Of two runs that start there at once one writes, and the other is refused.

    Raises:
        UsageError: as of `check`.
    """
    _check_batches(folder)
    (folder / STORE).mkdir(parents=True, exist_ok=True)
    with FileLock(folder / STORE / "fingerprint.lock"):
        check(folder, mark)
        if not (folder / STORE / MARK).exists():
            write_json(folder / STORE / MARK, {"fingerprint": mark})


def _check_batches(folder: Path) -> None:
    # in this order: a process writes the mark before anything else
    if strangers(folder / STORE) and not (folder / STORE / MARK).exists():
        raise UsageError(
            f"output={folder}: {STORE} there has no {MARK}, so that nobody knows whose it is; must"
            " be another folder, or be removed by hand"
        )


def plain(mark: dict[str, Any]) -> dict[str, Any]:
    """`mark` as it comes back from a file."""
    return json.loads(json.dumps(mark, default=str))
