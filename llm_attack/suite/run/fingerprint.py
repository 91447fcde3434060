"""Fingerprints of runs: runs with equal fingerprints have equal numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from llm_attack.attacks import ATTACKS
from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.base.folder import check_same, strangers
from llm_attack.base.record import versions, write_json
from llm_attack.base.redact import redacted, without_secrets
from llm_attack.harness import hashes
from llm_attack.harness.hashes import DIGITS, digest
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import Instance
from llm_attack.harness.texts import GENERATE
from llm_attack.lm.losses import LOSSES
from llm_attack.lm.units import unit_source
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.store import MARK, STORE


def of_run(
    plan: Plan,
    lm: AttackedHFLM,
    requests: Sequence[Instance],
    tokens: Iterable[Any],
    batches: Sequence[Any],
) -> dict[str, Any]:
    """Everything that the results of a run depend on, without secrets.

    Args:
        plan: the settings of attacks and tasks.
        lm: the model.
        requests: the requests of all tasks.
        tokens: the tokens that the model reads for them.
        batches: the requests that are computed together.
    """
    settings = plan.settings() | {"model_args": without_secrets(plan.model_args)}
    settings = redacted({k: v for k, v in settings.items() if k not in ("tasks", "include_path")})
    own = {name: ATTACKS[name].source for name in plan.attacks if name in ATTACKS}
    own[plan.loss] = LOSSES[plan.loss].source
    units = {condition.amplitude.epsilon.unit for condition in plan.conditions}
    own |= {str(unit): unit_source(unit) for unit in sorted(map(str, units))}
    own |= {"perturbation": "" if plan.fixed is None else plan.fixed.source}
    own = {name: source for name, source in own.items() if source}
    generates = any(request.request_type == GENERATE for request in requests)
    return {
        **settings,
        **({"sources": own} if own else {}),  # source code of the user's functions
        **({"generation": hashes.generation(lm.model)} if generates else {}),
        **of_model(lm),
        "tasks": of_tasks(requests),
        "tokens": digest(map(json.dumps, tokens)),
        "batches": digest([json.dumps(batches)]),
    }


def of_tasks(requests: Sequence[Instance]) -> dict[str, str]:
    """A hash of the prompts and choices of each task."""
    tasks: dict[str, Any] = {}
    for request in requests:
        content = json.dumps([request.doc_id, request.idx, *request.args]).encode()
        name = str(request.task_name)
        tasks.setdefault(name, hashlib.sha256()).update(content)
    return {name: content.hexdigest()[:DIGITS] for name, content in tasks.items()}


def of_model(lm: AttackedHFLM) -> dict[str, Any]:
    """The part of a fingerprint about the model and the software and device that run it."""
    return {**hashes.of_model(lm), "device": lm.device.type, "versions": versions()}


def kept(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of the finished or unfinished run in `folder`; None if there is no run.

    Raises:
        UsageError: a file is not the record of a run.
    """
    for path in (folder / STORE / MARK, folder / "run.json"):
        try:
            return {**json.loads(path.read_text(encoding="utf-8"))["fingerprint"]}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"output={folder}: {path.relative_to(folder)} in this folder is not the record of"
                f" a run ({one_line(error)}); must be another folder"
            ) from error
    return None


def check(folder: Path, mark: dict[str, Any]) -> None:
    """Compares `mark` with the fingerprint of the run in `folder`, if there is one.

    Raises:
        UsageError: it is another run (the message names the differences), or batches have no
            fingerprint.
    """
    stored = kept(folder)
    if stored is None:
        _check_batches(folder)
    else:
        check_same(folder, stored, plain(mark))


def keep(folder: Path, mark: dict[str, Any]) -> None:
    """Writes the fingerprint of the unfinished run into `folder`, unless the folder has it.

    If two runs start in one folder at the same time, one writes and the other is refused.

    Raises:
        UsageError: see `check`.
    """
    _check_batches(folder)
    (folder / STORE).mkdir(parents=True, exist_ok=True)
    with FileLock(folder / STORE / "fingerprint.lock"):
        check(folder, mark)
        if not (folder / STORE / MARK).exists():
            write_json(folder / STORE / MARK, {"fingerprint": mark})


def _check_batches(folder: Path) -> None:
    # in this order, because a process writes the mark before anything else
    if strangers(folder / STORE) and not (folder / STORE / MARK).exists():
        raise UsageError(
            f"output={folder}: {STORE} in this folder has no {MARK}, so its run is unknown; must"
            " be another folder, or remove the file by hand"
        )


def plain(mark: dict[str, Any]) -> dict[str, Any]:
    """`mark` in the form that a JSON file gives back."""
    read: dict[str, Any] = json.loads(json.dumps(mark, default=str))
    return read
