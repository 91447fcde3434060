"""What each attack of a standard's battery breaks alone, and what the battery costs.

    python benchmarks/battery.py --limit 5 -o results/standard/members.json

Every attack of the battery meets every question, also those that an earlier attack of the battery
makes wrong, and questions that are right without an attack count. `apgd` with as many steps as
`apgdt` is measured as well: it is what one would run without a standard. Times are processor
times of the engine alone, on one thread if OMP_NUM_THREADS=1.
"""

import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from llm_attack.attacks.settings import BATTERIES
from llm_attack.base.declare import DIALECT
from llm_attack.base.record import hardware, versions, write_json
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.settings import AttackSettings
from llm_attack.lm.standard import STANDARDS
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.execute import prepare

_SETTINGS = ("steps", "step_size", "restarts", "queries")


def right_of(answered, which):
    """Whether the likeliest choice is right."""
    sums = [log_likelihood for log_likelihood, _ in answered.answers[which]]
    gold = answered.question.gold
    return bool(gold[int(np.argmax(sums[: len(gold)]))])


def measured(prepared, settings):
    """Right or wrong by question, in the order of the batches, and seconds."""
    lm = prepared.lm
    lm.use(settings)
    batches = [work.batch for work in prepared.work]
    start = time.process_time()
    with frozen(lm.model):
        found = [answered for _, result in lm.answers(batches) for answered in result.answered]
    seconds = time.process_time() - start
    return [right_of(answered, 0) for answered in found], seconds


def of_condition(prepared, standard, norm, epsilon):
    """What each attack does at one amplitude, by its name."""
    common = AttackSettings("none", epsilon, norm=norm, loss=standard.loss)
    members = dict(BATTERIES[standard.version].members)
    alone = {name: {**members[name]} for name in members}
    alone["apgd"] = members["apgdt"]
    attacks = {
        name: replace(common, attack=name, **{k: v for k, v in own.items() if k in _SETTINGS})
        for name, own in alone.items()
    }
    attacks["none"] = common
    attacks[standard.version] = replace(common, attack=standard.version)
    return {name: measured(prepared, settings) for name, settings in attacks.items()}


def counts(rights, members):
    """How many questions each attack breaks, and how many nothing else of the battery breaks."""
    broken = {
        name: {i for i, right in enumerate(of_attack) if rights["none"][i] and not right}
        for name, of_attack in rights.items()
    }
    others = {
        name: set().union(*(broken[other] for other in members if other != name))
        for name in members
    }
    return {
        "broken": {name: len(found) for name, found in broken.items() if name != "none"},
        "only": {name: len(broken[name] - others[name]) for name in members},
    }


@click.command(context_settings={"show_default": True, **DIALECT})
@click.option("--model", default="demo")
@click.option("--tasks", default="demo_six")
@click.option("--limit", default=5, help="First questions of each task.")
@click.option("--version", default="standard-1", help="Of a standard with a battery.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model, tasks, limit, version, output):
    """Writes a JSON file with an entry for each condition."""
    console, standard = Console(stderr=True), STANDARDS[version]
    plan = Plan(model=model, tasks=tasks, attacks="none", loss=standard.loss, limit=limit)
    prepared = prepare(plan, "quiet", console)
    members = [name for name, _ in BATTERIES[version].members]
    rows = []
    for norm in standard.norms:
        for epsilon in standard.epsilons:
            found = of_condition(prepared, standard, norm, epsilon)
            rights = {name: of_attack for name, (of_attack, _) in found.items()}
            row = {"norm": norm, "epsilon": str(epsilon), "n": len(rights["none"])}
            row |= {"right": sum(rights["none"]), **counts(rights, members)}
            row["seconds"] = {name: round(seconds, 2) for name, (_, seconds) in found.items()}
            rows.append(row)
            console.print(row)
    settings = {"model": model, "tasks": tasks, "limit": limit, "version": version}
    record = {"hardware": hardware(), "versions": versions()}
    write_json(output, {"settings": settings, "conditions": rows, **record})


if __name__ == "__main__":
    main()
