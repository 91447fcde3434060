"""Attacks on embeddings by other libraries beside ours: the loss that each reaches, and its time.

    python benchmarks/others.py --limit 5 -o results/standard/beside.json

All attack the same requests, each alone, with the same radius and the same number of steps, and
raise the negative log-likelihood of all tokens but the first. Each library runs its own code.
What a user has to write for that is in the functions below: `lines` counts theirs. A library that
is not installed is left out. AdversariaLLM is no package: --adversariallm names its folder.

Two settings: one and ten steps of the sign in L-infinity, and ten steps in L2 for each token with
a radius of 0.1 of the mean length of the embeddings. Times are processor times of the attack and
of one more forward pass, on one thread if OMP_NUM_THREADS=1.
"""

import importlib
import inspect
import math
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import click
import numpy as np
import torch
from rich.console import Console
from torch import nn

from llm_attack.base.declare import DIALECT
from llm_attack.base.record import hardware, versions, write_json
from llm_attack.harness.requests import encode, questions_of
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.settings import AttackSettings
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.execute import prepare

BATCH, STEPS = 8, 10


class Unit(nn.Module):
    """A model of embeddings in the unit cube, which is where these libraries keep their points."""

    def __init__(self, model, epsilon):
        super().__init__()
        largest = float(model.get_input_embeddings().weight.abs().max()) + epsilon
        # a power of two, so that the way there and back rounds as little as can be
        self.model, self.width = model, 2.0 ** math.ceil(math.log2(2 * largest))

    def forward(self, x):
        logits = self.model(inputs_embeds=self.embeddings(x)).logits
        return logits.transpose(1, 2)

    def embeddings(self, x):
        return self.width * (x - 0.5)

    def cube(self, embeddings):
        return embeddings / self.width + 0.5


def by_torchattacks(model, epsilon, steps):
    """Cross-entropy leaves out the label -100, which torchattacks passes on."""
    import torchattacks

    unit = Unit(model, epsilon).eval()
    size = epsilon / unit.width
    attack = torchattacks.FGSM(unit, eps=size)
    if steps > 1:
        attack = torchattacks.BIM(unit, eps=size, alpha=size / 4, steps=steps)

    def attacked(x, target, real):
        return unit.embeddings(attack(unit.cube(x), target.masked_fill(~real, -100)))

    return attacked


def by_foolbox(model, epsilon, steps):
    """Its loss takes one label of an example, so rows of tokens need one of their own."""
    import eagerpy
    import foolbox
    from foolbox.attacks import LinfBasicIterativeAttack
    from foolbox.criteria import Misclassification

    unit = Unit(model, epsilon).eval()
    size = epsilon / unit.width

    class Sequences(LinfBasicIterativeAttack):
        def get_loss_fn(self, model, labels):
            def loss(x):
                found = nn.functional.cross_entropy(model(x).raw, labels.raw, reduction="sum")
                return eagerpy.astensor(found)

            return loss

    step = size if steps == 1 else size / 4
    attack = Sequences(abs_stepsize=step, steps=steps, random_start=False)
    wrapped = foolbox.PyTorchModel(unit, bounds=(0, 1))

    def attacked(x, target, real):
        criterion = Misclassification(target.masked_fill(~real, -100))
        return unit.embeddings(attack.run(wrapped, unit.cube(x), criterion, epsilon=size))

    return attacked


def by_art(model, epsilon, steps):
    """Its labels are one number for an example, so it gets the tokens as a loss of its own."""
    from art.attacks.evasion import BasicIterativeMethod, FastGradientMethod
    from art.estimators.classification import PyTorchClassifier

    unit = Unit(model, epsilon).eval()
    size = epsilon / unit.width

    def attacked(x, target, real):
        labels = target.masked_fill(~real, -100)

        class Loss(nn.Module):
            reduction = "mean"

            def forward(self, logits, given):
                return nn.functional.cross_entropy(logits, labels, reduction="sum")

        estimator = PyTorchClassifier(
            unit,
            loss=Loss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=model.config.vocab_size,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        attack = FastGradientMethod(estimator, eps=size, batch_size=len(x))
        if steps > 1:
            how = {"eps": size, "eps_step": size / 4, "max_iter": steps, "verbose": False}
            attack = BasicIterativeMethod(estimator, batch_size=len(x), **how)
        made_up = np.zeros(len(x), dtype=int)
        found = attack.generate(unit.cube(x).numpy(), made_up)
        return unit.embeddings(torch.from_numpy(found).to(x))

    return attacked


def by_adversariallm(model, tokenizer, epsilon, steps):
    """Its loss falls, so a negative step raises it. Nothing is generated in the end."""
    pgd = _adversariallm()
    config = pgd.PGDConfig(
        num_steps=steps,
        epsilon=epsilon,
        alpha=-epsilon / 4,
        normalize_gradient=True,
        optimizer="FGSM",
        optimizer_config={},
    )
    attack = pgd.PGDAttack(config)
    attack._initialize_embedding_scale(model)

    def attacked(tokens, real):
        points = []
        step = attack._perform_optimizer_step

        def kept(*given):
            points.append(step(*given))
            return points[-1]

        attack._perform_optimizer_step = kept
        mask = torch.cat([real, torch.zeros_like(real[:, :1])], 1)
        target = tokens.roll(-1, 1)
        moves = torch.cat([real[:, :1], real], 1)
        rows = [tokens, target, [None] * len(tokens), moves.long(), moves.long(), mask.long()]
        attack.attack_batch(model, tokenizer, None, *rows)
        attack._perform_optimizer_step = step
        return points[-1].detach()

    return attacked


def _adversariallm():
    """Its module of PGD. What its other attacks import may be missing: it is not called."""
    import transformers

    transformers.HybridCache = getattr(transformers, "HybridCache", transformers.DynamicCache)
    for _ in range(20):
        try:
            pgd = importlib.import_module("src.attacks.pgd")
            break
        except ModuleNotFoundError as error:
            sys.modules[error.name] = MagicMock()
            for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
                del sys.modules[name]

    def nothing(*given, embedding_list, **more):
        return [[""]] * len(embedding_list)

    pgd.generate_ragged_batched = nothing
    pgd.SingleAttackRunResult = pgd.AttackStepResult = MagicMock()
    pgd.trange = lambda n, **more: _Quiet(range(n))
    return pgd


class _Quiet(list):
    def set_postfix(self, *given):
        pass


def lines(function):
    """Lines of code of a function, and of `Unit` where it uses that."""
    text = inspect.getsource(function)
    text += inspect.getsource(Unit) if "Unit(" in text else ""
    code = [line for line in text.splitlines() if line.strip() and '"""' not in line]
    return len(code)


def batches(requests):
    """Tokens, what they predict, and what of it is no padding, sorted by length."""
    rows = sorted((torch.tensor(request.tokens) for request in requests), key=len, reverse=True)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        tokens = nn.utils.rnn.pad_sequence(part, batch_first=True)
        length = torch.tensor([len(row) for row in part])
        yield tokens, torch.arange(tokens.shape[1] - 1) < length[:, None] - 1


def reached(model, tokens, real, point):
    """The negative log-likelihood of each row at a point."""
    with torch.no_grad():
        log_prob = model(inputs_embeds=point).logits.log_softmax(-1)
    found = log_prob.gather(-1, tokens[:, 1:, None])[..., 0]
    return (-(found * real).sum(-1)).tolist()


def theirs(model, requests, attacked, tokens_too=False):
    """Negative log-likelihoods under another library."""
    found = []
    for tokens, real in batches(requests):
        if tokens_too:
            point = attacked(tokens, real)[:, :-1]
        else:
            x = model.get_input_embeddings()(tokens[:, :-1]).detach()
            point = attacked(x, tokens[:, 1:], real)
        found += reached(model, tokens, real, point)
    return found


def ours(prepared, settings):
    """Negative log-likelihoods under our attack, of its last step; a function that attacks."""
    lm = prepared.lm
    lm.trace = True
    lm.use(settings)
    lm.engine.scorer.nearest = None  # a diagnostic, which no other computes
    questions = questions_of(prepared.requests, encode(lm, prepared.requests), lm.settings)
    todo = lm.batches(questions)

    def run():
        answered = [one for _, result in lm.answers(todo) for one in result.answered]
        return [float(one.curves[0][0].values[-1, 0, 0]) for one in answered]

    return run


def compare(runs, turns, console):
    """The mean loss of each, its seconds, and the ratio to ours, the median over turns."""
    seconds = {name: [] for name in runs}
    losses = {}
    for turn in range(turns + 1):  # the first to warm up
        for name, run in runs.items():
            start = time.process_time()
            losses[name] = run()
            if turn:
                seconds[name].append(time.process_time() - start)
    rows = {}
    for name, spent in seconds.items():
        ratios = [a / b for a, b in zip(spent, seconds["ours"], strict=True)]
        rows[name] = {"loss": statistics.mean(losses[name]), "seconds": statistics.median(spent)}
        rows[name]["times_ours"] = statistics.median(ratios)
        console.print(name, rows[name])
    return rows


def installed(names):
    """Those that can be imported."""
    return [name for name in names if importlib.util.find_spec(name) is not None]


@click.command(context_settings={"show_default": True, **DIALECT})
@click.option("--model", default="demo")
@click.option("--tasks", default="demo_six")
@click.option("--limit", default=5, help="First questions of each task.")
@click.option("--epsilon", default=0.5, help="Of L-infinity, in RMS of the embeddings.")
@click.option("--turns", default=3)
@click.option("--dtype", default="float32", help="Of the model.")
@click.option("--adversariallm", "folder", help="Folder of AdversariaLLM's sources.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model, tasks, limit, epsilon, turns, dtype, folder, output):
    """Writes a JSON file."""
    console = Console(stderr=True)
    plan = Plan(model=model, tasks=tasks, attacks="none", limit=limit, model_args={"dtype": dtype})
    prepared = prepare(plan, "quiet", console)
    lm = prepared.lm
    requests = list(dict.fromkeys(encode(lm, prepared.requests)))
    network, size = lm.model, epsilon * lm.signal.rms
    makers = {"torchattacks": by_torchattacks, "foolbox": by_foolbox, "art": by_art}
    rows = {}
    with frozen(network):
        for steps, name in ((1, "fgsm"), (STEPS, "bim")):
            mine = AttackSettings(name, f"{epsilon}rms", steps=steps)
            runs = {"ours": ours(prepared, mine)}
            for library in installed(makers):
                attacked = makers[library](network, size, steps)
                runs[library] = lambda attacked=attacked: theirs(network, requests, attacked)
            rows[name] = compare(runs, turns, console)
        if folder is not None:
            sys.path.insert(0, folder)
            mine = AttackSettings("bim", "0.1token_norm", norm="l2_token", steps=STEPS)
            attacked = by_adversariallm(network, lm.tokenizer, 0.1, STEPS)
            runs = {"ours": ours(prepared, mine)}
            runs["adversariallm"] = lambda: theirs(network, requests, attacked, tokens_too=True)
            rows["l2_token"] = compare(runs, turns, console)
        record = {"requests": len(requests), "results": rows}
    record["lines"] = {name: lines(makers[name]) for name in installed(makers)}
    record["lines"] |= {} if folder is None else {"adversariallm": lines(by_adversariallm)}
    given = {"model": model, "tasks": tasks, "limit": limit, "epsilon": epsilon, "turns": turns}
    given["dtype"] = dtype
    write_json(
        output, {"settings": given, **record, "hardware": hardware(), "versions": versions()}
    )


if __name__ == "__main__":
    main()
