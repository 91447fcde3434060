"""Whether a card can be true: its form, and whether its numbers fit each other.

A card may come from anybody. So nothing here trusts what it reads. Needs neither torch nor lm-eval.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_attack.attacks.settings import BATTERIES, condition_name
from llm_attack.base.errors import shortened
from llm_attack.base.failures import one_line
from llm_attack.lm.standard import STANDARDS, Standard
from llm_attack.lm.units import Amplitude
from llm_attack.stats import wilson
from llm_attack.suite.analysis.flags import checks_of, failed

SCHEMA = Path(__file__).parent / "card.schema.json"
VERSION = 1  # raised when a field goes or changes its meaning; new fields do not raise it
LINK = re.compile(r"https?://[^\s<>\"'\\]+", re.ASCII)
NAME = 200  # letters of a name at most

_MOST = 10**15  # parameters of a model
_TIES = 0.01  # share of the questions with equal scores that a plausible card may have
_OF_MODEL = ("weights", "config", "tokenizer", "dtype")
# Control characters, halves of surrogate pairs, and what turns the direction of a text.
_UNSEEN, _TURNING = ("Cc", "Cs"), {*map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))}


def identity(version: str, model: Mapping[str, Any], tasks: list[dict[str, Any]]) -> str:
    """A hash of what was measured: the standard, the model and the questions."""
    of_model = [model.get(key) for key in _OF_MODEL]
    questions = [[task["name"], task["questions"], task["n"]] for task in tasks]
    text = json.dumps([version, of_model, questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(text: str) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is none, or has a number that is not finite, or a key twice in one place.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), -float("inf")) or value != value:
            raise ValueError(f"{shortened(digits)} is no finite number")
        return value

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {shortened(twice)} occurs twice")
        return content

    try:
        return json.loads(
            text, parse_float=number, parse_constant=number, object_pairs_hook=mapping
        )
    except RecursionError:
        raise ValueError("its parts are nested too deeply") from None


def faults(card: Any) -> list[str]:
    """The faults of a card, a line each. If its form is wrong, only the first fault of the form.

    Beyond the form, the identity must match the content, the numbers must fit each other, and every
    condition and check of the standard must be in the card.
    """
    form = _fault_of_form(card)
    if form is not None:
        return [form]
    try:
        return [*_faults(card)]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # where jsonschema is not installed
        return [f"has another form than cards have ({one_line(error)})"]


def fault_of_author(name: str | None, link: str | None) -> str | None:
    """The fault of the name or link of the person who submits a card; None if there is none."""
    if name is not None and (len(name) > NAME or not _plain(name) or not name.strip()):
        return f"name={shortened(name)!r}: must be a text of at most {NAME} letters in one line"
    if link is not None and not LINK.fullmatch(link):
        return f"link={shortened(link)!r}: must be an address that begins with https:// or http://"
    return None


def _fault_of_form(card: Any) -> str | None:
    if not isinstance(card, dict) or card.get("card_version") != VERSION:
        return f"must be a card of llm-attack, with card_version {VERSION}"
    version = card.get("standard")
    if not isinstance(version, str) or version not in STANDARDS:
        return f"standard={shortened(version)}: must be one of {', '.join(STANDARDS)}"
    for place, text in _texts(card):
        if not _plain(text):
            return f"{place}: has a control character, or one that turns the direction of the text"
    if find_spec("jsonschema") is not None:
        validator: Any = import_module("jsonschema").Draft202012Validator
        schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
        for error in validator(schema).iter_errors(card):
            place = ".".join(map(str, error.absolute_path)) or "card"
            return f"{shortened(place)}: {one_line(error.message)[:NAME]}"
    return None


def _texts(value: Any, place: str = "card") -> Iterator[tuple[str, str]]:
    """Every text in a card, keys included, with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield place, key
            yield from _texts(part, shortened(key) if place == "card" else place)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, place)


def _plain(text: str) -> bool:
    return not any(letter in _TURNING or unicodedata.category(letter) in _UNSEEN for letter in text)


def _faults(card: Mapping[str, Any]) -> Iterator[str]:
    standard = STANDARDS[card["standard"]]
    names = [task["name"] for task in card["tasks"]]
    if len({*names}) < len(names):
        yield "tasks: must name each task once"
    if card["id"] != identity(card["standard"], card["model"], card["tasks"]):
        yield "id: is not the hash of its standard, model and questions"
    if card["n"] != sum(task["n"] for task in card["tasks"]):
        yield "n: is not the sum over its tasks"
    parameters = card["model"]["parameters"]
    if parameters is not None and not 1 <= parameters <= _MOST:
        yield f"model.parameters: must be from 1 to {_MOST:,}"
    by = card["submitted_by"] or {"name": None, "link": None}
    author = fault_of_author(by["name"], by["link"])
    if author is not None:
        yield f"submitted_by: {author}"
    yield from _faults_of_conditions(card, standard)
    yield from _faults_of_checks(card, standard)
    for row in ({"condition": "none", **card["clean"]}, *card["robust"]):
        yield from (f"{row['condition']}: {text}" for text in _implausible(row, card))


def _faults_of_conditions(card: Mapping[str, Any], standard: Standard) -> Iterator[str]:
    """Boards put the numbers of all cards under the conditions of the first: the order counts."""
    wanted = [
        {
            "condition": condition_name(attack, str(Amplitude(epsilon, norm))),
            "attack": attack,
            "norm": norm,
            "epsilon": {"number": epsilon.number, "unit": epsilon.unit},
        }
        for norm in standard.norms
        for attack in standard.attacks
        for epsilon in standard.epsilons
    ]
    found = [{key: row[key] for key in wanted[0]} for row in card["robust"]]
    if found != wanted:
        yield f"robust: must have the {len(wanted)} conditions of {standard.version}, in order"


def _faults_of_checks(card: Mapping[str, Any], standard: Standard) -> Iterator[str]:
    names = [check["name"] for check in card["checks"]]
    wanted = checks_of(any(attack in BATTERIES for attack in standard.attacks))
    if names != wanted:
        yield f"checks: must be the {len(wanted)} of {standard.version}, in order"
    if set(card["failed_checks"]) != set(failed(card)):
        yield "failed_checks: are not those that its checks name"


def _implausible(row: Mapping[str, Any], card: Mapping[str, Any]) -> Iterator[str]:
    """The faults of accuracies: of intervals, counts and means, or above that without an attack."""
    of_tasks = {task["name"]: task for task in card["tasks"]}
    if row["tasks"].keys() != of_tasks.keys():
        yield "its tasks are not those of the card"
        return
    for name, part in {"mean": row["accuracy"], **row["tasks"]}.items():
        if not 0 <= part["low"] <= part["value"] <= part["high"] <= 1:
            yield f"{name}: the interval does not hold its accuracy"
    for name, task in of_tasks.items():
        part, n = row["tasks"][name], task["n"]
        right = part["right"].count("1")
        if len(part["right"]) != n or abs(right / n - part["value"]) > 1e-9:
            yield f"{name}: the accuracy is not that of its {n} questions"
        elif task["clusters"] == n and not _is_wilson(part, right, n):
            yield f"{name}: the interval is not Wilson's"
    mean = sum(part["value"] for part in row["tasks"].values()) / len(row["tasks"])
    if abs(mean - row["accuracy"]["value"]) > 1e-9:
        yield "the accuracy is not the mean of its tasks"
    if row.get("attack") in BATTERIES:
        yield from _implausible_losses(row, card)


def _is_wilson(part: Mapping[str, float], right: int, n: int) -> bool:
    ends = wilson(right, n)
    return all(
        abs(part[name] - end) <= 1e-6 for name, end in zip(("low", "high"), ends, strict=True)
    )


def _implausible_losses(row: Mapping[str, Any], card: Mapping[str, Any]) -> Iterator[str]:
    """The faults in the answers of a battery."""
    pairs = [
        pair
        for name, part in card["clean"]["tasks"].items()
        for pair in zip(part["right"], row["tasks"][name]["right"], strict=False)
    ]
    lost, gained = (pairs.count(change) for change in (("1", "0"), ("0", "1")))
    if gained > _TIES * card["n"]:
        yield f"{gained} questions are right that were wrong without an attack"
    broken = row.get("broken_by")
    members = [name for name, _ in BATTERIES[row["attack"]].members]
    if broken is None or not {*broken} <= {*members}:
        yield f"broken_by: must name attacks of {row['attack']}"
    # an answer that was wrong by rounding alone may be among them
    elif abs(sum(broken.values()) - lost) > _TIES * card["n"]:
        yield f"broken_by: names {sum(broken.values())} questions, but {lost} fell"
