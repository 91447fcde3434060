"""A folder with invented perturbations: files, samples and questions."""

import json

import numpy as np
import pandas as pd

from llm_attack.base.tensors import Spec, create
from llm_attack.suite.analysis.perturbations import SCHEMA, path_of

CONDITIONS = ["random@0.01", "fgsm@0.01"]
HOSTILE = "</script><img src=x onerror=alert(1)>"
WIDTH, LENGTH = 4, 22  # of an embedding; tokens of a request


def build(folder, n=40, task="demo"):
    """Writes the file of a task of `n` questions with two choices, each perturbed by itself.

    Of every request the first token and the last are not perturbed.
    """
    draw = np.random.default_rng(0)
    requests, rows = 2 * n, 2 * n * (LENGTH - 2)
    tokens = draw.integers(0, 50, (requests, LENGTH)).astype(np.int32)
    row = np.full((requests, LENGTH), -1, np.int32)
    row[:, 1:-1] = np.arange(rows).reshape(requests, -1)
    columns = {
        "doc_id": np.arange(n).repeat(2),
        "choice": np.tile(np.arange(2, dtype=np.int32), n),
        "n_continuation": np.full(requests, 2, np.int32),
        "start": np.arange(requests + 1) * LENGTH,
        "tokens": tokens.ravel(),
        "row": row.ravel(),
        "unit": np.arange(requests, dtype=np.int32),
    }
    for i, condition in enumerate(CONDITIONS):
        change = draw.normal(0, 1 + i, (rows, WIDTH)).astype(np.float32)
        share = draw.normal(i, 1, rows).astype(np.float32)
        sums = share.reshape(requests, -1).sum(1)
        before = draw.uniform(1, 2, requests)
        columns |= {
            f"change/{condition}": change,
            f"norm/{condition}": np.linalg.norm(change, axis=1),
            f"nearest/{condition}": draw.integers(0, 50, rows).astype(np.int32),
            f"distance/{condition}": draw.uniform(0, 4, rows).astype(np.float32),
            f"share/{condition}": share,
            f"loss/{condition}": np.stack([before, before + sums + 0.01], 1),
        }
    names = {"int64": "I64", "int32": "I32", "float32": "F32", "float64": "F64"}
    specs = {name: Spec(names[a.dtype.name], a.shape) for name, a in columns.items()}
    texts = {str(i): f" w{i}" for i in range(50)} | {"7": HOSTILE}
    about = {"schema": SCHEMA, "model": "m", "conditions": json.dumps(CONDITIONS)}
    path = path_of(folder, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = create(path, specs, {**about, "texts": json.dumps(texts)})
    for name, column in columns.items():
        arrays[name][...] = column
    return _frames(draw, n, task)


def _frames(draw, n, task):
    gold = draw.integers(0, 2, n)
    questions = pd.DataFrame(
        {
            "task": task,
            "doc_id": np.arange(n),
            "n_choices": 2,
            "gold": [[int(g)] for g in gold],
            "question": [f"Question {i}? {HOSTILE}" for i in range(n)],
            "choices": [[f"yes {i}", f"no {i}"] for i in range(n)],
        }
    )
    samples = []
    for condition in ("none", *CONDITIONS):
        values = draw.normal(0, 3, (n, 2))
        samples += [
            {
                "task": task,
                "doc_id": i,
                "condition": condition,
                "prediction": int(values[i].argmax()),
                "log_likelihoods": values[i].tolist(),
                "acc": float(values[i].argmax() == gold[i]),
            }
            for i in range(n)
        ]
    return pd.DataFrame(samples), questions
