"""Text generation by `attacked-hf`: batches of prompts, continued under every condition.

The attack perturbs the prompts at prefill (`lm.engine.generate`). The rest is lm-eval's own
`generate_until`: how prompts become tokens, where a text ends, and what is cut off.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence

from llm_attack.base.errors import UsageError
from llm_attack.harness.patches import replaced
from llm_attack.harness.seq2seq import CAUSAL, check_attack
from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.engine.engine import Answered, BatchResult
from llm_attack.lm.engine.generate import attacked_prompts
from llm_attack.lm.losses import LOSSES
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.network.reproducible import reproducible
from llm_attack.lm.packing.positions import QUESTION
from llm_attack.lm.packing.questions import Question, Request

GENERATE = "generate_until"

# Arguments from which lm-eval reads the largest number of tokens. The first that is given counts.
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Piece(NamedTuple):
    """A token of a text: its id, and the characters where it starts and ends."""

    token: int
    start: int
    end: int


@dataclass(frozen=True)
class Prompts:
    """Prompts that are continued together.

    Attributes:
        questions: the tokens of each prompt.
        texts: the text of each prompt.
        how: lm-eval's arguments of generation.
        most: largest number of generated tokens.
    """

    questions: list[Question]
    texts: list[str]
    how: dict[str, Any]
    most: int

    def halves(self) -> list[Prompts]:
        """Splits the batch into two."""
        middle = len(self.texts) // 2
        parts = slice(middle), slice(middle, None)
        return [replace(self, questions=self.questions[p], texts=self.texts[p]) for p in parts]


@dataclass
class _Kept:
    """Data from a call of `generate_until`, in addition to its texts.

    Attributes:
        outputs: for each condition except the first, the outputs for lm-eval's later calls, in
            order.
        sums: for each batch and condition, the values to add to its `Diagnostics`.
        alignments: results of `AttackedBatch.alignment`, by the tokens of the prompt.
    """

    outputs: list[deque[torch.Tensor]]
    sums: list[list[dict[str, float]]] = field(default_factory=list)
    alignments: dict[tuple[int, ...], tuple[float, ...]] = field(default_factory=dict)


class Generating(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """The part of `AttackedHFLM` that generates text."""

    _kept: _Kept | None = None  # only while `generated` runs
    _condition = 0  # the condition that generates

    @torch.inference_mode(False)
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of the prompts, which are attacked at prefill."""
        check_generation(self.settings, str(requests[0].task_name))
        check_attack(self, str(requests[0].task_name))
        _check_end(self.tokenizer, str(requests[0].task_name))
        answers: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._pool()
        return answers

    @torch.inference_mode(False)
    def prompts(self, requests: Sequence[Instance]) -> list[Prompts]:
        """Puts the requests of a task into batches, which depend only on them and the settings.

        Args:
            requests: `generate_until` requests. The questions' answers are indices into them.

        Raises:
            UsageError: a prompt leaves no room for an answer, has unknown tokens, or is sampled.
        """
        alike: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(n)
        return [prompts for numbers in alike.values() for prompts in self._alike(requests, numbers)]

    def _alike(self, requests: Sequence[Instance], numbers: Sequence[int]) -> Iterable[Prompts]:
        """Batches of requests with the same arguments of generation."""
        first = requests[numbers[0]]
        task, how = str(first.task_name), dict(first.args[1])
        check_attack(self, task)
        _check_end(self.tokenizer, task)
        _check_greedy(task, how)
        most = next((int(how[key]) for key in _MOST if how.get(key)), int(self.max_gen_toks))
        # an encoder reads the prompt alone
        room = self.max_length - most * (self.backend == CAUSAL)
        if room <= 0:
            raise UsageError(
                f"tasks={task}: max_gen_toks={most} must be below the model's length,"
                f" {self.max_length} tokens, which holds the prompt and the answer"
            )
        answers: dict[str, list[int]] = {}
        for n in numbers:
            answers.setdefault(requests[n].args[0], []).append(n)
        questions, cut = {}, 0
        for text, of_text in answers.items():
            (tokens,) = self.tok_batch_encode([text], truncation=self.truncation)[0].tolist()
            cut += len(tokens) > room
            if not tokens:
                raise UsageError(
                    f"tasks={task}: question {requests[of_text[0]].doc_id} has an empty prompt;"
                    " must be a task whose prompts have tokens"
                )
            questions[text] = Question([Request(tuple(tokens[-room:]), 0)], [of_text])
        self._check_known({t for q in questions.values() for t in q.requests[0].tokens})
        self._warn_cut(task, cut, len(questions), room)
        # the order in which lm-eval sorts them
        order = sorted(questions, key=lambda text: (-questions[text].longest, text))
        while order:
            rows = self._rows(questions[order[0]].longest + most)
            some, order = order[:rows], order[rows:]
            yield Prompts([questions[text] for text in some], some, how, most)

    def _warn_cut(self, task: str, cut: int, n: int, room: int) -> None:
        sentence = (
            f"task {task}: {cut} of {n} prompts are longer than {room} tokens, which max_length"
            " less max_gen_toks leaves, so their first tokens are cut off"
        )
        if cut and sentence not in self.warnings:
            self.warnings.append(sentence)

    def _rows(self, length: int) -> int:
        """The number of prompts of a batch, if the longest has this many tokens with its answer."""
        if self.engine.layout.deterministic:
            return 1
        if not str(self.batch_size).startswith("auto"):
            return int(self.batch_size)
        most = self._arguments.get("max_batch_size")
        rows = max(1, int(self.tokens_per_batch or self.engine.budget) // length)
        return rows if most is None else min(rows, int(most))

    @torch.inference_mode(False)
    def generated(self, prompts: Prompts) -> BatchResult:
        """The texts under every condition. A batch that runs out of memory is halved."""
        result = BatchResult([], [Diagnostics() for _ in self.conditions])
        waiting = [prompts]
        while waiting:
            part = waiting.pop(0)
            if not self._answered(part, result):
                clear_device_cache(garbage_collection=True)
                waiting = [*part.halves(), *waiting]
        return result

    def _answered(self, prompts: Prompts, result: BatchResult) -> bool:
        """Adds the texts to `result`; False if memory ran out and the batch can be halved."""
        kept = _Kept([deque() for _ in self.conditions[1:]])
        asked = [Instance(GENERATE, {}, (text, prompts.how), 0) for text in prompts.texts]
        generate, texts = super().generate_until, []
        now = {"_kept": kept, "batch_size_per_gpu": len(asked)}
        try:
            with replaced(self, **now):
                for condition in range(len(self.conditions)):
                    with replaced(self, _condition=condition):
                        texts.append(generate(asked, disable_tqdm=True))
        except Exception as error:
            alone = len(asked) == 1 or not self.engine.layout.divides
            if alone or not should_reduce_batch_size(error):
                raise
            return False
        for sums in kept.sums:
            for diagnostics, of_condition in zip(result.diagnostics, sums, strict=True):
                diagnostics.add(of_condition)
        for i, question in enumerate(prompts.questions):
            answers: list[list[Any]] = [[of_condition[i]] for of_condition in texts]
            alignment = kept.alignments.get(question.requests[0].tokens)
            none: list[Any] = [None] * len(texts)
            result.answered.append(Answered(question, answers, alignment, none, none, []))
        return True

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        if self._kept is not None and self._condition > 0:
            return self._kept.outputs[self._condition - 1].popleft()
        options.setdefault("attention_mask", torch.ones_like(context))
        first, *others = self._continued(context, max_length, stop, **options)
        if self._kept is not None:
            for waiting, output in zip(self._kept.outputs, others, strict=True):
                waiting.append(output.cpu())
        return first

    def _continued(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> list[torch.Tensor]:
        """Prompts with their continuations: (B, L) token ids for each condition."""
        mask, rotary = options["attention_mask"], self.engine.scorer.rotary
        self._check_known(context[mask.bool()].tolist())
        shortest = int(mask.sum(-1).min())
        exact = self.engine_settings.deterministic
        # encoders may count positions from the padding on, and may generate a text of its length
        pairs = self.backend != CAUSAL
        alone = exact or pairs or rotary.scale(shortest) != rotary.scale(max_length)
        if len(context) > 1 and alone:
            return self._continued_alone(context, max_length, stop, **options)
        generate = partial(super()._model_generate, context, max_length, stop, **options)
        with frozen(self.model), rotary.fresh(), reproducible(exact):
            clean = generate() if pairs and not self.engine.clean else None
            attacked = attacked_prompts(self.engine, context, mask, clean)
            if self._kept is None:
                self._now.add(attacked.sums)
            else:
                self._kept.sums.append(attacked.sums)
                self._kept.alignments |= attacked.alignments
            outputs: list[torch.Tensor] = []
            for condition in range(1 if self._kept is None else len(self.conditions)):
                if clean is not None and attacked.ends[condition] is None:
                    outputs.append(clean)
                    continue
                with attacked.under(condition):
                    outputs.append(generate())
        return outputs

    def _continued_alone(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> list[torch.Tensor]:
        """Continues one prompt at a time, without its padding. So none depends on another."""
        rows = []
        for row, keep in zip(context, options.pop("attention_mask").bool(), strict=True):
            left = int((~keep).sum())
            prompt = row[None, left:]
            mask = torch.ones_like(prompt)
            texts = self._continued(prompt, max_length - left, stop, attention_mask=mask, **options)
            # a text of an encoder-decoder model is without its prompt
            padding = row[: left * (self.backend == CAUSAL)]
            rows.append([torch.cat([padding, text]) for (text,) in texts])
        pad = self.tokenizer.pad_token_id
        return [
            pad_sequence(list(of_condition), batch_first=True, padding_value=pad)
            for of_condition in zip(*rows, strict=True)
        ]

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of a text, which the tokenizer splits by itself."""
        if getattr(self.tokenizer, "is_fast", False):
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
            return [Piece(token, *ends) for token, ends in pairs]
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        ends = [len(self.tokenizer.decode(tokens[:i])) for i in range(len(tokens) + 1)]
        return [Piece(*of) for of in zip(tokens, ends, ends[1:], strict=False)]


def check_generation(settings: Any, task: str) -> None:
    """Refuses settings that have no meaning for a task that generates text.

    Raises:
        UsageError: the loss or the positions need choices or a continuation.
    """
    if settings.needs_gold:
        raise UsageError(
            f"loss={settings.loss}: task {task} generates text, so it has no choices with labels;"
            " use loss=sequence"
        )
    if not LOSSES[settings.loss].whole:
        raise UsageError(
            f"loss={settings.loss}: must be sequence for tasks that generate text, such as {task}"
        )
    if settings.positions in (QUESTION, "continuation"):
        raise UsageError(
            f"positions={settings.positions}: task {task} generates text, so its prompt has no"
            f" {settings.positions}; must be another value, such as not_first"
        )


def _check_end(tokenizer: Any, task: str) -> None:
    """Refuses a tokenizer without a token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"tokenizer={tokenizer.name_or_path}: has no EOS token, but lm-eval needs one for task"
            f" {task}, which generates text; must be a tokenizer with such a token"
        )


def _check_greedy(task: str, how: dict[str, Any]) -> None:
    """Refuses tasks that draw texts at random, because these differ even without an attack."""
    sample, temperature = how.get("do_sample"), float(how.get("temperature") or 0)
    if sample is True or (sample is None and temperature > 0):
        given = "do_sample=True" if sample else f"temperature={temperature:g}"
        raise UsageError(
            f"tasks={task}: {given} in its generation_kwargs draws texts at random, which differ"
            " without an attack, too; must be do_sample=False. llm-attack eval takes the task as it"
            " is"
        )
