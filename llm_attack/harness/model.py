"""`attacked-hf`: lm-eval's `hf` model with perturbed embeddings.

The data flow: lm-eval's requests -> tokens (lm-eval's own code) -> questions (`requests`) -> the
engine -> answers in the order of the requests.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple
from functools import cached_property
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.instance import Instance
from tqdm import tqdm

from llm_attack.attacks import Attack
from llm_attack.attacks.cells import check_cells
from llm_attack.attacks.swaps import Vocabulary
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import one_line
from llm_attack.base.loaded import name_of
from llm_attack.demo import MODEL_PATH
from llm_attack.harness import cache, gguf, hashes, loading, quantised, seq2seq, sharded
from llm_attack.harness.arguments import check_names, check_string, check_values, trusted
from llm_attack.harness.generation import Generating, Prompts
from llm_attack.harness.in_use import InUse
from llm_attack.harness.requests import (
    TokenRequest,
    check_score,
    encode,
    questions_of,
    truncated,
    with_siblings,
)
from llm_attack.harness.revision import check_revision
from llm_attack.harness.seq2seq import CAUSAL
from llm_attack.harness.start import report_if_lm_eval_runs, set_device, source_of
from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.engine.engine import Answer, BatchResult, Engine, Layout
from llm_attack.lm.engine.fixed import Fixed
from llm_attack.lm.engine.gradient import Finding, examine, refusal
from llm_attack.lm.engine.hookpoints import scorers
from llm_attack.lm.engine.probe import longest_tree
from llm_attack.lm.engine.scatter import by_index
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.engine.tokens import vocabulary_for
from llm_attack.lm.network import half
from llm_attack.lm.network.blocks import prepare
from llm_attack.lm.network.hook import frozen, resolve, vocabulary_of
from llm_attack.lm.network.reproducible import reproducible
from llm_attack.lm.network.signals import CALIBRATION_TEXT, signals_at
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.positions import QUESTION
from llm_attack.lm.packing.questions import Question
from llm_attack.lm.settings import AttackSettings, EngineSettings, labels, split_arguments
from llm_attack.lm.smoothing import Smoothing
from llm_attack.lm.units import Signal

log = logging.getLogger(__name__)

DEFAULT_MODEL = "TinyLlama/TinyLlama_v1.1"


class AttackedHFLM(Generating):
    """A causal or encoder-decoder Hugging Face model that answers under attack.

    Args:
        pretrained: hub id, local folder, GGUF file, `demo` (the bundled model) or a loaded model.
        **arguments: the settings of `AttackSettings` and `EngineSettings` (docs/arguments.md), and
            the arguments of lm-eval's `hf`.

    Raises:
        UsageError: an argument is unknown or out of range, or the model cannot be loaded.
    """

    progress: Callable[..., Any] = staticmethod(tqdm)
    """Makes the progress bar of a batch of requests; called like tqdm."""

    tokens_per_batch: int | None = None
    """Largest number of tokens of a batch, with padding; None: a number that suits the device."""

    path_points: int | None = None
    """`path_points` of the engine's traces from the next call of `use` on; None: no traces."""

    trace: bool = False
    """Whether the engine returns the loss at every step; conditions of `use` from then on."""
    smoothing: Smoothing | None = None
    """Noise under which the model votes, from the next call of `use` on; None: it does not."""

    fixed: Fixed | None = None
    """The perturbation of the attacks in `FIXED`, from the next call of `use` on."""

    @torch.inference_mode(False)
    def __init__(self, pretrained: Any = DEFAULT_MODEL, **arguments: Any) -> None:
        report_if_lm_eval_runs()
        settings, arguments = split_arguments(arguments, AttackSettings)
        self.engine_settings, arguments = split_arguments(arguments, EngineSettings)
        check_names(arguments)
        check_values(arguments)
        self._arguments = arguments
        pretrained = source_of(pretrained)
        loading.settle_loaded(pretrained, arguments)
        set_device(arguments)
        if "trust_remote_code" in arguments:  # in Python, a text such as "no" is true
            arguments["trust_remote_code"] = trusted(arguments["trust_remote_code"])
        source = str(MODEL_PATH) if pretrained == "demo" else pretrained
        source, gguf_file = gguf.located(source, arguments.get("gguf_file"))
        if gguf_file is not None:
            arguments["gguf_file"] = gguf_file
        check_revision(pretrained, source, arguments)
        dequantize = self.engine_settings.dequantize
        loading.check_arguments(source, {**arguments, "dequantize": dequantize})
        passed = dict(arguments)
        self._quantization = loading.quantization(passed)
        if arguments.get("tp_plan") is not None and "RANK" not in os.environ:
            raise UsageError(
                f"tp_plan={arguments['tp_plan']}: must be started by torchrun, with one process"
                " for each part of the model"
            )
        # lm-eval 0.4.10 does not keep it; later releases set it again
        self.enable_thinking = arguments.get("enable_thinking")
        self._copy: Any = None  # the copy in `gradient_dtype`, as soon as a condition needs it
        self.warnings: list[str] = []
        """Sentences about the model that a reader of the results should know."""
        self.dequantised = ""
        """Name of the format whose weights were replaced by full-precision weights; or empty."""
        self._load(pretrained, source, passed)
        self._check_loaded()
        prepare(self.model, self.engine_settings, resolve(self.model, settings.hookpoint))
        self.use(settings)
        self.check_gradient()

    def _load(self, pretrained: Any, source: Any, passed: dict[str, Any]) -> None:
        """Lets lm-eval load the model.

        Args:
            pretrained: the argument as the user gave it.
            source: the result of `source_of`.
            passed: the other arguments of `hf`.
        """
        try:
            with gguf.without_progress(), loading.untouched(source):
                super().__init__(source, **passed)
        except (UsageError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a broken file can make its reader raise anything
            given = {"pretrained": pretrained, **self._arguments}
            raise loading.not_loaded(given, hasattr(self, "_config"), error) from error
        self.pretrained = pretrained

    def _check_loaded(self) -> None:
        """Refuses a model that cannot compute, and arguments that do not fit it."""
        sharded.begin(name_of(self.pretrained), self.model)
        seq2seq.check_model(self)
        loading.check_finite(name_of(self.pretrained), self.model)
        quantised.check_kernels(name_of(self.pretrained), self.model, self._way_out)
        size = vocabulary_of(self.model)
        prefix = self._arguments.get("prefix_token_id")
        if prefix is not None and (isinstance(prefix, bool) or prefix not in range(size)):
            raise invalid("prefix_token_id", prefix, f"the id of a token, from 0 to {size - 1}")
        loading.check_float64(self.model, torch.zeros(1, 2, dtype=torch.int64, device=self.device))
        name = self.engine_settings.gradient_dtype
        if name is not None:
            half.check(self.model, name, self.mixed_precision_dtype, sharded.by(self))

    @torch.inference_mode(False)
    def use(self, *conditions: AttackSettings) -> None:
        """Attacks with other settings from now on, and resets the diagnostics.

        Args:
            conditions: the settings of each condition. The model returns the answers of the first.
                The others share its work, for a run of the suite. They may differ in attack,
                epsilon, steps, step_size and hookpoint.

        Raises:
            UsageError: the model has no such hookpoint, or conditions differ in other settings.
        """
        with frozen(self.model):
            self._now = self._prepared(*conditions)
        self.diagnostics = self._now.no_diagnostics()

    def _prepared(self, *conditions: AttackSettings) -> InUse:
        if any(other.threat != conditions[0].threat for other in conditions):
            raise UsageError("conditions of one run must have the same loss, context and seed")
        names = list(dict.fromkeys(condition.hookpoint for condition in conditions))
        text = self._known(self.tok_encode(CALIBRATION_TEXT))[: self.max_length]
        units = {condition.amplitude.epsilon.unit for condition in conditions}
        smoothing = self.smoothing
        if smoothing is not None:
            units |= {sigma.unit for sigma in smoothing.sigmas}
        by_name = self._signals_at(names, text, units)
        signals = [by_name[condition.hookpoint] for condition in conditions]
        if smoothing is not None:
            smoothing = smoothing.resolved(signals[0])
        attacks = [
            condition.resolved(signal, label)
            for condition, signal, label in zip(
                conditions, signals, labels(conditions), strict=True
            )
        ]
        places = [condition.hookpoint for condition in conditions]
        self._check_attacks(attacks, places, {signal.width for signal in signals})
        at_names = self._scorers(self.model, names)
        seq2seq.check_positions(conditions[0], at_names[0])
        if any(attack.kind.swaps for attack in attacks):
            at_names[names.index(None)].vocabulary = self._swappable(attacks)
        pad = self._known([self.tokenizer.pad_token_id or 0])[0]
        engine = Engine(
            at_names[0],
            attacks,
            conditions[0].threat,
            self.device,
            self._layout(at_names[0], pad),
            [at_names[names.index(condition.hookpoint)] for condition in conditions],
            self._slopes(at_names, names, attacks),
            self.path_points,
            self.trace,
            smoothing,
            self.fixed,
        )
        return InUse(conditions, tuple(signals), engine, tuple(text))

    def _signals_at(
        self, names: Sequence[str | None], text: Sequence[int], units: Collection[str | None]
    ) -> dict[str | None, Signal]:
        """The scale of the activations at each hookpoint."""
        try:
            with reproducible(self.engine_settings.deterministic):
                input_ids = torch.tensor([text]).to(self.device)
                return signals_at(self.model, names, input_ids, units)
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise
            raise UsageError(
                f"pretrained={name_of(self.pretrained)}: the first forward pass fails"
                f" ({one_line(error)})"
            ) from error

    def _check_attacks(
        self, attacks: Sequence[Attack], places: Sequence[str | None], widths: Collection[int]
    ) -> None:
        largest = torch.finfo(self.model.dtype).max
        for attack, place in zip(attacks, places, strict=True):
            if attack.kind.fixed and self.fixed is None:
                raise UsageError(
                    f"attack={attack.name}: needs a perturbation, so it must be run by llm-attack"
                    " run --perturbation"
                )
            if attack.epsilon > largest:
                raise UsageError(
                    f"epsilon={attack.epsilon:g}: must be a number of the model's dtype,"
                    f" {self.model.dtype}, whose largest number is {largest:g}"
                )
            if attack.cells is not None:
                check_cells(attack.cells, self.model.dtype, widths)
            if attack.kind.tied and (place is not None or self.backend != CAUSAL):
                raise UsageError(
                    f"attack={attack.name}: must be given with a causal model and without a"
                    " hookpoint, because it perturbs the table of the input embedding"
                )
            fmn = any(member.name == "fmn" for member in attack.members)
            if fmn and self.engine_settings.gradient_dtype is not None:
                raise UsageError(
                    f"gradient_dtype={self.engine_settings.gradient_dtype}: must be left out with"
                    f" attack={attack.name}, which needs an answer with every gradient"
                )

    def _swappable(self, attacks: Sequence[Attack]) -> Vocabulary:
        """The tokens that may take the place of others."""
        embedding = self.model.get_input_embeddings()
        if self.backend != CAUSAL or not isinstance(embedding, torch.nn.Embedding):
            name = next(attack.name for attack in attacks if attack.kind.swaps)
            raise UsageError(
                f"attack={name}: must be given with a causal model whose input embedding is a table"
            )
        special = {*self.tokenizer.all_special_ids}
        ids = [token for token in self.tokenizer.get_vocab().values() if token not in special]
        return vocabulary_for(embedding, ids, vocabulary_of(self.model))

    def _scorers(self, model: Any, names: Sequence[str | None]) -> list[Scorer]:
        """A scorer for each hookpoint."""
        if self.backend != CAUSAL:
            return [seq2seq.scorer(self, model, names)]
        place = resolve(model, names[0])
        first = Scorer(model, place, self.mixed_precision_dtype, self.softmax_dtype)
        return scorers(first, names, self.device) if len(names) > 1 else [first]

    def _layout(self, scorer: Scorer, pad: int) -> Layout:
        """The settings that say how questions become batches."""
        settings = self.engine_settings
        rows = settings.deterministic or self.backend != CAUSAL
        packing = "off" if rows else settings.packing
        longest = {"off": 0, "tree": sys.maxsize}.get(packing)
        if longest is None:
            longest = longest_tree(scorer, self.device, pad)
        divides = sharded.by(self) is None
        # recomputed and compiled blocks do not support a cache that they write to
        alone = settings.gradient_checkpointing or settings.compile
        prefixes = packing != "off" and not alone
        once = prefixes and divides and self.mixed_precision_dtype is None
        return Layout(pad, longest, prefixes, once, divides, settings.deterministic)

    def _slopes(
        self, at_names: Sequence[Scorer], names: Sequence[str | None], attacks: Sequence[Attack]
    ) -> dict[Scorer, Scorer]:
        """For each scorer, the scorer of the copy in `gradient_dtype`; empty without a copy."""
        name = self.engine_settings.gradient_dtype
        if name is None or not any(a.kind.gradient and not a.identity for a in attacks):
            return {}
        if self._copy is None:
            self._copy = half.copied(self.model, name, self.engine_settings, names[0])
        return dict(zip(at_names, self._scorers(self._copy, names), strict=True))

    @property
    def copy_bytes(self) -> int:
        """Number of bytes of the copy in `gradient_dtype`; 0 without a copy."""
        weights = [] if self._copy is None else self._copy.parameters()
        return sum({w.data_ptr(): w.nbytes for w in weights}.values())

    @property
    def conditions(self) -> tuple[AttackSettings, ...]:
        """The settings of each condition."""
        return self._now.conditions

    @property
    def settings(self) -> AttackSettings:
        """The settings of the first condition."""
        return self._now.conditions[0]

    @property
    def engine(self) -> Engine:
        """The engine, which answers under all conditions."""
        return self._now.engine

    @property
    def attack(self) -> Attack:
        """The first condition's attack, in the units of the point."""
        return self.engine.attacks[0]

    def gradient(self) -> Finding | None:
        """The result of the check of the gradient; None if no condition follows a gradient.

        The gradient at the first hookpoint is checked, because it goes through all later ones.
        """
        followed = [
            (attack, scorer)
            for attack, scorer in zip(self.engine.attacks, self.engine.scorers, strict=True)
            if (attack.kind.gradient or self.path_points) and not attack.identity
        ]
        if not followed:
            return None
        _, scorer = min(followed, key=lambda pair: len(pair[1].skip.blocks) if pair[1].skip else 0)
        scorer = self.engine.slopes.get(scorer, scorer)
        with frozen(self.model), reproducible(self.engine_settings.deterministic):
            try:
                return examine(scorer, self._now.text, self.device)
            except Exception as error:
                quantised.check_error(name_of(self.pretrained), self.model, error, self._way_out)
                raise

    @property
    def _way_out(self) -> bool:
        """Whether `dequantize=True` is allowed for the model, if it is quantised."""
        given = self._arguments.keys() & {"autogptq", "gptqmodel", "tp_plan"}
        return isinstance(self.pretrained, str) and not given

    def check_gradient(self) -> None:
        """Checks the gradient, if a condition needs it, and adds to `warnings`.

        Raises:
            UsageError: it is not the gradient of the model.
        """
        finding = self.gradient()
        if finding is None:
            return
        if finding.fault:
            attacks = self.engine.attacks
            name = next((a.name for a in attacks if a.kind.gradient and not a.identity), None)
            if name is None:
                raise UsageError(
                    f"path_points={self.path_points}: must be 0, because shares of the loss need"
                    f" the gradient of this model, {finding.fault}"
                )
            way_out = self._way_out and quantised.can_be(self.model)
            raise UsageError(refusal(name, finding.fault, way_out))
        if finding.warning and finding.warning not in self.warnings:
            self.warnings.append(finding.warning)

    @property
    def signal(self) -> Signal:
        """The scale of the activations that the first condition perturbs."""
        return self._now.signals[0]

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> AttackedHFLM:
        """Like lm-eval's method, but numbers must be written plainly."""
        check_string(arg_string)
        model: AttackedHFLM = super().create_from_arg_string(arg_string, additional_config)
        return model

    def _known(self, tokens: Iterable[int]) -> list[int]:
        """The tokens that have an embedding; [0] if none has."""
        size = vocabulary_of(self.model)
        return [token for token in tokens if 0 <= token < size] or [0]

    def _check_known(self, tokens: Iterable[int]) -> None:
        """Raises a `UsageError` if a token has no embedding."""
        size = vocabulary_of(self.model)
        unknown = {token for token in tokens if not 0 <= token < size}
        if unknown:
            token = min(unknown)
            raise UsageError(
                f"tokenizer={self.tokenizer.name_or_path}: gives the token {token}"
                f" ({self.tokenizer.convert_ids_to_tokens(token)!r}), but the model has embeddings"
                f" for 0 to {size - 1}; must be the tokenizer of this model"
            )

    # -- loading -----------------------------------------------------------------------------------

    @cached_property
    def prefix_token_id(self) -> int:
        """Like lm-eval's property, which looks the token up again for every text."""
        token: int = super().prefix_token_id
        return token

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        super()._get_config(*args, **kwargs)
        check_names(self._arguments, self._config)

    def _create_model(self, pretrained: Any, *args: Any, **kwargs: Any) -> None:
        config = self._quantization
        dequantize = self.engine_settings.dequantize
        if dequantize:
            config = quantised.asked_for(self._config, config, self._arguments.get("gguf_file"))
        if config is not None:
            kwargs["quantization_config"] = config
        with loading.noting(self) as unfit:
            unfit.dequantize = dequantize
            super()._create_model(pretrained, *args, **kwargs)
        about = unfit.left_out(self._config, self._model)
        self.dequantised = quantised.replaced_format(self._config, config, self._model)
        if self.dequantised:
            quantised.unify(self._model)
            dtype = str(self._model.dtype).removeprefix("torch.")
            about.append(f"quantised weights ({self.dequantised}) were dequantised to {dtype}")
        self.warnings += unfit.sentences()
        if self.warnings and not self.engine_settings.allow_missing_weights:
            raise UsageError(
                f"pretrained={pretrained}: {'; '.join(self.warnings)}; must be a complete"
                " checkpoint of this architecture, or allow_missing_weights=True"
            )
        self.warnings += about

    def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        super()._create_tokenizer(*args, **kwargs)
        tokenizer = self.tokenizer
        given = self._arguments.get("prefix_token_id") is not None
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None and not given:
            raise UsageError(
                f"tokenizer={tokenizer.name_or_path}: has no BOS and no EOS token, but lm-eval"
                " needs one before empty contexts; must be a tokenizer with such a token, or give"
                " prefix_token_id="
            )

    # -- answering ---------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[Answer]:
        """(log-likelihood, is_greedy) of each request, under attack.

        Raises:
            UsageError: the loss needs gold labels that the task does not have, or no task has the
                score. It is raised before anything is computed.
        """
        check_score(requests, self.settings.score)
        shared = self.settings.threat.shared
        asked = with_siblings(requests) if shared else list(requests)
        questions = questions_of(asked, encode(self, asked), self.settings)
        if shared and self.cache_hook.dbdict is not None:
            cache.refuse_ambiguous(questions, asked)
        answers = self._attacked(questions, [r.args for r in asked], disable_tqdm)
        self._pool()
        return answers[: len(requests)]

    @torch.inference_mode(False)
    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each text. Every window of a text is attacked by itself."""
        check_rolling(self.settings, str(requests[0].task_name))
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        self._pool()
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """Answers windows of longer texts. Each window is a question."""
        encoded = [truncated(self, request) for request in requests]
        questions = [Question([request], [[i]]) for i, request in enumerate(encoded)]
        return self._attacked(questions, [r[0] for r in requests], disable_tqdm, override_bs)

    def _attacked(
        self,
        questions: Iterable[Question],
        keys: Sequence[Any],
        disable_tqdm: bool,
        rows: int | None = None,
    ) -> list[Answer]:
        """The answers under the first condition, in the order of `keys`, the keys of the cache."""
        answers = [(0.0, False)] * len(keys)
        progress = self.progress(
            total=len(keys),
            disable=disable_tqdm or self.rank != 0,
            desc=f"Running loglikelihood requests ({self.attack.condition})",
        )
        batches = self.batches(questions, rows)
        self.fit(batches)
        with frozen(self.model), progress:
            for _, batch in self.engine.answers(batches):
                self._now.add([asdict(sums) for sums in batch.diagnostics])
                requests = by_index(batch.answered)
                for index, of_request in requests.items():
                    answers[index] = of_request.answers[0]
                    if keys[index] is not None:  # a window of a longer text has no key
                        self.cache_hook.add_partial("loglikelihood", keys[index], answers[index])
                progress.update(len(requests))
        return answers

    @torch.inference_mode(False)
    def batches(self, questions: Iterable[Question], rows: int | None = None) -> list[Batch]:
        """The batches of questions. `rows` replaces `batch_size`."""
        limit = rows or self.batch_size
        if str(limit).startswith("auto"):
            limit = self._arguments.get("max_batch_size", sys.maxsize)
        questions = list(questions)
        self._check_known({t for q in questions for r in q.requests for t in r.tokens})
        with frozen(self.model):
            self.engine.probe(questions, self.tokens_per_batch)
            return self.engine.batches(questions, int(limit), self.tokens_per_batch)

    @torch.inference_mode(False)
    def fit(self, batches: Iterable[Batch | Prompts]) -> None:
        """Fits the tables of tied attacks to all these batches together."""
        with frozen(self.model):
            self.engine.fit(batch for batch in batches if isinstance(batch, Batch))

    @torch.inference_mode(False)
    def answers(
        self, todo: Iterable[Batch | Prompts]
    ) -> Iterator[tuple[Batch | Prompts, BatchResult]]:
        """Yields each batch of a run with its answers under every condition."""
        batches = list(todo)
        yield from self.engine.answers(b for b in batches if isinstance(b, Batch))
        for batch in batches:
            if isinstance(batch, Prompts):
                yield batch, self.generated(batch)

    def _pool(self) -> None:
        """Sets `diagnostics`, which lm-eval reads after the run, to the sums over all processes."""
        sums = torch.tensor([astuple(d) for d in self._now.diagnostics], dtype=torch.float64)
        if self.world_size > 1:
            sums = self.accelerator.gather(sums[None].to(self.device)).sum(0).cpu()
        self.diagnostics = [Diagnostics(*row) for row in sums.tolist()]
        for sentence in self.all_warnings(self.diagnostics):
            log.warning(sentence)

    def all_warnings(self, diagnostics: Sequence[Diagnostics] | None = None) -> list[str]:
        """Warnings for a reader of the results: about the model, then about each condition.

        Args:
            diagnostics: the diagnostics of each condition; by default, of lm-eval's last call.
        """
        diagnostics = self.diagnostics if diagnostics is None else diagnostics
        return [*self.warnings, *self._now.warnings(diagnostics)]

    # -- descriptions for the results --------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's description of the model, with the attack under "attack"."""
        attack = {**self.attack_info(), "warnings": self.all_warnings()}
        return {**super().get_model_info(), "attack": attack}

    def attack_info(
        self, condition: int = 0, diagnostics: Diagnostics | None = None
    ) -> dict[str, Any]:
        """Resolved settings and diagnostics of a condition; see docs/numbers.md.

        Args:
            condition: number of the condition.
            diagnostics: its diagnostics; by default, of lm-eval's last call.
        """
        diagnostics = self.diagnostics[condition] if diagnostics is None else diagnostics
        return self._now.info(condition, diagnostics, self.engine_settings.gradient_dtype)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Accepts lm-eval's cache, unless its file was written under other settings."""
        if cache_hook.dbdict is not None:
            ignored = {"device", "batch_size", "max_batch_size", "parallelize"}
            settings = {k: v for k, v in self._arguments.items() if k not in ignored}
            settings |= {"pretrained": name_of(self.pretrained), **self.settings.arguments()}
            settings |= self.settings.sources
            # hashes, because the files of a folder and the weights of a loaded model can change
            settings |= hashes.of_model(self) | {"generation": hashes.generation(self.model)}
            cache.guard(cache_hook.dbdict, settings, cache_hook.dbdict.filename)
        super().set_cache_hook(cache_hook)


def check_rolling(settings: AttackSettings, task: str) -> None:
    """Refuses settings that have no meaning for a task that scores whole texts.

    Raises:
        UsageError: the loss needs choices, or the positions do.
    """
    if settings.needs_gold:
        raise UsageError(
            f"loss={settings.loss}: task {task} is not a multiple-choice task with labels; use"
            " loss=sequence"
        )
    if settings.positions == QUESTION:
        raise UsageError(
            f"positions={QUESTION}: task {task} has no continuations of a question; must be another"
            " value, such as not_first"
        )
