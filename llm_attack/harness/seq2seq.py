"""Encoder-decoder models (`backend=seq2seq`): what is refused, and the requests that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.base.loaded import name_of
from llm_attack.lm.engine.pairs import PairScorer, decoder_inputs, longest_decoder
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.network.pairs import ENCODER, is_pair
from llm_attack.lm.network.rotary import Rotary
from llm_attack.lm.packing.questions import Request
from llm_attack.lm.settings import AttackSettings

CAUSAL = "causal"


def check_model(lm: Any) -> None:
    """Refuses models that this package cannot attack: wrong backends, and parts that it ignores.

    Raises:
        UsageError: the message names the argument.
    """
    name, pair = name_of(lm.pretrained), is_pair(lm.model)
    if lm.backend == CAUSAL:
        if pair:
            raise UsageError(
                "backend=causal: must be left out, or be seq2seq, because"
                f" {type(lm.model).__name__} is an encoder-decoder model"
            )
        return
    wrong = ""
    if not pair:
        wrong = "must be a causal model, or an encoder-decoder model of text"
    elif Rotary(lm.model).scale(0):
        wrong = "its rotary embeddings depend on the length; must be a model with plain ones"
    elif getattr(getattr(lm.model, "active_peft_config", None), "is_prompt_learning", False):
        wrong = "has virtual tokens of an adapter; must be an adapter without them, such as LoRA"
    if wrong:
        raise UsageError(f"pretrained={name}: {type(lm.model).__name__}: {wrong}")
    try:
        decoder_inputs(lm.model, [int(lm.model.config.pad_token_id == 0)])  # no padding
    except Exception as error:
        raise UsageError(
            f"pretrained={name}: {type(lm.model).__name__} does not name the first token of its"
            f" decoder ({one_line(error)}); give decoder_start_token_id="
        ) from error
    if lm.engine_settings.compile:
        raise UsageError("compile=True: must be left out for encoder-decoder models")


def scorer(lm: Any, model: Any, hookpoints: Sequence[str | None]) -> PairScorer:
    """The scorer of an encoder-decoder model.

    Args:
        lm: lm-eval's model.
        model: the network, or its copy in another dtype.
        hookpoints: the names.

    Raises:
        UsageError: there are several hookpoints, or `packing=tree` is not possible.
    """
    if len(hookpoints) > 1:
        raise UsageError(
            f"hookpoints={','.join(str(h or 'embed') for h in hookpoints)}: must be one hookpoint"
            " for an encoder-decoder model"
        )
    made = PairScorer(model, hookpoints[0], lm.mixed_precision_dtype, lm.softmax_dtype)
    settings = lm.engine_settings
    if settings.packing != "off" and not settings.deterministic:
        made.longest_decoder = longest_decoder(made, lm.device, lm.tokenizer.pad_token_id or 0)
        if settings.packing == "tree" and not made.longest_decoder:
            raise UsageError(
                f"packing=tree: must be auto or off for {type(lm.model).__name__}, because a trial"
                " of several requests in one row of its decoder fails"
            )
    return made


def check_positions(settings: AttackSettings, scorer: Scorer) -> None:
    """Refuses positions that the hookpoint of an encoder-decoder model does not hold.

    Raises:
        UsageError: the message names both.
    """
    if not isinstance(scorer, PairScorer):
        return
    encoder, decoder = scorer.parts
    missing = "context" if not encoder else "continuation" if not decoder else None
    if settings.positions == missing:
        raise UsageError(
            f"positions={missing}: must be another value with"
            f" hookpoint={settings.hookpoint or f'{ENCODER}.embed_tokens'}, because this part of"
            f" the model does not read the {missing}"
        )


def truncated(lm: Any, context: list[int], continuation: list[int], n_question: int = 0) -> Request:
    """The request that an encoder-decoder model gets; lm-eval cuts each part from the left.

    Args:
        lm: the model.
        context: the tokens of the prompt.
        continuation: the tokens of the answer.
        n_question: see `Request`.
    """
    parts = (tokens[-lm.max_length :] for tokens in (context, continuation))
    made: Request = lm.engine.scorer.request(*parts)
    return replace(made, n_question=n_question)


def n_before(lm: Any, context: list[int], examples: list[int]) -> int:
    """The number of tokens of a prompt that belong to its examples.

    Args:
        lm: the model.
        context: the tokens of the prompt.
        examples: the tokens of the text before the question, encoded by itself.
    """
    if lm.backend == CAUSAL:
        return len(examples)
    pairs = zip(context, examples, strict=False)
    # the tokenizer may end both texts in a token, which is not part of the examples
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def check_attack(lm: Any, task: str) -> None:
    """Refuses an attack on prompts that the model continues.

    Raises:
        UsageError: the hookpoint is in a decoder, which reads no prompt; or an attack fits a table
            to all questions.
    """
    tied = next((attack.name for attack in lm.engine.attacks if attack.kind.tied), None)
    if tied is not None:
        raise UsageError(
            f"attack={tied}: must be given with tasks that compare or score given texts; task"
            f" {task} generates text"
        )
    if lm.backend != CAUSAL and not lm.engine.clean and lm.engine.scorer.parts[1]:
        raise UsageError(
            f"hookpoint={lm.settings.hookpoint}: must be left out, or be a module of the encoder,"
            f" with task {task}, which generates text; the decoder does not read the prompt"
        )
