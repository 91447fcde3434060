"""Lets ``lm_eval --model attacked-hf`` find the model in releases that read no entry points.

lm-eval reads the entry-point group ``lm_eval.models`` only after release 0.4.13. For the releases
before it, this file is installed at the top of site-packages, beside ``llm_attack_shim.pth``, which
imports it when the interpreter starts. It waits for lm-eval to load its own models and then adds
``attacked-hf`` to them, as a name to be resolved when it is asked for.

It runs in every Python process of the environment. Hence its rules: it imports ``sys`` alone until
lm-eval is there, it raises nothing, and it leaves every other import as it was.
"""

import sys

TYPE_CHECKING = False  # what typing.TYPE_CHECKING is, without the cost of importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

NAME = "attacked-hf"
TARGET = "llm_attack.harness.model:AttackedHFLM"
TRIGGER = "lm_eval.models"


def register() -> None:
    """Add ``attacked-hf`` to lm-eval's models: now, or as soon as lm-eval loads its own.

    Does nothing where lm-eval is absent, knows the name already, or reads entry points itself.
    Raises nothing, and may be called any number of times.
    """
    try:
        if TRIGGER in sys.modules:
            _add()
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception:
        pass


def _add() -> None:
    """Add the name to lm-eval's registry, in the form that this release of lm-eval takes."""
    from lm_eval.api import registry

    if hasattr(registry, "load_plugins"):  # this release reads the entry point itself
        return
    models = getattr(registry, "model_registry", None)
    if models is None:
        models = registry.MODEL_REGISTRY
    if NAME in models:
        return
    if isinstance(models, dict):  # up to 0.4.9.2: classes by name
        models[NAME] = _LazyModel(models)
        return
    for keyword in ("target", "lazy"):  # since 0.4.10; on the main branch before it
        try:
            models.register(NAME, **{keyword: TARGET})
            return
        except TypeError:
            continue


class _Finder:
    """Meta-path finder that sees `lm_eval.models` being loaded, once, and changes nothing else."""

    busy = False

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Asks the finders behind this one, and returns a loader that registers afterwards."""
        if name != TRIGGER or self.busy:
            return None
        self.busy = True  # another finder may ask the whole meta-path in its turn
        try:
            for finder in list(sys.meta_path):
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._register_after(spec.loader)
                    return spec
        except Exception:
            pass  # the import goes on as if this finder were not there
        finally:
            self.busy = False
        return None

    def _register_after(self, loader: "Any") -> None:
        # The loader itself stays the module's loader, so that inspect and importlib.resources work.
        execute = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            loader.__dict__.pop("exec_module", None)
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        loader.exec_module = exec_module


class _LazyModel:
    """Stands for the model class in a plain dict of classes, until it is called or looked into."""

    def __init__(self, models: "dict[str, Any]") -> None:
        self._models = models

    def _resolve(self) -> "Any":
        from importlib import import_module

        module, _, attribute = TARGET.partition(":")
        self._models.pop(NAME, None)  # free for the decorator of lm-eval, which takes no name twice
        try:
            model = getattr(import_module(module), attribute)
        except BaseException:
            self._models[NAME] = self
            raise
        self._models[NAME] = model
        return model

    def __call__(self, *args: "Any", **kwargs: "Any") -> "Any":
        return self._resolve()(*args, **kwargs)

    def __getattr__(self, name: str) -> "Any":
        if name.startswith("__"):  # asked by copy, inspect and the like, of any object
            raise AttributeError(name)
        return getattr(self._resolve(), name)


register()
