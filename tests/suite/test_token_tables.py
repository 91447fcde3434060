"""Attacks that choose tokens in a run: conditions, the frame, the table, and a stored run."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llm_attack import Plan, evaluate
from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.lm.settings import condition_names
from llm_attack.suite import results
from llm_attack.suite.analysis import tokens as analysis
from llm_attack.suite.analysis.conditions import Condition, of_run
from llm_attack.suite.plan import NO_PART
from llm_attack.suite.run.estimate import dry_run
from llm_attack.suite.studies import tokens

HOW = {"model": "demo", "tasks": "demo_arc_easy", "limit": 2, "steps": 2, "loss": "margin"}


def plan(attacks, **more):
    return Plan(**{**HOW, "attacks": attacks, **more})


# -- the plan --------------------------------------------------------------------------------------


def test_names_and_order_of_conditions():
    mixed = plan("none,gcg,token_sparse,swap", swaps="1,3", epsilons="0.1rms,0.2rms")
    assert condition_names(mixed.conditions) == [
        *("none", "gcg@1swap", "gcg@3swap", "token_sparse@0.1rms", "token_sparse@0.2rms"),
        "swap@1swap",
    ]
    several = plan("none,gcg,hotflip", steps=[2, 4])
    assert condition_names(several.conditions) == [
        *("none", "gcg@1swap-steps2", "gcg@1swap-steps4", "hotflip@1swap"),
    ]


def test_they_are_no_part_of_the_worst_case():
    assert {"swap", "hotflip", "gcg", "token_sparse"} < {*NO_PART}


def test_other_runs_have_the_settings_that_they_had():
    names = {"swaps", "candidates", "exact_tokens"}
    assert not names & {*plan("none,fgsm").settings()}
    assert names < {*plan("none,hotflip").settings()}


OTHER = {"steps": 7, "step_size": 0.5, "restarts": 3, "seed": 1, "loss": "choice", "norm": "l2"}
OTHER |= {"exact_tokens": 2, "candidates": 9, "queries": 3, "positions": "context"}
USES = {
    "token_sparse": {"steps", "step_size", "loss", "norm", "exact_tokens", "positions"},
    "swap": {"norm", "positions"},
    "hotflip": {"loss", "norm", "candidates", "positions"},
    "gcg": {"steps", "seed", "loss", "norm", "candidates", "positions"},
}


@pytest.mark.parametrize("attack", USES)
def test_a_setting_counts_where_it_is_used(attack):
    here = {"attack": attack, "epsilon": 1.0, "loss": "margin"}
    assert {
        name
        for name, value in OTHER.items()
        if Condition.of("x", here) != Condition.of("x", here | {name: value})
    } == USES[attack]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"attacks": "none,gcg", "swaps": "1,1"}, "swaps=1,1: must name 1 only once"),
        ({"attacks": "none,gcg", "swaps": "0"}, "swaps=0: must be integers, 1 or more"),
        ({"attacks": "none,gcg", "swaps": "two"}, "swaps='two': must be integers, 1 or more"),
        ({"attacks": "none,swap", "swaps": "2"}, "swaps=2: no attack .* with one of gcg"),
        ({"attacks": "none,swap", "candidates": 9}, "candidates=9: no attack .* hotflip, gcg"),
        ({"attacks": "none,gcg", "exact_tokens": 2}, "exact_tokens=2: no attack .* token_sparse"),
        ({"attacks": "none,gcg", "epsilons": "0.1"}, r"epsilons=0\.1: no attack of this run"),
    ],
)
def test_settings_without_an_effect_are_refused(more, says):
    with pytest.raises(UsageError, match=says):
        plan(**more)


# -- a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with attacks that choose tokens, and its folder."""
    folder = tmp_path_factory.mktemp("tokens") / "run"
    attacks = "none,token_sparse,hotflip,gcg"
    more = {"epsilons": "0.2rms", "candidates": 4, "swaps": 2}
    return evaluate(plan(attacks, **more), output=folder, progress="quiet"), folder


def test_a_row_for_each_question_and_attack(run):
    result, _ = run
    frame = result.changed
    assert len(frame) == 2 * 3 and set(frame["condition"]) == {
        *("token_sparse@0.2rms", "hotflip@1swap", "gcg@2swap"),
    }
    acc = result.samples.set_index(["doc_id", "condition"])["acc"]
    for row in frame.to_dict("records"):
        n = None if pd.isna(row["tokens"]) else row["tokens"]
        assert (n is not None) == (acc[row["doc_id"], row["condition"]] == 0)
        assert len({len(row[name]) for name in ("place", "old", "rms", "linf")}) == 1
        assert [row["of_question"][i] for i in row["place"]] == [*row["old"]]
        assert len(row["place"]) == (n or 0)
        if row["attack"] == "token_sparse":
            assert max(row["linf"]) <= 0.2 * (1 + 1e-5) and row["new"] is None
            assert len(row["saliency"]) == len(row["of_question"])
            continue
        assert row["saliency"] is None and len(row["new"]) == len(row["old"])
        assert all(a != b for a, b in zip(row["old"], row["new"], strict=True))
        assert sum(row["tried"]) == (4 if row["attack"] == "hotflip" else sum(row["tried"]))
        shared = ~np.isnan(row["nearest_rms"])
        assert [*row["of_question"]][: shared.sum()][-2:] == ["Answer", ":"]
        for i, size in zip(row["place"], row["linf"], strict=True):
            assert size >= row["nearest_linf"][i] * (1 - 1e-6)


def test_sizes_are_those_of_embeddings_in_units_of_their_rms(run):
    result, _ = run
    table = load_file(MODEL_PATH / "model.safetensors")["model.embed_tokens.weight"].double()
    ids = AutoTokenizer.from_pretrained(MODEL_PATH).convert_tokens_to_ids
    rms = table.square().mean().sqrt()
    swapped = result.changed[result.changed["new"].notna() & (result.changed["tokens"] > 0)]
    assert len(swapped)
    for row in swapped.to_dict("records"):
        moved = (table[ids([*row["new"]])] - table[ids([*row["old"]])]) / rms
        assert row["rms"] == pytest.approx(moved.square().mean(-1).sqrt().tolist(), rel=1e-5)
        assert row["linf"] == pytest.approx(moved.abs().amax(-1).tolist(), rel=1e-5)


def test_a_stored_run_is_read_again_and_says_what_is_missing(run):
    result, folder = run
    loaded = results.load(folder)
    pd.testing.assert_frame_equal(loaded.changed[["tokens"]], result.changed[["tokens"]])
    assert of_run(loaded.run, loaded.samples).keys() == {*result.conditions} - {"worst"}
    there = loaded.conditions["gcg@2swap"]
    assert (there.get("epsilon"), there.get("epsilon_unit"), there.get("candidates")) == (
        *(2.0, "swap", 4),
    )
    assert there.get("swaps") is None  # epsilon has it
    for title, shown in tokens.cells(loaded.changed).items():
        assert shown.markdown() in (folder / tokens.FILE).read_text("utf-8")
        assert title in (folder / "report.html").read_text("utf-8").lower()
    path = folder / "tokens.parquet"
    kept = path.read_bytes()
    try:
        loaded.changed.drop(columns="old").to_parquet(path)
        with pytest.raises(UsageError, match=r"tokens\.parquet: has no column old"):
            results.load(folder)
        path.unlink()
        with pytest.raises(UsageError, match=r"has no tokens\.parquet"):
            results.load(folder)
    finally:
        path.write_bytes(kept)


def test_the_record_has_the_passes(run):
    infos = json.loads((run[1] / "run.json").read_text("utf-8"))["attacks"]
    assert infos["hotflip@1swap"]["forward_passes"] == 1 + 4 + 1
    assert infos["token_sparse@0.2rms"]["backward_passes"] >= 2
    assert infos["gcg@2swap"]["not_perturbed"] is None


def test_the_dry_run_knows_the_largest_number_of_passes(run, capsys):
    result, _ = run
    more = {"candidates": 4, "epsilons": "0.2rms"}
    estimate = dry_run(plan("none,token_sparse,hotflip", **more), "quiet")
    longest = max(len(row) for row in result.changed["of_question"])
    forwards = 1 + (longest * (2 + 1) - 2) + 2 * longest + 1 + 4 + 1
    assert estimate.passes.forwards == forwards
    assert "at most" in estimate.lines()["passes"]


# -- the numbers -----------------------------------------------------------------------------------


def made(**columns):
    rows = len(columns["tokens"])
    default = {"task": "a", "condition": "c", "attack": "swap", "doc_id": range(rows)}
    empty = dict.fromkeys(analysis.COLUMNS)
    lists = {name: [[]] * rows for name in ("nearest_rms", "nearest_linf", "tried", "wrong")}
    frame = pd.DataFrame({**empty, **lists, **default, **columns}, index=range(rows))
    return frame.astype({"tokens": "Int64"})


def test_counts_by_hand():
    sizes = [[0.5], [0.2, 0.9], [], []]
    frame = made(
        tokens=[1, 2, 0, None],
        rms=sizes,
        linf=[[2 * x for x in of] for of in sizes],
        place=[[3], [0, 1], [], []],
        saliency=[[0, 0, 0, 9], [1, 2, 3, 4], [1, 1, 1, 1], [1, 1, 1, 1]],
        tried=[[4, 4], [4, 4], [0, 0], [4, 4]],
        wrong=[[1, 0], [0, 2], [0, 0], [0, 0]],
        nearest_rms=[[1.0, np.nan], [2.0, 4.0], [8.0], []],
        nearest_linf=[[3.0, np.nan], [6.0, 2.5], [9.0], []],
    )
    (row,) = analysis.counts(frame).to_dict("records")
    assert (row["n"], row["right"], row["fell"]) == (4, 3, 2)
    assert [row[f"at_most_{n}"] for n in (1, 2, 3)] == [1, 2, 2]
    assert (row["median"], row["rms"], row["linf"], row["least_linf"]) == (1.5, 0.7, 1.4, 1.0)
    assert (row["first"], row["tried"], row["wrong"]) == (0.5, 24, 3)
    found = row["nearest_rms"], row["nearest_linf"], row["least_nearest"]
    assert found == (3.0, 4.5, 2.5)
    two = pd.concat([frame, frame.assign(task="b")])
    assert [*analysis.counts(two)["task"]] == ["a", "b", "all"]
    assert analysis.counts(two)["n"].tolist() == [4, 4, 8]


def test_examples_have_the_tokens_and_the_shares_of_their_saliency():
    frame = made(
        tokens=[2, 0, 1],
        rms=[[1.0, 1.0], [], [1.0]],
        linf=[[1.0, 1.0], [], [1.0]],
        place=[[0, 2], [], [1]],
        old=[["a", " b"], [], ["x"]],
        new=[None, None, ["\n"]],
        of_question=[["a", "c", " b", "d"], [], ["w", "x"]],
        saliency=[[2.0, 1, 4, 1], [1.0], None],
        attack=["token_sparse", "token_sparse", "swap"],
        tried=[None, None, [8, 4]],
        wrong=[None, None, [2, 3]],
    )
    shown = tokens.cells(frame)[tokens.EXAMPLES]
    assert shown.rows == [
        ["c", "a", "0", "a, ' b'", "' b' 50%, a 25%, c 12%"],
        ["c", "a", "2", "x → \\n", "x 75%, w 25%"],
    ]


def test_nothing_fell():
    empty = {name: [[]] for name in ("rms", "linf", "place", "old")}
    frame = made(tokens=[None], saliency=[None], **empty)
    shown = tokens.cells(frame.assign(attack="gcg"))
    (row,), (sizes,) = shown[tokens.TITLE].rows, shown[tokens.SIZES].rows
    assert row == ["c", "1", "1", "0", "0", "0", "0", "–", "–"] and sizes == ["c", *"––––––"]
    assert shown[tokens.EXAMPLES].rows == [["c", "a", "0", "–", "–"]]
    assert tokens.cells(None) == {}
