"""Models in a GGUF file: by path or by folder and name, and one line for every bad file."""

import lm_eval
import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from evaluation import evaluated
from lm_eval.models.huggingface import HFLM

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.harness import gguf as ours
from llm_attack.harness.tasks import look_up

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402

HIDDEN, HEADS, INNER = 32, 4, 64


def write(path, seed=0, architecture="llama", kind=gguf.GGMLQuantizationType.F32):
    """A Llama of one layer that reads bytes, with weights of `seed`."""
    draw = np.random.default_rng(seed)
    vocabulary = [*bytes_to_unicode().values(), "ab", "cd", "<|endoftext|>"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * (len(vocabulary) - 1) + [3])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(len(vocabulary) - 1)
    writer.add_eos_token_id(len(vocabulary) - 1)
    shapes = {"token_embd": (len(vocabulary), HIDDEN)}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (INNER, HIDDEN) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (HIDDEN, INNER)}
    for name, shape in shapes.items():
        weights = draw.normal(0, 0.2, shape).astype(np.float32)
        weights = gguf.quantize(weights, kind)
        writer.add_tensor(f"{name}.weight", weights, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "tiny.gguf")


def test_as_in_stock(good, build):
    """By its path, or by folder and name, it is what `hf` loads."""
    requests = build("demo_piqa", 3).instances
    both = {"device": "cpu", "batch_size": 4}
    stock = HFLM(pretrained=str(good.parent), gguf_file=good.name, **both)
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    for source in ({"pretrained": str(good)}, {"pretrained": good.parent, "gguf_file": good.name}):
        lm = ours_of(**source, **both)
        found = lm.loglikelihood(requests, disable_tqdm=True)
        assert np.array(found) == pytest.approx(np.array(expected), rel=1e-5)


def ours_of(pretrained, **arguments):
    from llm_attack.harness.model import AttackedHFLM

    return AttackedHFLM(pretrained=str(pretrained), attack="none", **arguments)


def bad_files(folder):
    """Name of a file that cannot be loaded -> what is wrong with it."""
    whole = write(folder / "whole.gguf").read_bytes()
    contents = {
        "empty": b"",
        "cut_header": whole[:10],
        "cut_metadata": whole[:3000],
        "cut_weights": whole[:-5000],
        "text": b"This is not a model.",
    }
    for name, content in contents.items():
        (folder / f"{name}.gguf").write_bytes(content)
    write(folder / "architecture.gguf", architecture="nosuch")
    unsupported = whole.replace(*tensor_types(whole))
    (folder / "type.gguf").write_bytes(unsupported)
    (folder / "whole.gguf").unlink()
    return [*contents, "architecture", "type"]


def tensor_types(content):
    """The declaration of a tensor in a file, and the same with a type that nobody knows."""
    name = b"blk.0.attn_q.weight"
    start = content.index(name) + len(name) + 4 + 2 * 8  # dimensions: their number, then each
    declared = content[content.index(name) : start + 4]
    return declared, declared[:-4] + (199).to_bytes(4, "little")


def refused(*arguments):
    """The one line that a command ends with."""
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.output
    return line


def test_bad_files(tmp_path):
    for name in bad_files(tmp_path):
        path, out = tmp_path / f"{name}.gguf", tmp_path / "out"
        line = refused("run", "--model", path, "--tasks", "demo_piqa", "--limit", 1, "-o", out)
        assert f"gguf_file={name}.gguf: cannot be loaded (" in line
        assert "must be a whole GGUF file" in line
        assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": "{folder}/tinny.gguf"}, "gguf_file=tinny.gguf: .*did you mean 'tiny.gguf'"),
        ({"pretrained": "{folder}", "gguf_file": "x"}, "gguf_file=x: .*did you mean 'tiny.gguf'"),
        ({"pretrained": "{folder}/no/tiny.gguf"}, "there is no folder .*no"),
        ({"pretrained": "{folder}"}, "pretrained=.*has GGUF files: gguf_file=tiny.gguf"),
        ({"pretrained": "{folder}/tiny.gguff"}, r"pretrained=.*did you mean .*tiny\.gguf\?"),
    ],
    ids=lambda value: str(value.values()) if isinstance(value, dict) else "",
)
def test_missing_files(good, arguments, message):
    given = {key: value.format(folder=good.parent) for key, value in arguments.items()}
    with pytest.raises(UsageError, match=message):
        ours_of(**given, device="cpu")


def test_missing_package(good, monkeypatch):
    monkeypatch.setattr(ours, "is_gguf_available", lambda: False)
    with pytest.raises(UsageError, match=r"gguf_file=tiny\.gguf: .*pip install -U gguf"):
        ours_of(good)


@pytest.mark.parametrize("wanted", [False, True])
def test_progress_of_dequantisation(good, capfd, wanted):
    before = transformers.logging.get_verbosity()
    try:
        if wanted:
            transformers.logging.set_verbosity_info()
        ours_of(good, device="cpu")
    finally:
        transformers.logging.set_verbosity(before)
    assert ("de-quantizing" in capfd.readouterr().err) is wanted


def test_lm_eval(good, capfd):
    """The file by its path, in a string of arguments; nothing about its dequantisation."""
    found = lm_eval.simple_evaluate(
        model="attacked-hf",
        model_args=f"pretrained={good}",
        tasks=["demo_piqa"],
        task_manager=look_up(["demo_piqa"])[0],
        limit=2,
        device="cpu",
    )
    assert 0 <= found["results"]["demo_piqa"]["acc,none"] <= 1
    assert "de-quantizing" not in capfd.readouterr().err


def test_other_weights_are_another_run(tmp_path):
    path, out = tmp_path / "tiny.gguf", tmp_path / "out"
    settings = {"attacks": ["none"], "limit": 2, "device": "cpu", "progress": "quiet"}

    def run():
        return evaluated(str(path), "demo_piqa", output=out, **settings)

    write(path)
    first = run()
    assert first.run["model_name"] == "tiny.gguf"
    before = (out / "run.json").read_bytes()
    write(path, seed=1)
    with pytest.raises(UsageError, match=r"weights: \"\w+\" there, \"\w+\" here"):
        run()
    assert (out / "run.json").read_bytes() == before
    write(path)
    again = run().samples
    assert again["log_likelihoods"].map(list).tolist() == first.samples["log_likelihoods"].tolist()
