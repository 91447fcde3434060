"""Answers a run's batches on the workers of a Ray cluster. Only this process judges and writes.

A worker is an actor that holds the model. It knows nothing of tasks, folders or files. Ray places
the actors, reports when one dies, and carries batches and answers. So machines share only the
network.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import torch

from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import ProcessDied, held, look, one_line
from llm_attack.base.folder import differences
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.engine.engine import BatchResult
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.settings import AttackSettings
from llm_attack.suite.plan import Plan
from llm_attack.suite.run import fingerprint
from llm_attack.suite.run.load import load_model
from llm_attack.suite.run.work import AnyBatch

PAUSE = 1.0  # seconds, at most, between two looks at the size of the cluster
LONGEST = 30.0  # seconds that the head of a cluster may be gone, or an answer may take to arrive
DEATHS = 3  # tolerated deaths for each worker, in a row and without a finished batch in between
_SHARE = 0.9  # of a GPU for each worker; a driver that runs as a job gets the rest


def threads_of(lm: AttackedHFLM) -> int:
    """The number of torch's threads for the batches of a model in this process."""
    return 1 if lm.engine_settings.deterministic else torch.get_num_threads()


class Worker:
    """The model of a run on one device.

    Args:
        plan: the plan, with the device.
        conditions: the conditions of the run.
    """

    def __init__(self, plan: Plan, conditions: Sequence[AttackSettings]) -> None:
        self.plan, self.conditions = plan, conditions

    @cached_property
    def lm(self) -> AttackedHFLM:
        """The model. The first access loads it and raises the errors of loading."""
        lm = load_model(self.plan)
        lm.use(*self.conditions)
        lm.check_gradient()  # the kernels of this device may differ
        return lm

    def ready(self) -> tuple[dict[str, Any], int]:
        """The model's part of the fingerprint, and the number of threads."""
        return fingerprint.of_model(self.lm), threads_of(self.lm)

    def answer(self, batch: AnyBatch) -> BatchResult:
        """The answers to a batch."""
        with frozen(self.lm.model):
            ((_, answers),) = self.lm.answers([batch])
        return answers


@contextmanager
def cluster(plan: Plan) -> Iterator[None]:
    """Connects to the cluster that the plan names, or starts one here. Does nothing without `ray`.

    Raises:
        UsageError: Ray is not installed, the cluster does not answer, or its devices differ from
            those of this machine.
    """
    if plan.ray is None:
        yield
        return
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"ray={plan.ray}: needs Ray ({one_line(error)}); pip install llm-attack[ray]"
        ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        at = urlsplit(f"//{plan.ray}")
        if at.port:  # Ray itself would try for minutes
            socket.create_connection((str(at.hostname), at.port), timeout=10).close()
    except (ValueError, OSError) as error:
        raise _no_cluster(plan, error) from None
    try:
        try:
            with held(), _handlers_kept():
                ray.init(plan.ray, logging_level="ERROR", log_to_driver=False)
        except (RuntimeError, ValueError, OSError) as error:
            raise _no_cluster(plan, error) from None
        _check_devices(plan, bool(ray.cluster_resources().get("GPU")))
        yield
    finally:
        with held():
            ray.shutdown()


def _no_cluster(plan: Plan, error: Exception) -> UsageError:
    return invalid("ray", plan.ray, f"a cluster that can be reached ({one_line(error)})")


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restores the handler of SIGTERM after `ray.init`, which makes the signal a SystemExit."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
    finally:
        if before is not None and signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)


def _check_devices(plan: Plan, there: bool) -> None:
    here = torch.cuda.is_available() if plan.device is None else plan.device.startswith("cuda")
    if here and not there:
        raise UsageError(
            f"ray={plan.ray}: has no GPU; must be a cluster with GPUs, or give device=cpu"
        )
    if there and not here and plan.device is None:
        raise UsageError(
            f"ray={plan.ray}: has GPUs, but this machine, which plans the run, has none; must be"
            " started on a machine with a GPU, or with device=cpu"
        )


def answers(
    plan: Plan,
    lm: AttackedHFLM,
    todo: Iterable[AnyBatch],
    say: Callable[[str], None],
    threads: set[int],
) -> Iterator[tuple[AnyBatch, BatchResult]]:
    """Yields batches with the answers of the cluster's workers, in the order in which they finish.

    There is one worker for every GPU of the cluster (on CPUs, for every core), or as many as
    `ray_workers` says. New machines get workers too. A dead worker is replaced when there is room,
    and any free worker repeats its batch. Ray's own restarts would let the batch wait for that
    room.

    Args:
        plan: the plan of the run.
        lm: its model. This process frees its weights.
        todo: the batches.
        say: gets messages for the user.
        threads: gets the numbers of threads of the workers.

    Raises:
        UsageError: a worker has another model, or raises this error itself.
        ProcessDied: workers die without a finished batch, or Ray itself is gone.
    """
    import ray
    import ray.exceptions

    waiting = deque(todo)
    if not waiting:
        return
    model, gpu = fingerprint.of_model(lm), lm.device.type == "cuda"
    torch.nn.Module.to(lm.model, "meta")
    if gpu:
        torch.cuda.empty_cache()
    actor = ray.remote(num_cpus=1, num_gpus=_SHARE if gpu else 0)(Worker)
    given = replace(plan, ray=None, ray_workers=None, device=lm.device.type)
    kind = "GPU" if gpu else "CPU"
    workers = _Workers(ray, lambda: actor.remote(given, lm.conditions), waiting, say)
    while workers.busy_or_waiting():
        look()
        for batch, result in workers.finished(plan.ray_workers, kind):
            if batch is not None:
                yield batch, result
                continue
            of_worker, n = result
            threads.add(n)
            if other := differences(of_worker, model):
                raise UsageError(
                    f"ray={plan.ray}: a worker has another model than this machine"
                    f" ({'; '.join(other)}); must be the same files and versions everywhere"
                )
        workers.hand_out()


class _Workers:
    """The workers of a run, what each one does, and the waiting batches.

    Args:
        ray: the module.
        make: starts a worker.
        waiting: the batches.
        say: gets messages for the user.
    """

    def __init__(
        self,
        ray: Any,
        make: Callable[[], Any],
        waiting: deque[AnyBatch],
        say: Callable[[str], None],
    ) -> None:
        self.ray, self.make, self.waiting, self.say = ray, make, waiting, say
        self.idle: list[Any] = []
        # a worker without a batch is loading the model
        self.busy: dict[Any, tuple[Any, AnyBatch | None]] = {}
        self.alive = _Alive(ray)
        self.number = self.deaths = 0

    def busy_or_waiting(self) -> bool:
        """Whether there are batches without an answer."""
        return bool(self.waiting) or any(batch for _, batch in self.busy.values())

    def start(self) -> None:
        """Starts a worker, which loads the model."""
        worker = self.make()
        self.busy[worker.ready.remote()] = worker, None

    def hand_out(self) -> None:
        """Gives batches to idle workers."""
        while self.idle and self.waiting:
            worker, batch = self.idle.pop(), self.waiting.popleft()
            self.busy[worker.answer.remote(batch)] = worker, batch

    def finished(self, wanted: int | None, kind: str) -> Iterator[tuple[AnyBatch | None, Any]]:
        """Yields (batch, answers) or, from a new worker, (None, `Worker.ready`), for one pause at
        most.

        Args:
            wanted: number of workers; None: as many as there is room for.
            kind: the resource that a worker needs, "GPU" or "CPU".
        """
        for done in self._done(wanted, kind):
            worker, batch = self.busy.pop(done)
            try:
                result = self.ray.get(done, timeout=LONGEST)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except self.ray.exceptions.RayError as error:
                self._replace(batch, error)
                continue
            self.idle.append(worker)
            if batch is not None:
                self.deaths = 0
            yield batch, result

    def _done(self, wanted: int | None, kind: str) -> list[Any]:
        """Starts workers if there is room, and returns the finished calls."""
        try:
            if not self.alive.is_known():
                time.sleep(PAUSE)
                return []
            room = wanted or int(self.ray.cluster_resources().get(kind, 0))
            for _ in range(self.number, room):
                self.start()
            self.number = max(self.number, room)
            finished, _ = self.ray.wait([*self.busy], timeout=PAUSE)
        except self.ray.exceptions.RayError as error:
            raise ProcessDied(f"Ray: {one_line(error)}") from error
        return [*finished]

    def _replace(self, batch: AnyBatch | None, error: Exception) -> None:
        """Starts another worker for one that died. The batch of the dead worker waits again."""
        self.deaths += 1
        if self.deaths > DEATHS * self.number:
            text = f"{self.deaths} workers died in a row: {one_line(error)}"
            raise ProcessDied(text) from error
        self.say("a worker died: a new worker starts, and its batch is repeated")
        self.waiting.extend([] if batch is None else [batch])
        self.start()


class _Alive:
    """Checks that the parts of Ray that a run needs are alive.

    Without this check, Ray waits forever if the raylet of this machine has died. If the head of the
    cluster is gone, calls of Ray wait for a minute and then end this process.
    """

    def __init__(self, ray: Any) -> None:
        context = ray.get_runtime_context()
        self.ray, self.own, self.head = ray, context.get_node_id(), context.gcs_address
        self._seen = time.monotonic()

    def is_known(self) -> bool:
        """Whether the head answers. Raises `ProcessDied` if a part is gone for good."""
        host, _, port = self.head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PAUSE).close()
        except OSError as error:
            if time.monotonic() - self._seen > LONGEST:
                text = f"Ray's head, {self.head}, cannot be reached ({one_line(error)})"
                raise ProcessDied(text) from error
            return False
        self._seen = time.monotonic()
        if not any(node["Alive"] for node in self.ray.nodes() if node["NodeID"] == self.own):
            raise ProcessDied("Ray's raylet on this machine died")
        return True
