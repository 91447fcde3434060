"""The command lines that the documentation shows, and how a test runs each.

A command of the documentation may need a model from the hub, or an hour. `RULES` says what is
changed so it takes seconds, and why. All else is as shown. A command without a rule is an error.
Whoever shows a new command adds a rule here, if no present rule fits.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "results" / "README.md",
)

PROGRAMS = ("accelerate", "lm_eval", "llm-attack", "make", "pip", "python")
SHELL = ("", "bash", "sh", "shell", "console")


def commands(text: str) -> list[str]:
    """The commands of a Markdown text, each once: of its blocks, and those in backticks.

    Raises:
        ValueError: a block is neither commands nor Python.
    """
    found, rest = [], []
    for block, prose in _parts(f"\n{text}"):
        rest.append(prose)
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        if lines and _is_command(lines[0]):
            found += [line for line in lines if line.strip()]
        elif block and not re.search("^(from|import) ", block, re.MULTILINE):
            raise ValueError(f"neither commands nor Python: {block}")
    for code in re.findall(r"`([^`]+)`", "\n".join(rest)):
        if _is_command(code) and len(code.split()) > 1:
            found.append(code)
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in found))


def _is_command(line: str) -> bool:
    return line.split()[:1] != [] and line.split()[0] in PROGRAMS


def _parts(text: str) -> list[tuple[str, str]]:
    """(block, prose before it), fences and indents removed; blocks of other languages are prose."""
    block = r"^```(\w*)\n(.*?)^```$|(?<=\n\n)((?:^ {4}[^\n]*\n?|^\n(?= {4}))+)"
    parts, end = [], 0
    for match in re.finditer(block, text, re.MULTILINE | re.DOTALL):
        language, fenced, indented = match.groups()
        content = re.sub("^ {4}", "", indented or "", flags=re.MULTILINE)
        if fenced is not None:
            content = fenced if language in SHELL else ""
        parts.append((content, text[end : match.start()]))
        end = match.end()
    return [*parts, ("", text[end:])]


@dataclass(frozen=True)
class Rule:
    """How commands of a kind are run.

    Args:
        pattern: regular expression of the whole command.
        reason: why it is not run as it stands.
        changes: regular expressions and what takes their place, in turn.
        more: arguments that are added; where one is given twice, the last counts.
        at_root: whether it runs in the project's folder, and not in one of the test's own.
        needs: a package without which it cannot run.
        data: whether it cannot run without the data of the benchmarks.
    """

    pattern: str
    reason: str
    changes: tuple[tuple[str, str], ...] = ()
    more: str = ""
    at_root: bool = False
    needs: str = "llm_attack"
    data: bool = False

    def shortened(self, command: str, words: dict[str, str]) -> list[str]:
        """The words of the command that is run; `words` are those for {model} and the like."""
        for old, new in self.changes:
            command = re.sub(old, new, command)
        return shlex.split(f"{command} {self.more}".format(**words))


# A model of the hub, and the default, are one that is here.
MODEL = (
    (r"pretrained=[\w.-]+/[\w.-]+", "pretrained={model}"),
    (r"--model_args (?!\S*pretrained=)", "--model_args pretrained={model},"),
    (r"--model (\w[\w.-]*(/[\w.-]+)+|\.\.\.|\S+\.gguf)", "--model {model}"),
)
# Without the data of the benchmarks, the demo's tasks of the same shapes; likewise images.
TASKS = (
    (r"(?<=[ ,])(?=(arc_challenge|arc_easy|hellaswag|openbookqa|piqa|winogrande)\b)", "{prefix}"),
    (r"--tasks paper_six", "--tasks {six}"),
)
# Files that other commands, or other people, make.
LOADED = (r" --load \S+", "")
THEIRS = (r"--dataset imagefolder:\S+ --network \S+:\S+ --weights \S+", "--network cnn")
IMAGES = ((r"--dataset (mnist|cifar10)", r"--dataset {\1}"),)
FEW = "a few questions of each task"

RULES = (
    Rule("make help", "as shown", at_root=True),
    Rule(
        r"make [.a-z-]+( REPOSITORY=\S+)?",
        "builds an environment, takes long or runs these tests: what it would do is printed",
        changes=((r"^make", "make -n"),),
        at_root=True,
    ),
    Rule(
        r"pip install ('\.\[(gguf|ray)\]'|\.)",
        "the libraries are here, and nothing is fetched; tests/test_install.py installs for real",
        changes=((r"'?\.(\[\w+\])?'?$", r"'{root}\1'"),),
        more="--no-index --no-deps --no-build-isolation --target installed",
        needs="hatchling",
    ),
    Rule(
        r"(pip|llm-attack) [a-z]+( --target)?",
        "named, not shown: its help",
        changes=((" --target", ""),),
        more="--help",
    ),
    Rule(
        r"llm-attack run .*--attacks standard .*",
        "one question: the battery takes seconds for each",
        changes=(
            (r"--model MODEL", "--model demo"),
            (r"demo_six|paper_six", "demo_piqa"),
        ),
        more="--limit 1",
    ),
    Rule(
        r"llm-attack (card|board) .*",
        "they need a run of a standard: their help; tests/suite/test_board.py runs both",
        changes=((r"(card|board) .*", r"\1"),),
        more="--help",
    ),
    Rule(
        r"lm_eval --model attacked-hf --model_args .*",
        f"{FEW}; where there are no data, tasks of ours, of which lm_eval has to be told",
        changes=(*MODEL, *TASKS),
        more="--limit 2 {include}",
    ),
    Rule(r"llm-attack eval --model_args .*", FEW, changes=(*MODEL, *TASKS), more="--limit 2"),
    Rule(
        r"llm-attack run .* --fail_under .*",
        f"{FEW}, which show nothing: thresholds that nothing misses",
        changes=((r"--fail_under \S+ --fail_drop \S+", "--fail_under worst=0 --fail_drop 100"),),
        more="--limit 2",
    ),
    Rule(
        r"llm-attack run --model demo --tasks demo_six --shard 1/2 -o shared",
        f"{FEW}; it would wait for the other share",
        changes=(("--shard 1/2 -o shared", "--shard 1/1 -o share"),),
        more="--limit 2",
    ),
    Rule(
        r"llm-attack run --model .* --ray (local|auto)( .*)?",
        f"{FEW}; on a cluster of its own, in a folder without another run",
        changes=(*MODEL, ("--ray auto", "--ray local"), (" DIR", " on-ray")),
        more="--tasks demo_piqa --device cpu --limit 2",
        needs="ray",
    ),
    Rule(
        r"llm-attack run --model \S+ --model_args (peft|load_in_4bit)=\S+ .*",
        f"{FEW}; the adapter is the reader's, and bitsandbytes needs a GPU: without either",
        changes=(*MODEL, *TASKS, (r" --model_args \S+( --dequantize)?", "")),
        more="--limit 2",
    ),
    Rule(
        r"llm-attack compare base adapted",
        "two runs that are here",
        changes=(("base adapted", "DIR_A DIR_B"),),
    ),
    Rule(r"llm-attack run --config suite\.yaml", "as shown"),
    Rule(r"llm-attack run --help", "as shown"),
    Rule(
        r"llm-attack run --model (?!.* --tasks ).*",
        f"{FEW}; its tasks are the default, the paper's, where their data is",
        changes=MODEL,
        more="--limit 1 {default_tasks}",
    ),
    Rule(
        r"llm-attack run .* --wandb_args \S+",
        f"{FEW}; W&B is not installed here: with another of lm-eval's loggers, which writes files",
        changes=((r"--wandb_args \S+", "--hf_hub_log_args output_path=logged"), (" DIR", " W")),
        more="--limit 2",
    ),
    Rule(
        r"llm-attack run .* --save_perturbations .*",
        f"{FEW}, and few gradients; in a folder without another run",
        changes=(*MODEL, *TASKS, (" DIR", " perturbed")),
        more="--limit 2 --path_points 2",
    ),
    Rule(
        r"llm-attack run --model models/demo-1 --revisions .*",
        FEW,
        changes=((r"models/demo-1", "checkpoints"),),
        more="--revisions step1,step2 --limit 2 --tasks demo_piqa",
    ),
    Rule(
        r"python -m llm_attack\.demo\.train .*",
        "few steps",
        more="--steps 2 --checkpoints 2 --batch-size 8",
    ),
    Rule(
        r"llm-attack run .* --cells .*",
        f"{FEW}, and few steps",
        changes=(*MODEL, *TASKS, (r"results/cells/\S+", "rounded"), (" --half held_out", "")),
        more="--limit 2 --steps 2",
    ),
    Rule(
        r"llm-attack run .* --attacks none,(token_sparse|swap|hotflip).*",
        f"{FEW}, few steps and few candidates",
        changes=(
            (r"results/\S+", "chosen"),
            ("none,swap,", "none,"),
            (r"\S+\.gguf", "demo"),
            ("--tasks arc_easy", "--tasks demo_arc_easy"),
            (r"--exact_tokens \d", ""),
            (r"--(candidates|steps|limit) \d+", ""),
        ),
        more="--limit 2 --steps 2",
    ),
    Rule(
        r"llm-attack run .* --sigmas .*",
        f"{FEW}, and few draws of noise",
        changes=(*MODEL, *TASKS, (r"results/certify/\S+", "certified")),
        more="--limit 2 --draws 12 --selection_draws 2 --steps 2 --rounds 2",
    ),
    Rule(
        r"llm-attack (universal|export|transfer|scaling) .*",
        "they need each other's files: their help; tests/suite/test_universal.py runs them",
        changes=((r"(universal|export|transfer|scaling) .*", r"\1"),),
        more="--help",
    ),
    Rule(
        r"llm-attack train .*",
        "few updates, of the bundled model and of its text",
        changes=(*MODEL, (r"--model \S+", "--model demo"), (r"--text \S+", "")),
        more="--updates 1 --batch_size 2",
    ),
    Rule(
        r"llm-attack run --model out/robust/\S+ .*",
        f"{FEW}; the model is of another command",
        changes=((r"--model \S+", "--model demo"), (r"out/robust/run", "robust")),
        more="--limit 2",
    ),
    Rule(
        r"llm-attack run --model out/sizes/width72 --revisions .*",
        FEW,
        changes=((r"out/sizes/width72", "checkpoints"), (r"out/critical/width72", "sizes")),
        more="--revisions step1,step2 --limit 2 --tasks demo_piqa",
    ),
    Rule(
        r"llm-attack run .* --perturbation \S+ .*",
        f"{FEW}; the perturbation is of another command: without it",
        changes=(
            (r"--model out/variants/\w+", "--model demo"),
            *MODEL,
            (r" --perturbation \S+", ""),
            (r"results/universal/\w+", "scored"),
        ),
        more="--limit 2",
    ),
    Rule(r"llm-attack run --model .*", FEW, changes=(*MODEL, *TASKS), more="--limit 2"),
    Rule(
        r"python -m torch\.distributed\.run .* -m llm_attack run .*",
        FEW,
        changes=((r"--nproc_per_node \d+", "--nproc_per_node 2 --master_port {port}"),),
        more="--tasks demo_piqa --limit 2",
    ),
    Rule(
        r"accelerate launch --num_processes \d+ -m llm_attack run .*",
        f"{FEW}; two processes, which share the CPU; in a folder without another run",
        changes=(
            *MODEL,
            (r"--num_processes \d+", "--multi_gpu --num_processes 2 --main_process_port {port}"),
            (" DIR", " shared"),
        ),
        more="--tasks demo_piqa --limit 4",
        needs="accelerate",
    ),
    Rule(
        r"llm-attack compare DIR_A DIR_B --fail_drop 2",
        "few questions, which show nothing: a threshold that nothing misses",
        changes=(("--fail_drop 2", "--fail_drop 100"),),
    ),
    Rule(r"llm-attack (report DIR|compare DIR_A DIR_B)( --equivalence \d+)?", "as shown"),
    Rule(r"llm-attack (report DIR|compare DIR_A DIR_B) --format (pdf,)?tex.*", "as shown"),
    Rule(r"llm-attack compare DIR DIR_A DIR_B -o models\.csv .*", "as shown"),
    Rule(r"llm-attack doctor --model demo --tasks demo_six", FEW, more="--limit 2 --queries 5"),
    Rule(
        r"python docs/positions\.py .*",
        FEW,
        changes=(
            *MODEL,
            *TASKS,
            (r"--limit \d+", "--limit 2"),
            (r"results/where/positions-[\w-]+", "positions"),
        ),
    ),
    Rule(
        r"python benchmarks/engine\.py .*--beside .*",
        FEW,
        changes=MODEL,
        more="--tokens 50 --tasks arc_easy --repeats 1",
        needs="torchattacks",
    ),
    Rule(
        r"python benchmarks/engine\.py --model .*",
        FEW,
        changes=MODEL,
        more="--questions 2 --tokens 100 --tasks arc_easy --conditions none",
    ),
    Rule(
        r"python benchmarks/engine\.py .*--shots .*",
        FEW,
        more="--questions 2 --tasks arc_easy --shots 1",
        data=True,
    ),
    Rule(
        r"python benchmarks/others\.py .*",
        f"{FEW}; without AdversariaLLM, which is no package",
        changes=((r" --adversariallm \S+", ""), (r"results/standard/", "")),
        more="--tasks demo_piqa --limit 1 --turns 1",
        needs="torchattacks",
    ),
    Rule(
        r"python benchmarks/battery\.py .*",
        "one question: the battery takes seconds for each",
        changes=((r"results/standard/", ""),),
        more="--tasks demo_piqa --limit 1",
    ),
    Rule(r"python benchmarks/layers\.py.*", FEW, more="--tasks demo_piqa --limit 4 --repeats 1"),
    Rule(r"python docs/fig3\.py results/fig3/[\w-]+", "as shown", at_root=True),
    Rule(r"python tests/prose/check\.py", "as shown", at_root=True),
    Rule(
        r"python docs/(arguments|architectures)\.py",
        "as shown; the page stays as it is",
        at_root=True,
    ),
    Rule(
        r"llm-attack reproduce all .*",
        "each figure has a rule of its own, and `all` no option that shortens it",
        more="--help",
    ),
    Rule(
        r"llm-attack reproduce fig1 .*",
        "few images, one of them in the figure: any network knows one",
        changes=(*IMAGES, LOADED),
        more="--network cnn --width 0.5 --train_size 500 --test_size 100 --epochs 2 --images 1",
    ),
    Rule(
        r"llm-attack reproduce fig[25] .*",
        "narrow networks of the package, few images, one epoch",
        changes=(*IMAGES, LOADED, THEIRS),
        more="--width 0.1 --train_size 64 --test_size 20 --subset 2 --epochs 1",
    ),
    Rule(
        r"llm-attack reproduce relation( .*)?",
        "a narrow network, few images",
        changes=IMAGES,
        more="--dataset digits --width 0.1 --train_size 64 --test_size 40 --epochs 1 --images 1"
        " --lines 1",
    ),
    Rule(
        r"llm-attack reproduce tradeoff .*",
        "one narrow network and seed, few images, one epoch",
        changes=IMAGES,
        more="--network cnn --width 0.1 --widths 1 --seeds 1 --train_size 64 --test_size 20"
        " --subset 10 --epochs 1",
    ),
    Rule(
        r"llm-attack reproduce factors( .*)?",
        "one narrow network and seed, few images, one epoch",
        changes=IMAGES,
        more="--network cnn --width 0.1 --widths 1 --seeds 1 --train_size 64 --test_size 20"
        " --subset 5 --epochs 1 --label_smoothings 0 --schedules cycle",
    ),
    Rule(
        r"llm-attack reproduce declines( .*)?",
        "a narrow network, few images, one epoch",
        changes=IMAGES,
        more="--network cnn --width 0.1 --train_size 64 --test_size 20 --subset 5 --epochs 1",
    ),
    Rule(
        r"llm-attack reproduce toys( .*)?",
        "few points, one kind of training",
        more="--seeds 2 --epochs 50 --points 50 --test-points 50 --optimisers sgd --domains 1"
        " --batch_sizes 50",
    ),
    Rule(
        r"llm-attack reproduce fig4( .*)?",
        "few points and epochs",
        more="--seeds 2 --epochs 2 --points 50 --test-points 50",
    ),
    Rule(
        r"llm-attack reproduce fig6( .*)?",
        "small networks, few epochs",
        more="--seeds 2 --epochs 2 --embedding_sizes 2,3",
    ),
    Rule(
        r"python benchmarks/channels\.py .*",
        FEW,
        changes=((r"--model \S+", "--model demo"), (r"--tasks \S+", "--tasks demo_piqa")),
        more="--limit 2",
    ),
    Rule(
        r"python benchmarks/variants\.py .*",
        "few steps",
        changes=((r" --model \S+ --group \d+", ""), (r" --texts \d+ --rate \S+", "")),
        more="--steps 2",
    ),
    Rule(
        r"python benchmarks/sizes\.py .*",
        "few steps",
        more="--steps 2 --checkpoints 1 --width 16",
    ),
    Rule(
        r"python benchmarks/robust\.py .*",
        "one update of one model, and few questions",
        more="--updates 1 --limit 2 --certify 1 --against none",
    ),
    Rule(
        r"python benchmarks/(interval|linear)_bounds\.py .*",
        FEW,
        changes=((r" -o \S+", ""),),
        more="--limit 1",
    ),
    Rule(
        r"python benchmarks/sparsefool\.py .*",
        "small images; without the authors' program, which is not ours to bring along",
        changes=((r"--dataset \w+", "--dataset digits"), (r" --authors \S+", "")),
        more="--train_size 1000 --epochs 3 --batch 2 --rounds 1",
        needs="torchattacks",
    ),
    Rule(
        r"python benchmarks/autoattack\.py .*",
        "there is no network that was kept: its help",
        more="--help",
        needs="pyautoattack",
    ),
    Rule(
        r"python benchmarks/equality\.py .*",
        FEW,
        changes=((r"pretrained=\S+", "pretrained={model}"),),
        more="--tasks {easy} --limit 2",
    ),
    Rule(
        r"python benchmarks/shares\.py .*",
        "few questions, one kind; on the model that is here",
        changes=MODEL,
        more="--tasks arc_easy --tokens 50 --repeats 1 --kinds float32",
    ),
    Rule(r"python benchmarks/decoder_rows\.py.*", FEW, more="--questions 2 --repeats 1"),
    Rule(r"python benchmarks/suite\.py .*", FEW, more="--tasks demo_piqa --limit 4 --repeats 1"),
    Rule(
        r"python -m llm_attack\.demo\.train --output DIR",
        "three steps, not two thousand",
        changes=(("DIR", "trained"),),
        more="--steps 3 --batch-size 4",
    ),
)


def rule_of(command: str) -> Rule:
    """The first rule that knows the command.

    Raises:
        LookupError: none does.
    """
    for rule in RULES:
        if re.fullmatch(rule.pattern, command):
            return rule
    raise LookupError(f"no rule in tests/shown.py says how a test runs: {command}")
