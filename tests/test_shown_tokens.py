"""The numbers of `docs/tokens.md` and `docs/swaps.md`, and the results behind them."""

import json

import numpy as np
import pandas as pd
import pytest
from shown import ROOT
from test_shown_numbers import tables

from llm_attack.suite.analysis.tokens import counts

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("tokens", "swaps")}
WORDS = {name: " ".join(text.split()) for name, text in PAGES.items()}
RESULTS = ROOT / "results"
TEMPLATE = ("Question", ":", "\n", "Answer")


def changed(folder):
    return pd.read_parquet(RESULTS / folder / "tokens.parquet")


FOLDERS = ("tokens/demo", "swaps/demo", "tokens/smollm2-135m", "swaps/smollm2-135m")


@pytest.mark.parametrize("folder", FOLDERS)
def test_tables_are_those_of_the_results(folder):
    """The table of examples in part, the others whole."""
    shown = list(tables(PAGES[folder.partition("/")[0]]))
    for heading, *rows in tables((RESULTS / folder / "tokens.md").read_text("utf-8")):
        found = [of[1:] for of in shown if of[0] == heading and of[1] in rows]
        left_out = {"tokens/demo": "RMS", "tokens/smollm2-135m": "RMS", "swaps/smollm2-135m": "n"}
        if heading[1] == left_out.get(folder) or (folder == FOLDERS[3] and "strongest" in heading):
            assert not found  # with token_sparse, the sizes are epsilon
            continue
        (beside,) = found
        assert all(row in rows for row in beside)
        few = 5 if folder.endswith("demo") else 3
        assert len(beside) == (few if "strongest" in heading else len(rows))


def test_a_real_model():
    few = counts(changed("swaps/smollm2-135m")).set_index("condition")
    assert few["right"].tolist() == [3, 3, 3] and few["fell"].tolist() == [2, 3, 3]
    assert "`hotflip` changes 2 of the 3 answers and `gcg` all 3" in WORDS["swaps"]
    some = changed("swaps/smollm2-135m")
    some = some[some["attack"] == "hotflip"]["nearest_linf"].explode().astype(float).dropna()
    text = f"None of the {len(some)} tokens of these prompts has another within {some.min():.2f}"
    assert text in WORDS["swaps"]
    assert f"In the median the nearest is {some.median():.2f} RMS away" in WORDS["swaps"]
    assert some.min() > 0.7


def test_counts_are_made_again_from_the_frames():
    fewest = counts(changed("tokens/demo")).set_index("condition")
    assert fewest.loc["token_sparse@0.2rms", ["at_most_1", "at_most_2", "fell"]].tolist() == [
        *(13, 20, 20),
    ]
    assert "at 0.2 RMS, one or two of about twelve" in WORDS["tokens"].lower().replace("rms", "RMS")
    longest = changed("tokens/demo")["of_question"].map(len)
    assert 10.5 < longest.mean() < 13.5
    assert (fewest["at_most_1"]["token_sparse@0.5rms"], fewest["first"].min()) == (20, 1.0)


def test_sizes_beside_critical_epsilons():
    of_swaps = counts(changed("swaps/demo")).set_index("condition").loc["swap@1swap"]
    infos = json.loads((RESULTS / "swaps/demo/run.json").read_text("utf-8"))["attacks"]
    rms = infos["critical@0.5rms"]["embedding_rms"]
    table = pd.read_csv(RESULTS / "swaps/demo/critical.csv").set_index("condition")
    median = table.loc["critical@0.5rms", "median"].iloc[0] / rms
    assert f"have a median of {median:.3f} RMS" in WORDS["swaps"]
    assert f"Moving all embeddings by {median:.3f} RMS changes half" in WORDS["swaps"]
    assert f"`linf` of {of_swaps['linf']:.2f} RMS in the median" in WORDS["swaps"]
    assert f"No swap at all is nearer than {of_swaps['least_nearest']:.2f} RMS" in WORDS["swaps"]
    assert f"is at least {of_swaps['least_nearest']:.2f} RMS away" in WORDS["swaps"]
    assert of_swaps["least_linf"] > of_swaps["least_nearest"] > median


def test_swaps_of_the_template_and_the_most_salient_token():
    frame = changed("swaps/demo")
    every = frame[frame["attack"] == "swap"].set_index("doc_id")
    of_template, fallen = np.zeros(2), 0
    for row in every.to_dict("records"):
        here = np.isin(row["of_question"], TEMPLATE) & (row["tried"] > 0)
        of_template += [row["tried"][here].sum(), row["wrong"][here].sum()]
        fallen += row["wrong"][here].any()
    share = 100 * of_template[1] / of_template[0]
    text = f"also change all {fallen} answers, and {share:.1f} % of them give a wrong answer"
    assert fallen == len(every) and text in WORDS["swaps"]
    fewest = changed("tokens/demo")
    first = fewest[fewest["condition"] == "token_sparse@0.1rms"].set_index("doc_id")
    same = 0
    for doc_id, row in every.iterrows():
        there = row["tried"] > 0
        share = row["wrong"][there] / row["tried"][there]
        same += first.loc[doc_id, "saliency"][there].argmax() == share.argmax()
    assert f"In {same} of the {len(every)} questions, the token with the most" in WORDS["swaps"]


def test_shares_of_wrong_swaps():
    table = counts(changed("swaps/demo")).set_index("attack")
    for name, text in (
        ("swap", "{} % of all swaps"),
        ("hotflip", "{} % of those that the gradient"),
    ):
        share = 100 * table.loc[name, "wrong"] / table.loc[name, "tried"]
        assert text.format(f"{share:.1f}") in WORDS["swaps"]
