"""The commands `universal` and `export`: fits one perturbation to many questions, and ships it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.folder import check_writable, resolved, resolved_file
from llm_attack.base.record import finite, whole_or_not
from llm_attack.base.redact import redacted
from llm_attack.base.tensors import TensorFile
from llm_attack.harness.patches import without_bars
from llm_attack.harness.requests import by_question
from llm_attack.lm.engine.fixed import Universal
from llm_attack.lm.engine.universal import Fitted, MeanLoss, fit
from llm_attack.lm.fixed import DELTA, FORMAT, POSITION, SCHEMA, SHARES
from llm_attack.lm.network.hook import frozen, vocabulary_of
from llm_attack.lm.network.pairs import embedding_of, is_pair
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.units import NEFTUNE
from llm_attack.suite.evaluate import silence, silenced
from llm_attack.suite.plan import Plan
from llm_attack.suite.plan.fixed import FITTING
from llm_attack.suite.run import estimate, fingerprint, fixed
from llm_attack.suite.run.execute import Prepared, Processes, prepare
from llm_attack.suite.run.load import load_model
from llm_attack.suite.run.progress import RunProgress, written


def check(plan: Plan, share: str) -> None:
    """Checks that a plan can fit a universal perturbation.

    Raises:
        UsageError: a setting is not allowed for this.
    """
    if share not in SHARES:
        raise invalid("share", share, SHARES)
    if len(plan.conditions) != 1 or plan.hookpoints:
        raise UsageError(
            f"attacks={','.join(plan.attacks)}, epsilons={','.join(map(str, plan.epsilons))}: must"
            " be one attack and one amplitude, with one number of steps and one hookpoint"
        )
    kind = plan.conditions[0].attack_in_units.kind
    other = kind.targeted or kind.minimal or kind.reverse or kind.members or kind.inside
    if not kind.gradient or other:
        raise UsageError(
            f"attacks={plan.attacks[0]}: must follow the gradient of one loss, such as bim or apgd"
        )
    if plan.norm == "l2":
        raise UsageError(
            "norm=l2: must be linf or l2_token, because a universal perturbation belongs to no"
            " question whose tokens could share its length"
        )
    if plan.epsilons[0].in_unit(plan.epsilon_unit).unit == NEFTUNE:
        raise UsageError(
            f"epsilons={plan.epsilons[0]}: must be in another unit than {NEFTUNE}, whose size"
            " depends on the question"
        )
    if plan.epsilons[0].number == 0:
        raise UsageError("epsilons=0: must be above 0 for a universal perturbation")
    if Processes.of(plan).world > 1:
        raise UsageError("WORLD_SIZE: must be 1 for a universal perturbation, without shard")


def universal(plan: Plan, share: str, output: str, progress: str = "bar") -> Fitted:
    """Fits a universal perturbation to one half of the questions, and saves it.

    Args:
        plan: model, tasks, one attack and one amplitude. Its `half` is replaced.
        share: one of `SHARES`.
        output: the file of safetensors to write.
        progress: `bar`, `json` or `quiet`.

    Raises:
        UsageError: a setting is not allowed, or the file exists.
    """
    plan = fitting(plan, share)
    path = resolved_file(output)
    check_writable(path.parent, path.name)
    if path.exists():
        raise UsageError(f"output={output}: exists; must be a new file")
    with silenced() if progress == "quiet" else nullcontext():
        return _fitted(plan, share, path, progress)


def _fitted(plan: Plan, share: str, path: Path, progress: str) -> Fitted:
    console = Console(stderr=True)
    prepared = prepare(plan, progress, console)
    loss, attack = objective(prepared, share), prepared.lm.engine.attacks[0]
    n, requests = len(by_question(prepared.requests)), len(prepared.requests)
    total = requests * (attack.steps * attack.restarts if attack.kind.iterative else 1)
    with (
        RunProgress(progress, console, [attack.condition], total, 0) as bar,
        frozen(prepared.lm.model),
    ):
        fitted = fit(attack, loss, plan.seed, lambda _: bar.add(requests, []))
    save(path, fitted, prepared, share, n)
    return fitted


def fitting(plan: Plan, share: str) -> Plan:
    """The plan, checked, with the half of the questions to fit to."""
    check(plan, share)
    return replace(plan, half=FITTING)


def objective(prepared: Prepared, share: str) -> MeanLoss:
    """The mean loss of the questions of a prepared run.

    Raises:
        UsageError: the model, or a task, has no such loss.
    """
    lm = prepared.lm
    if is_pair(lm.model):
        raise UsageError(f"model={prepared.plan.model_name}: must be a causal model")
    batches = []
    for work in prepared.work:
        if not isinstance(work.batch, Batch):
            raise UsageError(f"tasks={work.key[0]}: must be a task with choices or whole texts")
        batches.append(work.batch)
    return MeanLoss(lm.engine, batches, share, vocabulary_of(lm.model))


def save(path: Path, fitted: Fitted, prepared: Prepared, share: str, n: int) -> None:
    """Writes a universal perturbation with everything that its numbers depend on."""
    plan, attack = prepared.plan, prepared.lm.engine.attacks[0]
    condition = plan.conditions[0]
    about = {
        "format": FORMAT,
        "schema": SCHEMA,
        "share": share,
        "model": plan.model_name,
        "tasks": json.dumps(sorted({str(r.task_name) for r in prepared.requests})),
        "key": str(plan.seed),
        "attack": attack.name,
        "amplitude": str(condition.amplitude),
        "epsilon_absolute": repr(attack.epsilon),
        "norm": plan.norm,
        "loss": plan.loss,
        "hookpoint": plan.hookpoint or "",
        "positions": plan.positions,
        "fitted_to": str(n),
        "rows": str(int(fitted.seen.sum())),
        "loss_before": repr(fitted.before),
        "loss_after": repr(fitted.after),
        "settings": json.dumps(finite(redacted(plan.settings())), default=str),
        "fingerprint": json.dumps(finite(redacted(fingerprint.plain(prepared.mark)))),
    }
    with whole_or_not(path) as draft:
        save_file({DELTA: fitted.table.cpu().contiguous()}, draft, about)


def run(
    plan: Plan,
    share: str,
    output: str | None,
    progress: str = "bar",
    verbose: int = 0,
    dry_run: bool = False,
) -> None:
    """The command `llm-attack universal`."""
    silence(verbose)
    if dry_run:
        with without_bars():
            plan = fitting(plan, share)
            estimated = estimate.dry_run(plan, progress)
        return Console().print(estimate.show(estimated, plan.model_name))
    if output is None:
        raise UsageError("output=: must be given, the file for the perturbation")
    with without_bars():
        fitted = universal(plan, share, output, progress)
    seen, rows = int(fitted.seen.sum()), len(fitted.seen)
    print(f"mean loss: {fitted.before:.4g} without, {fitted.after:.4g} with the perturbation")
    print(f"rows: {seen} of {rows} belong to tokens of the questions")
    if progress != "quiet":
        written(f"{output}: to score it on the other half: llm-attack run --perturbation {output}")


# -- a checkpoint with the perturbation ------------------------------------------------------------


def export(file: str, output: str, model: str | None = None) -> None:
    """Saves a checkpoint whose embeddings contain a universal perturbation.

    The head keeps its weights: if it shares the embedding's, it gets a copy of its own.

    Args:
        file: a file of `universal`, with a perturbation for each vocabulary entry, or one for all.
        output: a new folder for the checkpoint, with its tokenizer.
        model: the model; None: that of the file.

    Raises:
        UsageError: the perturbation cannot be part of an embedding, or is not of this model.
    """
    folder = resolved(output)
    check_writable(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"output={output}: must be a new or an empty folder")
    plan = Plan(perturbation=file)
    found = plan.fixed
    assert found is not None
    if found.share is None or found.share == POSITION or found.hookpoint is not None:
        raise UsageError(
            f"perturbation={file}: must be one of the input embedding, for each vocabulary entry or"
            " for all tokens"
        )
    settings = json.loads(TensorFile(found.path).metadata["settings"])
    if settings["positions"] != "all":
        raise UsageError(
            f"perturbation={file}: was fitted with positions={settings['positions']}; must be"
            " positions=all, because an embedding cannot tell positions apart"
        )
    plan = Plan(
        model or settings["model"], perturbation=file, model_args=settings["model_args"],
        attacks=["none"], device="cpu",
    )  # fmt: skip
    lm = load_model(plan)
    table = fixed.load(plan, lm)
    assert isinstance(table, Universal)
    with torch.no_grad(), frozen(lm.model):
        with_perturbation(lm.model, table.table)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def with_perturbation(model: Any, table: Tensor) -> None:
    """Adds a table, (vocabulary, H) or (1, H), to the output of a model's input embedding.

    Raises:
        UsageError: the weights of the embedding cannot give this output.
    """
    embedding = embedding_of(model)
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise UsageError(
            f"model: its embedding is a {type(embedding).__name__} without weights in floating"
            " point; must be a model that is not quantised there"
        )
    ids = torch.arange(len(weight))
    wanted = embedding(ids) + table.to(weight)
    scale = _scale(embedding, weight, ids)
    head = model.get_output_embeddings()
    if head is not None and head.weight is weight:  # the head stays as it is
        head.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    weight.data += table.to(weight) / scale
    error = (embedding(ids) - wanted).abs().max()
    if error > 4 * torch.finfo(weight.dtype).eps * wanted.abs().max():
        raise UsageError(
            f"model: the output of its {type(embedding).__name__} does not follow its weights; must"
            " be a model whose embedding is a table"
        )


def _scale(embedding: Any, weight: Tensor, ids: Tensor) -> float:
    """The factor between weights and output of an embedding, which some models have."""
    output = embedding(ids)
    at = weight.abs().argmax()
    return float(output.flatten()[at] / weight.flatten()[at])
