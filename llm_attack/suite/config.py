"""A YAML file with the settings of a plan."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm_attack.base.declare import SettingSpec, check_names, declared, underscored
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import one_line
from llm_attack.base.folder import check_readable
from llm_attack.lm.losses import LOSSES, known_loss
from llm_attack.lm.units import ABSOLUTE, UNITS, known_unit
from llm_attack.suite.plan import Plan


def from_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, whose keys are the settings of `Plan`.

    Raises:
        UsageError: the file cannot be read, is no mapping, or has an unknown key.
    """
    import yaml

    check_readable(path, "config")
    try:
        content = _read_yaml(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        text = f"cannot be read ({one_line(error)}); must be a YAML file"
        raise UsageError(f"config={path}: {text}") from error
    if not isinstance(content, dict):
        raise UsageError(f"config={path}: must be a mapping, such as attacks: [none, fgsm]")
    content = {underscored(str(key)): value for key, value in content.items()}
    fields = list(declared(Plan))
    allowed = {entry.name: about for entry, about in fields} | {"output": SettingSpec("", str)}
    may_be_null = {entry.name for entry, _ in fields if entry.default is None} | {"output"}
    try:
        check_names(content, list(allowed))
        for key, value in content.items():
            known = key in may_be_null if value is None else allowed[key].allows(value)
            if not known:
                raise invalid(key, value, allowed[key].choices or allowed[key].words())
            if key == "loss" and isinstance(value, str) and not known_loss(value):
                raise invalid(key, value, LOSSES)
            if key == "epsilon_unit" and isinstance(value, str) and not known_unit(value):
                raise invalid(key, value, (ABSOLUTE, *UNITS))
    except UsageError as error:
        raise UsageError(f"config={path}: {error}") from None
    return content


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _read_yaml(text: str) -> Any:
    """The content of a YAML text. A repeated key is an error, while YAML would take the last."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is not typed
        """Reads numbers as JSON does. YAML 1.1 reads 1_0, 010 and 1:30 as 10, 8 and 90."""

        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [pair for pair in resolvers if not pair[0].endswith((":int", ":float"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    digits = r"((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
    of_number = rf"[-+]?({digits}|\.inf|\.nan)$"
    Loader.add_implicit_resolver("!number", re.compile(of_number), list("-+.0123456789"))
    Loader.add_constructor("!number", lambda loader, node: _number(node.value))

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key} occurs twice")
        content: dict[Any, Any] = loader.construct_mapping(node, deep=True)
        return content

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return yaml.load(text, Loader)
