"""The command `train`: adversarial tuning of a model in embedding space."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.base.folder import check_readable, check_writable, resolved
from llm_attack.base.record import hardware, now, versions, write_json
from llm_attack.demo.questions import training_texts
from llm_attack.demo.train import batches, padded, train
from llm_attack.demo.world import SEED, World
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.patches import without_bars
from llm_attack.lm.engine.adversarial import AdversarialLoss
from llm_attack.lm.network.pairs import embedding_of, is_pair
from llm_attack.suite.evaluate import silence
from llm_attack.suite.plan import Plan
from llm_attack.suite.plan.training import FREELB, Training
from llm_attack.suite.run.execute import Processes
from llm_attack.suite.run.load import load_model
from llm_attack.suite.run.progress import written

RECORD = "training.json"


def tune(training: Training, plan: Plan, output: str | None, bar: bool = True) -> dict[str, Any]:
    """Tunes a model, and saves it or its adapter. Returns the record.

    The embedding stays as it is, so an epsilon means the same before and after.

    Args:
        training: the settings.
        plan: the result of `Training.plan`.
        output: a new folder; None: only what the training would need is measured.
        bar: whether to show a progress bar.

    Raises:
        UsageError: a setting is not allowed, or the model cannot be trained so.
    """
    folder = None if output is None else resolved(output)
    if folder is not None:
        check_writable(folder)
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"output={output}: must be a new or an empty folder")
    if Processes.of(plan).world > 1:
        raise UsageError("WORLD_SIZE: must be 1 for a training")
    texts = _texts(training, plan)
    torch.manual_seed(plan.seed)
    plan = replace(plan, model_args={"dtype": "float32", **plan.model_args})
    lm = load_model(plan)
    model = trainable(lm, training.lora)
    data = _batches(lm, texts, training, plan.seed)
    pad = _pad(lm)
    free = training.attack[0] == FREELB
    backward = AdversarialLoss(lm.attack, free, pad, plan.seed)
    record = _record(training, plan, lm, model, backward, data)
    if folder is None:
        start = time.perf_counter()
        backward(model.train(), data[0])
        return record | {"seconds": (time.perf_counter() - start) * len(data)}
    start = time.perf_counter()
    losses = train(model, data, training.learning_rate, 0.0, backward=backward, bar=bar)
    record["seconds"] = time.perf_counter() - start
    record["losses"] = losses
    if training.lora is None:
        model.eval().save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    else:  # PEFT would look for a config to compare the vocabulary with
        model.eval().save_pretrained(folder, save_embedding_layers=False)
    write_json(folder / RECORD, record)
    return record


def trainable(lm: AttackedHFLM, lora: int | None) -> Any:
    """The model, whose weights except the embedding require a gradient; or its LoRA adapter.

    Raises:
        UsageError: this is not possible.
    """
    model: Any = lm.model
    name = str(lm.config.name_or_path)
    if is_pair(model):
        raise UsageError(f"model={name}: must be a causal model")
    if lora is not None:
        try:
            import peft
        except ImportError as error:
            raise UsageError(f"lora={lora}: needs the package peft ({one_line(error)})") from None
        config = peft.LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)
    weights = list(model.parameters())
    if not all(weight.is_floating_point() for weight in weights):
        raise UsageError(f"model={name}: has quantised weights; must be trained with lora")
    for weight in weights:
        weight.requires_grad_(True)
    for weight in embedding_of(model).parameters():
        weight.requires_grad_(False)
    return model


def _texts(training: Training, plan: Plan) -> list[str] | None:
    """The texts of the file; None: those of the little world."""
    if training.text is None:
        if str(plan.model) != "demo":
            raise UsageError(
                "text=: must be given, a file with a training text in each line, because only the"
                " bundled model has a text of its own"
            )
        return None
    check_readable(training.text, "text")
    try:
        lines = Path(training.text).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"text={training.text}: must be a text file in UTF-8 ({one_line(error)})"
        ) from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UsageError(f"text={training.text}: must have at least one line that is not empty")
    return texts


def _batches(
    lm: AttackedHFLM, texts: Sequence[str] | None, training: Training, seed: int
) -> list[Tensor]:
    """The batches of all updates. A file that is too short is read again, in another order."""
    n = training.updates * training.batch_size
    if texts is None:
        of_world = list(training_texts(World(SEED), n))
        data = batches(of_world, lm.tokenizer, training.batch_size, seed)
    else:
        ends = [] if lm.tokenizer.eos_token_id is None else [lm.tokenizer.eos_token_id]
        whole = lm.tokenizer([*texts])["input_ids"]
        rows = [[*ids, *ends][: lm.max_length] for ids in whole]
        rows = [row for row in rows if len(row) > 1]
        if not rows:
            raise UsageError(f"text={training.text}: must have a text of two tokens or more")
        generator, chosen = random.Random(seed), list[list[int]]()
        while len(chosen) < n:
            chosen += generator.sample(rows, len(rows))
        data = padded(chosen[:n], _pad(lm), training.batch_size, seed)
    return [ids.to(lm.device) for ids in data]


def _pad(lm: AttackedHFLM) -> int:
    """The token id of padding; 0 if the model has none."""
    pad = lm.model.config.pad_token_id
    return pad if isinstance(pad, int) and pad > 0 else 0


def _record(
    training: Training,
    plan: Plan,
    lm: AttackedHFLM,
    model: Any,
    backward: AdversarialLoss,
    data: Sequence[Tensor],
) -> dict[str, Any]:
    """Everything that the result depends on, and the passes."""
    of_plan = ("model", "model_args", "norm", "steps", "step_size", "seed")
    weights = list(model.parameters())
    return {
        "made": now(),
        "settings": vars(training) | {name: plan.plain()[name] for name in of_plan},
        "epsilon_absolute": lm.attack.epsilon,
        "weights": sum(weight.numel() for weight in weights),
        "trained": sum(weight.numel() for weight in weights if weight.requires_grad),
        "tokens": sum(ids.numel() for ids in data),
        "passes": backward.passes * len(data),
        "versions": versions(),
        "hardware": hardware(),
    }


def run(
    training: Training,
    settings: Mapping[str, Any],
    output: str | None,
    progress: str = "bar",
    verbose: int = 0,
    dry_run: bool = False,
) -> None:
    """The command `llm-attack train`."""
    silence(verbose)
    plan = training.plan(settings)
    if output is None and not dry_run:
        raise UsageError("output=: must be given, a new folder for the model")
    with without_bars():
        record = tune(training, plan, None if dry_run else output, progress == "bar")
    if dry_run:
        return Console().print(_estimate(record, training))
    losses = record["losses"]
    few = max(1, len(losses) // 10)
    first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
    print(f"loss per token: {first:.4g} in the first {few} updates, {last:.4g} in the last {few}")
    if progress != "quiet":
        words = f"--model {output}"
        if training.lora is not None:
            words = f"--model {plan.model} --model_args peft={output}"
        written(f"{output}: to attack it: llm-attack run {words}")


def _estimate(record: Mapping[str, Any], training: Training) -> Table:
    table = Table(title=f"training against {training.against}, estimated from one update")
    table.add_column("what")
    table.add_column("amount", justify="right")
    table.add_row(
        "weights, and those that are trained", f"{record['weights']:,}, {record['trained']:,}"
    )
    table.add_row("updates", f"{training.updates:,}")
    table.add_row("passes, forward and backward", f"{record['passes']:,}")
    table.add_row("tokens, padding included", f"{record['tokens']:,}")
    table.add_row("minutes", f"{record['seconds'] / 60:.1f}")
    return table
