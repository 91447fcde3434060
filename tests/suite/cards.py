"""Invented cards, whose numbers fit each other."""

import hashlib

from llm_attack.lm.standard import STANDARDS
from llm_attack.stats import wilson
from llm_attack.suite.analysis.flags import ZEROS, checks_of
from llm_attack.suite.studies import card


def accuracies(right):
    """Of one task."""
    value = right.count("1") / len(right)
    low, high = wilson(right.count("1"), len(right))
    part = {"value": value, "low": min(low, value), "high": max(high, value)}
    return {"accuracy": part, "tasks": {"demo_piqa": part | {"right": right}}}


def made(
    name,
    *,
    clean,
    robust,
    parameters=1_000_000,
    family="llama",
    failed=False,
    questions="a" * 16,
    date="2026-01-01T00:00:00+00:00",
):
    """A card under standard-1, with the same answers under every condition."""
    standard = STANDARDS["standard-1"]
    model = {"name": name, "source": name, "revision": None, "family": family}
    model |= {"parameters": parameters, "dtype": "torch.float32"}
    hashed = hashlib.sha256(name.encode()).hexdigest()[:16]
    model |= dict.fromkeys(("weights", "config", "tokenizer"), hashed)
    task = {"name": "demo_piqa", "version": 1.0, "num_fewshot": 0, "n": len(clean)}
    task |= {"clusters": len(clean), "baseline": 0.5, "questions": questions}
    lost = sum(pair == ("1", "0") for pair in zip(clean, robust, strict=True))
    checks = [
        {"name": check, "passed": check != ZEROS or not failed, "figure": "measured"}
        for check in checks_of(battery=True)
    ]
    return {
        "card_version": 1,
        "id": card.identity(standard.version, model, [task]),
        "standard": standard.version,
        "package": {"name": "llm-attack", "version": "0.1.0"},
        "git_revision": None,
        "date": date,
        "model": model,
        "tasks": [task],
        "n": len(clean),
        "limit": None,
        "clean": accuracies(clean),
        "robust": [
            {
                "condition": f"standard-1@{epsilon}{'' if norm == 'linf' else '-' + norm}",
                "attack": "standard-1",
                "norm": norm,
                "epsilon": {"number": epsilon.number, "unit": epsilon.unit},
                **accuracies(robust),
                "broken_by": {"apgdt": lost} if lost else {},
            }
            for norm in standard.norms
            for epsilon in standard.epsilons
        ],
        "checks": checks,
        "failed_checks": [ZEROS] if failed else [],
        "warnings": [],
        "hardware": {"processor": "p", "cores": 2, "gpus": []},
        "seconds": 1.5,
        "versions": {"torch": "2"},
        "settings": {},
        "submitted_by": None,
    }
