"""The numbers of `docs/scaling.md` and `docs/training.md` are those of the stored results."""

import numpy as np
import pandas as pd
from shown import ROOT

RESULTS = ROOT / "results"


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def lines(rows):
    return ["| " + " | ".join(row) + " |" for row in rows]


def of_models():
    for row in pd.read_csv(RESULTS / "scaling" / "last.csv").to_dict("records"):
        width = row["model"].split("/")[-2].removeprefix("width")
        cells = [width, f"{row['parameters']:,}", f"{row['right']} of {row['asked']}"]
        yield [*cells, f"{row['accuracy']:.3f}", f"{row['median']:.4f}"]


def of_laws():
    kinds = {"demo": "all 25", "last": "last five", "ceiling": "all 25, ceiling"}
    for name, kind in kinds.items():
        laws = pd.read_csv(RESULTS / "scaling" / f"{name}-laws.csv")
        for row in laws.to_dict("records"):
            cells = [kind, row["method"], "yes" if row["covariate"] else "no"]
            cells.append(f"{row['exponent']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})")
            cells.append(f"{row['lowest']:+.2f} to {row['highest']:+.2f}")
            yield [*cells, "" if np.isnan(row["slope"]) else f"{row['slope']:+.2f}"]


def test_scaling():
    shown = page("scaling").splitlines()
    for row in lines([*of_models(), *of_laws()]):
        assert row in shown, row
    assert pd.read_csv(RESULTS / "scaling" / "demo.csv")["censored"].sum() == 0
    hidden = pd.read_csv(RESULTS / "scaling" / "ceiling.csv")
    share = hidden["censored"].sum() / hidden["right"].sum()
    assert f"{100 * share:.0f} % of the questions" in page("scaling")


def share(row, name, digits=3):
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def of_front():
    """Of each model: accuracies, and the median critical epsilon."""
    for row in pd.read_csv(RESULTS / "training" / "front.csv").to_dict("records"):
        accuracies = (share(row, name) for name in ("none", "apgd@0.05rms", "apgd@0.1rms"))
        yield [f"`{row['against']}`", *accuracies, share(row, "median")]


def of_certificates():
    front = pd.read_csv(RESULTS / "training" / "front.csv").dropna()
    for row in front.to_dict("records"):
        yield [
            f"`{row['against']}`",
            *(share(row, f"certified@{r}", 2) for r in ("0", "1", "1.5", "2")),
        ]


def of_smollm2():
    found = pd.read_csv(RESULTS / "training" / "smollm2-135m.csv")
    for row in found[found["task"] == "arc_easy"].to_dict("records"):
        if row["condition"].startswith(("none", "fgsm")):
            ends = f"({row['difference_low']:+.1f} to {row['difference_high']:+.1f})"
            both = [f"{row['acc_a']:.3f}", f"{row['acc_b']:.3f}"]
            yield [row["condition"], *both, f"{row['difference']:+.1f} {ends}"]


def test_training():
    shown = page("training").splitlines()
    for row in lines([*of_front(), *of_certificates(), *of_smollm2()]):
        assert row in shown, row


def test_the_front():
    """What the text says of it."""
    front = pd.read_csv(RESULTS / "training" / "front.csv").set_index("against")
    text = " ".join(page("training").split())
    plain, best = front.loc["none"], front.loc["pgd@0.2rms"]
    assert f"from {plain['apgd@0.05rms']:.3f} to {best['apgd@0.05rms']:.3f}" in text
    assert best["apgd@0.05rms"] == front["apgd@0.05rms"].max()
    assert best["apgd@0.05rms_low"] > plain["apgd@0.05rms_high"] and best["none"] >= plain["none"]
    most = front.loc["pgd@0.4rms"]
    assert most["none_high"] < plain["none_low"]
    assert most["apgd@0.05rms"] < best["apgd@0.05rms_low"]
    assert (front["apgd@0.2rms"] == 0).all()
