"""Turns lm-eval's requests into questions in tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

from llm_attack.base.errors import UsageError
from llm_attack.harness import gold, patches, scores, seq2seq
from llm_attack.harness.encode import encoded_together
from llm_attack.harness.seq2seq import CAUSAL, n_before
from llm_attack.lm.packing.positions import QUESTION
from llm_attack.lm.packing.questions import Question, Request
from llm_attack.lm.settings import AttackSettings

__all__ = [
    "Instance",
    "TokenRequest",
    "by_question",
    "check_score",
    "distinct",
    "encode",
    "questions_of",
    "truncated",
    "with_siblings",
]

# An lm-eval request in tokens: ((context, continuation) or None, context, continuation).
TokenRequest = tuple[Any, list[int], list[int]]


def by_question(requests: Sequence[Instance]) -> list[list[int]]:
    """For each question, the numbers of its requests in the order of its choices."""
    questions: dict[Any, list[int]] = {}
    for number, request in enumerate(requests):
        # requests that are made by hand have no task and no doc_id; each is a question
        alone = number if request.doc_id is None else -1
        place = patches.noted(request) or (request.task_name, request.doc_id, alone)
        questions.setdefault(place, []).append(number)
    for numbers in questions.values():
        numbers.sort(key=lambda n: requests[n].idx)
    return list(questions.values())


def distinct(requests: Sequence[Instance], numbers: Sequence[int]) -> list[int]:
    """The numbers of different requests, because a task with `repeats` asks each several times."""
    return list({id(requests[n]): n for n in reversed(numbers)}.values())[::-1]


def with_siblings(requests: Sequence[Instance]) -> list[Instance]:
    """The requests, followed by the other requests of their questions.

    A cache may have answered some requests of a question. An attack on the question needs all.
    """
    known = {id(request): request for request in requests}
    siblings = {id(s): s for request in requests for s in gold.siblings(request)}
    return [*requests, *(s for key, s in siblings.items() if key not in known)]


def encode(lm: HFLM, requests: Sequence[Instance]) -> list[Request]:
    """The requests in tokens, made by lm-eval's own code.

    lm-eval only logs prompts that are cut, and tokens that belong to both a prompt and its answer.
    Here they go into the model's warnings.

    Raises:
        UsageError: an answer has no token, or more than the model's length; or thinking is on.
    """
    _refuse_thinking(lm, requests)
    pairs = [r.args for r in requests]
    texts = [text for a, b in pairs for text in (a.rstrip(), a + b)]
    with encoded_together(lm.tokenizer, texts):
        for request in requests:
            _refuse_empty(lm, request)
        encoded = TemplateLM.loglikelihood(_Encoder(lm), requests, disable_tqdm=True)
        for request, tokens in zip(requests, encoded, strict=True):
            _refuse_unfit(lm, request, tokens)
        _warn(lm, requests, encoded)
    own = [0] * len(requests)
    if lm.settings.positions == QUESTION:
        before = functools.cache(lm.tok_encode)
        own = [
            len(context) + len(continuation) - n_before(lm, context, before(examples_of(request)))
            for request, (_, context, continuation) in zip(requests, encoded, strict=True)
        ]
    return [truncated(lm, request, n) for request, n in zip(encoded, own, strict=True)]


def examples_of(request: Instance) -> str:
    """The part of the prompt before the question's own text: examples, a system prompt.

    Raises:
        UsageError: the prompt does not contain the question's text as its task builds it.
    """
    task = gold.task_of(request)
    context: str = request.args[0]
    if not context.strip():  # a prompt of acc_mutual_info
        return ""
    text: Any = task.doc_to_text(request.doc)
    if not isinstance(text, str):  # its choices are contexts
        text = task.doc_to_choice(request.doc)[request.idx]
    at = context.rfind(text.strip())
    if at < 0:
        raise UsageError(
            f"positions={QUESTION}: the prompt of task {request.task_name}, question"
            f" {request.doc_id}, does not contain its text; must be another value, such as"
            " not_first"
        )
    return context[:at].rstrip(" ")  # a space belongs to the next word


def truncated(lm: HFLM, request: TokenRequest, n_question: int = 0) -> Request:
    """The request that the model gets. It, or each part of it, has at most `max_length` tokens."""
    _, context, continuation = request
    if lm.backend != CAUSAL:
        return seq2seq.truncated(lm, context, continuation, n_question)
    tokens = tuple((context + continuation)[-(lm.max_length + 1) :])
    return Request(tokens, len(continuation), n_question)


def check_score(requests: Sequence[Instance], asked: str) -> None:
    """Refuses the name of a score that no task of these requests has.

    Raises:
        UsageError: the message lists the names that exist.
    """
    first = {str(r.task_name): r for r in reversed(requests) if patches.noted(r) is not None}
    if first and asked != scores.ACC:
        scores.check_asked(asked, {name: gold.siblings(r) for name, r in first.items()})


def questions_of(
    requests: Sequence[Instance], encoded: Sequence[Request], settings: AttackSettings
) -> list[Question]:
    """The questions of `requests`. Their `answers` are indices into `requests`.

    Args:
        requests: the requests of lm-eval.
        encoded: the same requests in tokens.
        settings: say whether gold labels, and the lengths of choices, are needed.

    Raises:
        UsageError: the task does not have a value that is needed.
    """
    questions = []
    of_tasks: dict[int, list[tuple[Question, list[Instance]]]] = {}
    with patches.templates_compiled_once():
        for numbers in by_question(requests):
            choices: dict[tuple[Any, ...], list[int]] = {}
            for n in numbers:
                choices.setdefault((requests[n].idx, encoded[n].tokens), []).append(n)
            answers = [choices[key] for key in sorted(choices)]
            question = Question([encoded[a[0]] for a in answers], answers)
            if settings.needs_gold:
                instances = [requests[a[0]] for a in answers]
                with _refused(instances[0], settings):
                    question.gold = gold.gold_choices(instances)
                task = id(gold.task_of(instances[0]))
                of_tasks.setdefault(task, []).append((question, instances))
            questions.append(question)
        for known in of_tasks.values():
            asked = [instances for _, instances in known]
            with _refused(asked[0][0], settings):
                score = scores.of_task(asked, settings.score)
            for question, instances in known:
                question.lengths = score.lengths(instances) or []
    return questions


@contextmanager
def _refused(request: Instance, settings: AttackSettings) -> Iterator[None]:
    """The error for a question whose gold label the attacker cannot know, with the reason."""
    try:
        yield
    except gold.Unlabelled as error:
        raise UsageError(
            f"loss={settings.loss}: question {request.doc_id} of task {request.task_name} {error};"
            " use loss=sequence or loss=continuation"
        ) from error


def _place(request: Instance) -> str:
    return f"task {request.task_name}, question {request.doc_id}, choice {request.idx}"


def _refuse_thinking(lm: HFLM, requests: Sequence[Instance]) -> None:
    if lm.enable_thinking and requests:
        raise UsageError(
            f"enable_thinking=True: must be False for task {requests[0].task_name}, which compares"
            " log-likelihoods; lm-eval's hf refuses it too"
        )


def _refuse_empty(lm: HFLM, request: Instance) -> None:
    """Refuses an answer that has no token. lm-eval reads the first one if the prompt is empty."""
    context, continuation = request.args
    if not continuation or not (context or lm.tok_encode(continuation, add_special_tokens=False)):
        raise UsageError(f"{_place(request)}: the answer {continuation!r} has no token")


def _refuse_unfit(lm: HFLM, request: Instance, tokens: TokenRequest) -> None:
    _, context, continuation = tokens
    if len(continuation) > lm.max_length:
        raise UsageError(
            f"max_length={lm.max_length}: must be at least {len(continuation)}, the tokens of the"
            f" answer of {_place(request)}"
        )
    if continuation:
        return
    whole = lm.tok_encode("".join(request.args))
    alone, together = ([lm.tok_decode([t]) for t in tokens[-3:]] for tokens in (context, whole))
    hint = (
        "" if lm.settings.encode_separately else "; encode_separately=True tokenises it separately"
    )
    raise UsageError(
        f"{_place(request)}: the answer {request.args[1]!r} has no token of its own. The prompt"
        f" with the answer has {len(whole)} tokens and ends in {together}; the prompt without it"
        f" has {len(context)} and ends in {alone}{hint}"
    )


def _warn(lm: HFLM, requests: Sequence[Instance], encoded: Sequence[TokenRequest]) -> None:
    """Adds doubts about the requests of each task to the model's warnings."""
    counts: dict[str, list[int]] = {}
    together = lm.backend == CAUSAL and not lm.settings.encode_separately
    for request, (_, context, continuation) in zip(requests, encoded, strict=True):
        of_task = counts.setdefault(str(request.task_name), [0, 0, 0])
        of_task[0] += 1
        # an encoder reads the context alone
        read = len(context) + (len(continuation) - 1 if lm.backend == CAUSAL else 0)
        of_task[1] += read > lm.max_length
        if request.args[0].strip() and together:
            of_task[2] += lm.tok_encode("".join(request.args))[: len(context)] != context
    for task, (n, cut, across) in counts.items():
        sentences = {
            f"task {task}: {cut} of {n} requests are longer than max_length={lm.max_length}, so"
            " their first tokens are cut off": cut,
            f"task {task}: in {across} of {n} requests, one token contains the end of the prompt"
            " and the start of the answer. The model does not read the prompt as the task has it;"
            " encode_separately=True avoids this": across,
        }
        lm.warnings += [s for s, wrong in sentences.items() if wrong and s not in lm.warnings]


class _Encoder:
    """A model for lm-eval that only turns requests into tokens."""

    def __init__(self, lm: HFLM) -> None:
        self._lm = lm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes as lm-eval does, except that a prompt of blanks begins like an empty one."""
        lm = self._lm
        if lm.settings.encode_separately:
            end = len(context.rstrip())
            continuation = context[end:] + continuation  # lm-eval moves blanks so
            before = lm.tok_encode(context[:end]) if end else []
            own = lm.tok_encode(continuation, add_special_tokens=False)
        else:
            before, own = lm._encode_pair(context, continuation)
        if before or not own:
            return before, own
        prefix = lm.prefix_token_id
        return (own[:1], own[1:]) if own[0] == prefix else ([prefix], own)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], **options: Any
    ) -> list[TokenRequest]:
        return requests
