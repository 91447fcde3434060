"""Is the second of two lm-eval runs worse than the first? Statistics of their paired answers.

    lm_eval ... --log_samples --output_path first
    lm_eval ... --log_samples --output_path second
    python examples/two_lm_eval_runs.py first second

Both runs must have asked the same questions. No attack is needed, so the runs may be of two models.
"""

import json
import sys
from pathlib import Path

from llm_attack.stats import detectable, paired_error, paired_interval, sign_test


def answers(folder):
    """Whether each question was answered right, by task and number."""
    right = {}
    for path in Path(folder).rglob("samples_*.jsonl"):
        task = path.stem.removeprefix("samples_").rpartition("_")[0]
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            right[task, row["doc_id"]] = row["acc"]
    return right


def main(first, second):
    before, after = answers(first), answers(second)
    both = before.keys() & after.keys()
    for task in sorted({task for task, _ in both}):
        pairs = [(before[key], after[key]) for key in both if key[0] == task]
        n, lost, gained = len(pairs), pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
        low, high = paired_interval(lost, gained, n)
        p = sign_test([[1] * gained + [-1] * lost], [n])
        least = detectable([paired_error(lost, gained, n)])
        print(f"{task}: {n} questions, {lost} lost, {gained} gained, p = {p:.2g}")
        ends = f"{100 * low:+.1f} to {100 * high:+.1f}"
        print(f"  change {100 * (gained - lost) / n:+.1f} points ({ends})")
        print(f"  this many questions detect a change of {100 * least:.1f} points")


if __name__ == "__main__":
    main(*sys.argv[1:])
