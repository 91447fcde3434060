"""lm-eval's loggers get for each condition what lm-eval itself would give them."""

import contextlib
import json
import sys
import types
from importlib.util import find_spec

import pytest
from lm_eval import loggers
from lm_eval.loggers import EvaluationTracker
from test_docs import blocks

from llm_attack import Plan, evaluate
from llm_attack.base.errors import UsageError
from llm_attack.harness.loggers import CLASSES, Loggers
from llm_attack.suite import evaluate as suite
from llm_attack.suite import results

PLAN = {"tasks": "demo_piqa", "limit": 2, "attacks": "none,fgsm", "device": "cpu"}
NAMES = ["none", "fgsm@0.01"]


@pytest.fixture(scope="module")
def result(tmp_path_factory, one_index):
    folder = tmp_path_factory.mktemp("run") / "run"
    return evaluate(Plan("demo", **PLAN), output=folder, progress="quiet")


class Recorder:
    """In the place of lm-eval's WandbLogger, or TrackioLogger."""

    made = ()

    def __init__(self, arguments):
        self.arguments, self.told, self.run = arguments, [], self
        type(self).made = (*self.made, self)

    def post_init(self, results):
        self.results = results

    def log_eval_result(self):
        self.told.append("results")

    def log_eval_samples(self, samples):
        self.samples = samples

    def finish(self):
        self.told.append("finished")


@pytest.fixture
def recorded(monkeypatch):
    """`Recorder` for both, and packages that stand for wandb and trackio."""
    for name, kind in (("wandb", "WandbLogger"), ("trackio", "TrackioLogger")):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()
        module.init = lambda project=None, name=None, group=None, mode=None: None
        module.login = lambda prompt=True: True
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(loggers, kind, Recorder, raising=False)
    monkeypatch.setattr(Recorder, "made", ())
    return Recorder


@pytest.mark.parametrize("option", ["wandb_args", "trackio_args"])
def test_each_condition_is_a_run(option, recorded, result):
    told = Loggers("demo", {option: "project=robust,step=3"})
    assert told.log(result.lm_eval) == []
    assert [logger.arguments for logger in recorded.made] == [
        {"project": "robust", "step": 3, "group": "demo", "name": name} for name in NAMES
    ]
    for logger, name in zip(recorded.made, NAMES, strict=True):
        acc = result.table[(result.table["condition"] == name)]["acc"].iloc[0]
        assert logger.results["results"]["demo_piqa"]["acc,none"] == pytest.approx(acc)
        assert logger.results["config"]["attack"]["condition"] == name
        assert "samples" not in logger.results
        assert [s["doc_id"] for s in logger.samples["demo_piqa"]] == [0, 1]
        assert logger.told == ["results", "finished"]


def test_the_users_names_stay(recorded, result):
    Loggers("demo", {"wandb_args": "name=mine,group=ours"}).log(result.lm_eval, "revision")
    found = [(logger.arguments["name"], logger.arguments["group"]) for logger in recorded.made]
    assert found == [(f"mine-{name}", "ours") for name in NAMES]
    Loggers("demo", {"wandb_args": "project=x"}).log(result.lm_eval, "revision")
    assert recorded.made[-1].arguments["group"] == "revision"


def test_what_fails_is_a_line_and_the_others_are_told(recorded, result, monkeypatch):
    def fails(self):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(recorded, "log_eval_result", fails)
    lines = Loggers("demo", {"wandb_args": "project=x"}).log(result.lm_eval)
    assert len(lines) == 2
    assert "wandb_args, of none" in lines[0] and "no route to host" in lines[0]
    assert [logger.told for logger in recorded.made] == [["finished"], ["finished"]]


def test_nothing_is_told_unless_asked(recorded, result):
    assert Loggers("demo", dict.fromkeys(CLASSES)).log(result.lm_eval) == []
    assert recorded.made == ()


def test_the_command_tells_them_at_its_end(recorded, result, tmp_path, capsys):
    """Also of a finished folder, whose results have no samples."""
    settings = {"model": "demo", **PLAN, "progress": "quiet", "dry_run": False}
    suite.run(output=str(result.folder), wandb_args="project=x", **settings)
    assert [logger.arguments["name"] for logger in recorded.made] == NAMES
    assert not any(hasattr(logger, "samples") for logger in recorded.made)
    acc = result.lm_eval["fgsm@0.01"]["results"]["demo_piqa"]["acc,none"]
    assert recorded.made[1].results["results"]["demo_piqa"]["acc,none"] == acc


class Hub:
    """In the place of the hub's API: what is pushed."""

    def __init__(self):
        self.files, self.repos, self.broken = {}, [], False

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repo_id, **about):
        if self.broken:
            raise ConnectionError("no route to host")
        self.repos.append((repo_id, about["private"]))

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo, **_):
        self.files[path_in_repo.rpartition("/")[0]] = json.load(open(path_or_fileobj))  # noqa: SIM115

    def upload_folder(self, folder_path, path_in_repo, **_):
        from pathlib import Path

        (path,) = Path(folder_path).glob("samples_*.jsonl")
        self.files[f"{path_in_repo}, samples"] = list(map(json.loads, path.open()))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: hub)
    module = sys.modules[EvaluationTracker.__module__]
    monkeypatch.setattr(module, "HfApi", lambda token: hub, raising=False)  # of earlier releases
    monkeypatch.setattr(EvaluationTracker, "recreate_metadata_card", lambda self: None)
    return hub


PUSH = "token=secret,hub_results_org=us,details_repo_name=robust,push_results_to_hub=True"


def test_the_hub_gets_each_condition_as_a_model(hub, result):
    told = Loggers("demo", {"hf_hub_log_args": f"{PUSH},push_samples_to_hub=True"})
    assert told.log(result.lm_eval) == []
    assert set(hub.repos) == {("us/robust-private", True)}
    for name in NAMES:
        pushed = hub.files[f"demo@{name}"]
        expected = result.lm_eval[name]["results"]["demo_piqa"]["acc,none"]
        assert pushed["results"]["demo_piqa"]["acc,none"] == expected
        assert pushed["model_name"] == f"demo@{name}"
        samples = hub.files[f"demo@{name}, samples"]
        assert [sample["doc_id"] for sample in samples] == [0, 1]
    assert isinstance(result.lm_eval["none"]["samples"]["demo_piqa"][0]["arguments"], list)


def test_a_hub_that_is_gone_is_a_line(hub, result):
    """lm-eval's tracker only logs it."""
    told = Loggers("demo", {"hf_hub_log_args": PUSH})
    hub.broken = True
    lines = told.log(result.lm_eval)
    assert len(lines) == 2
    assert "hf_hub_log_args, of none" in lines[0] and "no route to host" in lines[0]


def test_files_as_those_of_lm_eval(result, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    told = Loggers("demo", {"hf_hub_log_args": f"output_path={tmp_path}"})
    assert told.log(result.lm_eval) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo@fgsm@0.01", "demo@none"]


def test_weights_and_biases_itself(result, tmp_path, monkeypatch):
    """Offline, where it is installed: a run for each condition, with its accuracy."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert Loggers("demo", {"wandb_args": "project=robust"}).log(result.lm_eval) == []
    runs = [path.read_bytes() for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert len(runs) == 2
    assert sorted(content.count(b"fgsm@0.01") > 0 for content in runs) == [False, True]
    tables = tmp_path.glob("wandb/offline-run-*/files/media/table/evaluation/*.json")
    rows = [row for path in tables for row in json.loads(path.read_text())["data"]]
    logged = [float(row[5]) for row in rows if row[4] == "acc"]
    assert sorted(logged) == sorted(result.table[result.table["task"] == "demo_piqa"]["acc"])


def test_trackio_itself(result, tmp_path, monkeypatch):
    """On this machine, where it is installed."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio", reason="trackio is not installed")
    if not hasattr(loggers, "TrackioLogger"):
        pytest.skip("this lm-eval has no TrackioLogger")
    assert Loggers("demo", {"trackio_args": "project=robust"}).log(result.lm_eval) == []
    assert any(b"fgsm@0.01" in path.read_bytes() for path in tmp_path.rglob("*.db*"))


def test_the_example_for_mlflow(result, tmp_path, monkeypatch):
    """The lines of the page; without MLflow, a stub takes what it would log."""
    (code,) = blocks("loggers.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "DIR").symlink_to(result.folder)
    monkeypatch.chdir(tmp_path)
    logged, names, here = {}, [], types.ModuleType("mlflow")
    if find_spec("mlflow") is not None:
        import mlflow as here

        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        here.set_tracking_uri((tmp_path / "mlruns").as_uri())
    else:
        here.set_experiment = lambda name: None
        here.start_run = lambda run_name: contextlib.nullcontext(names.append(run_name))
        here.log_params = lambda params: None
        here.log_metrics = lambda values: logged.setdefault(names[-1], values)
        monkeypatch.setitem(sys.modules, "mlflow", here)
    exec(code, {})
    if not names:
        runs = here.search_runs(experiment_names=["robustness"])
        names = runs["tags.mlflow.runName"].tolist()
        found = zip(names, runs["metrics.demo_piqa.acc"], strict=True)
        logged = {name: {"demo_piqa.acc": acc} for name, acc in found}
    assert sorted(names) == sorted(NAMES)
    table = result.table[result.table["task"] == "demo_piqa"].set_index("condition")["acc"]
    for name in NAMES:
        assert logged[name]["demo_piqa.acc"] == pytest.approx(table[name])


WRONG = [
    ("wandb_args", "robust", r"wandb_args='robust': must be key=value,\.\.\."),
    ("wandb_args", "", r"wandb_args='': must be key=value"),
    ("wandb_args", "projct=x", "wandb_args=projct=...: must be an argument of wandb.init; did you"),
    ("wandb_args", "name=a,name=b", "wandb_args: name=a: must be given only once"),
    ("hf_hub_log_args", "hub_result_org=me", "argument of lm-eval's EvaluationTracker; did you"),
    ("hf_hub_log_args", "push_results_to_hub=True", "token is not defined"),
]


@pytest.mark.parametrize(("option", "text", "says"), WRONG)
def test_bad_values_are_one_line(option, text, says, recorded, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UsageError, match=says) as caught:
        Loggers("demo", {option: text})
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_one_line(monkeypatch):
    monkeypatch.delattr(loggers, "TrackioLogger", raising=False)
    with pytest.raises(UsageError, match="trackio_args=project=x: needs a later lm-eval"):
        Loggers("demo", {"trackio_args": "project=x"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("llm_attack.harness.loggers.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb_args=project=x: needs the package wandb"):
        Loggers("demo", {"wandb_args": "project=x"})


def test_without_a_login_nothing_begins(recorded):
    sys.modules["wandb"].login = lambda prompt=True: False
    with pytest.raises(UsageError, match=r"wandb_args=project=x: is refused by wandb\.init"):
        Loggers("demo", {"wandb_args": "project=x"})
    assert Loggers("demo", {"wandb_args": "project=x,mode=offline"})


def test_what_was_read_from_a_folder_is_what_was_judged(result):
    stored = results.lm_eval_of(results.load(result.folder))
    assert list(stored) == NAMES
    acc = [of["results"]["demo_piqa"]["acc,none"] for of in stored.values()]
    assert acc == [of["results"]["demo_piqa"]["acc,none"] for of in result.lm_eval.values()]
