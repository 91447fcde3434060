"""The output of a run while it lasts, without a terminal and from Python."""

import io
import json
import logging
import re

from click.testing import CliRunner
from rich.console import Console

from llm_attack import Plan, evaluate
from llm_attack.cli import main
from llm_attack.suite.evaluate import LIBRARIES
from llm_attack.suite.run.progress import RunProgress, status

WORDS = ["run", "--model", "demo", "--tasks", "demo_piqa", "--attacks", "none,random"]
WORDS += ["--limit", "4", "--device", "cpu"]


def test_off_a_terminal_a_plain_line_every_thirty_seconds(monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    console = Console(file=io.StringIO(), width=40)
    with RunProgress("bar", console, ["none", "fgsm@0.1"], total=2000, done=1000) as progress:
        for at in (110, 120, 130, 159, 160):
            seconds[0] = at
            progress.add(100, [[1.0, 0.0], [1.0, 1.0]])
        seconds[0] = 180
    assert console.file.getvalue().splitlines() == [
        "1,000 of 2,000 requests",
        "1,300 of 2,000 requests, 10 a second, 0:01:10 left; accuracy so far: none 1.000,"
        " fgsm@0.1 0.500",
        "1,500 of 2,000 requests, 8.33 a second, 0:01:00 left; accuracy so far: none 1.000,"
        " fgsm@0.1 0.500",
        "1,500 of 2,000 requests, 6.25 a second, 0:01:20 left; accuracy so far: none 1.000,"
        " fgsm@0.1 0.500",
    ]


def test_a_stage_is_a_line_off_a_terminal_and_an_event_of_json():
    for mode, expected in (
        ("bar", "loading [x]\n"),
        ("json", json.dumps({"event": "stage", "text": "loading [x]"}) + "\n"),
        ("quiet", ""),
    ):
        console = Console(file=io.StringIO())
        with status(mode, console, "loading [x]"):
            assert console.file.getvalue() == expected  # said before it is done
        assert console.file.getvalue() == expected


def test_a_run_says_its_stages_and_logs_with_v(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, WORDS)
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    assert lines[:3] == ["looking up the tasks", "loading demo", "building the requests"]
    assert lines[3] == "0 of 8 requests" and lines[-1] == "judging"
    assert re.match(r"8 of 8 requests, \S+ a second, 0:00:00 left; accuracy so far: none", lines[4])


def test_v_shows_logs(caplog):
    before = {name: logging.getLogger(name).level for name in (*LIBRARIES, "llm_attack")}
    try:
        done = CliRunner().invoke(main, [*WORDS, "-v", "--progress", "quiet"])
        assert done.exit_code == 0, done.output
        levels = {logging.getLogger(name).level for name in (*LIBRARIES, "llm_attack")}
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
    own = [r for r in caplog.records if r.name == "llm_attack.suite.run.progress"]
    assert any(re.fullmatch(r"loading demo: \d+\.\d s", r.getMessage()) for r in own)
    assert levels == {logging.INFO}


def test_quiet_from_python_is_silent_and_leaves_the_libraries_as_they_were(capfd):
    from transformers.utils import logging as bars

    before = {name: logging.getLogger(name).level for name in LIBRARIES}
    enabled = bars.is_progress_bar_enabled()
    bars.enable_progress_bar()
    try:
        plan = Plan("demo", "demo_piqa", attacks=["none", "random"], limit=4, device="cpu")
        evaluate(plan, progress="quiet")
        assert capfd.readouterr() == ("", "")
        assert bars.is_progress_bar_enabled()
    finally:
        (bars.enable_progress_bar if enabled else bars.disable_progress_bar)()
    assert {name: logging.getLogger(name).level for name in LIBRARIES} == before


def test_json_also_while_loading(capfd):
    evaluate(Plan("demo", "demo_piqa", attacks=["none"], limit=2, device="cpu"), progress="json")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    events = [json.loads(line) for line in lines]
    assert {"event": "stage", "text": "loading demo"} in events
    assert events[0] == {"event": "stage", "text": "looking up the tasks"}
