"""Short tables of `docs/paper` and `docs/critical.md`, and the list of claims, against results."""

import json
import re

import pandas as pd
import pytest
from shown import ROOT
from test_shown_numbers import record_of, table_of, tables, words

from llm_attack.stats import rank_correlation, wilson
from llm_attack.theory import fig6
from llm_attack.theory.settings import FEWEST

RESULTS = ROOT / "results"
PAPER = ROOT / "docs" / "paper"
FIG3, CRITICAL = "docs/paper/fig3.md", "docs/critical.md"
MASKED = "docs/paper/masked.md"
VERDICTS = {"holds": "seen", "does not hold": "not seen", "not shown": "cannot be told"}
OF_CLAIMS = re.compile(r"(not seen|seen|reversed|cannot be told)\b")


def minus(text):
    return text.replace("-", "−")


def mean_row(folder, condition, task="mean"):
    table = pd.read_csv(RESULTS / folder / "table.csv")
    of = table[(table["task"] == task) & (table["condition"] == condition)]
    (row,) = of.to_dict("records")
    return row


def folder_of(condition, questions):
    """Where Fig. 3 ran a condition on so many questions of each benchmark."""
    if questions == 500:
        return "fig3/smollm2-135m"
    return "fig3/smollm2-135m-bim" + ("" if condition.endswith("rms") else "-0.01")


def test_claims_at_a_glance():
    """Fig. 3: beside the whole lists of claims, which `test_tables_of_fig3` compares."""
    whole = {}
    for heading, *rows in tables((ROOT / FIG3).read_text("utf-8")):
        if heading == ["claim", "condition", "verdict", "figure"]:
            for claim, condition, *told in rows:
                whole.setdefault((claim, condition), told)  # of the run with most questions
    _, *rows = table_of(FIG3, "the paper", "attack")
    for claim, condition, measured, verdict in rows:
        told, figure = whole[claim, condition]
        assert measured == re.split("[,;]", figure)[0]
        assert verdict == VERDICTS[told]


def test_what_stays_above_guessing():
    by_score = [
        of for of in tables((ROOT / FIG3).read_text("utf-8")) if of[0][:2] == ["task", "score"]
    ]
    assert len(by_score) == 3
    _, *rows = table_of(FIG3, "condition", "questions of each")
    for condition, questions, mean, *shown in rows:
        heading, *cells = next(of for of in by_score if condition in of[0])
        column = heading.index(condition)
        for score, names in zip(("acc", "acc_norm"), shown, strict=True):
            above = [row[0] for row in cells if row[1] == score and "↑" in row[column]]
            assert names == (", ".join(above) or "–"), condition
        of = mean_row(folder_of(condition, int(questions)), condition)
        assert mean == f"{of['acc']:.3f}" and f"{of['baseline']:.2f}" == "0.33"


@pytest.mark.parametrize("amplitude", ["0.01", "0.7 RMS"])
def test_points_lost_in_ten_steps(amplitude):
    _, *rows = table_of(FIG3, f"condition, {amplitude}")
    for condition, mean, lost, snr in rows:
        folder = folder_of(condition, 150)
        of = mean_row(folder, condition)
        assert mean == "{acc:.3f} ({acc_low:.3f} to {acc_high:.3f})".format(**of)
        assert lost == minus("{drop:.1f} ({drop_low:.1f} to {drop_high:.1f})".format(**of))
        assert snr == f"{record_of(folder)['attacks'][condition]['snr_db']:.1f}"
    assert len(rows) == 4


def test_changes_of_log_likelihoods():
    _, *rows = table_of(FIG3, "attack", "questions of each")
    for attack, questions, *cells in rows:
        for epsilon, cell in zip(("0.01", "0.7rms"), cells, strict=True):
            condition = f"{attack}@{epsilon}"
            of = mean_row(folder_of(condition, int(questions)), condition)
            change = of["log_likelihood_change"]
            assert cell == minus(f"{change:+.{2 if abs(change) < 0.1 else 1}f}")


def test_a_known_answer():
    """Fig. 3: one step of FGSM with the right answer known."""
    folder = "fig3/smollm2-135m-choice"
    _, *rows = table_of(FIG3, "FGSM, right answer known")
    for amplitude, absolute, snr, mean in rows:
        condition = f"fgsm@{amplitude.replace(' RMS', 'rms')}"
        of, made = mean_row(folder, condition), record_of(folder)["attacks"][condition]
        assert float(absolute.split(",")[0]) == pytest.approx(of["epsilon"], rel=0.006)
        assert snr == f"{made['snr_db']:.0f}"
        assert mean.split(",")[0] == f"{of['acc']:.3f}"
        assert ("below guessing" in mean) <= (of["acc_high"] < of["baseline"])


def test_all_of_arc_in_bfloat16():
    _, *rows = table_of(FIG3, "arc_easy, bfloat16")
    for condition, cell in rows:
        of = mean_row("fig3/smollm2-135m-bf16", condition, "arc_easy")
        detectable = "" if of["p_mcnemar_holm"] <= 0.05 else ", not detectable"
        assert cell == minus(f"{of['drop']:.1f}") + detectable
        assert f"{of['n']:,.0f} questions" in words(FIG3)


def test_clean_accuracy_is_that_of_lm_eval():
    page = "docs/paper/checks.md"
    folder = RESULTS / "fig3" / "equality"
    found = json.loads((folder / "smollm2-135m.json").read_text("utf-8"))
    _, *rows = table_of(page, "pair")
    assert len(rows) == len(found["pairs"])
    for (_, *cells), of in zip(rows, found["pairs"].values(), strict=True):
        largest, mean, *counts = of.values()
        assert cells == [f"{largest:.1e}", f"{mean:.1e}", *map(str, counts)]
    assert f"{found['requests']:,} requests of {found['questions']:,} questions" in words(page)
    pairs = json.loads((folder / "smollm2-135m-float64.json").read_text("utf-8"))["pairs"]
    _, *rows = table_of(page, "float32, against stock in float64")
    for (_, *cells), pair in zip(rows, ("stock, batches of 16", "attack=none"), strict=True):
        both = [of for name, of in pairs.items() if pair in name and "float64" in name]
        assert cells == [f"{both[0][k]:.1e}" for k in ("largest", "mean")]
    samples = pd.read_parquet(RESULTS / "fig3/smollm2-135m/samples.parquet")
    _, *rows = table_of(page, "task", "metric", "card")
    for task, score, card, here in rows:
        of = samples[(samples["task"] == task) & (samples["condition"] == "none")][score]
        low, high = wilson(of.sum(), len(of))
        assert here == f"{of.mean():.3f} ({low:.3f}–{high:.3f})" and low < float(card) < high


def test_the_packet_of_the_toy():
    page = "docs/paper/fig4.md"
    curves = pd.read_csv(RESULTS / "experiments/fig4/curves.csv")
    means = curves.groupby("epoch").mean()
    heading, *rows = table_of(page, "predicted packet")
    epochs = [int(name.split()[1]) for name in heading[1:]]
    for (_, *cells), column in zip(rows, ("dx_predicted", "dp_predicted"), strict=True):
        assert cells == [f"{means.loc[epoch, column]:.3g}" for epoch in epochs]
    text = words(page)
    assert f"ends at {means['product_predicted'].iloc[-1]:.3f}" in text
    assert f"product ends at {means['product_fixed'].iloc[-1]:.2f}" in text
    width = means["dx_fixed"]
    lowest = width.idxmin()
    falls = f"falls to {width[lowest]:.2f} at epoch {lowest} and then rises to"
    assert f"{falls} {width.iloc[-1]:.2f}." in text
    first, *_, last = 100 * (means["clean"] - means["robust"])
    assert f"gap between the two grows from {first:.0f} points to {last:.0f}." in text


def signed(value):
    return minus(f"{value:+.3f}")


def test_toys_with_other_optimisers_and_domains():
    page = "docs/paper/fig4.md"
    table = pd.read_csv(RESULTS / "experiments/toys/verdicts.csv")
    stepped, robust = (table[table["accuracy"] == of] for of in ("stepped", "robust"))
    _, *rows = table_of(page, "optimiser", "batch")
    assert len(rows) == len(stepped) == 12
    for row, of in zip(rows, stepped.to_dict("records"), strict=True):
        assert row == [
            *(of["optimiser"], str(of["batch_size"]), f"±{of['domain']:g}"),
            *(f"{of[epoch]:.3f}" for epoch in ("epoch_10", "epoch_50", "last")),
            f"{signed(of['change'])} ({signed(of['low'])} to {signed(of['high'])})",
            of["verdict"],
        ]
    verdicts = stepped.groupby(["batch_size", "verdict"]).size()
    assert verdicts.to_dict() == {
        (100, "rises"): 6,
        (1000, "cannot be told"): 2,
        (1000, "falls"): 4,
    }
    assert robust["verdict"].value_counts().to_dict() == {"cannot be told": 8, "rises": 4}
    above = stepped[stepped["product_fixed"] > 0.5]
    assert len(above) == 4 and set(above["batch_size"]) == {100}
    assert above["optimiser"].value_counts().to_dict() == {"adam": 3, "sgd": 1}
    (only,) = above[above["optimiser"] == "sgd"]["domain"]
    assert only == stepped["domain"].max()
    assert "It does so in four of the twelve trainings" in words(page)
    assert "It rises in four and does not change detectably in eight." in words(page)


def test_declines_at_features_and_pixels():
    page = "docs/paper/fig5.md"
    table = pd.read_csv(RESULTS / "experiments/declines/declines.csv")
    _, *rows = table_of(page, "data", "attacked at")

    def points(of, *names):
        value, low, high = (minus(f"{100 * of[name]:+.1f}") for name in names)
        return f"{value} ({low} to {high})"

    assert len(rows) == len(table) and set(table["condition"]) == {"fgsm"}
    for row, of in zip(rows, table.to_dict("records"), strict=True):
        pixels = of["point"] == "pixels"
        more = "–" if pixels else points(of, "more", "more_low", "more_high")
        verdict = "–" if pixels else of["verdict"]
        fall = points(of, "decline", "low", "high")
        assert row == [of["dataset"], of["point"], f"{of['epsilon']:.3g}", fall, more, verdict]
    assert set(table["verdict"].dropna()) == {"less", "cannot be told"}
    clean = {name: of["clean"] for name, of in record_of("experiments/declines")["results"].items()}
    ends = f"ends at {clean['mnist-cnn']:.3f} (MNIST) and {clean['cifar10-cnn']:.3f} (CIFAR-10)"
    assert ends in words(page)


def test_channels_of_a_language_model():
    page, where = "docs/paper/fig5.md", "where/smollm2-135m-layers"
    made = pd.read_csv(RESULTS / "experiments/channels/channels.csv").set_index("hookpoint")
    table = pd.read_csv(RESULTS / where / "table.csv")
    fgsm = table["condition"].str.startswith("fgsm@0.02rms")
    left = table[(table["task"] == "mean") & fgsm].set_index("hookpoint")["acc"]
    _, *rows = table_of(page, "hookpoint", "RMS / median")
    for name, *cells in rows:
        of = made.loc[name]
        assert cells == [
            *(f"{of['ratio']:.1f}", f"{100 * of['top']:.0f} %", f"{2 * of['ratio']:.1f} %"),
            f"{left[name]:.3f}",
        ]
    blocks = made.index[1:]
    assert made["ratio"].idxmax() == left.idxmin() == "model.layers.2"
    value, low, high, _ = rank_correlation(made["ratio"][blocks], left[blocks])
    shown = minus(f"is {value:.2f} ({low:.2f} to {high:.2f})")
    assert f"what FGSM leaves {shown}." in words(page) and len(blocks) == 30
    # the stored scale of each block, of other questions, is within a sixth
    attacks = record_of(where)["attacks"].values()
    rms = {of["hookpoint"]: of["hookpoint_rms"] for of in attacks if of.get("hookpoint_rms")}
    assert all(abs(rms[name] / made["rms"][name] - 1) < 1 / 6 for name in blocks)


def test_how_the_gradient_misleads():
    """Of the stored rows of Fig. 2; the corner of the ball is as far as every pixel allows."""
    table = pd.read_csv(RESULTS / "experiments/fig2-cifar10-resnet18/table.csv")
    table = table.set_index(["epoch", "condition"])
    _, *rows = table_of(MASKED, "epoch", "clean", "FGSM")
    for epoch, *cells in rows:
        of = table.loc[int(epoch)]
        accuracies = [f"{of.loc[name, 'accuracy']:.3f}" for name in ("none", "fgsm", "bim")]
        assert of.loc["fgsm", "zero_gradient"] == 0
        assert cells == [*accuracies, "0", f"{of.loc['bim', 'l2']:.2f}"]
    assert f"whose length is {3072**0.5 * 8 / 255:.2f}" in words(MASKED)


def of_factors(name):
    path = RESULTS / "experiments/factors-digits" / f"{name}.csv"
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def test_networks_of_the_factorial_experiment():
    table = of_factors("table")
    last = table[table["epoch"] == table["epoch"].max()]
    _, *rows = table_of(MASKED, "smoothing", "augmentation")
    means = last.groupby(["smoothing", "augmentation", "schedule", "condition"])
    accuracy, cosine = means["accuracy"].mean(), means["cosine"].mean()
    assert len(rows) == 8 and set(last["seed"]) == {0, 1}
    for smoothing, *known, clean, fgsm, pgd, apgdt, gap, turned in rows:
        at = (float(smoothing), *known)
        of = accuracy.loc[at]
        assert clean == f"{of['all']:.3f}"
        shown = [f"{of[name]:.2f}" for name in ("fgsm", "pgd", "apgdt")]
        assert [fgsm, pgd, apgdt] == shown
        assert float(gap) == pytest.approx(of["fgsm"] - of["apgdt"], abs=5.1e-3)
        assert turned == f"{cosine[(*at, 'none')]:.2f}"
    assert (last["zero"] < 0.005).all() and (last["vanished"] == 0).all()


def test_effects_of_the_factorial_experiment():
    found = of_factors("effects").set_index(["factor", "of"])
    columns = ("clean", "fgsm", "apgdt", "gap", "cosine")
    _, *rows = table_of(MASKED, "choice", "pairs")
    factors = ("smoothing", "augmentation", "schedule", "epoch")
    for factor, (_, pairs, *cells) in zip(factors, rows, strict=True):
        assert int(pairs) == found.loc[(factor, "fgsm"), "pairs"]
        for name, cell in zip(columns, cells, strict=True):
            of = found.loc[(factor, name)]
            value, low, high = (f"{of[end]:+.2f}" for end in ("difference", "low", "high"))
            assert cell == minus(f"{value} ({low} to {high})")


def test_the_last_epochs_with_wrong_words():
    curves = pd.read_csv(RESULTS / "experiments/fig6/curves.csv")
    enough = curves[(curves["split"] == "train") & (curves["wrong_mean"] >= FEWEST)]
    _, (name, *epochs), _ = table_of("docs/paper/fig6.md", "size", "8")
    assert enough.groupby("size")["epoch"].max().tolist() == list(map(int, epochs))
    assert f"with {FEWEST} wrong training words or more" in name
    # of 1,920 words; the means of accuracies have five digits
    train = curves[curves["split"] == "train"]
    assert ((1 - train["accuracy_mean"]) * 1920 - train["wrong_mean"]).abs().max() < 0.15


def test_the_packet_along_the_gradient():
    """Of the images: the smallest and largest means over blocks, right and wrong images."""
    lines = pd.read_csv(RESULTS / "experiments/relation/lines.csv")
    lines = lines[lines["direction"] == "gradient"]
    lines = lines.assign(dx=lines["dx"] / lines["reach"], dp=lines["dp"] * lines["reach"])
    means = lines.groupby(["epoch", "block", "right"])[["dx", "dp"]].mean()
    (_, *widths), (_, *slopes) = table_of("docs/paper/relation.md", "along the gradient")[1:]
    before, after = means.loc[0], means.loc[means.index.levels[0].max()]
    ends = [f"{of['dx'].min():.2f} to {of['dx'].max():.2f}" for of in (before, after)]
    assert widths == ends
    assert slopes[0] == f"{before['dp'].max():.2f} at most"
    assert slopes[1] == f"{after['dp'].min():.2f} to {after['dp'].max():.2f}"


def test_words_after_training():
    page = "docs/paper/fig6.md"
    curves = pd.read_csv(RESULTS / "experiments/fig6/curves.csv")
    last = curves[curves["epoch"] == 1000].set_index(["size", "split"])
    _, *rows = table_of(page, "size", "accuracy, test")
    for size, *cells, train in rows:
        of = last.loc[int(size), "test"]
        for cell, name in zip(cells, ("accuracy", "cosine_right", "cosine_wrong"), strict=True):
            shown = [float(x) for x in re.findall(r"-?\d\.\d+", cell.replace("−", "-"))]
            ends = [of[f"{name}_{end}"] for end in ("mean", "min", "max")]
            assert shown == pytest.approx(ends, abs=5.1e-4)
        assert train == minus(f"{last.loc[(int(size), 'train'), 'cosine_right_mean']:.3f}")
    test = curves[(curves["epoch"] == 1000) & (curves["split"] == "test")]
    ends = f"{test['accuracy_min'].min():.2f} to {test['accuracy_max'].max():.2f}"
    assert f"Accuracy on new words is {ends} over the 30 networks" in words(page)


def test_words_by_their_characters_alone():
    page = "docs/paper/fig6.md"
    networks = pd.read_csv(RESULTS / "experiments/fig6-controls/networks.csv")
    found = fig6.trends(networks[networks["ngram"] == 1])
    _, *rows = table_of(page, "characters only")
    for (_, cell), of in zip(rows, found.values(), strict=True):
        value, low, high = (f"{of[k]:+.2f}" for k in ("correlation", "low", "high"))
        assert cell == minus(f"{value} ({low} to {high})")
    new = networks[networks["split"] == "test"]
    means = new.groupby(list(fig6.Kind._fields))["accuracy"].mean()
    assert (means - 1 / 3).abs().le(0.05).sum() == 18 and len(means) == 24
    assert "Eighteen of the 24 kinds are within 5 points" in words(page)


def test_medians_of_critical_epsilons():
    folders = ("critical/demo", "critical/smollm2-135m", "critical/smollm2-135m-fmn")
    _, *rows = table_of(CRITICAL, "model", "condition", "median critical epsilon")
    for folder, (_, condition, median, share) in zip(folders, rows, strict=True):
        (made, *_) = tables((RESULTS / folder / "critical.md").read_text("utf-8"))
        (of,) = (row for row in made if row[:2] == ["mean", condition])
        assert median == of[made[0].index("median")]
        rms = record_of(folder)["attacks"]["none"]["embedding_rms"]
        assert share == f"{100 * float(median.split()[0]) / rms:.0f} %"


def test_what_the_estimate_gains():
    """The smallest and largest difference to the margin, over the rows of the whole tables."""
    made = [
        [dict(zip(heading, row, strict=True)) for row in rows]
        for heading, *rows in tables((ROOT / CRITICAL).read_text("utf-8"))
        if "first_order - margin" in heading
    ]
    _, *rows = table_of(CRITICAL, "`first_order` against `margin`")
    for (_, *cells), of in zip(rows, (made[0], made[1] + made[2]), strict=True):
        for cell, measure in zip(cells, ("spearman", "auroc"), strict=True):
            gains = [
                float(row["first_order - margin"].split()[0])
                for row in of
                if row["measure"] == measure
            ]
            assert cell == f"{min(gains):.2f} to {max(gains):.2f}"


def numbers(text):
    return re.findall(r"\d+(?:\.\d+)?", text)


def test_the_list_of_claims():
    """Its numbers stand on the page that it links to, and so does each figure of the section."""
    _, *rows = table_of("docs/paper/index.md", "claim of the paper")
    linked = set()
    for claim, measured, verdict, link, command in rows:
        ((name, _),) = re.findall(r"\]\(([\w.]+)(#[\w-]+)?\)", link)
        page = numbers((PAPER / name).read_text("utf-8"))
        assert set(numbers(measured)) <= set(page), (claim, measured)
        assert verdict in {*VERDICTS.values(), "reversed"}
        text = (PAPER / name).read_text("utf-8")
        assert f"llm-attack {command.strip('`')} -" in text
        linked.add(name)
    others = {"index.md", "checks.md", "masked.md"}
    assert linked == {path.name for path in PAPER.glob("*.md")} - others


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.md")), ids=lambda path: path.stem)
def test_verdicts_are_of_four_kinds(path):
    for heading, *rows in tables(path.read_text("utf-8")):
        if "verdict" in heading and heading[0] in ("the paper", "claim of the paper"):
            for row in rows:
                assert OF_CLAIMS.match(row[heading.index("verdict")]), row
