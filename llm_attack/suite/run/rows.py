"""A run as frames: `questions`, a row each, and `samples`, a row per question and condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.harness import gold, scores
from llm_attack.harness.requests import Instance, by_question, distinct
from llm_attack.harness.scores import Score
from llm_attack.harness.sources import clusters
from llm_attack.harness.texts import CHOICES, NatsPerByte, TextScore, names_of, without_choices
from llm_attack.harness.texts import of_task as texts_of_task
from llm_attack.lm.settings import EMBED
from llm_attack.suite.analysis.outcomes import (
    BINARY,
    BROKEN_BY,
    CHOICE,
    HIGHER,
    LOWER,
    NUMBER,
    SHARE,
    kind_of,
)
from llm_attack.suite.run import texts

if TYPE_CHECKING:
    from llm_attack.harness.model import AttackedHFLM
    from llm_attack.suite.run.work import Gathered


def grouped(requests: Sequence[Instance]) -> dict[tuple[str, Any], list[int]]:
    """The numbers of each question's requests by (task, doc_id), in the order of its choices."""
    groups = [distinct(requests, numbers) for numbers in by_question(requests)]
    first = [requests[numbers[0]] for numbers in groups]
    return {(str(r.task_name), r.doc_id): group for r, group in zip(first, groups, strict=True)}


def gold_of(requests: Sequence[Instance]) -> dict[tuple[str, Any], list[bool]]:
    """For each question (task, doc_id), whether each of its choices is right.

    The list is empty for tasks that generate or score whole texts.

    Raises:
        UsageError: a question of another task has no choices with gold labels.
    """
    golds: dict[tuple[str, Any], list[bool]] = {}
    for (task, doc_id), numbers in grouped(requests).items():
        if without_choices(requests[numbers[0]]):
            golds[task, doc_id] = []
            continue
        try:
            golds[task, doc_id] = gold.gold_choices([requests[n] for n in numbers])
        except gold.Unlabelled as error:
            raise scores.refused(task, requests[numbers[0]], error) from error
    return golds


def scores_of(requests: Sequence[Instance], asked: str) -> dict[str, Score]:
    """The score of each task.

    Args:
        requests: all requests of the run.
        asked: the score that the user asks for.

    Raises:
        UsageError: no task has this score, or lm-eval could not judge a task.
    """
    of_tasks: dict[str, list[list[Instance]]] = {}
    for (task, _), numbers in grouped(requests).items():
        of_tasks.setdefault(task, []).append([requests[n] for n in numbers])
    first = {task: questions[0] for task, questions in of_tasks.items()}
    score_of = {
        task: texts_of_task(task, of_tasks[task], asked)
        for task, some in first.items()
        if without_choices(some[0])
    }
    names = [name for task in score_of for name in names_of(first[task][0])]
    first = {task: some for task, some in first.items() if task not in score_of}
    scores.check_asked(asked, first, names)
    for task in first:
        questions = of_tasks[task]
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

    Columns:
        task, doc_id: the question.
        doc_hash: lm-eval's hash of the prompt.
        n_choices: number of choices.
        gold: indices of the right choices.
        question, choices: their texts.
        lengths: characters of each choice, by which acc_norm divides; None if the task does not
            list its choices.
        cluster: number of the source that questions of the task share (`sources.clusters`); null if
            the task names no source.
        target: the expected answer of a task that generates text. Only in runs with tasks without
            choices.
        n_bytes: bytes of a text that is scored as a whole. Only in runs with tasks without choices.

    Args:
        requests: all requests of the run.
        right_of: the result of `gold_of`.
        results: lm-eval's results under any condition.
    """
    rows = []
    groups = grouped(requests)
    for task, samples in results["samples"].items():
        kept = _kept(samples)
        docs = [requests[groups[task, sample["doc_id"]][0]].doc for sample in kept]
        for sample, cluster in zip(kept, clusters(docs), strict=True):
            asked = [requests[n] for n in groups[task, sample["doc_id"]]]
            if without_choices(asked[0]):
                content = texts.of_question(asked[0])
            else:
                content = _with_choices(asked, right_of[task, sample["doc_id"]])
            place = {"task": task, "doc_id": sample["doc_id"], "doc_hash": sample["prompt_hash"]}
            rows.append({**place, **content, "cluster": cluster})
    frame = pd.DataFrame(rows)
    types = {"cluster": "Int64", **({"n_bytes": "Int64"} if "n_bytes" in frame else {})}
    return frame.astype(types)


def _with_choices(asked: Sequence[Instance], right: Sequence[bool]) -> dict[str, Any]:
    """The part of a row of `question_rows` that follows from a question's choices."""
    try:
        lengths = gold.choice_lengths(asked)
    except UsageError:
        lengths = None
    question, choices = _texts([r.args for r in asked[: len(right)]])
    return {
        "n_choices": len(right),
        "gold": [i for i, is_right in enumerate(right) if is_right],
        "question": question,
        "choices": choices,
        "lengths": lengths,
    }


def samples_of(
    questions: pd.DataFrame,
    requests: Sequence[Instance],
    scored: Mapping[str, Score],
    lm: AttackedHFLM,
    results: Sequence[dict[str, Any]],
    gathered: Gathered,
) -> pd.DataFrame:
    """A row per question and condition.

    Columns:
        task, doc_id, cluster, n_choices, gold: as in `question_rows`.
        condition, attack, hookpoint, epsilon: the condition.
        prediction: the choice that the score prefers, which is the likeliest unless the score
            divides by lengths.
        prediction_norm: the choice with the largest log-likelihood by length.
        score, kind, better: name of the task's score, its kind (`outcomes.CHOICE`, ...), and
            whether higher or lower is better.
        acc: value of the score.
        acc_norm: lm-eval's metric of this name.
        log_likelihoods: one per choice. A text that is scored as a whole has one.
        cosine: cosine similarity of the question's embeddings and the gradient of the loss at them.
        critical_epsilon: smallest amplitude with a wrong answer, for attacks that search for it. 0
            if the clean answer is wrong, infinite if none was found.
        first_order: first-order estimate of the critical epsilon from the clean point
            (`AttackedBatch.alignment`), if the loss knows the gold.
        broken_by: only in runs with a battery. The attack of the battery that made the answer
            wrong; null if none did, or if the clean answer is wrong.
        request, text: only in runs with tasks without choices. lm-eval's type of request, and the
            generated text.
        parts_at, parts_from, parts_none, parts_token: only in these runs. The place at which the
            text parts from the text of `none` (`texts.Parting`).

    Args:
        questions: the result of `question_rows`.
        requests: all requests of the run.
        scored: the result of `scores_of`.
        lm: the model, with the conditions of the run.
        results: lm-eval's results under each condition.
        gathered: the result of `work.gather`.
    """
    groups, attacks = grouped(requests), lm.engine.attacks
    places = [condition.hookpoint or EMBED for condition in lm.conditions]
    clean = next((i for i, attack in enumerate(attacks) if attack.identity), None)
    judged = [
        {
            (task, sample["doc_id"]): sample
            for task, samples in judged_samples["samples"].items()
            for sample in _kept(samples, scored[task])
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
        for i, attack in enumerate(attacks):
            known = alignments and places[i] == places[0]  # the gradient was taken there
            found = [gathered.answers[i][n] for n in numbers]
            if without_choices(asked[0]):
                pair = found[0], None if clean is None else gathered.answers[clean][numbers[0]]
                outcome = texts.of_answer(asked[0], score, judged[i][place], pair, lm.pieces)
            else:
                outcome = _of_choices(question, score, asked, judged[i][place], found)
            rows.append(
                {
                    **{key: question[key] for key in ("task", "doc_id", "cluster")},
                    "condition": attack.condition,
                    "attack": attack.name,
                    "hookpoint": places[i],
                    "epsilon": 0.0 if attack.identity else attack.epsilon,
                    **{key: question[key] for key in ("n_choices", "gold")},
                    **{key: outcome.pop(key) for key in ("prediction", "prediction_norm")},
                    "score": score.name,
                    "better": LOWER if score.lower else HIGHER,
                    **{key: outcome.pop(key) for key in ("acc", "acc_norm", "log_likelihoods")},
                    "cosine": cosine,
                    "critical_epsilon": critical_epsilons[i],
                    "first_order": alignments[0][3] if known else None,
                    **outcome,
                    **({BROKEN_BY: broken_by[i]} if batteries else {}),
                }
            )
    types = dict.fromkeys(("prediction_norm", "cluster"), "Int64")
    types |= dict.fromkeys(("acc_norm", "cosine", "critical_epsilon", "first_order"), "float")
    frame = pd.DataFrame(rows)
    if "request" in frame:
        types |= texts.TYPES
        frame["request"] = frame["request"].fillna(CHOICES)
    frame = frame.astype(types)
    kinds = {
        task: kind_of(values, _kind(scored[str(task)]))
        for task, values in frame["acc"].groupby(frame["task"], sort=False)
    }
    frame.insert(frame.columns.get_loc("better"), "kind", frame["task"].map(kinds))
    return frame


def _of_choices(
    question: Mapping[str, Any],
    score: Score,
    asked: Sequence[Instance],
    sample: Mapping[str, Any],
    answers: Sequence[Any],
) -> dict[str, Any]:
    """The part of a row of `samples_of` that follows from answers about choices."""
    log_likelihoods = np.array([answer[0] for answer in answers])
    n, lengths = question["n_choices"], question["lengths"]
    values = log_likelihoods[:n]
    prediction = int(score.compared(log_likelihoods, asked)[:n].argmax())
    norm = sample.get("acc_norm")
    divided = lengths is not None and norm is not None
    return {
        "prediction": prediction,
        "prediction_norm": int((values / lengths).argmax()) if divided else None,
        "acc": score.value(sample, prediction in set(question["gold"])),
        "acc_norm": None if norm is None else float(norm),
        "log_likelihoods": values.tolist(),
    }


def _kind(score: Score) -> str:
    """The kind of a score as far as made-up answers show it; real answers may show more."""
    if isinstance(score, NatsPerByte):
        return NUMBER
    return CHOICE if score.choice else BINARY if score.counted else SHARE


def whole_tasks(
    requests: Sequence[Instance],
    scored: Mapping[str, Score],
    conditions: Sequence[str],
    results: Sequence[dict[str, Any]],
) -> dict[str, dict[str, dict[str, float]]]:
    """For each condition and task, lm-eval's numbers that are no mean over questions."""
    tasks = {str(r.task_name): gold.task_of(r) for r in requests}
    whole: dict[str, dict[str, dict[str, float]]] = {}
    for condition, result in zip(conditions, results, strict=True):
        for task, task_result in tasks.items():
            kept = _kept(result["samples"][task], scored[task])[0]
            names = {
                n: f"{n},{kept['filter']}"
                for n in scores.of_whole_tasks(task_result, kept["metrics"])
            }
            values = {n: result["results"][task].get(key) for n, key in names.items()}
            numbers = {n: float(x) for n, x in values.items() if isinstance(x, (int, float))}
            if numbers:
                whole.setdefault(condition, {})[task] = numbers
    return whole


def _kept(samples: list[dict[str, Any]], score: Score | None = None) -> list[dict[str, Any]]:
    """The judgements of one filter. lm-eval judges once per filter: the score names it, or the
    first.
    """
    kept = score.filter if isinstance(score, TextScore) else samples[0]["filter"]
    return [sample for sample in samples if sample["filter"] == kept]


def _texts(pairs: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
    """Splits a question's requests into their common text and the text that each adds.

    The common text is the context, unless the choices are contexts. Then the cut is between words.
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
    """Cosine similarity from the sums of x·g, x·x, g·g; None if the gradient is missing or zero."""
    if not products:
        return None
    xg, xx, gg, *_ = np.sum(products, axis=0)
    return float(xg / np.sqrt(xx * gg)) if xx > 0 and gg > 0 else None
