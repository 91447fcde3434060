"""Batches on the workers of a Ray cluster: who gets which, without Ray, and with it."""

import json
import os
import signal
import socket
import sqlite3
import sys
import types
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import RUN, Command, contents, until

from llm_attack import Plan
from llm_attack.base.errors import UsageError
from llm_attack.base.failures import ProcessDied, Stopped, held
from llm_attack.suite.run import on_ray
from llm_attack.suite.run.store import STORE

PLAN = Plan("demo", "demo_piqa", ray="local", device="cpu")
BATCHES = [[number] for number in range(6)]


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__("a traceback of many lines")
        self.cause = cause


class Ray(types.ModuleType):
    """A cluster in this process: calls are answered when they are waited for, the last one first.

    Args:
        rooms: cores of the cluster at each look at it; the last one from then on.
        meets: told a worker's number and batch (None: it loads the model), what is raised.
    """

    def __init__(self, rooms=(2,), meets=lambda worker, batch: None):
        super().__init__("ray")
        self.exceptions = types.ModuleType("ray.exceptions")
        self.exceptions.RayError, self.exceptions.RayTaskError = RayError, RayTaskError
        self.rooms, self.meets, self.workers, self.asked = [*rooms], meets, 0, []
        self.model, self.alive, self.head = ({"weights": "same"}, 1), True, None

    def cluster_resources(self):
        return {"CPU": float(self.rooms.pop(0) if len(self.rooms) > 1 else self.rooms[0])}

    def remote(self, **resources):
        assert resources == {"num_cpus": 1, "num_gpus": 0}
        return self

    def __call__(self, worker):
        assert worker is on_ray.Worker
        return types.SimpleNamespace(remote=self._start)

    def _start(self, plan, conditions):
        assert (plan.ray, plan.device, conditions) == (None, "cpu", "conditions")
        self.workers += 1
        number = self.workers

        def call(batch=None):
            self.asked.append((number, batch))
            return number, batch if batch is None else batch[0], len(self.asked)

        method = types.SimpleNamespace(remote=call)
        return types.SimpleNamespace(ready=method, answer=method)

    def wait(self, calls, timeout):
        assert 0 < timeout <= 1
        return calls[-1:], calls[:-1]

    def get(self, call, timeout):
        assert timeout > 0
        worker, batch, _ = call
        error = self.meets(worker, batch)
        if error is not None:
            raise error
        return self.model if batch is None else f"answer {batch}"

    def get_runtime_context(self):
        return types.SimpleNamespace(get_node_id=lambda: "here", gcs_address=self.head)

    def nodes(self):
        return [{"NodeID": "here", "Alive": self.alive}, {"NodeID": "there", "Alive": True}]


@pytest.fixture
def answers(monkeypatch):
    """All that `on_ray.answers` yields on a cluster, and what it says."""
    monkeypatch.setattr("llm_attack.suite.run.fingerprint.of_model", lambda _: {"weights": "same"})
    lm = types.SimpleNamespace(
        device=torch.device("cpu"),
        conditions="conditions",
        model=torch.nn.Linear(1, 1),
    )

    head = socket.create_server(("127.0.0.1", 0))

    def found(ray, plan=PLAN):
        ray.head = ray.head or "{}:{}".format(*head.getsockname())
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
        said, threads = [], set()
        result = list(on_ray.answers(plan, lm, iter(BATCHES), said.append, threads))
        assert threads == {1}
        assert all(batch is BATCHES[batch[0]] for batch, _ in result)
        assert sorted(text for _, text in result) == [f"answer {number}" for number in range(6)]
        return said

    with head:
        yield found


def test_every_batch_is_answered_once(answers):
    ray = Ray()
    answers(ray)
    assert ray.workers == 2
    assert sorted(batch[0] for _, batch in ray.asked if batch) == list(range(6))


def test_workers_join(answers):
    """Those of a node that joins in the middle, and not the fewer of one that leaves."""
    ray = Ray(rooms=(1, 1, 1, 3, 2))
    answers(ray)
    assert ray.workers == 3
    ray = Ray(rooms=(0, 0, 1))  # it is waited for
    ray.wait = lambda calls, timeout: Ray.wait(ray, calls, timeout) if calls else ([], [])
    answers(ray)


def test_a_number_of_workers(answers):
    ray = Ray()
    answers(ray, replace(PLAN, ray_workers=5))
    assert ray.workers == 5


def test_a_batch_of_a_worker_that_dies_is_repeated(answers):
    """By another one; so is that of its successor, and one that dies while it loads has none."""
    died = []

    def meets(worker, batch):
        if (batch == 3 or batch is None) and len(died) < 4:
            died.append(worker)
            return RayError("it was killed")

    ray = Ray(meets=meets)
    said = answers(ray)
    assert len(said) == 4 and ray.workers == 6
    assert not {worker for worker, _ in ray.asked[-2:]} & {*died}


def test_a_batch_that_kills_every_worker(answers):
    """The others are answered before it is given up."""
    finished = []

    def meets(worker, batch):
        if batch == 2:
            return RayError("it was killed")
        finished.append(batch)

    with pytest.raises(ProcessDied, match="7 workers died in a row: RayError: it was killed"):
        answers(Ray(meets=meets))
    assert {*finished} == {None, 0, 1, 3, 4, 5}


def test_what_a_worker_raises(answers):
    error = UsageError("attack=none: 1 of 2 log-likelihoods are not finite")
    with pytest.raises(UsageError, match=r"^attack=none: 1 of 2") as raised:
        answers(Ray(meets=lambda worker, batch: RayTaskError(error) if batch == 1 else None))
    assert raised.value is error


def test_a_worker_with_another_model(answers):
    ray = Ray()
    ray.model = {"weights": "other"}, 1
    with pytest.raises(UsageError, match=r'ray=local: .*\(weights: "other" there, "same" here\)'):
        answers(ray)


def test_this_machine_leaves_the_cluster(answers):
    """Its raylet has died: nothing that is asked for is ever answered."""

    def meets(worker, batch):
        ray.alive = batch != 3

    ray = Ray(meets=meets)
    with pytest.raises(ProcessDied, match=r"^Ray's raylet on this machine died$"):
        answers(ray)


def test_the_head_of_the_cluster_is_gone(answers, monkeypatch):
    """Nothing is asked of Ray then, which would end the process; it may come back for a while."""
    monkeypatch.setattr(on_ray, "PAUSE", 0.01)
    monkeypatch.setattr(on_ray, "LONGEST", 0.1)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        ray = Ray()
        ray.head = "{}:{}".format(*nobody.getsockname())
        with pytest.raises(ProcessDied, match=f"^Ray's head, {ray.head}, cannot be reached"):
            answers(ray)
        assert not ray.asked
        monkeypatch.setattr(on_ray, "LONGEST", 100.0)
        monkeypatch.setattr(on_ray.time, "sleep", lambda _: nobody.listen())
        answers(ray)


@pytest.mark.parametrize(("number", "error"), [
    (signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped),
])  # fmt: skip
def test_a_signal_inside_of_ray(answers, monkeypatch, number, error):
    """It is raised outside of Ray's own code, by which an exception would not come through."""

    def stop(*_):
        raise Stopped

    def wait(calls, timeout):
        signal.raise_signal(number)
        inside.append(True)
        return calls[-1:], calls[:-1]

    inside, ray = [], Ray()
    ray.wait = wait
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(error), held():
            answers(ray)
        assert signal.getsignal(signal.SIGTERM) is stop
        assert inside == [True]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_while_ray_starts(monkeypatch):
    """Ray's own handler, which it sets meanwhile, would end the process with code 15."""

    def init(*_, **__):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    def stop(*_):
        raise Stopped

    ray, ended = Ray(), []
    ray.init, ray.shutdown = init, lambda: ended.append(True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped):
            on_ray.cluster(PLAN).__enter__()
        assert signal.getsignal(signal.SIGTERM) is stop and ended
    finally:
        signal.signal(signal.SIGTERM, before)


def test_threads_are_those_that_compute(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    for deterministic, threads in ((False, 7), (True, 1)):
        engine = types.SimpleNamespace(deterministic=deterministic)
        assert on_ray.threads_of(types.SimpleNamespace(engine_settings=engine)) == threads


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UsageError, match=r"^ray=local: needs Ray .*; pip install llm-attack\[ray\]$"
    ):
        on_ray.cluster(PLAN).__enter__()


def test_no_cluster(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", Ray())
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = "127.0.0.1:{1}".format(*nobody.getsockname())
        with pytest.raises(UsageError, match=f"^ray='{address}': must be .* can be reached"):
            on_ray.cluster(replace(PLAN, ray=address)).__enter__()


@pytest.mark.parametrize(("device", "there", "says"), [
    ("cuda", False, "ray=local: has no GPU"),
    (None, True, "this machine, which plans the run, has none"),
    ("cpu", True, None), ("cpu", False, None), (None, False, None), ("cuda:1", True, None),
])  # fmt: skip
def test_devices(monkeypatch, device, there, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = replace(PLAN, device=device)
    if says is None:
        return on_ray._check_devices(plan, there)
    with pytest.raises(UsageError, match=says):
        on_ray._check_devices(plan, there)


# -- with Ray, where it is installed ---------------------------------------------------------------

LONG = [*RUN, "--steps", "100"]  # long enough for what happens in the middle
ON_RAY = [*LONG, "--ray", "local", "--ray_workers", "2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files of one process without Ray."""
    pytest.importorskip("ray", reason="pip install 'llm-attack[ray]'")
    folder = tmp_path_factory.mktemp("alone")
    command = Command(folder, *LONG)
    assert command.wait() == 0, command.err
    return contents(folder / "run")


def stored(folder):
    """Batches that are finished and kept."""
    path = folder / "run" / STORE / "part-0.sqlite"
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path)) as part:
        try:
            return part.execute("SELECT count(*) FROM batches").fetchone()[0]
        except sqlite3.OperationalError:  # no table yet
            return 0


def descendants(pid):
    """(pid, title) of the processes that a process has started, and those have, ..."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    for child in {int(n) for path in children for n in path.read_text().split()}:
        try:
            title = Path(f"/proc/{child}/cmdline").read_bytes().decode()
            yield child, title
            yield from descendants(child)
        except (FileNotFoundError, ProcessLookupError):
            continue


def answering(pid):
    return [worker for worker, title in descendants(pid) if title.startswith("ray::Worker.answer")]


def both_stopped(pid):
    """Stops both workers while each is at a batch, so the run cannot end without them."""
    while True:
        until(lambda: len(answering(pid)) == 2)
        workers = answering(pid)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        if len(workers) == 2 and answering(pid) == workers:
            return workers
        for worker in workers:  # one of them had finished its batch
            os.kill(worker, signal.SIGCONT)


@pytest.mark.slow
def test_workers_are_killed(tmp_path, alone):
    """Three times one that is at a batch: the files are those of one process."""
    command, finished = Command(tmp_path, *ON_RAY), 0
    for _ in range(3):
        until(lambda: stored(tmp_path) > finished and answering(command.pid))  # noqa: B023
        finished = stored(tmp_path)
        os.kill(answering(command.pid)[0], signal.SIGKILL)
    assert command.wait() == 0, command.err
    notes = [event for line in command.err.splitlines() if (event := json.loads(line))]
    died = [note for note in notes if note.get("text", "").startswith("a worker died")]
    assert len(died) == 3
    assert contents(tmp_path / "run") == alone


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_is_stopped_and_goes_on_without_ray(tmp_path, alone, number, code):
    """Nothing of Ray is left running."""
    command = Command(tmp_path, *ON_RAY)
    until(lambda: stored(tmp_path) > 0)
    started = list(descendants(command.pid))
    os.kill(command.pid, number)
    assert command.wait() == code
    *_, last = command.err.splitlines()
    assert last.startswith("stopped; finished batches are kept; to continue: llm-attack run ")
    assert "--ray local --ray_workers 2" in last
    assert started
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid, _ in started), 60)
    command = Command(tmp_path, *LONG)
    assert command.wait() == 0, command.err
    assert contents(tmp_path / "run") == alone


@pytest.mark.slow
@pytest.mark.parametrize("part", ["raylet/raylet", "gcs_server"])
def test_a_part_of_ray_is_killed(tmp_path, alone, part):
    """The run ends by itself and says so; it goes on without Ray."""
    command = Command(tmp_path, *ON_RAY)
    until(lambda: stored(tmp_path) > 0)
    workers = both_stopped(command.pid)
    (pid,) = [pid for pid, title in descendants(command.pid) if title.split("\0")[0].endswith(part)]
    os.kill(pid, signal.SIGKILL)

    def send(number):
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, number)
        return not command.process.is_alive()

    # again and again: the kernel continues stopped processes whose parent has died
    until(lambda: send(signal.SIGSTOP), 120)
    assert command.wait() == 1, command.err
    send(signal.SIGKILL)
    *_, last = command.err.splitlines()
    says = "Ray's raylet on this machine died" if part != "gcs_server" else "Ray's head, "
    assert last.startswith(f"error: {says}") or " workers died, " in last
    assert "; finished batches are kept; to continue: llm-attack run " in last
    before = stored(tmp_path)
    assert before > 0
    command = Command(tmp_path, *LONG)
    assert command.wait() == 0, command.err
    assert contents(tmp_path / "run") == alone
