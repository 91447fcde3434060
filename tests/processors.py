"""The numerical tests with every instruction set of this processor, on one thread and on two.

Another instruction set or number of threads sums in another order, so the last bits differ. This
script tries that on one machine. It leaves out installation, command line, files and browser.

    python tests/processors.py [arguments of pytest]
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
NUMERICAL = [TESTS / name for name in ("attacks", "lm", "suite", "theory", "vision")]
FILES = ("durable", "faults", "foreign_files", "resume", "secrets", "store")
OTHER = [TESTS / "suite" / name for name in ("report", *(f"test_{name}.py" for name in FILES))]

# As torch calls it, as oneDNN, and as MKL. A processor that has one has those before it.
SETS = (
    ("DEFAULT", "SSE41", "SSE4_2"),
    ("AVX2", "AVX2", "AVX2"),
    ("AVX512", "AVX512_CORE", "AVX512"),
)


def tested(torch_set: str, onednn_set: str, mkl_set: str, threads: int, arguments: list[str]):
    """The exit code of pytest, and the last line that it wrote."""
    environment = {
        "ATEN_CPU_CAPABILITY": torch_set.lower(),
        "ONEDNN_MAX_CPU_ISA": onednn_set,
        "MKL_ENABLE_INSTRUCTIONS": mkl_set,
        "OMP_NUM_THREADS": str(threads),
    }
    ignored = [f"--ignore={path}" for path in OTHER]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0"]
    workers = max(1, (os.cpu_count() or 1) // threads)
    command += ["--durations-min=20", f"-n{workers}", "--dist=worksteal", *ignored]
    command += arguments or list(map(str, NUMERICAL))
    run = subprocess.Popen(
        command, cwd=TESTS.parent, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    last = ""
    for line in run.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return run.wait(), last


def main(arguments: list[str]) -> int:
    own = torch.backends.cpu.get_cpu_capability()
    known = [name for name, *_ in SETS]
    if own not in known:
        print(f"{own}: only the instruction sets of x86 can be chosen among; with this one alone")
    sets = SETS[: known.index(own) + 1] if own in known else [(own, own, own)]
    found = []
    for name, *others in sets:
        for threads in (1, 2):
            print(f"\n{name}, {threads} threads", flush=True)
            code, last = tested(name, *others, threads, arguments)
            found.append((code, f"{name}, {threads} threads: {last}"))
    print("", *(line for _, line in found), sep="\n")
    return max(code for code, _ in found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
