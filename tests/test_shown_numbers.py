"""The numbers in the documentation are those of the results in the repository."""

import json
import re
import runpy
from statistics import mean

import pandas as pd
import pytest
from click.testing import CliRunner
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binomtest
from shown import ROOT

from llm_attack import stats as inference
from llm_attack.suite.analysis import critical
from llm_attack.theory import fig6
from llm_attack.theory.fig4 import PACKETS
from llm_attack.vision.trends import trend, verdict

# Folder -> the page, and what stands there before the table of accuracies.
SHOWN = {
    "fig3/smollm2-135m": ("docs/explain/statistics.md", "The accuracies were"),
    "fig3/smollm2-135m-bim-0.01": ("docs/paper/fig3.md", "### At 0.01"),
    "fig3/smollm2-135m-bim": ("docs/paper/fig3.md", "### At 0.7 RMS"),
    "fig3/smollm2-135m-choice": ("docs/paper/fig3.md", "## If the attacker knows"),
    "fig3/smollm2-135m-bf16": ("docs/paper/fig3.md", "In bfloat16, all of ARC"),
    "fig3/smollm2-135m-1000": ("docs/paper/fig3.md", "In float32, the first 1,000"),
    "demo/sequence": ("docs/demo.md", "`make demo` prints"),
    "demo/choice": ("docs/demo.md", "## With the label"),
}


NAMES = ("random", "fgsm", "bim")


def tables(text):
    """Rows of cells of each Markdown table, without its rule."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        yield [rows[0], *rows[2:]]


@pytest.mark.parametrize("folder", SHOWN)
def test_accuracies(folder):
    page, place = SHOWN[folder]
    text = (ROOT / page).read_text("utf-8")
    heading, *rows = next(tables(text[text.index(place) :]))
    found = pd.read_csv(ROOT / "results" / folder / "table.csv").set_index(["task", "condition"])
    assert [row[0] for row in rows] == list(found.index.unique("task"))
    for task, *cells in rows:
        for condition, cell in zip(heading[1:], cells, strict=True):
            if condition == "baseline":
                expected = found.loc[(task, "none"), "baseline"]
            else:
                expected = found.loc[(task, condition), "acc"]
            assert float(cell) == pytest.approx(expected, abs=5.1e-4), (task, condition)


def test_the_standard_of_the_bundled_model():
    """docs/standard.md: the card in board/cards."""
    card = json.loads((ROOT / "board/cards/demo-standard-1.json").read_text("utf-8"))
    heading, *rows = table_of("docs/standard.md", "condition", "accuracy", "95 % interval")
    expected = [("none", card["clean"]["accuracy"], {})]
    expected += [(r["condition"], r["accuracy"], r["broken_by"]) for r in card["robust"]]
    assert heading[-1] == "broken by"
    for row, (name, accuracy, broken_by) in zip(rows, expected, strict=True):
        ends = f"{accuracy['low']:.3f}–{accuracy['high']:.3f}"
        by = ", ".join(f"`{attack}` {n}" for attack, n in broken_by.items())
        assert row == [name, f"{accuracy['value']:.3f}", ends, by]
    total = sum(n for _, _, broken_by in expected for n in broken_by.values())
    assert f"Auto-PGD made all {total} answers wrong" in words("docs/standard.md")
    assert {attack for _, _, broken_by in expected for attack in broken_by} == {"apgdt"}


def test_what_each_attack_of_the_standard_breaks_alone():
    """docs/standard.md: every attack on every question."""
    found = json.loads((ROOT / "results/standard/members.json").read_text("utf-8"))["conditions"]
    heading, *rows = table_of("docs/standard.md", "condition", "`apgdt`", "`fmn`")
    names = [name.strip("`") for name in heading[1:5]]
    for row, of in zip(rows, found, strict=True):
        norm = "" if of["norm"] == "linf" else f"-{of['norm']}"
        assert row[0] == f"standard-1@{of['epsilon']}{norm}"
        broken = [of["broken"][name] for name in (*names, "standard-1")]
        seconds = of["seconds"]["standard-1"] / of["seconds"]["apgd"]
        expected = [*broken, sum(of["only"].values())]
        assert row[1:] == [*map(str, expected), f"{seconds:.1f}"]
        assert broken[0] == broken[1] == broken[3] == broken[4] and not expected[-1]
    spent = {name: sum(of["seconds"][name] for of in found) for name in ("standard-1", "apgd")}
    assert {of["n"] for of in found} == {30}
    text = words("docs/standard.md")
    assert f"takes {spent['standard-1'] / spent['apgd']:.1f} times as long" in text


def test_other_libraries_side_by_side():
    """docs/beside.md: losses, times and lines."""
    found = json.loads((ROOT / "results/standard/beside.json").read_text("utf-8"))
    results, lines = found["results"], found["lines"] | {"ours": 1}
    names = {"ours": "`llm_attack`", "art": "ART", "adversariallm": "AdversariaLLM"}
    _, *rows = table_of("docs/beside.md", "library", "loss, FGSM")
    one, ten = results["fgsm"], results["bim"]
    for row, name in zip(rows, one, strict=True):
        values = [one[name]["loss"], ten[name]["loss"], one[name]["times_ours"]]
        expected = [f"{value:.1f}" for value in (*values, ten[name]["times_ours"])]
        assert row == [names.get(name, name), *expected, str(lines[name])]
        assert all(abs(of[name]["loss"] / of["ours"]["loss"] - 1) < 0.005 for of in (one, ten))
        assert name == "ours" or (min(of[name]["times_ours"] for of in (one, ten)) > 1)
    _, *rows = table_of("docs/beside.md", "library", "loss", "time")
    for row, (name, of) in zip(rows, results["l2_token"].items(), strict=True):
        assert row == [names[name], f"{of['loss']:.1f}", f"{of['times_ours']:.1f}"]
    assert f"{found['requests']} requests" in words("docs/beside.md")
    times = results["l2_token"]["adversariallm"]["times_ours"]
    assert f"takes {times:.1f} times as long" in words("docs/beside.md")


def test_calibration():
    """docs/explain/calibration.md: the means over tasks of two runs."""
    page = "docs/explain/calibration.md"
    columns = {"accuracy": "acc", "confidence": "confidence", "gap": "gap", "ECE": "ece"}
    columns |= {"by chance": "ece_by_chance", "Brier": "brier"}
    found = [
        table for table in tables((ROOT / page).read_text("utf-8")) if table[0][0] == "condition"
    ]
    for folder, (heading, *rows) in zip(
        ("demo/sequence", "fig3/smollm2-135m-choice"), found, strict=True
    ):
        stored = pd.read_csv(ROOT / "results" / folder / "calibration.csv")
        means = stored[stored["task"] == "mean"].set_index("condition")
        assert heading == ["condition", *columns]
        for condition, *cells in rows:
            expected = means.loc[condition, [*columns.values()]].astype(float)
            assert [float(cell) for cell in cells] == pytest.approx([*expected], abs=5.1e-4)
    # "the gap cannot be told from 0": of the first run, without an attack
    clean = pd.read_csv(ROOT / "results/demo/sequence/calibration.csv").query("task == 'mean'")
    low, high = clean.set_index("condition").loc["none", ["gap_low", "gap_high"]]
    assert low < 0 < high


def words(page):
    """The text of a page, on one line."""
    return " ".join((ROOT / page).read_text("utf-8").split())


def table_of(page, *heading):
    """Heading and rows of the one table of a page whose first columns are those."""
    found = tables((ROOT / page).read_text("utf-8"))
    (table,) = (of for of in found if of[0][: len(heading)] == list(heading))
    return table


def record_of(folder):
    return json.loads((ROOT / "results" / folder / "run.json").read_text("utf-8"))


def test_changes_of_the_mean():
    """README: what noise, FGSM and BIM change, with the intervals."""
    text = (ROOT / "README.md").read_text("utf-8")
    heading, *rows = next(tables(text[text.index("| epsilon | random noise |") :]))
    assert [cell.partition(",")[0] for cell in heading[1:4]] == ["random noise", "FGSM", "BIM"]
    for epsilon, *cells, _ in rows:
        ten_steps = {"0.01": "fig3/smollm2-135m-bim-0.01", "0.7rms": "fig3/smollm2-135m-bim"}[
            epsilon
        ]
        folders = ("fig3/smollm2-135m", "fig3/smollm2-135m", ten_steps)
        for name, folder, cell in zip(NAMES, folders, cells, strict=True):
            table = pd.read_csv(ROOT / "results" / folder / "table.csv")
            (row,) = table[
                (table["task"] == "mean") & (table["condition"] == f"{name}@{epsilon}")
            ].to_dict("records")
            change, low, high = (-row[k] for k in ("drop", "drop_high", "drop_low"))
            shown = f"{change:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
            assert cell == shown + (", not detectable" if low < 0 < high else "")
    table = pd.read_csv(ROOT / "results/fig3/smollm2-135m-choice/table.csv")
    noise = table[table["condition"].str.startswith("random@")]
    assert (noise["p_mcnemar_holm"] > 0.05).all()  # no detectable effect
    most = noise.loc[noise["task"] == "mean", "drop_high"].max()
    assert f"it costs at most {most:.1f} points on the mean" in words("docs/paper/fig3.md")


def test_the_two_root_mean_squares():
    """Of the embedding matrix, which is the unit, and of the tokens, which is in the SNR."""
    of = record_of("fig3/smollm2-135m")["attacks"]["fgsm@0.01"]
    matrix, tokens = of["embedding_rms"], of["signal_rms"]
    assert of["snr"] == pytest.approx((tokens / of["noise_rms"]) ** 2)
    assert f"{matrix:.3f}" in words("README.md")
    assert f"0.01 is {1 / matrix:.0f} % of " in words("README.md")
    _, *rows = table_of("docs/paper/fig3.md", "RMS of")
    for (_, *cells), scale in zip(rows, (matrix, tokens), strict=True):
        small, large = 1 / scale, 70 * matrix / scale
        assert cells == [f"{scale:.3f}", f"{small:.0f} %", f"{large:.0f} %"]
    assert " dB" not in words("README.md")  # one of the two, where a reader compares
    of = record_of("demo/sequence")["attacks"]["fgsm@0.01"]
    text = words("docs/demo.md")
    assert (
        f"(RMS) of {of['embedding_rms']:.3f}, and 0.01 is {1 / of['embedding_rms']:.0f} %" in text
    )
    assert f"{of['signal_rms']:.3f}: {of['snr']:.0f} times ({of['snr_db']:.1f} dB)" in text


def test_openbookqa_by_its_other_score():
    """Fig. 3: by `acc_norm` above guessing, and taken there."""
    samples = pd.read_parquet(ROOT / "results/fig3/smollm2-135m/samples.parquet")
    of = samples[samples["task"] == "openbookqa"].pivot(
        index="doc_id", columns="condition", values="acc_norm"
    )
    of = of.astype(int)
    clean, noise, fgsm = of["none"], of["random@0.7rms"], of["fgsm@0.7rms"]
    p_clean = binomtest(int(clean.sum()), len(of), 0.25).pvalue
    lost, gained = ((clean > fgsm).sum(), (clean < fgsm).sum())
    p_drop = binomtest(int(lost), int(lost + gained), 0.5).pvalue
    low, high = (-100 * end for end in inference.paired_interval(lost, gained, len(of))[::-1])
    drop = f"{100 * (clean - fgsm).mean():.1f} ({low:.1f} to {high:.1f})"
    assert table_of("docs/paper/fig3.md", "OpenBookQA, `acc_norm`")[1:] == [
        ["none", f"{clean.mean():.3f}", "", f"{p_clean:.4f}, against guessing"],
        ["fgsm@0.7rms", f"{fgsm.mean():.3f}", drop, f"{p_drop:.3f}, against none"],
        ["random@0.7rms", f"{noise.mean():.3f}", "", ""],
    ]


def test_bfloat16_beside_float32():
    """Fig. 3: how many predictions differ, and the accuracies of the tasks."""
    runs = (
        pd.read_parquet(ROOT / "results" / folder / "samples.parquet")
        for folder in ("fig3/smollm2-135m-bf16", "fig3/smollm2-135m-1000")
    )
    both = next(runs).merge(next(runs), on=["task", "doc_id", "condition"])
    assert len(both[both["condition"] == "none"]) == 2000
    flips = (both["prediction_x"] != both["prediction_y"]).groupby(both["condition"]).mean() * 100
    _, *rows = table_of("docs/paper/fig3.md", "condition", "predictions that bfloat16 changes")
    assert {condition: cell for condition, cell in rows} == {
        condition: f"{share:.2f} %" for condition, share in flips.items()
    }
    means = both.groupby(["task", "condition"])[["acc_x", "acc_y"]].mean()
    most = 100 * (means["acc_x"] - means["acc_y"]).abs().max()
    assert f"changes no accuracy of a task by more than {most:.1f} points" in words(
        "docs/paper/fig3.md"
    )


def test_the_loss_is_our_reading_of_the_paper():
    """Which states neither loss, steps nor batches: nowhere is `sequence` called the paper's."""
    for page in ("README.md", "docs/paper/fig3.md", "docs/attacks.md"):
        assert "our reading" in words(page)
    sources = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("llm_attack/**/*.py"), ROOT / "README.md"]
    for path in sources:
        for line in path.read_text("utf-8").splitlines():
            assert not ("sequence" in line and "paper's" in line), (path.name, line)


@pytest.mark.parametrize(
    ("page", "file"),
    [
        ("where.md", "where/positions-demo/positions.md"),
        ("where.md", "where/positions-smollm2-135m/positions.md"),
        ("where.md", "where/demo-layers/layers.md"),
        ("where.md", "where/smollm2-135m-layers/layers.md"),
        ("cells.md", "cells/demo/roundings.md"),
        ("cells.md", "cells/smollm2-135m/roundings.md"),
        ("certify.md", "certify/demo/certified.md"),
        ("certify.md", "certify/smollm2-135m/certified.md"),
        ("critical.md", "critical/demo/critical.md"),
        ("critical.md", "critical/smollm2-135m/critical.md"),
        ("critical.md", "critical/smollm2-135m-fmn/critical.md"),
    ],
)
def test_tables_are_those_of_the_results(page, file):
    """Whole, or of a sweep over many layers some rows."""
    shown = list(tables((ROOT / "docs" / page).read_text("utf-8")))
    made = list(tables((ROOT / "results" / file).read_text("utf-8")))
    assert made
    for heading, *rows in made:
        beside = [of for of in shown if of[0] == heading and all(row in rows for row in of[1:])]
        assert beside and len(beside[0]) > (5 if file.endswith("layers.md") else len(rows))


def test_models_of_the_demo():
    """`docs/demo.md`: the drop of each model, and where it is largest."""
    text = (ROOT / "docs" / "demo.md").read_text("utf-8")
    _, *rows = next(tables(text[text.index("## Is the better model") :]))
    found = [pd.read_csv(ROOT / f"results/demo/models/{name}.csv") for name in ("demo", "choice")]
    shown = [("random@0.3rms", 0), ("fgsm@0.3rms", 0), ("fgsm@0.05rms", 1)]
    for steps, clean, *drops in rows:
        model = f"demo-{steps.replace(',', '')}"
        for drop, (condition, i) in zip(drops, shown, strict=True):
            of = found[i]
            (row,) = of[(of["model"] == model) & (of["condition"] == condition)].to_dict("records")
            ends = f"{row['drop_low']:.1f} to {row['drop_high']:.1f}"
            assert drop == f"{row['drop']:.1f} ({ends})" and clean == f"{row['clean']:.3f}"
    for condition, i in shown[1:]:
        of = found[i][found[i]["condition"] == condition].set_index("model")
        assert of["drop"].idxmax() == "demo-1100"
        if i == 1:
            best = of.loc[["demo-1500", "demo-2000"], "drop_high"]
            assert best.max() < of.loc["demo-1100", "drop_low"]
        known = inference.rank_correlation(of["clean"], of["drop"])
        assert f"{known.value:+.2f} ({known.low:+.2f} to {known.high:+.2f}, p = " in text


def test_checkpoints_of_the_demo():
    """`docs/demo.md`: means over three trainings with their ends, and what rises and falls."""
    folder = ROOT / "results/demo/training"
    runs = {
        kind: [pd.read_csv(folder / f"{kind}-{seed}.csv") for seed in (1, 2, 3)]
        for kind in ("sequence", "choice")
    }
    shown = {
        "clean": ("sequence", "fgsm@0.3rms", "clean"),
        **{f"{name}@0.3rms": ("sequence", f"{name}@0.3rms", "acc") for name in NAMES},
        **{
            f"{name}@0.05rms, gold known": ("choice", f"{name}@0.05rms", "acc")
            for name in ("fgsm", "bim")
        },
        "median critical epsilon, RMS": ("choice", "fmn@1rms", "critical"),
        "cosine": ("sequence", "fgsm@0.3rms", "cosine"),
    }
    curves = {}
    for name, (kind, condition, column) in shown.items():
        rows = [run[run["condition"] == condition].set_index("step")[column] for run in runs[kind]]
        curves[name] = pd.DataFrame(rows)
        assert curves[name].columns.tolist() == [*range(100, 2001, 100)]
    text = (ROOT / "docs/demo.md").read_text("utf-8")
    steps, trends = tables(text[text.index("## While it is trained") :])
    for step, *row in steps[1:]:
        for name, cell in zip(steps[0][1:], row, strict=True):
            values = curves[name][int(step.replace(",", ""))]
            ends = [values.mean(), values.min(), values.max()]
            found = [float(x) for x in re.findall(r"-?\d\.\d+", cell.replace("−", "-"))]
            digits = 4 if name in ("median critical epsilon, RMS", "cosine") else 3
            assert found == pytest.approx(ends, abs=0.51 * 10**-digits), name
    assert [row[0] for row in trends[1:]] == steps[0][1:]
    for name, *row in trends[1:]:
        late = curves[name].loc[:, 1300:]
        for part, (tau, told) in ((curves[name], row[:2]), (late, row[2:])):
            value, low, high = trend(part.to_numpy())
            assert tau == f"{value:+.2f} ({low:+.2f} to {high:+.2f})".replace("-", "−")
            assert told == verdict(low, high)


def test_speed():
    """`docs/speed.md`: time on a real model, of stock's."""
    found = json.loads((ROOT / "results/speed/cpu-smollm2-135m.json").read_text("utf-8"))
    text = (ROOT / "docs" / "speed.md").read_text("utf-8")
    shown = tables(text[text.index("## On a small real model") :])
    _, *rows, (_, _, *means) = next(shown)
    for (task, stock, *times), of in zip(rows, found["tasks"], strict=True):
        assert (task, stock) == (of["task"], f"{of['seconds']['stock']:.1f}")
        assert times == [f"{of['times_stock'][c]:.2f}" for c in found["geometric_mean_times_stock"]]
    known = list(found["geometric_mean_times_stock"].values())
    assert means == [f"{value:.2f}" for value in known]


def test_speed_at_five_shots():
    """`docs/speed.md`: time, tokens and memory with examples that are computed once."""
    found = json.loads((ROOT / "results/speed/cpu-110m-5-shots.json").read_text("utf-8"))
    text = (ROOT / "docs" / "speed.md").read_text("utf-8")
    times, memory, *_ = tables(text[text.index("## With few-shot examples") :])
    _, *rows, (_, _, *means) = times
    conditions = ("none", "fgsm own", "fgsm choice", "bim own")
    assert means == [f"{found['geometric_mean_times_stock'][c]:.2f}" for c in conditions]
    for row, of in zip(rows, found["tasks"], strict=True):
        assert row[:2] == [of["task"], f"{of['seconds']['stock']:.1f}"]
        assert row[2:] == [f"{of['times_stock'][c]:.2f}" for c in conditions]
    for row, of in zip(memory[1:], found["tasks"], strict=True):
        counts = [f"{of['tokens'][c]:,.0f}" for c in ("none", "stock")]
        assert row[:2] == [of["task"], ", ".join(counts)]
        bytes_ = [of["peak_memory"][c] for c in ("stock", "none", "fgsm own", "bim own")]
        assert row[2:] == [f"{n / 2**20:,.0f} MB" for n in bytes_]


def test_speed_beside_others():
    """`docs/speed.md`: FGSM of ours, in thirty lines and by torchattacks, of stock's clean pass."""
    found = json.loads((ROOT / "results/speed/beside.json").read_text("utf-8"))
    text = (ROOT / "docs" / "speed.md").read_text("utf-8")
    times, differences, *_ = tables(text[text.index("## Compared with other ways") :])
    _, *rows, (_, *means) = times
    others, columns = ("plain", "torchattacks"), []
    for row, of in zip(rows, found["tasks"], strict=True):
        ratios = [of["times_stock"][name] for name in ("fgsm own", *others)]
        ratios += [of["ours_to"][name] for name in others]
        ends = ["{:.2f} ({:.2f}–{:.2f})".format(*values) for values in ratios]
        assert row == [of["task"], *ends]
        columns.append([median for median, *_ in ratios])
    assert means == [f"{mean(column):.2f}" for column in zip(*columns, strict=True)]
    for row, of in zip(differences[1:], found["tasks"], strict=True):
        assert row == [of["task"], *(f"{of['difference'][name]:.2g}" for name in others)]


def test_speed_on_random_weights():
    """`docs/speed.md`: time, tokens and memory against stock, and where the time goes."""
    found = json.loads((ROOT / "results/speed/cpu-110m.json").read_text("utf-8"))
    text = (ROOT / "docs" / "speed.md").read_text("utf-8")
    _, *rows, (_, faster, *means) = next(tables(text[text.index("## With its memory") :]))
    for row, of in zip(rows, found["tasks"], strict=True):
        memory = [f"{of['peak_memory'][c] / 2**20:.0f} MB" for c in ("none", "stock")]
        times, tokens = of["times_stock"], of["tokens"]
        assert row == [
            of["task"],
            f"{1 / times['none']:.2f}",
            f"{tokens['none'] / tokens['stock']:.2f}",
            ", ".join(memory),
            f"{of['difference']['log_likelihood']:.1e}",
            *(f"{times[c]:.2f}" for c in ("fgsm shared", "fgsm own")),
            f"{times['none+random+fgsm+bim shared']:.1f}",
        ]
    known = found["geometric_mean_times_stock"]
    assert faster == f"{1 / known['none']:.2f}" and means[-3:] == [
        f"{known['fgsm shared']:.2f}",
        f"{known['fgsm own']:.2f}",
        f"{known['none+random+fgsm+bim shared']:.1f}",
    ]


# As the page says it -> the column.
OF_THE_TOY = {
    "loss, training": "loss",
    "accuracy, clean": "clean",
    "accuracy under FGSM": "robust",
    "accuracy after a plain step": "stepped",
    **{
        f"{what}, {packet}": f"{name}_{packet}"
        for packet in PACKETS
        for what, name in (("Δx", "dx"), ("Δp", "dp"), ("Δx · Δp", "product"), ("bound", "bound"))
    },
}


def with_interval(values):
    """A mean over seeds with its interval by Student's t."""
    of = inference.mean_of([(values, range(len(values)))])
    return f"{of.value:.3g} ({of.low:.3g} to {of.high:.3g})".replace("-", "−")


def test_uncertainty():
    """Fig. 4: both packets before and after training, and what changes."""
    text = words("docs/paper/fig4.md")
    _, *rows = table_of("docs/paper/fig4.md", "mean of five seeds (95 % interval)")
    curves = pd.read_csv(ROOT / "results/experiments/fig4/curves.csv").set_index(["epoch", "seed"])
    assert [row[0] for row in rows] == list(OF_THE_TOY)
    for name, *cells, told in rows:
        first, last = (curves.loc[epoch, OF_THE_TOY[name]] for epoch in (0, 500))
        assert cells == [with_interval(of.to_numpy()) for of in (first, last, last - first)], name
        change = inference.mean_of([((last - first).to_numpy(), range(5))])
        found = "rises" if change.low > 0 else "falls" if change.high < 0 else "cannot be told"
        assert told == found, name
    for packet, above in (("fixed", 0), ("predicted", 5)):
        assert (curves.loc[500, f"product_{packet}"] > 0.5).sum() == above
        assert (curves[f"product_{packet}"] >= curves[f"bound_{packet}"]).all()
    lowest = curves["product_predicted"].groupby("epoch").min()
    assert lowest[lowest <= 0.5].index.max() == 38 and "seeds from epoch 39 on |" in text


def test_the_plain_step_of_the_toy():
    """Fig. 4: its accuracy falls between two epochs, and then rises."""
    page = "docs/paper/fig4.md"
    curves = pd.read_csv(ROOT / "results/experiments/fig4/curves.csv")
    means = curves.groupby("epoch")[["clean", "robust", "stepped"]].mean()
    top = means["stepped"].loc[:50].idxmax()
    low = means["stepped"].loc[top:].idxmin()
    epochs = [top, low, 500]
    assert f"it falls from epoch {top} to epoch {low}, then rises again" in words(page)
    heading, *rows = table_of(page, "mean of five seeds", "epoch 14")
    assert heading[1:] == [f"epoch {epoch}" for epoch in epochs]
    for (_, *cells), name in zip(rows, ("stepped", "clean"), strict=True):
        assert cells == [f"{means.loc[epoch, name]:.3f}" for epoch in epochs]
    values = curves.set_index(["epoch", "seed"])["stepped"]
    for (first, last), told in (((top, low), "falls"), ((low, 500), "rises")):
        change = inference.mean_of([((values[last] - values[first]).to_numpy(), range(5))])
        assert told == ("falls" if change.high < 0 else "rises" if change.low > 0 else None)
    assert (means["robust"].cummax() - means["robust"]).max() < 0.005  # FGSM's does not fall
    _, *rows = table_of(page, "slope k")
    for slope, shown in rows:
        way = brentq(lambda t, k=int(slope): t - 0.3 * k * expit(-k * t), 0, 10)
        assert f"{way:.2f}" == shown


def test_words():
    """Fig. 6: cosines times the root of the size, the last word."""
    page = "docs/paper/fig6.md"
    curves = pd.read_csv(ROOT / "results/experiments/fig6/curves.csv")
    last = curves[(curves["epoch"] == 1000) & (curves["split"] == "test")].set_index("size")
    heading, *rows = table_of(page, "cosine times √size")
    assert heading[1:] == [str(size) for size in last.index]
    for kind, (name, *cells) in zip(("right", "wrong"), rows, strict=True):
        scaled = last[f"cosine_{kind}_mean"] * last.index.to_numpy() ** 0.5
        assert name == f"{kind} words"
        assert cells == [f"{value:+.3f}".replace("-", "−") for value in scaled]
        for end in ("min", "max"):  # the same within the seeds
            ends = (last[f"cosine_{kind}_{end}"] * last.index.to_numpy() ** 0.5).tolist()
            beyond = [of > max(scaled) if end == "max" else of < min(scaled) for of in ends]
            assert all(beyond), (kind, end)
    of_seeds = last["accuracy_max"] - last["accuracy_min"]
    assert last["accuracy_mean"].max() - last["accuracy_mean"].min() < of_seeds.min()
    unlearnt = curves[(curves["split"] == "train") & (curves["accuracy_min"] < 1)]
    _, _, (_, *epochs) = table_of(page, "size", "8")
    assert unlearnt.groupby("size")["epoch"].max().tolist() == list(map(int, epochs))


def test_which_words_have_the_larger_cosine():
    """Fig. 6: in size that of right words; the sign tells them apart."""
    text = words("docs/paper/fig6.md")
    networks = {}
    for folder in ("experiments/fig6", "experiments/fig6-controls"):
        table = pd.read_csv(ROOT / "results" / folder / "networks.csv")
        new = table[table["split"] == "test"]
        assert (new["cosine_right"] < 0).all() and (new["cosine_wrong"] > 0).all()
        further = new["cosine_right"].abs() > new["cosine_wrong"].abs()
        networks[folder] = int(further.sum()), len(new)
    assert networks == {"experiments/fig6": (30, 30), "experiments/fig6-controls": (31, 120)}
    assert (
        "further from 0 in all 30 networks" in text
        and "words are further from 0 in 31 of 120" in text
    )
    curves = pd.read_csv(ROOT / "results/experiments/fig6/curves.csv")
    new = curves[curves["split"] == "test"]
    assert (new["cosine_right_mean"].abs() > new["cosine_wrong_mean"].abs()).all()


def test_cosines_of_networks_that_differ_in_accuracy():
    """Fig. 6: the rank correlations, and how far apart the networks are."""
    page = "docs/paper/fig6.md"
    networks = pd.read_csv(ROOT / "results/experiments/fig6-controls/networks.csv")
    found = fig6.trends(networks)
    _, *rows = table_of(page, "cosine · √size of")
    assert [row[0] for row in rows] == ["right words", "wrong words"]
    for (_, *cells), of in zip(rows, found.values(), strict=True):
        value, low, high = (f"{of[k]:+.2f}" for k in ("correlation", "low", "high"))
        p = "< 0.001" if of["p"] < 0.001 else f"{of['p']:.3f}"
        shown = [str(of["kinds"]), f"{value} ({low} to {high})".replace("-", "−"), p]
        told = "rises" if of["low"] > 0 else "falls" if of["high"] < 0 else "cannot be told"
        assert cells == [*shown, told]
    new = networks[networks["split"] == "test"]
    means = new.groupby(list(fig6.Kind._fields))["accuracy"].mean()
    assert f"accuracies on new words run from {means.min():.3f} to {means.max():.3f};" in words(
        page
    )


def test_curves_agree_with_attacks_of_one_amplitude():
    """`docs/critical.md`: within 0.1 %, and FMN within two points."""
    for folder in ("critical/demo", "critical/smollm2-135m"):
        samples = pd.read_parquet(ROOT / "results" / folder / "samples.parquet")
        beside = critical.against_fixed(samples)
        beside = beside[beside["attack"] == "apgd"]
        difference = (beside["curve"] - beside["acc"]).abs()
        searched = beside["condition"].str.startswith("critical@")
        assert searched.sum() == 5 and difference[searched].max() <= 0.001
        assert difference[~searched].max() <= 0.0201


def test_what_foretells():
    """`docs/critical.md`: which intervals exclude chance, and which differences are above 0."""
    text = words("docs/critical.md")
    excluded, above = {}, {}
    for folder in ("critical/demo", "critical/smollm2-135m", "critical/smollm2-135m-fmn"):
        made = (ROOT / "results" / folder / "critical.md").read_text("utf-8")
        (rows,) = (of for of in tables(made) if "cosine" in of[0])
        rows = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        chance = [0.5 if row["measure"] == "auroc" else 0 for row in rows]
        ends = [[float(x) for x in re.findall(r"-?\d\.\d+", row["cosine"])[1:]] for row in rows]
        below = [high < of for (_, high), of in zip(ends, chance, strict=True)]
        assert not any(low > of for (low, _), of in zip(ends, chance, strict=True))
        excluded[folder] = (sum(below), len(rows))
        lows = [float(re.findall(r"-?\d\.\d+", row["first_order - margin"])[1]) for row in rows]
        above[folder] = [row["condition"] for row, low in zip(rows, lows, strict=True) if low <= 0]
    assert excluded["critical/demo"] == (3, 7) and "three of seven do" in text
    small = [of for folder, of in excluded.items() if folder.startswith("critical/smollm2")]
    assert tuple(map(sum, zip(*small, strict=True))) == (0, 8) and "none of its eight" in text
    assert above == {
        "critical/demo": ["fgsm@0.12rms"],
        "critical/smollm2-135m": ["fgsm@0.002rms", "fgsm@0.004rms"],
        "critical/smollm2-135m-fmn": [],
    }


def test_the_estimate_and_what_it_estimates():
    """`docs/critical.md`: quartiles of first_order / critical_epsilon."""
    folders = ("critical/demo", "critical/smollm2-135m", "critical/smollm2-135m-fmn")
    _, *rows = table_of("docs/critical.md", "model", "condition", "first quartile")
    for folder, (_, condition, *quartiles) in zip(folders, rows, strict=True):
        samples = pd.read_parquet(ROOT / "results" / folder / "samples.parquet")
        found = samples[(samples["condition"] == condition) & (samples["critical_epsilon"] > 0)]
        ratio = found["first_order"] / found["critical_epsilon"]
        assert [f"{x:.2f}" for x in ratio.quantile([0.25, 0.5, 0.75])] == quartiles


@pytest.mark.parametrize(
    "folder", ["fig3/smollm2-135m", "fig3/smollm2-135m-bim", "fig3/smollm2-135m-bim-0.01"]
)
def test_tables_of_fig3(folder):
    main = runpy.run_path(str(ROOT / "docs/fig3.py"), run_name="fig3")["main"]
    done = CliRunner().invoke(main, [str(ROOT / "results" / folder)], catch_exceptions=False)
    printed = done.output
    page = list(tables((ROOT / "docs/paper/fig3.md").read_text("utf-8")))
    made = list(tables(printed))
    assert len(made) == 6
    for table in made:
        assert table in page


def test_the_share_of_products():
    record = json.loads((ROOT / "results/speed/shares-products.json").read_text("utf-8"))
    found = record["kinds"]["float32"]["conditions"]
    none, fgsm = (f"{100 * found[name]['of_products']:.0f} %" for name in ("none", "fgsm"))
    text = " ".join((ROOT / "docs/speed.md").read_text("utf-8").split())
    assert f"on one thread, they are {none} (none) and {fgsm} (fgsm) of the time" in text
    assert record["settings"]["threads"] == 1


def test_rows_of_the_decoder():
    page = (ROOT / "docs/speed.md").read_text("utf-8")
    record = json.loads((ROOT / "results/speed/decoder-rows.json").read_text("utf-8"))
    saved = []
    for name in ("none", "fgsm, shared"):
        off, auto = (record["ratios"][f"{name}, packing={packing}"] for packing in ("off", "auto"))
        assert f"| {name} | {off:.2f} | {auto:.2f} |" in page
        saved.append(f"{100 * (1 - auto / off):.0f} %")
    assert f"save {saved[0]} (none) and {saved[1]} (fgsm) of the time" in page
    assert record["settings"]["context"] == 80
