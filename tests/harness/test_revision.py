"""A revision of a model without revisions is refused, and not ignored."""

import shutil

import pytest
from click.testing import CliRunner

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.demo import MODEL_PATH
from llm_attack.harness.revision import check_revision


def test_the_bundled_model_and_a_folder(make, tmp_path):
    """`from_pretrained` loads both whatever the revision is."""
    for pretrained in ("demo", str(MODEL_PATH)):
        with pytest.raises(UsageError, match=rf"revision=nonexistent: .*pretrained={pretrained},"):
            make(pretrained=pretrained, revision="nonexistent")
    folder = shutil.copytree(MODEL_PATH, tmp_path / "model")
    with pytest.raises(UsageError, match="revision=1"):
        make(pretrained=str(folder), revision=1)


def test_a_loaded_model(make):
    """Its revision was chosen when it was loaded."""
    model = make().model
    with pytest.raises(UsageError, match=r"revision=v1: .*pretrained=LlamaForCausalLM,"):
        make(pretrained=model, revision="v1", tokenizer=str(MODEL_PATH))


def test_a_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(UsageError, match="revision=v1"):
        check_revision(path, str(tmp_path), {"revision": "v1", "gguf_file": path.name})


@pytest.mark.parametrize("revision", [None, "main"])
def test_the_default_is_no_revision(make, revision):
    assert make(revision=revision).model is not None


@pytest.mark.parametrize("name", ["pretrained", "tokenizer", "peft", "delta"])
def test_what_is_loaded_from_a_hub_may_have_one(name):
    """Adapter, delta and tokenizer are loaded at the revision of the model."""
    sources = {"pretrained": str(MODEL_PATH), name: "somebody/something", "revision": "v1"}
    check_revision("x", sources.pop("pretrained"), sources)


def test_as_its_user_sees_it(tmp_path):
    words = "run --model demo --tasks demo_piqa --limit 1 --model_args revision=nope -o"
    done = CliRunner().invoke(main, [*words.split(), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "revision=nope: must be left out with pretrained=demo" in done.output
    assert not (tmp_path / "out").exists()
