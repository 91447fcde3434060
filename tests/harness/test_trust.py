"""Results that would be wrong and look right: missing weights, answers that are not finite."""

import json
import logging

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llm_attack.base.errors import UsageError
from llm_attack.base.record import write_json
from llm_attack.cli import main
from llm_attack.demo import MODEL_PATH

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def changed(tmp_path):
    """Makes a copy of the demo's model with other weights."""

    def make(edit, **config):
        folder = tmp_path / "model"
        folder.mkdir()
        for path in MODEL_PATH.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | config))
        return str(folder)

    return make


def test_json_has_no_number_that_is_none(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [float("nan"), (float("inf"), 1.5)], "b": {"c": float("-inf")}})

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"a": [None, [None, 1.5]], "b": {"c": None}}


def missing(weights):
    del weights[UP]


def unexpected(weights):
    weights["extra"] = torch.ones(2)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            missing,
            rf"weights that are missing in the checkpoint and were drawn at random: 1 \({UP}\)",
        ),
        (unexpected, r"weights of the checkpoint that the model does not use: 1 \(extra\)"),
    ],
)
def test_weights_that_do_not_fit(changed, make, build, edit, says):
    folder = changed(edit)
    with pytest.raises(UsageError, match=rf"pretrained=.*model: {says}; must be .*allow_missing"):
        make(pretrained=folder)
    torch.manual_seed(1)
    lm = make(pretrained=folder, allow_missing_weights=True)
    (sentence,) = lm.get_model_info()["attack"]["warnings"]
    assert sentence in says.replace("\\", "")
    requests = build("demo_piqa", 3).instances
    torch.manual_seed(2)
    again = make(pretrained=folder, allow_missing_weights=True)
    assert lm.loglikelihood(requests) == again.loglikelihood(requests)  # also random layers


def test_tied_weights_are_not_missing(changed, make):
    """The checkpoint of a model that ties its head has none."""
    lm = make(pretrained=changed(lambda w: w.pop("lm_head.weight"), tie_word_embeddings=True))
    assert lm.warnings == []
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


def test_missing_weights_are_told_in_a_run(changed, tmp_path):
    arguments = ["run", "--model", changed(missing), "--tasks", "demo_piqa", "--limit", "4"]
    arguments += ["--attacks", "none,random", "--device", "cpu", "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2 and "drawn at random" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, [*arguments, "--allow_missing_weights"])
    assert done.exit_code == 0, done.output
    sentence = f"weights that are missing in the checkpoint and were drawn at random: 1 ({UP})"
    assert f"warning: {sentence}" in " ".join(done.stdout.split())
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["warnings"] == [sentence]
    assert f"- warning: {sentence}" in (tmp_path / "out" / "table.md").read_text()
    report = (tmp_path / "out" / "report.html").read_text()
    assert f"Warning:</strong> {sentence}." in report
    assert run["fingerprint"]["weights"] in report


def test_weights_that_are_not_finite(changed, make):
    with pytest.raises(UsageError, match=rf"pretrained=.*: 3 values of the weight {UP} are NaN"):
        make(pretrained=changed(lambda w: w[UP].view(-1)[:3].fill_(float("nan"))))


def overflowing(lm):
    """Activations beyond what numbers there are, from weights that are finite."""
    lm.model.lm_head.weight.data.fill_(3e38)


def test_a_clean_answer_that_is_not_finite(make, build):
    lm = make(attack="none")
    overflowing(lm)
    with pytest.raises(UsageError, match=r"attack=none: \d+ of \d+ log-likelihoods are NaN"):
        lm.loglikelihood(build("demo_piqa", 2).instances)


def test_attacked_answers_that_are_not_finite(make, build, caplog):
    lm = make(attack="random")
    overflowing(lm)
    requests = build("demo_piqa", 2).instances
    with caplog.at_level(logging.WARNING):
        answers = lm.loglikelihood(requests)
    bad = sum(not torch.tensor(answer[0]).isfinite() for answer in answers)
    assert bad > 0
    assert lm.attack_info()["not_finite"] == bad
    sentence = f"random@0.01: {bad} answers have a log-likelihood that is not finite"
    assert lm.get_model_info()["attack"]["warnings"] == [sentence] == caplog.messages


def test_not_finite_answers_in_a_run(tmp_path, monkeypatch):
    """They are counted, and JSON has no NaN."""
    from llm_attack.lm.engine.attacked import AttackedBatch

    answers = AttackedBatch.answers

    def broken(self, x):
        found = answers(self, x)
        return found if x is None else found._replace(log_prob=found.log_prob * float("nan"))

    monkeypatch.setattr(AttackedBatch, "answers", broken)
    arguments = ["run", "--model", "demo", "--tasks", "demo_piqa", "--limit", "4", "--device"]
    arguments += ["cpu", "--attacks", "none,random", "--progress", "quiet", "-o", str(tmp_path)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output

    def refuse(name):
        raise AssertionError(name)

    found = {}
    for path in tmp_path.rglob("*.json"):
        found[path.name] = json.loads(path.read_text(), parse_constant=refuse)
    run = found["run.json"]
    assert run["attacks"]["random@0.01"]["not_finite"] == 8
    assert run["attacks"]["none"]["not_finite"] == 0
    assert "random@0.01: 8 answers have" in run["warnings"][0]
    assert "warning: random@0.01: 8 answers have" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("attack", ["random", "fgsm", "bim"])
@pytest.mark.sampled(3)
def test_lost_to_rounding(make, build, attack):
    """Of bfloat16 the numbers at 1.5 are 2^-7 apart, those at 2^-9 are 2^-16 apart."""
    lm = make(attack=attack, dtype="bfloat16", epsilon=2.0**-10)
    weight = lm.model.get_input_embeddings().weight.data
    width = weight.shape[1]
    weight[:, : width // 4] = 1.5
    weight[:, width // 4 :] = 2.0**-9
    lm.loglikelihood(build("demo_piqa", 3).instances)
    assert lm.attack_info()["lost_to_rounding"] == pytest.approx((width // 4) / width)
    (sentence,) = lm.all_warnings()
    assert "25 % of the perturbation is lost to rounding" in sentence
    weight[:] = 2.0**-9
    lm.use(lm.settings)
    lm.loglikelihood(build("demo_piqa", 3).instances)
    assert lm.attack_info()["lost_to_rounding"] == 0
    assert lm.all_warnings() == []
