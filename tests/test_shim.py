"""The start-up shim in separate interpreters, with fake and real lm-eval releases.

The fakes run under `python -S`, so no installed lm-eval is found, and no `.pth` file starts one.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[1]
SHIM = "_llm_attack_shim.py"
REEXPORT = (ROOT / "llm_attack" / "_shim.py").read_text()

# Registries of lm-eval's releases, reduced to what the shim meets.
REGISTRY_OBJECT = """
class Registry:
    def __init__(self):
        self.objs = {}
    def register(self, name, *, KEYWORD=None):
        self.objs[name] = KEYWORD
    def __iter__(self):
        return iter(self.objs)

model_registry = MODEL_REGISTRY = Registry()
"""
REGISTRY_DICT = """
MODEL_REGISTRY = {}

def register_model(name):
    def decorate(cls):
        assert name not in MODEL_REGISTRY
        MODEL_REGISTRY[name] = cls
        return cls
    return decorate
"""
# As in the real ones, the models' package imports the registry.
MODELS = "from lm_eval.api import registry\n"


@pytest.fixture
def run(tmp_path):
    """Runs code, with `files` on the path beside the shim, and returns what it prints."""
    shutil.copy(ROOT / SHIM, tmp_path / SHIM)

    def run(code, files=(), flags=("-S",)):
        for name, text in dict(files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text))
        done = subprocess.run(
            [sys.executable, *flags, "-c", dedent(code)],
            env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.strip()

    return run


def lm_eval(registry, models=MODELS):
    """Files of a fake lm-eval."""
    return {
        "lm_eval/__init__.py": "",
        "lm_eval/api/__init__.py": "",
        "lm_eval/api/registry.py": registry,
        "lm_eval/models/__init__.py": models,
    }


def test_imports_nothing_but_itself(run):
    code = """
        import sys
        before = set(sys.modules)
        import _llm_attack_shim
        print(set(sys.modules) - before)
        """
    assert run(code) == "{'_llm_attack_shim'}"


def test_without_lm_eval(run):
    code = """
        import _llm_attack_shim
        import json
        try:
            import lm_eval.models
        except ModuleNotFoundError as error:
            print(error.name)
        """
    assert run(code) == "lm_eval"


@pytest.mark.parametrize("keyword", ["target", "lazy"])
def test_registry_object(run, keyword):
    code = """
        import _llm_attack_shim, sys
        import lm_eval.api.registry
        print(lm_eval.api.registry.model_registry.objs)
        import lm_eval.models
        print(lm_eval.api.registry.model_registry.objs)
        print("llm_attack" in sys.modules)
        """
    printed = run(code, lm_eval(REGISTRY_OBJECT.replace("KEYWORD", keyword))).splitlines()
    assert printed == ["{}", "{'attacked-hf': 'llm_attack.harness.model:AttackedHFLM'}", "False"]


MODEL = """
class AttackedHFLM:
    kind = "the class"
    def __init__(self, text, end="."):
        self.text = text + end
"""
DECORATED = (
    "from lm_eval.api.registry import register_model\n@register_model('attacked-hf')" + MODEL
)


@pytest.mark.parametrize("model", [MODEL, DECORATED], ids=["plain", "decorated"])
@pytest.mark.parametrize("use", ["proxy.kind", "proxy('the class', end='').text"])
def test_registry_dict(run, model, use):
    code = f"""
        import _llm_attack_shim, sys
        import lm_eval.models
        from lm_eval.api.registry import MODEL_REGISTRY
        proxy = MODEL_REGISTRY["attacked-hf"]
        print(hasattr(proxy, "__wrapped__"), "llm_attack.harness.model" in sys.modules)
        print({use})
        print(MODEL_REGISTRY["attacked-hf"] is sys.modules["llm_attack.harness.model"].AttackedHFLM)
        """
    files = lm_eval(REGISTRY_DICT) | {"llm_attack/harness/model.py": model}
    assert run(code, files).splitlines() == ["False False", "the class", "True"]


def test_registry_dict_tells_why_the_model_cannot_be_loaded(run):
    code = """
        import _llm_attack_shim
        import lm_eval.models
        from lm_eval.api.registry import MODEL_REGISTRY
        for _ in range(2):
            try:
                MODEL_REGISTRY["attacked-hf"]()
            except ImportError as error:
                print(error)
        """
    files = lm_eval(REGISTRY_DICT) | {
        "llm_attack/harness/model.py": "raise ImportError('no torch')"
    }
    assert run(code, files).splitlines() == ["no torch", "no torch"]


KNOWN = REGISTRY_OBJECT.replace("KEYWORD", "target") + "model_registry.objs['attacked-hf'] = 'x:Y'"
NEWER = REGISTRY_OBJECT.replace("KEYWORD", "target") + "def load_plugins(): ..."


@pytest.mark.parametrize(
    ("registry", "holds"),
    [(KNOWN, "{'attacked-hf': 'x:Y'}"), (NEWER, "{}")],
    ids=["name known", "reads entry points"],
)
def test_nothing_to_do(run, registry, holds):
    code = """
        import _llm_attack_shim
        import lm_eval.models
        print(lm_eval.models.registry.model_registry.objs)
        """
    assert run(code, lm_eval(registry)) == holds


RAISING = """
class Registry:
    def __iter__(self):
        raise RuntimeError
model_registry = Registry()
"""


@pytest.mark.parametrize(
    "registry",
    [RAISING, "", REGISTRY_OBJECT.replace("KEYWORD", "unheard_of")],
    ids=["raises", "empty", "unknown keyword"],
)
def test_an_unknown_registry_does_no_harm(run, registry):
    code = """
        import _llm_attack_shim
        import lm_eval.models
        _llm_attack_shim.register()
        print("went on")
        """
    assert run(code, lm_eval(registry)) == "went on"


def test_leaves_no_trace_of_the_import(run):
    code = """
        import _llm_attack_shim, sys
        import lm_eval.models, importlib.resources
        loader = lm_eval.models.__spec__.loader
        print(type(loader).__name__, "exec_module" in vars(loader))
        print(any(isinstance(f, _llm_attack_shim._Finder) for f in sys.meta_path))
        importlib.reload(lm_eval.models)
        print(lm_eval.models.registry.model_registry.objs)
        """
    printed = run(code, lm_eval(REGISTRY_OBJECT.replace("KEYWORD", "target"))).splitlines()
    assert printed[:2] == ["SourceFileLoader False", "False"]
    assert printed[2] == "{'attacked-hf': 'llm_attack.harness.model:AttackedHFLM'}"


def test_a_look_for_the_spec_or_a_failed_import_does_not_use_it_up(run):
    code = """
        import _llm_attack_shim, importlib.util, sys
        print(importlib.util.find_spec("lm_eval.models") is not None)
        sys.missing_library = True
        try:
            import lm_eval.models
        except ImportError as error:
            print(error)
        del sys.missing_library
        import lm_eval.models
        print(list(lm_eval.models.registry.model_registry))
        """
    models = "import sys\nif hasattr(sys, 'missing_library'): raise ImportError('as lm-eval says')"
    files = lm_eval(REGISTRY_OBJECT.replace("KEYWORD", "target"), f"{models}\n{MODELS}")
    assert run(code, files).splitlines() == ["True", "as lm-eval says", "['attacked-hf']"]


def test_beside_other_finders(run):
    code = """
        import sys
        import _llm_attack_shim

        class Old:  # without find_spec, as finders were before Python 3.4
            def find_module(self, name, path=None):
                return None

        class AsksAll:
            asked = 0
            def find_spec(self, name, path=None, target=None):
                if name == "lm_eval.models":
                    self.asked += 1
                    others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
                    return next(filter(None, (f.find_spec(name, path) for f in others)), None)

        asks_all = AsksAll()
        sys.meta_path[1:1] = [Old(), asks_all]
        import lm_eval.models
        print(asks_all.asked, list(lm_eval.models.registry.model_registry))
        """
    files = lm_eval(REGISTRY_OBJECT.replace("KEYWORD", "target"))
    assert run(code, files, flags=("-S", "-W", "ignore")) == "1 ['attacked-hf']"


def test_repeated_calls_make_one_finder(run):
    code = """
        import sys
        before = len(sys.meta_path)
        from llm_attack._shim import register
        import _llm_attack_shim
        register()
        print(len(sys.meta_path) - before)
        import lm_eval.models
        register()
        print(len(sys.meta_path) - before, list(lm_eval.models.registry.model_registry))
        """
    files = lm_eval(REGISTRY_OBJECT.replace("KEYWORD", "target"))
    files |= {"llm_attack/_shim.py": REEXPORT}
    assert run(code, files).splitlines() == ["1", "0 ['attacked-hf']"]


def test_register_after_lm_eval(run):
    code = """
        import lm_eval.models
        print(list(lm_eval.models.registry.model_registry))
        from llm_attack._shim import register
        register()
        print(list(lm_eval.models.registry.model_registry))
        """
    files = lm_eval(REGISTRY_OBJECT.replace("KEYWORD", "target"))
    files |= {"llm_attack/_shim.py": REEXPORT}
    assert run(code, files).splitlines() == ["[]", "['attacked-hf']"]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_real_lm_eval(run):
    from lm_eval.api import registry

    if hasattr(registry, "load_plugins") or not hasattr(registry, "model_registry"):
        pytest.skip("this release of lm-eval has another registry; the fakes stand for it")
    code = """
        import sys
        import _llm_attack_shim
        import lm_eval.models
        from lm_eval.api.registry import model_registry
        print(dict(model_registry.items())["attacked-hf"], "hf" in model_registry)
        print([name for name in ("torch", "llm_attack.harness") if name in sys.modules])
        """
    printed = run(code, flags=("-W", "ignore")).splitlines()
    assert printed == ["llm_attack.harness.model:AttackedHFLM True", "[]"]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_real_lm_eval_resolves_the_name(run):
    code = """
        import _llm_attack_shim
        import lm_eval.models  # as evaluations do; get_model does it itself in later releases
        from lm_eval.api.registry import get_model
        print(get_model("attacked-hf").kind)
        """
    stand_in = {"llm_attack/__init__.py": "", "llm_attack/harness/__init__.py": ""}
    stand_in |= {"llm_attack/harness/model.py": MODEL}
    assert run(code, stand_in, flags=("-W", "ignore")) == "the class"
