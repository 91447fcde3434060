"""The command line from end to end, and the description in its results file."""

import json

import pytest
import torch
from click.testing import CliRunner

from llm_attack.cli import main
from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.packing.questions import Question, Request


def results_of(folder):
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


def test_eval(tmp_path):
    arguments = "pretrained=demo,attack=bim,epsilon=0.02,steps=3,loss=choice,seed=5"
    tried = ["eval", "--model_args", arguments, "--tasks", "demo_piqa", "--limit", "10"]
    done = CliRunner().invoke(main, [*tried, "--batch_size", "16", "--output_path", str(tmp_path)])
    assert done.exit_code == 0, done.output
    results = results_of(tmp_path)
    attack = results["config"]["attack"]
    settings = {
        "attack": "bim",
        "condition": "bim@0.02",
        "epsilon": 0.02,
        "epsilon_absolute": 0.02,
        "epsilon_unit": "absolute",
        "steps": 3,
        "step_size": 0.005,
        "loss": "choice",
        "score": "acc",
        "context": "shared",
        "hookpoint": None,
        "seed": 5,
        "zero_gradient_fraction": 0.0,
        "flat_gradient_fraction": 0.0,
    }
    assert {k: attack[k] for k in settings} == settings
    assert 0.005 < attack["embedding_rms"] < 0.2
    assert 0.005 < attack["noise_rms"] <= 0.02
    assert attack["snr"] == pytest.approx((attack["signal_rms"] / attack["noise_rms"]) ** 2)
    assert results["results"]["demo_piqa"]["acc,none"] <= 0.5


def test_diagnostics_are_of_the_tokens_read(reused, build):
    """Random signs of amplitude epsilon: the noise is epsilon, on every token but a last one."""
    task = build("demo_hellaswag", 5)
    lm = reused(attack="random", epsilon=0.003)
    lm.loglikelihood(task.instances, disable_tqdm=True)
    tokens = [lm.tok_encode("".join(r.args)) for r in task.instances]
    assert lm.diagnostics[0].elements == 128 * sum(len(t) - 1 for t in tokens)
    info = lm.attack_info()
    assert info["noise_rms"] == pytest.approx(0.003, rel=1e-4)
    matrix = lm.model.get_input_embeddings().weight.detach()
    rows = matrix[[token for t in tokens for token in t[:-1]]]
    assert info["signal_rms"] == pytest.approx(float(rows.square().mean().sqrt()), rel=1e-4)
    assert info["embedding_rms"] == pytest.approx(float(matrix.square().mean().sqrt()), rel=1e-5)
    assert info["zero_gradient_fraction"] is None


def test_choices_that_a_question_lacks_have_no_gradient(reused):
    """Two, three and five choices in one batch: towards each wrong one there are two gradients."""
    engine = reused(attack="apgdt", epsilon=0.003, steps=2, loss="choice").engine
    questions = [
        Question([Request((5, n, 7 + i), 1, 1) for i in range(n)], [[i] for i in range(n)], gold)
        for n, gold in ((n, [True] + [False] * (n - 1)) for n in (2, 3, 5))
    ]
    ((_, result),) = engine.answers(engine.batches(questions, 20))
    (found,) = result.diagnostics
    assert (found.slopes, found.flat) == (2 * (1 + 2 + 4), 0)


def test_tokens_of_choices_that_are_not_compared_have_no_gradient(reused, build):
    """No gradient is hidden here, although many coordinates of each are zero."""
    lm = reused(attack="fgsm", epsilon=0.003, loss="margin")
    lm.loglikelihood(build("demo_hellaswag", 5).instances, disable_tqdm=True)
    info = lm.attack_info()
    assert info["zero_gradient_fraction"] > 0.1 and info["flat_gradient_fraction"] == 0


def test_epsilon_in_units_of_the_embeddings(reused, build):
    lm = reused(attack="fgsm", epsilon=0.5, epsilon_unit="rms")
    assert lm.attack.epsilon == pytest.approx(0.5 * lm.signal.rms)
    lm.loglikelihood(build("demo_piqa", 2).instances, disable_tqdm=True)
    assert lm.attack_info()["noise_rms"] == pytest.approx(0.5 * lm.signal.rms, rel=1e-3)


def test_epsilon_in_units_of_a_token(reused, build):
    """In L2 the same share of the signal's power; the condition's name tells the norm."""
    lm = reused(attack="fgsm", epsilon="0.5rms", norm="l2_token")
    width = lm.model.config.hidden_size
    assert lm.attack.epsilon == pytest.approx(0.5 * lm.signal.rms * width**0.5)
    lm.loglikelihood(build("demo_piqa", 2).instances, disable_tqdm=True)
    info = lm.attack_info()
    assert info["noise_rms"] == pytest.approx(0.5 * lm.signal.rms, rel=1e-3)
    assert (info["condition"], info["norm"]) == ("fgsm@0.5rms-l2_token", "l2_token")


def test_masked_gradients_are_reported(reused, build):
    """A model that hides half of its gradient is not robust: the share of zeros says so."""
    lm = reused(attack="fgsm")
    half = torch.arange(lm.model.config.hidden_size // 2)

    def hide(module, args):
        shown = args[0].index_select(-1, half)
        return (args[0].detach().index_copy(-1, half, shown), *args[1:])

    handle = lm.model.model.layers[0].register_forward_pre_hook(hide)
    lm.loglikelihood(build("demo_piqa", 4).instances, disable_tqdm=True)
    handle.remove()
    assert lm.attack_info()["zero_gradient_fraction"] == pytest.approx(0.5, abs=1e-3)


def test_a_ratio_of_nothing():
    """Perturbations whose squares overflow: the ratio is 0, and its logarithm no number."""
    of = Diagnostics(signal=1.0, noise=float("inf"), elements=2.0).report()
    assert of["snr"] == 0 and of["snr_db"] is None
