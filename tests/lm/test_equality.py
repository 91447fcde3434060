"""attack=none equals lm-eval's stock `hf`."""

import pytest
from lm_eval.models.huggingface import HFLM

from llm_attack.demo import MODEL_PATH

DEMO = ["arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "winogrande"]
MODELS = ["stories260K", "tinystories-chat-3m"]


def both(reused, task, model, **options):
    stock = HFLM(pretrained=model, device="cpu", batch_size=8, **options)
    ours = reused(pretrained=model, attack="none", batch_size=8, **options)
    return (
        stock.loglikelihood(task.instances, disable_tqdm=True),
        ours.loglikelihood(task.instances, disable_tqdm=True),
    )


@pytest.mark.parametrize("task", DEMO)
@pytest.mark.sampled(2)
def test_demo(reused, build, task):
    expected, found = both(reused, build(f"demo_{task}", 20), str(MODEL_PATH))
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-4)
    assert [g for _, g in found] == [g for _, g in expected]


@pytest.mark.parametrize("task", DEMO)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", {"abs": 2e-6, "rel": 1e-7}), ("float32", {"abs": 1e-4, "rel": 3e-6})],
    ids=["float64", "float32"],
)
@pytest.mark.sampled(8)
def test_real_tasks(reused, build, real_data, task, model, dtype, tolerance):
    """In float32 a log-likelihood of -1000 has a last place of 6e-5: up to a few of them. GPT-Neo's
    attention is in float32 always.
    """
    path = str(real_data / "models" / model)
    expected, found = both(reused, build(task, 5), path, dtype=dtype, softmax_dtype=dtype)
    expected_lls = [ll for ll, _ in expected]
    assert [ll for ll, _ in found] == pytest.approx(expected_lls, **tolerance)
    assert [g for _, g in found] == [g for _, g in expected]


def test_truncation_and_empty_context(reused, build):
    """Long requests lose tokens on the left, empty contexts get a prefix token: as in `hf`."""
    task = build("demo_arc_easy", 6)
    for request in task.instances[::3]:
        request.arguments = ("", request.arguments[1])
    expected, found = both(reused, task, str(MODEL_PATH), max_length=9)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-4)


def test_rolling(reused, build):
    task = build("demo_arc_easy", 3)
    requests = []
    for request in task.instances[::4]:
        text = type(request)("loglikelihood_rolling", {}, (" ".join(request.args),), 0)
        requests.append(text)
    options = {"max_length": 7, "device": "cpu", "batch_size": 2}
    stock = HFLM(pretrained=str(MODEL_PATH), **options)
    expected = stock.loglikelihood_rolling(requests, disable_tqdm=True)
    ours = reused(attack="none", **options).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(expected, abs=1e-4)
