"""Signals wait until nothing is half done, and handlers are restored afterwards."""

import os
import signal
import threading
import time

import pytest
from click.testing import CliRunner

from llm_attack.base import failures
from llm_attack.base.failures import Stopped, failure, held, look
from llm_attack.base.record import write_text
from llm_attack.cli import main
from llm_attack.suite import evaluate as evaluating

BOTH = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)]


@pytest.fixture(autouse=True)
def stopped():
    """SIGTERM raises, as in a run."""

    def stop(*_):
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    yield stop
    assert signal.getsignal(signal.SIGTERM) is stop
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGTERM, before)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "error"), BOTH)
def test_a_signal_waits_for_a_look(number, error):
    reached = []
    with pytest.raises(error), held():
        send(number)
        reached.append("behind")
        look()
        reached.append("never")
    assert reached == ["behind"]


@pytest.mark.parametrize(("number", "error"), BOTH)
def test_a_signal_waits_for_the_end(number, error):
    with pytest.raises(error), held(), held():
        send(number)
    with pytest.raises(error) as raised, held():
        send(number)
        raise ValueError("of the work")
    assert isinstance(raised.value.__context__, ValueError)
    look()  # nothing is left


@pytest.mark.parametrize(("number", "error"), BOTH)
def test_the_second_time_it_does_not_wait(number, error):
    reached = []
    with pytest.raises(error), held():
        send(number)
        reached.append("behind")
        send(number)
        reached.append("never")
    assert reached == ["behind"]


@pytest.mark.parametrize(("number", "error"), BOTH)
def test_it_does_not_wait_for_ever(monkeypatch, number, error):
    monkeypatch.setattr(failures, "PATIENCE", 0.05)
    end = time.monotonic() + 60
    with pytest.raises(error), held():
        send(number)
        while time.monotonic() < end:
            sum(range(100))


def test_files_are_whole_or_not_begun(tmp_path):
    with pytest.raises(KeyboardInterrupt), held():
        write_text(tmp_path / "first", "whole")
        send(signal.SIGINT)
        write_text(tmp_path / "second", "never")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_handlers_that_are_not_ours_are_left():
    """The default of SIGTERM, which is none to call; and one that somebody sets meanwhile."""
    stop = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with held():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            signal.signal(signal.SIGTERM, stop)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, stop)


def test_in_another_thread():
    """Nothing is set there, and what the main thread waits for is not raised there."""
    found = []

    def other():
        before = signal.getsignal(signal.SIGINT)
        with held():
            found.append(signal.getsignal(signal.SIGINT) is before)
            look()

    with pytest.raises(KeyboardInterrupt), held():
        send(signal.SIGINT)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        found.append("behind")
    assert found == [True, "behind"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Stopped(), 143)])
def test_what_code_in_c_makes_of_it(error, code):
    made = SystemError("<method> returned a result with an exception set")
    made.__cause__ = error
    assert failure(made) == (code, "stopped")
    assert failure(error) == (code, "stopped")


@pytest.mark.parametrize("outcome", [None, ValueError("x"), KeyboardInterrupt()])
def test_a_command_leaves_the_handlers_as_they_were(monkeypatch, stopped, outcome):
    def evaluate(*_, **__):
        assert signal.getsignal(signal.SIGTERM) is not stopped
        if outcome is not None:
            raise outcome

    def leave(code, line):
        raise SystemExit(code)

    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    monkeypatch.setattr(evaluating, "leave", leave)
    codes = {type(None): 0, ValueError: 70, KeyboardInterrupt: 130}
    done = CliRunner().invoke(main, ["run", "--model", "demo"])
    assert done.exit_code == codes[type(outcome)], done.output


def test_a_command_in_another_thread(monkeypatch):
    monkeypatch.setattr(evaluating, "evaluate", lambda *_, **__: None)
    found = []
    words = ["run", "--model", "demo"]
    thread = threading.Thread(target=lambda: found.append(CliRunner().invoke(main, words)))
    thread.start()
    thread.join()
    assert found[0].exit_code == 0, found[0].output
