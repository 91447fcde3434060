"""lm-eval tasks of every kind of score, made in a folder: YAML files, questions, functions."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ["cat", "dog", "bird", "fish", "tree", "house", "water", "bread", "milk", "stone"]

FUNCTIONS = '''
import numpy as np
from lm_eval.tasks.truthfulqa.utils import process_results_mc2


def mass(doc, results):
    """As truthfulqa_mc2, whose right choices come first."""
    order = sorted(range(len(results)), key=lambda i: -doc["labels"][i])
    targets = {"labels": [doc["labels"][i] for i in order]}
    return process_results_mc2({"mc2_targets": targets}, [results[i] for i in order])


def pairs(doc, results):
    """As crows_pairs."""
    first, second = (ll for ll, _ in results)
    return {"likelihood_diff": abs(first - second), "pct_stereotype": float(first > second)}


def ranks(doc, results):
    """As mutual."""
    order = np.argsort([-ll for ll, _ in results]).tolist()
    rank = order.index(doc["right"])
    return {"r@1": float(rank == 0), "r@2": float(rank < 2), "mrr": 1 / (rank + 1)}


def weighted(items):
    """As afrixnli."""
    from sklearn.metrics import f1_score

    gold, found = zip(*items)
    return f1_score(gold, found, average="weighted")


def estimate(items):
    """An aggregate of 0 and 1 that is no mean, as those of tinyBenchmarks."""
    return 0.25 + 0.5 * sum(items) / len(items)


def raises(doc, results):
    share = 1 / doc["right"]
    return {"acc": share}


def some(doc, results):
    """Has its score of some questions alone."""
    return {"acc" if doc["right"] == 0 else "other": float(results[0][0] > results[1][0])}


def never(doc, results):
    return {"acc": 0.0}


def fails(items):
    raise RuntimeError("needs 100 questions")
'''


def own(name, higher="true", aggregation="mean"):
    """A metric of a task's own, as YAML."""
    return f"{name}\n    aggregation: {aggregation}\n    higher_is_better: {higher}"


# name -> (metrics, choices of a question, more lines)
KINDS = {
    "acc": (["acc"], 3, ""),
    "acc_norm": (["acc_norm"], 3, ""),
    "acc_bytes": (["acc_bytes"], 3, ""),
    "acc_mutual_info": (["acc_mutual_info"], 3, ""),
    "exact_match": (["exact_match"], 3, ""),
    "brier_score": (["brier_score"], 3, ""),
    "mcc": (["mcc"], 2, ""),
    "f1": (["acc", "f1"], 2, ""),
    "weighted_f1": ([own("f1", aggregation="!function functions.weighted")], 3, ""),
    "mass": (["acc"], 3, "process_results: !function functions.mass\n"),
    "pairs": (
        [own("likelihood_diff", "false"), own("pct_stereotype", "false")],
        2,
        "process_results: !function functions.pairs\n",
    ),
    "ranks": (
        [own("r@1"), own("r@2"), own("mrr")],
        3,
        "process_results: !function functions.ranks\n",
    ),
    "estimate": ([own("acc_norm", aggregation="!function functions.estimate")], 3, ""),
    "repeats": (["acc", "acc_norm"], 3, "repeats: 2\n"),
}


def questions(n, choices):
    """Documents with as many choices, of different lengths."""
    docs = []
    for i in range(n):
        options = [WORDS[(i + 1) % 10], WORDS[(3 * i + 2) % 10] + "es", WORDS[(i + 5) % 10] + " á"]
        docs.append(
            {
                "text": f"Question {i}: the {WORDS[i % 10]} likes the",
                "options": options[:choices],
                "right": i % choices,
                "labels": [int(j == i % choices or i % 2 > j) for j in range(choices)],
            }
        )
    return docs


def write(folder, name, docs, metrics, more="", output_type="multiple_choice"):
    """Writes a task into `folder`."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    fields = {"doc_to_text": "text", "doc_to_choice": "options", "doc_to_target": "right"}
    if output_type != "multiple_choice":
        fields = {"doc_to_text": "text", "doc_to_target": "' {{options[0]}}'"}
    lines = [
        f"task: {name}",
        "dataset_path: json",
        "test_split: test",
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}",
        f"output_type: {output_type}",
        *(f'{key}: "{value}"' for key, value in fields.items()),
        "metric_list:",
        *(f"  - metric: {metric}" for metric in metrics),
        more,
    ]
    (folder / f"{name}.yaml").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_all(folder, n=24):
    """Writes a task of each kind."""
    for name, (metrics, choices, more) in KINDS.items():
        write(folder, f"kind_{name}", questions(n, choices), metrics, more)
    return folder
