"""Time and memory of attacked evaluations, as multiples of stock lm-eval's `hf`.

Both evaluate the same model (a randomly initialised Llama unless one is named) on the same
requests, and take turns in one process. Numbers are medians of several runs; stock has the best of
several batch sizes. Requests are those of the six benchmarks if their data are available (the
environment variable LLM_ATTACK_TEST_DATA: datasets offline, and a Llama tokenizer), and else
synthetic ones of the same lengths. Times are those of `loglikelihood`, including tokenisation for
both.

    python benchmarks/engine.py --tokens 6000 --repeats 2 --output results/speed
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import beside
import click
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from llm_attack.base.declare import DIALECT
from llm_attack.base.record import hardware, versions, write_json
from llm_attack.harness import patches
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import encode, questions_of
from llm_attack.lm.packing.trie import build
from llm_attack.lm.settings import AttackSettings

# Per task: number of choices; mean number of Llama tokens that they share, and that each has for
# itself.
SYNTHETIC = {
    "arc_challenge": (4, 32, 6),
    "arc_easy": (4, 27, 5),
    "hellaswag": (4, 61, 29),
    "openbookqa": (4, 14, 4),
    "piqa": (2, 12, 24),
    "winogrande": (2, 12, 15),
}

# Dense bfloat16 peaks without sparsity, in FLOP/s, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}

LONGEST = "none+random+fgsm+bim shared"  # measured once: two dozen passes already are a mean

ATTACKED = {
    "none": [AttackSettings("none")],
    "fgsm shared": [AttackSettings("fgsm", context="shared")],
    "fgsm choice": [AttackSettings("fgsm", loss="choice")],
    "fgsm own": [AttackSettings("fgsm")],
    "bim own": [AttackSettings("bim")],
    LONGEST: [AttackSettings(name, context="shared") for name in ("none", "random", "fgsm", "bim")],
}


def real_requests(
    tasks: list[str], tokens: int, tokenizer: Any, count: int | None = None, shots: int = 0
) -> dict[str, list[Instance]]:
    """Requests for `count` questions of each task, as lm-eval builds them, or for `tokens` tokens.

    Each prompt begins with `shots` examples, the same for all questions of a task.

    Both engines sort by length. So in a full run, neighbours in length share a batch, and only 0 to
    7 % of the tokens are padding. The sample has neighbours in size, around the median, to
    reproduce this.
    """
    from lm_eval.api.samplers import get_sampler
    from lm_eval.tasks import TaskManager, get_task_dict

    manager, found = TaskManager(), {}
    for name in tasks:
        (task,) = get_task_dict([name], manager).values()
        task.set_config("num_fewshot", shots)
        if shots:
            task.sampler = get_sampler("first_n")(list(task.fewshot_docs()))
        task.build_all_requests()
        of_question: dict[int, list[list[int]]] = defaultdict(list)
        texts = [r.args[0] + r.args[1] for r in task.instances]
        for r, ids in zip(task.instances, tokenizer(texts)["input_ids"], strict=True):
            of_question[r.doc_id].append(ids)
        order = sorted(of_question, key=lambda doc_id: (len(build(of_question[doc_id])), doc_id))
        middle = of_question[order[len(order) // 2]]
        questions = count or max(1, round(tokens / sum(map(len, middle))))
        start = max(0, (len(order) - questions) // 2)
        kept = set(order[start : start + questions])
        found[name] = [r for r in task.instances if r.doc_id in kept]
    return found


def synthetic_requests(tasks: list[str], tokens: int) -> dict[str, list[Instance]]:
    """Requests of random words with the lengths of the benchmarks."""
    draw = random.Random(0)

    def text(mean: int) -> str:
        return "".join(
            f" {draw.choice(WORDS)}" for _ in range(max(1, round(draw.gauss(mean, mean / 4))))
        )

    found = {}
    for name in tasks:
        choices, shared, own = SYNTHETIC[name]
        found[name] = []
        for doc_id in range(max(1, round(tokens / (choices * (shared + own))))):
            context = text(shared)
            for idx in range(choices):
                arguments = (context, text(own))
                metadata = (name, doc_id, 1)
                found[name].append(Instance("loglikelihood", {}, arguments, idx, metadata))
        # replaces lm-eval's task, because its questions are attacked as a whole
        patches.note(SimpleNamespace(instances=found[name]))
    return found


WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")


@contextmanager
def counted(model: torch.nn.Module, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds inside the model (`device`) and altogether (`wall`), and the tokens that it got."""
    totals = {"device": 0.0, "tokens": 0.0}
    forward, grad = model.forward, torch.autograd.grad
    events: list[tuple[Any, Any]] = []

    def timed(call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if device.type == "cuda":
                pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                pair[0].record()
                try:
                    return call(*args, **kwargs)
                finally:
                    pair[1].record()
                    events.append(pair)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                totals["device"] += time.perf_counter() - start

        return run

    inner = timed(forward)

    def counting(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        totals["tokens"] += ids.numel()
        return inner(*args, **kwargs)

    model.forward, torch.autograd.grad = counting, timed(grad)
    start = time.perf_counter()
    try:
        yield totals
        if device.type == "cuda":
            torch.cuda.synchronize()
        totals["wall"] = time.perf_counter() - start
        totals["device"] += sum(a.elapsed_time(b) for a, b in events) / 1000
    finally:
        del model.forward
        torch.autograd.grad = grad


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes allocated at the peak of `run()` above those before it; None if this is not known."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))


def load(name: str | None, shape: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The model of this name, or a Llama with random weights; and its tokenizer."""
    if name is not None:
        lm = AttackedHFLM(name, attack="none", dtype=dtype, device=device)
        return lm.model, lm.tokenizer
    data = os.environ.get("LLM_ATTACK_TEST_DATA")
    folder = Path(data) / "models/tinyllama-shape" if data else None
    if shape == "tinyllama" and folder is not None:
        config = AutoConfig.from_pretrained(folder)
    elif shape == "tinyllama":
        raise click.UsageError("--shape tinyllama: its configuration needs LLM_ATTACK_TEST_DATA")
    else:
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    if folder is not None:
        return model, AutoTokenizer.from_pretrained(folder)
    from llm_attack.demo import MODEL_PATH

    return model, AutoTokenizer.from_pretrained(MODEL_PATH)


class Bench:
    """Stock and our model, with the same weights."""

    def __init__(
        self, model: Any, tokenizer: Any, options: dict[str, Any], positions: str = "all"
    ) -> None:
        self.positions = positions
        self.model, self.options = model, {"tokenizer": tokenizer, "pretrained": model, **options}
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.options["device"] = str(self.device)

    def stock(self, batch_size: int, requests: list[Instance]) -> Callable[[], Any]:
        options = {k: v for k, v in self.options.items() if k != "compile"}
        lm = HFLM(batch_size=batch_size, **options)
        return lambda: lm.loglikelihood(requests, disable_tqdm=True)

    def ours(self, conditions: list[AttackSettings], requests: list[Instance]) -> AttackedHFLM:
        """Our model, warmed up: the trial whether it takes trees is made once per model."""
        lm = AttackedHFLM(batch_size="auto", **self.options)
        lm.use(*(replace(c, positions=self.positions) for c in conditions))
        lm.batches(questions_of(requests, encode(lm, requests), lm.settings))
        return lm

    def time(self, run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
        gc.collect()
        with counted(self.model, self.device) as totals:
            answers = run()
        return totals, answers


def difference(ours: list, stock: list) -> dict[str, Any]:
    """The largest difference of a log-likelihood, and answers whose is_greedy differs."""
    pairs = list(zip(ours, stock, strict=True))
    return {
        "log_likelihood": max(abs(a[0] - b[0]) for a, b in pairs),
        "greedy": sum(a[1] != b[1] for a, b in pairs),
    }


def measure(
    bench: Bench,
    name: str,
    requests: list[Instance],
    sizes: list[int],
    repeats: int,
    labels: list[str],
) -> dict[str, Any]:
    """All measurements of one task."""
    trials = {size: bench.time(bench.stock(size, requests)) for size in sizes}
    best = min(trials, key=lambda size: trials[size][0]["wall"])
    runs: dict[str, Callable[[], Any]] = {"stock": bench.stock(best, requests)}
    for label in labels:
        lm = bench.ours(ATTACKED[label], requests)
        runs[label] = functools.partial(lm.loglikelihood, requests, disable_tqdm=True)
    times: dict[str, list[dict[str, float]]] = {label: [] for label in runs}
    answers: dict[str, Any] = {}
    for i in range(repeats):
        for label, run in runs.items():
            if i > 0 and label == LONGEST:
                continue
            totals, answers[label] = bench.time(run)
            times[label].append(totals)
    median = {
        label: {key: statistics.median(t[key] for t in of_label) for key in of_label[0]}
        for label, of_label in times.items()
    }
    useful = median["stock"]["tokens"]
    row = {
        "task": name,
        "requests": len(requests),
        "stock_batch_size": best,
        "stock_seconds": {size: trials[size][0]["wall"] for size in sizes},
        "seconds": {label: m["wall"] for label, m in median.items()},
        "runs": {label: [t["wall"] for t in of_label] for label, of_label in times.items()},
        "times_stock": {label: m["wall"] / median["stock"]["wall"] for label, m in median.items()},
        "host_share": {label: 1 - m["device"] / m["wall"] for label, m in median.items()},
        "tokens": {label: m["tokens"] for label, m in median.items()},
        "stock_tokens_per_second": {label: useful / m["wall"] for label, m in median.items()},
        "difference": difference(answers["none"], answers["stock"]),
    }
    largest = _largest_batch(requests)
    row["peak_memory"] = {
        "stock": peak_memory(bench.stock(MEMORY_ROWS, largest), bench.device),
        **{
            label: peak_memory(_same_tokens(bench, largest, ATTACKED[label]), bench.device)
            for label in labels
        },
    }
    row["utilisation"] = _utilisation(bench, median)
    return row


# Rows of the batches whose memory is measured.
MEMORY_ROWS = 8


def _largest_batch(requests: list[Instance]) -> list[Instance]:
    """The questions with the longest requests: several batches of `MEMORY_ROWS` rows."""
    by_question: dict[int, list[Instance]] = {}
    for r in requests:
        by_question.setdefault(r.doc_id, []).append(r)
    longest = sorted(
        by_question.values(), key=lambda rs: -max(len(r.args[0] + r.args[1]) for r in rs)
    )
    return [r for rs in longest[:8] for r in rs]


def _same_tokens(
    bench: Bench, requests: list[Instance], conditions: list[AttackSettings]
) -> Callable[[], Any]:
    """Our passes with batches of as many tokens as stock's largest."""
    lm = bench.ours(conditions, requests)
    encoded = [len(bench.tokenizer.encode(r.args[0] + r.args[1])) for r in requests]
    lm.tokens_per_batch = MEMORY_ROWS * max(encoded)
    return lambda: lm.loglikelihood(requests, disable_tqdm=True)


def _utilisation(bench: Bench, median: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """Model FLOP utilisation of the clean passes on GPUs: 2 FLOP per parameter and token."""
    if bench.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    parameters = sum(p.numel() for p in bench.model.model.layers.parameters())
    if peak is None:
        return None
    done = {label: 2 * parameters * median[label]["tokens"] for label in ("stock", "none")}
    return {label: flop / median[label]["wall"] / peak for label, flop in done.items()}


def show(rows: list[dict[str, Any]], console: Console) -> dict[str, float]:
    """Prints both tables; returns the geometric means over tasks of the second."""
    first = Table("task", title="clean pass: ours against stock hf at its best batch size")
    for column in ("batch", "stock tok/s", "ours tok/s", "faster", "host", "stock host"):
        first.add_column(column, justify="right")
    for column in ("memory", "stock mem.", "max diff.", "greedy"):
        first.add_column(column, justify="right")
    for r in rows:
        memory = {
            k: "?" if v is None else f"{v / 2**20:.0f} MB" for k, v in r["peak_memory"].items()
        }
        first.add_row(
            r["task"],
            str(r["stock_batch_size"]),
            f"{r['stock_tokens_per_second']['stock']:.0f}",
            f"{r['stock_tokens_per_second']['none']:.0f}",
            f"{1 / r['times_stock']['none']:.2f}x",
            f"{r['host_share']['none']:.1%}",
            f"{r['host_share']['stock']:.1%}",
            memory["none"],
            memory["stock"],
            f"{r['difference']['log_likelihood']:.1e}",
            str(r["difference"]["greedy"]),
        )
    console.print(first)
    labels = list(rows[0]["times_stock"])[1:]
    second = Table("task", *labels, title="time as a multiple of stock clean")
    for r in rows:
        second.add_row(r["task"], *(f"{r['times_stock'][x]:.2f}" for x in labels))
    means = {x: statistics.geometric_mean(r["times_stock"][x] for r in rows) for x in labels}
    second.add_section()
    second.add_row("geometric mean", *(f"{means[x]:.2f}" for x in labels))
    console.print(second)
    return means


def _beside(
    bench: Bench,
    requests: dict[str, list[Instance]],
    others: list[str],
    turns: int,
    console: Console,
    output: Path | None,
    name: str | None,
) -> None:
    """Compares ours with `others`; see `beside`."""
    unknown = [other for other in others if other not in beside.OTHERS]
    if unknown:
        raise click.UsageError(f"--beside={','.join(unknown)}: must be of {beside.OTHERS}")
    first = next(iter(requests.values()))
    plain = bench.ours([AttackSettings("none")], first)
    rows = beside.beside(
        plain, lambda of: bench.ours([beside.settings()], of), requests, others, turns, console
    )
    if output is not None:
        params = click.get_current_context().params
        content = {
            "settings": {k: v for k, v in params.items() if k not in ("output", "name", "model")},
            "threads": torch.get_num_threads(),
            "tasks": rows,
            "hardware": hardware(),
            "versions": versions(),
        }
        path = output / f"{name or 'beside'}.json"
        write_json(path, content)
        console.print(f"written: {path}")


@click.command(context_settings={"show_default": True, **DIALECT})
@click.option("--tasks", default=",".join(SYNTHETIC), help="Tasks, of the six benchmarks.")
@click.option("--tokens", default=6000, help="Tokens of each task's requests.")
@click.option("--questions", type=int, help="Questions of each task; replaces --tokens.")
@click.option(
    "--shots",
    default=0,
    help="Unperturbed examples before each question, the same for all questions of a task.",
)
@click.option("--repeats", default=2, help="Number of runs; the median is reported.")
@click.option(
    "--batch_sizes", default="1,8,32", help="Batch sizes of stock lm-eval; the best counts."
)
@click.option(
    "--model", help="A model, as for `pretrained` of attacked-hf. The default has random weights."
)
@click.option("--shape", default="110m", type=click.Choice(["110m", "tinyllama"]))
@click.option("--dtype", default="float32")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option(
    "--conditions",
    default=tuple(label for label in ATTACKED if label != "bim own"),
    multiple=True,
    type=click.Choice(list(ATTACKED)),
    help="Conditions to measure besides stock lm-eval and `none`.",
)
@click.option("--compile", "compiled", is_flag=True, help="Run attacked-hf with compile=True.")
@click.option(
    "--beside",
    "others",
    help="Measure only FGSM and these other programs: plain, torchattacks.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the JSON file.")
@click.option("--name", help="Name of the JSON file; by default, device and shape.")
def main(
    tasks: str,
    tokens: int,
    questions: int | None,
    shots: int,
    repeats: int,
    batch_sizes: str,
    model: str | None,
    shape: str,
    dtype: str,
    device: str,
    conditions: tuple[str, ...],
    compiled: bool,
    others: str | None,
    output: Path | None,
    name: str | None,
) -> None:
    """Compares stock hf with attacked-hf on the same model."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    console = Console(width=140)
    names = tasks.split(",")
    real = "LLM_ATTACK_TEST_DATA" in os.environ
    if shots and not real:
        raise click.UsageError("--shots: needs LLM_ATTACK_TEST_DATA, whose tasks have examples")
    network, tokenizer = load(model, shape, dtype, device)
    if real:
        requests = real_requests(names, tokens, tokenizer, questions, shots)
    else:
        requests = synthetic_requests(names, tokens)
    positions = "question" if shots else "all"
    bench = Bench(network, tokenizer, {"compile": compiled}, positions)
    if others is not None:
        _beside(bench, requests, others.split(","), repeats, console, output, name)
        return
    sizes = [int(size) for size in batch_sizes.split(",")]
    labels = list(dict.fromkeys(("none", *conditions)))
    rows = []
    for task in names:
        rows.append(measure(bench, task, requests[task], sizes, repeats, labels))
        ratios = {label: round(ratio, 2) for label, ratio in rows[-1]["times_stock"].items()}
        console.print(f"{task}: stock {rows[-1]['seconds']['stock']:.1f} s; {ratios}")
    means = show(rows, console)
    if output is not None:
        settings = click.get_current_context().params | {
            "requests": "real" if real else "synthetic"
        }
        content = {
            "settings": {k: v for k, v in settings.items() if k not in ("output", "name")},
            "geometric_mean_times_stock": means,
            "tasks": rows,
            "hardware": hardware(),
            "versions": versions(),
        }
        content["settings"]["model"] = None if model is None else Path(model).name
        path = output / f"{name or f'{device}-{Path(model or shape).stem}'}.json"
        write_json(path, content)
        console.print(f"written: {path}")


if __name__ == "__main__":
    main()
