"""The numbers of `docs/cells.md` beside its table, and the results behind them."""

import json

import pandas as pd
from shown import ROOT

PAGE = " ".join((ROOT / "docs" / "cells.md").read_text("utf-8").split())
RUN = ROOT / "results" / "cells" / "demo"
FORMATS = ("int8", "int4", "nf4", "bfloat16")
NAMES = ("rounding", "random_rounding", "fgsm_rounding", "worst_rounding", "tied_rounding")


def test_answers_that_are_lost():
    samples = pd.read_parquet(RUN / "samples.parquet")
    right = samples.groupby("condition")["acc"].sum()
    assert (right["none"], len(samples)) == (20, 20 * (1 + len(FORMATS) * len(NAMES)))
    for name in ("rounding", "random_rounding"):
        assert {right[f"{name}@{format}"] for format in FORMATS} == {20}
    for format, kept in zip(FORMATS, (20, 0, 0, 20), strict=True):
        assert {right[f"{name}@{format}"] for name in NAMES[2:]} == {kept}
    assert "In int8 nothing: the bundled model keeps all 20 answers." in PAGE
    assert "In int4 everything: it loses all 20, and one table of embeddings" in PAGE


def line_of(folder, format, *more):
    """The row of a table that was fitted to one half: accuracies and drops."""
    table = pd.read_csv(ROOT / "results" / "cells" / folder / "table.csv")
    table = table[table["task"] != "mean"].set_index("condition")
    none = table.loc["none"]
    cells = [format, *more, f"{none['n']:.0f}", f"{none['acc']:.3f}"]
    for name in ("tied_rounding", "tied_random_rounding"):
        row = table.loc[f"{name}@{format}"]
        ends = f"({row['drop_low']:.1f} to {row['drop_high']:.1f})"
        cells += [f"{row['acc']:.3f}", f"{row['drop'] + 0:.1f} {ends}"]
    return "| " + " | ".join(cells) + " |"


def test_tables_on_both_halves():
    for format in FORMATS:
        for half in ("fitting", "held_out"):
            assert line_of(half, format, f"`{half}`") in PAGE
    held_out = pd.read_csv(ROOT / "results/cells/held_out/table.csv").query("task == 'mean'")
    drop = held_out.set_index("condition").loc["tied_rounding@int4", "drop"]
    assert f"On questions that such a table has not seen, it costs {drop:.0f} points." in PAGE
    notes = (ROOT / "results/cells/held_out/roundings.md").read_text("utf-8")
    n = pd.read_csv(ROOT / "results/cells/fitting/table.csv")["n"].iloc[0]
    assert f"fitted to {n} questions of the other half" in notes and f"fitted to {n} que" in PAGE


def test_a_table_for_smollm2():
    folder = "smollm2-135m-held_out"
    for format in ("int8", "int4"):
        assert line_of(folder, format) in PAGE
    table = pd.read_csv(ROOT / "results" / "cells" / folder / "table.csv").query("task != 'mean'")
    attacked = table.set_index("condition").filter(like="tied", axis=0)
    assert (attacked["p_mcnemar_holm"] > 0.05).all()
    could = [attacked.loc[f"tied_rounding@{f}", "detectable"] for f in ("int4", "int8")]
    assert "a drop of {:.0f} points in int4, and of {:.0f} in int8".format(*could) in PAGE
    notes = (ROOT / "results" / "cells" / folder / "roundings.md").read_text("utf-8")
    assert "fitted to 33 questions of the other half" in notes and "fitted to 33 of" in PAGE


def test_smollm2():
    table = pd.read_csv(ROOT / "results/cells/smollm2-135m/table.csv").query("task == 'arc_easy'")
    left = table.set_index("condition")["acc"]
    said = f"leaves {left['worst_rounding@int8']:.1%} right of {left['none']:.1%}"
    assert said.replace("%", " %") in PAGE
    assert (table.loc[table["attack"] == "rounding", "p_mcnemar_holm"] > 0.05).all()
    critical = pd.read_csv(ROOT / "results/critical/smollm2-135m/critical.csv").set_index("task")
    run = json.loads((ROOT / "results/critical/smollm2-135m/run.json").read_text("utf-8"))
    rms = next(iter(run["attacks"].values()))["embedding_rms"]
    median = critical["median"].loc["arc_easy"].iloc[0] / rms
    notes = (ROOT / "results/cells/smollm2-135m/roundings.md").read_text("utf-8")
    half = float(notes.split("| int8 | 40 | ")[1].split(" ")[0])
    assert half > median and f"critical epsilon of this model, {median:.3f} RMS" in PAGE


def test_sizes_of_the_cells_beside_critical_epsilons():
    infos = json.loads((RUN / "run.json").read_text("utf-8"))["attacks"]
    asked = {*pd.read_parquet(RUN / "samples.parquet")["doc_id"]}
    samples = pd.read_parquet(ROOT / "results/critical/demo/samples.parquet")
    here = samples["task"].eq("demo_arc_easy") & samples["doc_id"].isin(asked)
    here &= samples["condition"].eq("critical@0.5rms")
    rms = infos["rounding@int8"]["embedding_rms"]
    median = samples.loc[here, "critical_epsilon"].median() / rms
    assert here.sum() == 20 and f"their median is {median:.3f} RMS" in PAGE
    half = {f: infos[f"rounding@{f}"]["half_cell_rms"] / rms for f in FORMATS}
    assert max(half["int8"], half["bfloat16"]) < median < min(half["int4"], half["nf4"])


def test_the_largest_cosine_and_the_changes_of_the_margin():
    infos = json.loads((RUN / "run.json").read_text("utf-8"))["attacks"]
    cosines = [abs(infos[f"worst_rounding@{f}"]["rounding_cosine"]) for f in FORMATS]
    assert f"It is at most {max(cosines):.3f}." in PAGE
    table = pd.read_csv(RUN / "table.csv")
    change = table[table["task"] != "mean"].set_index("condition")["margin_change"]
    for format in FORMATS:
        row = " | ".join(f"{change[f'{name}@{format}']:+.3f}" for name in NAMES)
        assert f"| {format} | {row} |" in PAGE
