"""Saved perturbations reproduce the stored scores, whatever the batches were."""

import json
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from evaluation import evaluated
from safetensors import safe_open
from test_docs import blocks
from transformers import AutoModelForCausalLM
from versions import dtype_of

from llm_attack import Plan
from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.suite import evaluate as evaluating
from llm_attack.suite import results
from llm_attack.suite.analysis.perturbations import path_of, tasks_in
from llm_attack.suite.run import perturbations
from llm_attack.suite.run.store import STORE

SMALL = {
    "limit": 2,
    "attacks": "none,random,fgsm",
    "device": "cpu",
    "save_perturbations": True,
    "path_points": 4,
    "progress": "quiet",
}
OWN = {"tasks": "demo_piqa,demo_winogrande"}
SHARED = {"tasks": "demo_arc_easy", "loss": "choice", "norm": "l2"}
ATTACKED = ["random@0.01", "fgsm@0.01"]


def ran(folder, **settings):
    settings = {**SMALL, **settings}
    return evaluated("demo", settings.pop("tasks"), output=folder, **settings)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("own") / "run", **OWN)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("shared") / "run", **SHARED)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, **dtype_of(torch.float32)).eval()


def again(model, perturbed):
    """The log-likelihood of a choice, with the change on the clean embeddings."""
    tokens = torch.tensor(perturbed.tokens).long()
    change = torch.tensor(perturbed.change[:-1]).to(model.dtype)
    with torch.no_grad():
        x = model.get_input_embeddings()(tokens[:-1]) + change
        scores = model(inputs_embeds=x[None]).logits[0].float().log_softmax(-1)
    of_tokens = scores[torch.arange(len(tokens) - 1), tokens[1:]]
    return float(of_tokens[-perturbed.n_continuation :].sum())


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_they_give_the_stored_scores_again(kind, request, model):
    result = results.load(request.getfixturevalue(kind).folder)
    samples = result.samples[result.samples["condition"] != "none"]
    assert set(samples["condition"]) == ({*ATTACKED} if kind == "own" else {*samples["condition"]})
    for row in samples.itertuples():
        found = result.perturbations(row.task, row.condition)
        for choice, value in enumerate(row.log_likelihoods):
            perturbed = found.of(row.doc_id, choice)
            assert again(model, perturbed) == pytest.approx(value, abs=2e-4)
            assert perturbed.tokens.dtype == np.int32
            assert (perturbed.change[-1] == 0).all()  # which the model does not read


def test_in_the_models_dtype(tmp_path):
    """Of bfloat16: what is added to the clean embeddings gives the attacked ones to its last place,
    so that scores agree as far as the dtype's do.
    """
    args = {"model_args": "dtype=bfloat16", "path_points": 0, "attacks": "none,fgsm"}
    result = ran(tmp_path / "run", tasks="demo_piqa", **args)
    with safe_open(path_of(result.folder, "demo_piqa"), "pt") as file:
        assert file.get_tensor("change/fgsm@0.01").dtype == torch.bfloat16
        whole = file.get_tensor("change/fgsm@0.01").float().numpy()
    found = result.perturbations("demo_piqa", "fgsm@0.01")
    np.testing.assert_array_equal(found.change, whole)
    assert np.isnan(found.share).all()
    wide = AutoModelForCausalLM.from_pretrained(MODEL_PATH, **dtype_of(torch.bfloat16)).eval()
    for row in result.samples[result.samples["condition"] == "fgsm@0.01"].itertuples():
        for choice, value in enumerate(row.log_likelihoods):
            assert again(wide, found.of(row.doc_id, choice)) == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize(("kind", "how"), [("own", OWN), ("shared", SHARED)])
@pytest.mark.sampled(2)
def test_batch_size_and_packing_do_not_matter(kind, how, request, tmp_path):
    expected = request.getfixturevalue(kind)
    other = ran(tmp_path / "run", **how, batch_size=1, packing="off")
    tasks = tasks_in(expected.folder)
    assert tasks == tasks_in(other.folder) == sorted(how["tasks"].split(","))
    for task in tasks:
        with (
            safe_open(path_of(expected.folder, task), "np") as a,
            safe_open(path_of(other.folder, task), "np") as b,
        ):
            assert a.keys() == b.keys()
            for name in a.keys():  # noqa: SIM118
                one, two = a.get_tensor(name), b.get_tensor(name)
                assert one.dtype == two.dtype
                if one.dtype.kind == "i" and not name.startswith("nearest/"):
                    np.testing.assert_array_equal(one, two, name)
                elif name.startswith("nearest/"):
                    assert (one == two).mean() > 0.95  # ties
                else:
                    close = np.isclose(one, two, rtol=1e-3, atol=1e-4)
                    assert close.mean() > 0.999, name  # signs of gradients that are nearly 0


def test_requests_share_the_rows_that_they_share(own, shared):
    """With a perturbation for each request none; with one for a question those of its prompt."""
    for result, task in ((own, "demo_piqa"), (shared, "demo_arc_easy")):
        condition = next(name for name in result.conditions if name.startswith("fgsm"))
        found = result.perturbations(task, condition)
        questions = result.questions[result.questions["task"] == task]
        assert len(found.doc_id) == questions["n_choices"].sum()
        rows = [found.row[a:b] for a, b in zip(found.start, found.start[1:], strict=False)]
        used = np.concatenate([r[r >= 0] for r in rows])
        assert set(used) == set(range(len(found.norm)))
        first = [set(r[r >= 0]) for r, d in zip(rows, found.doc_id, strict=True) if d == 0]
        common = set.intersection(*first)
        assert bool(common) == (result is shared)
        units = len(questions) if result is shared else len(found.doc_id)
        assert found.loss.shape == (units, 2)
        assert [len(part) for part in found.rows] == [
            len(
                set(np.concatenate([r for r, u in zip(rows, found.unit, strict=True) if u == unit]))
                - {-1}
            )
            for unit in range(units)
        ]


def test_shares_and_their_remainder_are_the_change(own):
    found = own.perturbations("demo_winogrande", "fgsm@0.01")
    sums = np.array([found.share[rows].sum() for rows in found.rows])
    change = found.loss[:, 1] - found.loss[:, 0]
    np.testing.assert_allclose(sums + found.remainder, change, atol=1e-4)
    assert (change > 0).all()
    assert (np.abs(found.remainder) < 0.3 * change).all()  # of four points


def test_norms_and_texts(own):
    found = own.perturbations("demo_piqa", "random@0.01")
    np.testing.assert_allclose(found.norm, np.linalg.norm(found.change, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.norm, 0.01 * found.change.shape[1] ** 0.5, rtol=1e-4)
    first = found.tokens[: found.start[1]].tolist()
    question = own.questions[own.questions["task"] == "demo_piqa"].iloc[0]
    read = " ".join(found.texts[token].strip() for token in first)
    assert read.split()[:3] == question["question"].replace(":", " :").split()[:3]
    assert {int(token) for token in found.nearest} <= found.texts.keys()


def test_the_file_says_what_it_is_of(own):
    with safe_open(path_of(own.folder, "demo_piqa"), "np") as file:
        about = file.metadata()
    assert about["model"] == "demo"
    assert json.loads(about["conditions"]) == ATTACKED
    assert json.loads(about["settings"])["path_points"] == 4
    mark = json.loads(about["fingerprint"])
    assert mark["weights"] == own.run["fingerprint"]["weights"]
    assert mark["tokens"] == own.run["fingerprint"]["tokens"]


def test_reading_needs_neither_torch_nor_lm_eval(own):
    code = """
import sys
from pathlib import Path
from llm_attack.suite import results
found = results.load(Path(sys.argv[1])).perturbations("demo_piqa", "fgsm@0.01")
print(found.change.shape, found.of(0, 1).change.shape, found.remainder.shape)
print({"torch", "lm_eval", "transformers"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(own.folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_example_of_the_page(own, tmp_path, monkeypatch, capsys):
    (code,) = blocks("perturbations.md")
    (tmp_path / "DIR").symlink_to(own.folder)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = own.perturbations("demo_piqa", "fgsm@0.01")
    shown, shapes = capsys.readouterr().out.splitlines()
    assert float(shown.split()[-1]) == pytest.approx(found.share.max(), rel=1e-5)
    n = found.start[2] - found.start[1]
    assert shapes == f"({n},) ({n}, {found.change.shape[1]})"


def test_the_scores_are_those_of_a_run_without(own, tmp_path):
    plain = ran(tmp_path / "run", **OWN, save_perturbations=False, path_points=50)
    assert own.samples["log_likelihoods"].equals(plain.samples["log_likelihoods"])
    assert "save_perturbations" not in plain.run["settings"]
    assert not (plain.folder / "perturbations").exists()
    for result, linked in ((own, True), (plain, False)):
        assert (result.folder / "perturbations.html").exists() == linked
        page = (result.folder / "report.html").read_text("utf-8")
        assert ('href="perturbations.html"' in page) == linked
    with pytest.raises(UsageError, match="no perturbations"):
        plain.perturbations("demo_piqa", "fgsm@0.01")


def test_shares_that_miss_much_are_a_warning(own, shared, monkeypatch):
    """Of four points, most do; without shares, none can."""
    (text,) = [w for w in own.run["warnings"] if "fgsm" in w]
    found = [own.perturbations(task, "fgsm@0.01") for task in tasks_in(own.folder)]
    change = np.concatenate([of.loss[:, 1] - of.loss[:, 0] for of in found])
    missed = np.abs(np.concatenate([of.remainder for of in found])) > 0.05 * np.abs(change)
    assert f": {missed.sum()} of {len(missed)} perturbations of fgsm@0.01 miss" in text
    assert not [w for w in own.run["warnings"] if "random" in w]
    assert perturbations.warnings(own.folder) == [text]
    monkeypatch.setattr(perturbations, "_MISSED", 10)
    assert perturbations.warnings(own.folder) == []


@contextmanager
def counted(monkeypatch):
    """The batches that go through the model."""
    numbers = []
    keep = perturbations.keep

    def counting(path, result):
        numbers.append(path.name)
        keep(path, result)

    with monkeypatch.context() as patch:
        patch.setattr(perturbations, "keep", counting)
        yield numbers


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, own):
    """Batches whose traces are there are not computed again; others are."""
    folder = tmp_path / "run"

    def stop(*args):
        raise KeyboardInterrupt

    with counted(monkeypatch) as all_of_them, monkeypatch.context() as patch:
        patch.setattr(perturbations.Saved, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            ran(folder, **OWN, batch_size=2)
    traces = sorted((folder / STORE).glob("traces-*"))
    assert len(traces) == len(all_of_them) > 3
    traces[0].unlink()
    traces[1].write_bytes(traces[1].read_bytes()[:-1])
    with counted(monkeypatch) as again_computed:
        result = ran(folder, **OWN, batch_size=2)
    assert sorted(again_computed) == [path.name for path in traces[:2]]
    assert not (folder / STORE).exists()
    found, expected = (r.perturbations("demo_piqa", "fgsm@0.01") for r in (result, own))
    np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-4)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_the_size_is_said_before(own, capsys, tmp_path, monkeypatch):
    """It is that of the files but for their headers; a disk that is too small is refused."""
    path = path_of(own.folder, "demo_piqa")
    said = []
    monkeypatch.setattr(perturbations.Saved, "write", lambda self, *_: said.append(self.size))
    ran(tmp_path / "run", tasks="demo_piqa")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert said == [pytest.approx(path.stat().st_size - header, rel=0.02)]
    monkeypatch.setattr(perturbations.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(UsageError, match=r"save_perturbations=True: needs .* MB in .*/two"):
        ran(tmp_path / "two", tasks="demo_piqa")
    assert not (tmp_path / "two").exists()


WRONG = [
    ({"save_perturbations": True, "attacks": "none"}, "needs an attack that perturbs something"),
    ({"path_points": 3}, "path_points=3: must be given together with save_perturbations"),
    ({"path_points": -1, "save_perturbations": True}, "path_points=-1: must be"),
]


@pytest.mark.parametrize(("settings", "text"), WRONG)
def test_what_makes_no_sense_is_refused(settings, text):
    with pytest.raises(UsageError, match=text):
        Plan("demo", **settings)


def test_without_a_folder_nothing_could_be_saved():
    with pytest.raises(UsageError, match="save_perturbations=True: needs output"):
        evaluating.evaluate(Plan("demo", save_perturbations=True))


def test_what_is_not_there_is_one_line(own):
    with pytest.raises(UsageError, match=r"task=demo_pika: must be one of .*'demo_piqa'"):
        own.perturbations("demo_pika", "fgsm@0.01")
    with pytest.raises(UsageError, match=r"condition=none: must be one of random@0.01, fgsm@0.01"):
        own.perturbations("demo_piqa", "none")
    with pytest.raises(UsageError, match="doc_id=7, choice=0: task demo_piqa has no such request"):
        own.perturbations("demo_piqa", "fgsm@0.01").of(7, 0)
