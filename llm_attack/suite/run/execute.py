"""The way of a run: tasks -> requests -> batches, each stored when finished -> judgement ->
outputs.

Processes share no memory and send no messages. Each takes every `world`-th batch. The first waits
for the others, judges, and writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.console import Console

from llm_attack.attacks import Attack
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import look
from llm_attack.base.folder import clear_drafts
from llm_attack.base.loaded import LoadedModel
from llm_attack.base.record import Stopwatch, git_revision, hardware, now, versions
from llm_attack.base.redact import redacted
from llm_attack.harness.judge import Judge
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.patches import templates_compiled_once
from llm_attack.harness.requests import Instance
from llm_attack.harness.scores import Score
from llm_attack.harness.seq2seq import CAUSAL
from llm_attack.harness.tasks import look_up
from llm_attack.harness.texts import without_choices
from llm_attack.lm.engine.hookpoints import expand
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.batches import Batch
from llm_attack.suite.analysis import critical
from llm_attack.suite.analysis.conditions import of_plan
from llm_attack.suite.analysis.equivalence import with_equivalence
from llm_attack.suite.analysis.flags import CHECKS, flagged
from llm_attack.suite.analysis.perturbations import FOLDER
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.analysis.worst import KNOWS_GOLD, hidden_gradients, with_worst
from llm_attack.suite.plan import Plan
from llm_attack.suite.results import LM_EVAL, Result
from llm_attack.suite.run import (
    certificates,
    checks,
    fingerprint,
    fixed,
    on_ray,
    perturbations,
    rows,
    steps,
    texts,
    tied,
    tokens,
)
from llm_attack.suite.run.load import load_model
from llm_attack.suite.run.progress import RunProgress, note, status
from llm_attack.suite.run.store import Follower, Store, all_here
from llm_attack.suite.run.work import Gathered, RunningAccuracy, Work, gather, work_of


class Processes(NamedTuple):
    """The place of this process among all processes of a run.

    Attributes:
        rank, world: the process answers share `rank` of `world` shares of the batches.
        member: number of this process among those that each hold a part of the model and answer the
            same batches (tensor parallelism). The first of them stores finished batches.
    """

    rank: int
    world: int
    member: int = 0

    @property
    def first(self) -> bool:
        """Whether this process judges and writes."""
        return self.rank == 0 and self.member == 0

    @classmethod
    def of(cls, plan: Plan) -> Processes:
        """Reads RANK and WORLD_SIZE, which torchrun and accelerate launch set, or `shard`.

        With `tp_plan`, all processes of a launch are one worker, and only `shard` divides the
        batches.

        Raises:
            UsageError: the values are not allowed together.
        """
        launch = {"RANK": "0", "WORLD_SIZE": "1"}
        for name in launch:
            launch[name] = os.environ.get(name, launch[name])
            if not re.fullmatch("[0-9]{1,9}", launch[name]):
                raise invalid(name, launch[name], "an integer, such as torchrun sets")
        rank, world = map(int, launch.values())
        if world > 1 and isinstance(plan.model, LoadedModel):
            raise UsageError(
                f"model={plan.model}: must be a name or a path with WORLD_SIZE={world}, because a"
                " loaded model belongs to one process"
            )
        others = {"WORLD_SIZE": world if world > 1 else None, "shard": plan.shard}
        others["tp_plan"] = plan.model_args.get("tp_plan")
        for name, value in others.items():
            if plan.ray is not None and value is not None:
                text = f"must not be given with {name}={value}, which already divides the work"
                raise UsageError(f"ray={plan.ray}: {text}")
        if rank >= world:
            raise invalid("RANK", rank, f"below WORLD_SIZE, {world}")
        if plan.model_args.get("tp_plan") is not None:
            return cls(*(plan.share or (0, 1)), rank)
        if plan.share is not None and world > 1:
            raise UsageError(
                f"shard={plan.shard}: must not be given with WORLD_SIZE={world}, which already"
                " divides the work"
            )
        return cls(*(plan.share or (rank, world)))


class Prepared(NamedTuple):
    """A run before anything is computed or written.

    Attributes:
        plan: the plan.
        lm: the model with the plan's conditions.
        judge: lm-eval's tasks, ready to judge answers.
        requests: the requests of all tasks.
        gold: the result of `rows.gold_of`.
        scores: the result of `rows.scores_of`.
        work: the batches.
        fit_to: the questions to which tables of embeddings are fitted.
        mark: the fingerprint.
        timings: seconds by stage.
    """

    plan: Plan
    lm: AttackedHFLM
    judge: Judge
    requests: list[Instance]
    gold: dict[tuple[str, Any], list[bool]]
    scores: dict[str, Score]
    work: list[Work]
    fit_to: tied.FitTo
    mark: dict[str, Any]
    timings: Mapping[str, float]


@templates_compiled_once()
def prepare(plan: Plan, progress: str, console: Console, doctor: bool = False) -> Prepared:
    """Loads the model and builds the tasks.

    Args:
        plan: the plan.
        progress: one of `progress.MODES`.
        console: shows the progress.
        doctor: whether `doctor` calls. It examines a wrong gradient instead of refusing it, and
            takes only tasks with choices.

    Raises:
        UsageError: an argument is not allowed, or the gradient is not that of the model.
    """
    clock = Stopwatch()
    with status(progress, console, "looking up the tasks"):
        manager, tasks = look_up(plan.tasks, plan.include_path)
    clock.lap("tasks")
    with status(progress, console, redacted(f"loading {plan.model}")):
        lm = load_model(plan)
        conditions = plan.conditions
        if plan.hookpoints:
            conditions = plan.conditions_at(expand(lm.model, plan.hookpoints))
        lm.use(*conditions)
        if not doctor:
            lm.check_gradient()
    clock.lap("model")
    with status(progress, console, "building the requests"):
        judge = Judge(lm, manager, tasks, fixed.chosen(plan), **plan.evaluation)
        requests = judge.requests()
        for request in filter(without_choices, requests if doctor else ()):
            raise UsageError(
                f"tasks={request.task_name}: must be a task with choices for doctor, which compares"
                " their log-likelihoods"
            )
        gold = rows.gold_of(requests)
        scores = rows.scores_of(requests, plan.score)
        if plan.trace and not any(gold.values()):
            raise UsageError(
                f"trace=True: needs a task with choices; tasks={','.join(map(str, plan.tasks))}"
            )
        work = list(work_of(lm, requests))
        fixed.assign(plan, lm, work, requests)
        batches = [(w.key, w.asked()) for w in work]
        asked = (r for w in work for q in w.batch.questions for r in q.requests)
        read = ((r.tokens, r.n_continuation) for r in asked)
        fit_to = tied.FitTo.of(plan, lm, judge, requests, work)
        mark = fingerprint.of_run(plan, lm, requests, read, batches) | fit_to.record()
    clock.lap("requests")
    return Prepared(plan, lm, judge, requests, gold, scores, work, fit_to, mark, clock)


@templates_compiled_once()
def execute(prepared: Prepared, folder: Path, progress: str, console: Console) -> Result | None:
    """Carries out the rest of a run. Returns None on all processes except the first.

    Args:
        prepared: the result of `prepare`.
        folder: the folder of the run. It keeps finished batches (`Store`) until the run is
            complete.
        progress: one of `progress.MODES`.
        console: shows the progress.

    Raises:
        UsageError: another process writes into the folder, or the clean model gives no finite
            numbers.
        ProcessDied: another process of this run ended early. Finished batches are kept.
    """
    plan, lm, judge, requests, gold, scores, work, fit_to, mark, _ = prepared
    clock = Stopwatch(prepared.timings)
    who = Processes.of(plan)
    planned = [w.key for w in work]
    saved = perturbations.Saved.of(prepared.plan, lm, work)
    if saved is not None and who.first:
        saved.check_room(folder)
        note(progress, console, saved.words(folder))
    kind = Follower if who.member else Store
    with kind(folder, planned, who.rank, who.world) as store, frozen(lm.model):
        if who.member == 0:
            fingerprint.keep(folder, mark)
        if who.first:
            clear_drafts(folder, (LM_EVAL, FOLDER))
        for path in store.check():
            text = f"{path.with_suffix('.sqlite')}: cannot be read; moved aside, and computed again"
            note(progress, console, f"{text}: {path}")
        checked = _checked(prepared, who)
        threads = sorted(_answer(prepared, store, saved is not None, progress, console))
        if not who.first:
            return None
        stage = "waiting for the other processes" if who.world > 1 else "reading the answers"
        with status(progress, console, stage):
            store.wait()
        gathered = gather(store.contents(), work, len(requests))
        if saved is not None:
            with status(progress, console, "writing the perturbations"):
                saved.write(folder, requests, [(w, store.traces(w.key)) for w in work], mark)
    clock.lap("answers")
    with status(progress, console, "judging"):
        results = [judge.results(answers, i) for i, answers in enumerate(gathered.answers)]
        questions = rows.question_rows(requests, gold, results[0])
        attacks = lm.engine.attacks
        samples = rows.samples_of(questions, requests, scores, lm, results, gathered)
        samples = critical.judged(samples, critical.score_of({"settings": plan.settings()}))
        infos = {
            attack.condition: lm.attack_info(i, gathered.diagnostics[i])
            for i, attack in enumerate(attacks)
        }
        known = of_plan(plan, lm.conditions, attacks, fit_to.source)
        run: dict[str, Any] = {"settings": plan.settings(), "attacks": infos}
        run["conditions"] = {name: condition.record() for name, condition in known.items()}
        run["of_tasks"] = rows.whole_tasks(requests, scores, list(infos), results)
        run[KNOWS_GOLD] = plan.needs_gold
        kinds = {str(r.task_name): str(r.request_type) for r in requests}
        if of_texts := texts.record(kinds, plan.loss, lm.backend != CAUSAL):
            run["texts"] = of_texts
        of_questions = certificates.certificates(plan, lm, questions, requests, gathered)
        run |= certificates.record(plan, lm) | fixed.record(plan) | fit_to.record()
        if plan.standard is not None:
            checked += checks.at_end(samples)
            run |= {"standard": plan.standard.version, CHECKS: checked}
        run |= {"of_model": _of_model(lm), "tasks": _tasks(results[0])}
        table = summarise(with_worst(samples, run), infos, run["of_tasks"])
        table = flagged(with_equivalence(table, plan.equivalence), {"": run})
    clock.lap("judgement")
    seconds = {name: round(duration, 2) for name, duration in clock.items()}
    # of this process if all batches were finished before
    of_threads = {"threads": threads if len(threads) > 1 else threads[0]} if threads else {}
    run |= {
        "model": str(plan.model),
        "model_name": plan.model_name,
        "equivalence": plan.equivalence,
        "warnings": [
            *lm.all_warnings(gathered.diagnostics),
            *hidden_gradients(samples, known),
            *(f"{name}: {text}" for name, text in critical.stalled(samples).items()),
            *checks.sentences(checked),
            *_of_others(plan, attacks, scores),
            *([] if saved is None else perturbations.warnings(folder)),
        ],
        "fingerprint": fingerprint.plain(mark),
        "versions": versions(),
        "git_revision": git_revision(),
        "hardware": hardware() | {"device": str(lm.device)} | of_threads,
        "timings": {"processes": who.world, "seconds": seconds, "date": now()},
    }
    judged = dict(zip(infos, results, strict=True))
    more: Any = {"traced": _traced(prepared, gathered), "certificates": of_questions}
    more["changed"] = tokens.frame(lm, questions, requests, gathered.changes)
    return Result(table, samples, questions, redacted(run), judged, **more)


def _checked(prepared: Prepared, who: Processes) -> list[checks.Checked]:
    """The checks of a standard before a run, by all processes that hold a part of the model."""
    first = next((w.batch for w in prepared.work if isinstance(w.batch, Batch)), None)
    if prepared.plan.standard is None or who.rank != 0 or first is None:
        return []
    return checks.at_start(prepared.lm, first)


def _traced(prepared: Prepared, gathered: Gathered) -> pd.DataFrame | None:
    """The loss at every step; None without `trace`."""
    if not prepared.plan.trace:
        return None
    conditions = [attack.condition for attack in prepared.lm.engine.attacks]
    shared = prepared.lm.settings.shared
    groups = rows.grouped(prepared.requests)
    return steps.frame_of(groups, prepared.gold, conditions, gathered.steps, shared)


def _of_model(lm: AttackedHFLM) -> dict[str, Any]:
    """Properties of the model that a list of models may be sorted by."""
    family = str(getattr(lm.model.config, "model_type", ""))
    return {"family": family, "parameters": int(lm.model.num_parameters())}


def _tasks(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's version and number of few-shot examples of each task."""
    return {
        task: {
            "version": result.get("versions", {}).get(task),
            "num_fewshot": result.get("n-shot", {}).get(task),
        }
        for task in result["samples"]
    }


def _of_others(plan: Plan, attacks: Sequence[Attack], scores: Mapping[str, Score]) -> list[str]:
    """A warning for each measure of the likeliest choice if another score is reported."""
    of_choices = ("acc", "acc_norm", "acc_bytes")
    others = [
        task for task, score in scores.items() if not (score.choice and score.name in of_choices)
    ]
    measures = {
        "critical epsilons": any(attack.kind.minimal for attack in attacks),
        "certificates": plan.smoothing is not None,
    }
    listed = ", ".join(f"{task} ({scores[task].name})" for task in others)
    return [
        f"{name} are about the likeliest choice, not about the score of {listed}"
        for name, measured in measures.items()
        if others and measured
    ]


def _answer(
    prepared: Prepared, store: Store, traces: bool, progress: str, console: Console
) -> set[int]:
    """Answers the unfinished batches of this process's share.

    Returns the numbers of threads that computed them.
    """
    lm = prepared.lm
    conditions = [attack.condition for attack in lm.engine.attacks]
    all_here()  # damaged parts have been moved aside by now
    finished = store.keys()
    if traces:  # a batch without its traces is not finished
        finished = {key for key in finished if perturbations.is_kept(store.traces(key))}
    all_here()  # no process adds batches before all have looked
    own = set(store.share(store.rank))
    share = [w for w in prepared.work if w.key in own]
    todo = {id(w.batch): w for w in share if w.key not in finished}
    total = sum(map(len, share))
    done = total - sum(map(len, todo.values()))
    running = RunningAccuracy(prepared.requests, prepared.scores, prepared.gold)
    batches = (w.batch for w in todo.values())
    threads: set[int] = set()
    if prepared.plan.ray is None:
        threads.add(on_ray.threads_of(lm))
        if todo and prepared.fit_to.batches:
            with status(progress, console, "fitting tables of embeddings"):
                lm.fit(prepared.fit_to.batches)
            if store.rank == 0 and store.keeps:
                tied.save(lm.engine.tables, store.folder.parent)
        answers = lm.answers(batches)
    else:
        say = partial(note, progress, console)
        answers = on_ray.answers(prepared.plan, lm, batches, say, threads)
    with RunProgress(progress, console, conditions, total, done) as bar:
        for batch, result in answers:
            store.watch()
            fingerprint.check(store.folder.parent, prepared.mark)
            of_batch = todo[id(batch)]
            content = of_batch.content(result)
            if traces and store.keeps:
                perturbations.keep(store.traces(of_batch.key), result)
            store.add(of_batch.key, content)
            bar.add(len(of_batch), running.add(content["answers"]))
            look()
    return threads
