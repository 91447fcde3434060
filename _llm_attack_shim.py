"""Lets ``lm_eval --model attacked-hf`` find the model in releases that read no entry points.

lm-eval reads the entry-point group ``lm_eval.models`` only after release 0.4.13. For earlier
releases, this file is installed at the top of site-packages, beside ``llm_attack_shim.pth``, which
imports it when the interpreter starts. It waits until lm-eval loads its own models. Then it adds
the name ``attacked-hf`` to them, and lm-eval looks up the model when somebody asks for it.

It runs in every Python process of the environment. So it follows three rules: it imports only
``sys`` until lm-eval is there, it raises nothing, and it does not change any other import.
"""

import sys

TYPE_CHECKING = False  # the value of typing.TYPE_CHECKING, without the cost of importing typing
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

    Does nothing if lm-eval is absent, already knows the name, or reads entry points itself. Raises
    nothing, and may be called any number of times.
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
    """Meta-path finder that sees once how `lm_eval.models` is loaded, and changes nothing else."""

    busy = False

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Asks the finders after this one, and returns a loader that registers afterwards."""
        if name != TRIGGER or self.busy:
            return None
        self.busy = True  # another finder may also ask the whole meta-path
        try:
            for finder in list(sys.meta_path):
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._register_after(spec.loader)
                    return spec
        except Exception:
            pass  # the import continues as if this finder did not exist
        finally:
            self.busy = False
        return None

    def _register_after(self, loader: "Any") -> None:
        # The module's own loader stays in place, so inspect and importlib.resources work.
        execute = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            loader.__dict__.pop("exec_module", None)
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        loader.exec_module = exec_module


class _LazyModel:
    """A placeholder for the model class in a plain dict, until it is called or inspected."""

    def __init__(self, models: "dict[str, Any]") -> None:
        self._models = models

    def _resolve(self) -> "Any":
        from importlib import import_module

        module, _, attribute = TARGET.partition(":")
        self._models.pop(NAME, None)  # lm-eval's decorator refuses a name that exists
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
        if name.startswith("__"):  # copy, inspect and others ask this of any object
            raise AttributeError(name)
        return getattr(self._resolve(), name)


register()
