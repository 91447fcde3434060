"""A run as frames: `questions`, a row each, and `samples`, a row per question and condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llm_attack.attacks import Attack
from llm_attack.base.errors import UsageError
from llm_attack.harness import gold, scores
from llm_attack.harness.requests import Instance, by_question, distinct
from llm_attack.harness.scores import Score
from llm_attack.harness.sources import clusters
from llm_attack.suite.analysis.outcomes import (
    BINARY,
    BROKEN_BY,
    CHOICE,
    HIGHER,
    LOWER,
    SHARE,
    kind_of,
)

if TYPE_CHECKING:
    from llm_attack.suite.run.work import Gathered


def grouped(requests: Sequence[Instance]) -> dict[tuple[str, Any], list[int]]:
    """Numbers of the requests of each question, (task, doc_id), in order of its choices."""
    groups = [distinct(requests, numbers) for numbers in by_question(requests)]
    first = [requests[numbers[0]] for numbers in groups]
    return {(str(r.task_name), r.doc_id): group for r, group in zip(first, groups, strict=True)}


def gold_of(requests: Sequence[Instance]) -> dict[tuple[str, Any], list[bool]]:
    """For each question, (task, doc_id), whether each of its choices is right.

    Raises:
        UsageError: a question has no choices with gold labels.
    """
    golds = {}
    for (task, doc_id), numbers in grouped(requests).items():
        try:
            golds[task, doc_id] = gold.gold_choices([requests[n] for n in numbers])
        except gold.Unlabelled as error:
            raise scores.refused(task, requests[numbers[0]], error) from error
    return golds


def scores_of(requests: Sequence[Instance], asked: str) -> dict[str, Score]:
    """The score of each task.

    Args:
        requests: all requests of the run.
        asked: the score that is asked for.

    Raises:
        UsageError: no task has it, or lm-eval could not judge a task.
    """
    of_tasks: dict[str, list[list[Instance]]] = {}
    for (task, _), numbers in grouped(requests).items():
        of_tasks.setdefault(task, []).append([requests[n] for n in numbers])
    scores.check_asked(asked, {task: questions[0] for task, questions in of_tasks.items()})
    score_of = {}
    for task, questions in of_tasks.items():
        try:
            score_of[task] = scores.of_task(questions, asked)
        except gold.Unlabelled as error:
            raise scores.refused(task, questions[0][0], error) from error
        scores.check(task, questions, score_of[task])
    return score_of


def question_rows(
    requests: Sequence[Instance],
    right_of: Mapping[tuple[str, Any], list[bool]],
    results: dict[str, Any],
) -> pd.DataFrame:
    """A row per question, in the order of the run.

    Columns: `task`, `doc_id`, `doc_hash` (of the prompt, lm-eval's), `n_choices`, `gold` (indices
    of the right choices), `question`, `choices`, `lengths` (characters of each choice, which
    acc_norm divides by; None where the task does not list its choices), `cluster` (number of the
    source that it shares with other questions of the task, `sources.clusters`; null where the task
    does not tell).

    Args:
        requests: all requests of the run.
        right_of: of `gold_of`.
        results: lm-eval's, of any condition.
    """
    rows = []
    groups = grouped(requests)
    for task, samples in results["samples"].items():
        kept = _first_filter(samples)
        docs = [requests[groups[task, sample["doc_id"]][0]].doc for sample in kept]
        for sample, cluster in zip(kept, clusters(docs), strict=True):
            asked = [requests[n] for n in groups[task, sample["doc_id"]]]
            right = right_of[task, sample["doc_id"]]
            try:
                lengths = gold.choice_lengths(asked)
            except UsageError:
                lengths = None
            question, choices = _texts([r.args for r in asked[: len(right)]])
            rows.append(
                {
                    "task": task,
                    "doc_id": sample["doc_id"],
                    "doc_hash": sample["prompt_hash"],
                    "n_choices": len(right),
                    "gold": [i for i, is_right in enumerate(right) if is_right],
                    "question": question,
                    "choices": choices,
                    "lengths": lengths,
                    "cluster": cluster,
                }
            )
    return pd.DataFrame(rows).astype({"cluster": "Int64"})


def samples_of(
    questions: pd.DataFrame,
    requests: Sequence[Instance],
    scored: Mapping[str, Score],
    attacks: Sequence[Attack],
    hookpoints: Sequence[str],
    results: Sequence[dict[str, Any]],
    gathered: Gathered,
) -> pd.DataFrame:
    """A row per question and condition.

    Columns: `task`, `doc_id`, `cluster`, `condition`, `attack`, `hookpoint`, `epsilon`,
    `n_choices`, `gold`, `prediction` (the choice that the score prefers: the likeliest, unless it
    divides by lengths) and `prediction_norm` (argmax of log-likelihood by length), `score`, `kind`
    and `better`: name of the task's score, what it is (`outcomes.CHOICE`, ...), and which direction
    is better; `acc`: its value, `acc_norm` (lm-eval's), `log_likelihoods`, `cosine`
    (similarity of the question's embeddings and the gradient of the loss there), `critical_epsilon`
    (of attacks that look for it, the smallest amplitude with a wrong answer: 0 where the clean one
    is wrong, infinite where none was found), `first_order` (its estimate from the clean point,
    `AttackedBatch.alignment`; where the loss knows the gold). Of a run with a battery also
    `broken_by`: the attack of it that made the answer wrong; null where none did, or it was wrong
    without an attack.

    Args:
        questions: of `question_rows`.
        requests: all requests of the run.
        scored: of `scores_of`.
        attacks: of the conditions.
        hookpoints: of the conditions.
        results: lm-eval's, for each condition.
        gathered: of `work.gather`.
    """
    groups = grouped(requests)
    judged = [
        {
            (task, sample["doc_id"]): sample
            for task, samples in judged_samples["samples"].items()
            for sample in _first_filter(samples)
        }
        for judged_samples in results
    ]
    rows = []
    batteries = any(attack.kind.members for attack in attacks)
    for question in questions.to_dict("records"):
        place = question["task"], question["doc_id"]
        numbers = groups[place]
        alignments = [gathered.alignments[n] for n in numbers if n in gathered.alignments]
        cosine = _cosine(alignments)
        critical_epsilons = gathered.critical_epsilons.get(numbers[0], [None] * len(attacks))
        broken_by = gathered.broken_by.get(numbers[0], [None] * len(attacks))
        score, asked = scored[place[0]], [requests[n] for n in numbers]
        gold_ones = set(question["gold"])
        of_conditions = zip(
            *(attacks, hookpoints, judged, gathered.answers, critical_epsilons, broken_by),
            strict=True,
        )
        for attack, hookpoint, samples, answers, critical, broken in of_conditions:
            known = alignments and hookpoint == hookpoints[0]  # where the gradient was taken
            found_here = np.array([answers[n][0] for n in numbers])
            values, n = found_here[: question["n_choices"]], question["n_choices"]
            prediction = int(score.compared(found_here, asked)[:n].argmax())
            norm, lengths = samples[place].get("acc_norm"), question["lengths"]
            rows.append(
                {
                    **{key: question[key] for key in ("task", "doc_id", "cluster")},
                    "condition": attack.condition,
                    "attack": attack.name,
                    "hookpoint": hookpoint,
                    "epsilon": 0.0 if attack.identity else attack.epsilon,
                    **{key: question[key] for key in ("n_choices", "gold")},
                    "prediction": prediction,
                    "prediction_norm": None
                    if lengths is None or norm is None
                    else int((values / lengths).argmax()),
                    "score": score.name,
                    "better": LOWER if score.lower else HIGHER,
                    "acc": score.value(samples[place], prediction in gold_ones),
                    "acc_norm": None if norm is None else float(norm),
                    "log_likelihoods": values.tolist(),
                    "cosine": cosine,
                    "critical_epsilon": critical,
                    "first_order": alignments[0][3] if known else None,
                    **({BROKEN_BY: broken} if batteries else {}),
                }
            )
    types = dict.fromkeys(("prediction_norm", "cluster"), "Int64")
    types |= dict.fromkeys(("acc_norm", "cosine", "critical_epsilon", "first_order"), "float")
    frame = pd.DataFrame(rows).astype(types)
    kinds = {
        task: kind_of(values, _kind(scored[str(task)]))
        for task, values in frame["acc"].groupby(frame["task"], sort=False)
    }
    frame.insert(frame.columns.get_loc("better"), "kind", frame["task"].map(kinds))
    return frame


def _kind(score: Score) -> str:
    """What a score is as far as made-up answers show; real ones may show more."""
    return CHOICE if score.choice else BINARY if score.counted else SHARE


def whole_tasks(
    requests: Sequence[Instance], conditions: Sequence[str], results: Sequence[dict[str, Any]]
) -> dict[str, dict[str, dict[str, float]]]:
    """For each condition and task, lm-eval's numbers that are no mean over questions."""
    tasks = {str(r.task_name): gold.task_of(r) for r in requests}
    whole: dict[str, dict[str, dict[str, float]]] = {}
    for condition, result in zip(conditions, results, strict=True):
        for task, task_result in tasks.items():
            kept = _first_filter(result["samples"][task])[0]
            names = {
                n: f"{n},{kept['filter']}"
                for n in scores.of_whole_tasks(task_result, kept["metrics"])
            }
            values = {n: result["results"][task].get(key) for n, key in names.items()}
            numbers = {n: float(x) for n, x in values.items() if isinstance(x, (int, float))}
            if numbers:
                whole.setdefault(condition, {})[task] = numbers
    return whole


def _first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval judges once per filter; a question's first judgement is taken."""
    return [s for s in samples if s["filter"] == samples[0]["filter"]]


def _texts(pairs: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
    """Splits a question's requests into what they have in common and what each adds.

    The context, unless the choices are contexts; cut between words.
    """
    whole = [context + continuation for context, continuation in pairs]
    context = pairs[0][0]
    if any(c != context for c, _ in pairs):
        first, last = min(whole), max(whole)
        letters = enumerate(zip(first, last, strict=False))
        common = first[: next((i for i, (a, b) in letters if a != b), len(first))]
        context = common[: common.rfind(" ") + 1]
    return context.rstrip(), [text[len(context) :].strip() for text in whole]


def _cosine(products: Sequence[Sequence[float]]) -> float | None:
    """Cosine similarity from the sums of x·g, x·x, g·g; None: no gradient, or a zero one."""
    if not products:
        return None
    xg, xx, gg, *_ = np.sum(products, axis=0)
    return float(xg / np.sqrt(xx * gg)) if xx > 0 and gg > 0 else None
