"""The numbers of `docs/universal.md` and `docs/transfer.md` are those of the stored results."""

import json

import pandas as pd
from shown import ROOT

RESULTS = ROOT / "results"
FITTED = ["demo_arc_easy", "demo_openbookqa", "demo_piqa"]


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def table_of(share):
    found = pd.read_csv(RESULTS / "universal" / share / "table.csv")
    return found.set_index(["task", "attack"])


def drop(row):
    return f"{row['drop'] + 0:.1f} ({row['drop_low']:.1f} to {row['drop_high']:.1f})"


def of_tasks():
    """A row for each task, and the mean, of the table with a row for each vocabulary entry."""
    table = table_of("token")
    for task in table.index.unique("task"):
        none, fixed, *controls = (
            table.loc[(task, name)] for name in ("none", "fixed", "fixed-shuffled", "fixed-random")
        )
        kind = "" if task == "mean" else "other half" if task in FITTED else "other task"
        rest = [f"{row['acc']:.3f}" for row in (none, fixed)]
        drops = [drop(row) for row in (fixed, *controls)]
        yield [task, kind, f"{none['n']:.0f}", *rest, *drops]


def of_shares():
    for share in ("token", "position", "all"):
        table = table_of(share)
        rows = (table.loc[("mean", f"fixed{kind}")] for kind in ("", "-shuffled", "-random"))
        yield [f"`{share}`", *map(drop, rows)]


def of_halves():
    """Means over the tasks to which it was fitted."""
    for half, folder in (("fitted", "fitted"), ("other", "token")):
        table = table_of(folder)
        mean = table.loc[FITTED].groupby("attack")["acc"].mean()
        n = int(table.loc[FITTED].xs("none", level="attack")["n"].sum())
        yield [half, str(n), *(f"{mean[name]:.3f}" for name in ("none", "fixed"))]


def of_smollm2():
    row, fixed, *controls = (
        table_of("smollm2-135m").loc[("arc_easy", name)]
        for name in ("none", "fixed", "fixed-shuffled", "fixed-random")
    )
    rest = [f"{part['acc']:.3f}" for part in (row, fixed)]
    yield ["arc_easy", f"{row['n']:.0f}", *rest, *(drop(part) for part in (fixed, *controls))]


def of_transfers(file, task, short=lambda name: name):
    """The matrices of the drops, and those of the control."""
    found = pd.read_csv(RESULTS / "transfer" / file)
    found = found[found["task"] == task]
    names = list(dict.fromkeys(found["scored_under"]))
    for text in (drop, lambda row: f"{row['drop_shuffled'] + 0:.1f}"):
        for under in names:
            rows = found[found["found_under"] == under].set_index("scored_under")
            yield [short(under), *(text(rows.loc[name]) for name in names)]


def lines(rows):
    return ["| " + " | ".join(row) + " |" for row in rows]


def test_universal():
    shown = page("universal").splitlines()
    for rows in (of_tasks(), of_shares(), of_halves(), of_smollm2()):
        assert {*lines(rows)} <= {*shown}
    detectable = table_of("smollm2-135m").loc[("mean", "fixed"), "detectable"]
    assert f"could detect a drop of {detectable:.0f} points" in " ".join(shown)


def test_the_first_line_of_universal():
    mean = table_of("token").loc["mean"]
    text = " ".join(page("universal").split())
    said = [f"{mean.loc[name, 'acc']:.1%}".replace("%", " %") for name in ("none", "fixed")]
    assert f"from {said[0]} to {said[1]}" in text


def test_it_asked_no_question_that_was_fitted():
    """In the stored results, the two halves have no question in common."""
    asked = [
        pd.read_csv(RESULTS / "universal" / name / "table.csv") for name in ("fitted", "token")
    ]
    counts = [run[run["attack"] == "none"].set_index("task")["n"] for run in asked]
    assert (sum(counts).dropna().loc[FITTED] == 100).all()
    record = json.loads((RESULTS / "universal/token/run.json").read_text("utf-8"))
    assert record["perturbation"]["tasks"] == FITTED
    assert record["perturbation"]["fitted_to"] == str(int(counts[0].loc[FITTED].sum()))


def test_transfer():
    shown = page("transfer").splitlines()
    for name in ("demo", "checkpoints"):
        for row in lines(of_transfers(f"{name}.csv", "mean")):
            assert row in shown
    short = {"SmolLM2-135M-Instruct.Q4_1.gguf": "Q4_1"}
    for row in lines(of_transfers("smollm2-135m.csv", "arc_easy", lambda n: short.get(n, n))):
        assert row in shown


def test_what_is_said_of_transfers():
    """Control: at most a point, or one of 40 questions. All drops are above it, diagonals most."""
    runs = ("demo", "mean", 1.0), ("checkpoints", "mean", 1.0), ("smollm2-135m", "arc_easy", 2.5)
    for name, task, most in runs:
        found = pd.read_csv(RESULTS / "transfer" / f"{name}.csv")
        found = found[found["task"] == task]
        assert found["drop_shuffled"].abs().max() <= most and len(found) == 9
        assert (found["difference_low"] > 0).all()
    largest = found.loc[found.groupby("found_under")["drop"].idxmax()]
    assert largest["same_weights"].all()


def test_what_is_said_of_checkpoints():
    found = pd.read_csv(RESULTS / "transfer" / "checkpoints.csv")
    found = found[found["task"] == "mean"].set_index(["found_under", "scored_under"])["drop"]
    early, middle, late = "step1000", "step1500", "step2000"
    for first, second in ((early, middle), (early, late)):
        assert found[second, first] > found[first, second]
    assert found[middle, late] > 0.9 * found[middle, middle]
    assert found[early, late] < 0.5 * found[early, early]
