"""The results in `docs/paper`, mainly those of the images, and their commands."""

import json
import re
import shlex
from fractions import Fraction

import pandas as pd
import pytest
import torch
from shown import ROOT
from test_shown_numbers import table_of, tables

from llm_attack.theory import relation
from llm_attack.vision import fig2
from llm_attack.vision.networks import build
from llm_attack.vision.settings import shown as called

RESULTS = ROOT / "results" / "experiments"
PAGE = "\n".join(path.read_text("utf-8") for path in sorted(ROOT.glob("docs/paper/*.md")))
TEXT = " ".join(PAGE.split())
FIG2, FIG5 = "docs/paper/fig2.md", "docs/paper/fig5.md"


def folders(pattern):
    found = (path for path in RESULTS.iterdir() if re.match(pattern, path.name))
    return sorted(path.name for path in found if (path / "run.json").exists())


FOLDERS = folders(r"fig[125](-|$)")
THEORY = folders(r"(fig[46]|relation|toys|factors|declines)(-|$)")
FIG1 = folders(r"fig1(-|$)")
SEEDS, TRADEOFFS = folders("seeds-"), folders("tradeoff-")
USUAL = fig2.Settings().attacks


def options(command):
    """Figure and options of a command, however they are written; without what is the default."""
    _, _, figure, *words = shlex.split(command)
    found = {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        number = f"{float(Fraction(value)):g}" if re.fullmatch(r"\d+/\d+", value) else value
        found[{"-o": "output"}.get(name, name.removeprefix("--").replace("-", "_"))] = number
    defaults = {"preset": "quick", "output": f"out/{figure}"}
    return figure, {k: v for k, v in found.items() if defaults.get(k) != v}


def shown_rows(first_column):
    """The rows of all tables whose first two columns are those."""
    for heading, *rows in tables(PAGE):
        if heading[: len(first_column)] == first_column:
            yield from (dict(zip(heading, row, strict=True)) for row in rows)


def signed(*values):
    return [f"{value:+.2f}".replace("-", "−") for value in values]


def record_of(folder):
    return json.loads((RESULTS / folder / "run.json").read_text("utf-8"))


@pytest.mark.parametrize("folder", [*FOLDERS, *THEORY, *SEEDS, *TRADEOFFS])
def test_the_page_has_the_command_of_each_result(folder):
    record = record_of(folder)
    commands = re.findall(
        r"llm-attack reproduce (?:fig[12456]|relation|tradeoff|toys|factors|declines) -[^`\n#]*",
        PAGE,
    )
    assert options(record["command"]) in [options(command) for command in commands]


def attacked():
    """Folder and network of all results under the usual attacks, with or without the last."""
    for folder in FOLDERS:
        record = record_of(folder)
        usual = record["settings"]["attacks"].startswith(
            USUAL.removesuffix(",sparsefool_unbounded")
        )
        if folder != "fig1" and usual:
            for label in record["results"]:
                yield folder, label.split("-")[1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_record_names_the_networks_that_were_attacked(folder):
    """Also where they were loaded: their number of parameters is that of the name and the width."""
    record = record_of(folder)
    results, width = record["results"], record["settings"]["width"]
    names = record["settings"]["network"].split(",")
    labels = [f"{d}-{n}" for d in record["settings"]["dataset"].split(",") for n in names]
    assert list(results) == labels
    for label, of in results.items():
        dataset, name = label.split("-")
        channels, size = (1, 28) if dataset == "mnist" else (3, 32)
        moments = torch.zeros(channels), torch.ones(channels)
        network = build(name, *moments, size=size, classes=10, width=width)
        assert of["parameters"] == sum(p.numel() for p in network.parameters())


def test_accuracies_after_the_last_epoch():
    seen = set()
    for row in shown_rows(["results", "network", "training images"]):
        folder, network = row["results"].strip("`"), row["network"].split()[0]
        table = pd.read_csv(RESULTS / folder / "table.csv")
        table = table[table["network"] == network]
        last = table[table["epoch"] == table["epoch"].max()].set_index("condition")
        record = record_of(folder)
        results = record["results"][f"{table['dataset'].iloc[0]}-{network}"]
        settings = record["settings"]
        scaled = "" if settings["width"] == 1 else f" × {settings['width']:g}"
        assert row["network"] == f"{network}{scaled} ({results['parameters']:,})"
        assert row["training images"] == f"{results['train_images']:,}"
        assert int(row["epochs"]) == results["epochs"] == last["epoch"].iloc[0]
        columns = {"clean, all": "all", "clean": "none"}
        names = list(row)[4:]
        assert set(names) == {*columns, *USUAL.split(",")}
        for name in names:
            if row[name] == "–":
                assert name not in last.index
                continue
            accuracy = last.loc[columns.get(name, name), "accuracy"]
            assert float(row[name]) == pytest.approx(accuracy, abs=5.1e-4), (folder, name)
        seen.add((folder, network))
    assert seen == set(attacked())
    of_all = {
        (row["results"].strip("`"), row["network"].split()[0]): 100 * float(row["clean, all"])
        for row in shown_rows(["results", "network", "training images"])
    }
    cnn, resnet, googlenet = (
        of_all[folder, name]
        for folder, name in (
            ("fig2-mnist", "cnn"),
            ("fig2-mnist-quarter", "resnet18"),
            ("fig2-mnist-quarter", "googlenet"),
        )
    )
    assert f"{cnn:.1f} % with the CNN; {resnet:.1f} % with" in TEXT and resnet == googlenet
    names = {"cnn": "the CNN", "resnet18": "ResNet-18", "googlenet": "GoogLeNet"}
    shown = [f"{of_all[f'fig2-cifar10-{k}', k]:.1f} % with {v}" for k, v in names.items()]
    assert f"higher: {', '.join(shown)} |" in PAGE


def last_rows(folder, network):
    table = pd.read_csv(RESULTS / folder / "table.csv")
    table = table[table["network"] == network]
    return table[table["epoch"] == table["epoch"].max()].set_index("condition")


def claim(text):
    """What the page of Fig. 2 says of a claim of the paper."""
    ((_, measured, _),) = (row for row in table_of(FIG2, "the paper", "here") if row[0] == text)
    return measured


def test_points_lost():
    """Each cell; how many of them are in the paper's ranges; and which networks lose most."""
    six = USUAL.split(",")[:6]
    lost, fooled, parameters = {}, {}, {}
    for row in shown_rows(["points lost", "network"]):
        folder, network = row["points lost"].strip("`"), row["network"].split()[0]
        last = last_rows(folder, network)
        exact = 100 * (last.loc["none", "accuracy"] - last.loc[six, "accuracy"])
        assert [row[name] for name in six] == [f"{points:.1f}" for points in exact]
        dataset = last["dataset"].iloc[0]
        lost[dataset, network] = exact
        fooled[dataset, network] = last.loc[six, "fooled"]
        of = record_of(folder)["results"][f"{dataset}-{network}"]
        parameters[dataset, network] = of["parameters"]
    assert {folder for folder, _ in attacked() if folder.startswith("fig2")} == {
        row["points lost"].strip("`") for row in shown_rows(["points lost", "network"])
    }
    names = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
    counts = {}
    for dataset, (low, high) in {"mnist": (10, 15), "cifar10": (30, 50)}.items():
        cells = pd.concat(of for (there, _), of in lost.items() if there == dataset)
        inside = cells.between(low, high).sum()
        counts[dataset] = [(cells < low).sum(), inside, (cells > high).sum()]
        text = claim(f"robust accuracy {low}–{high} points lower on {names[dataset]}")
        number = {1: "one", 3: "three"}[inside]
        assert len(cells) == 18 and text.startswith(f"in {number} of 18 cells: ")
    assert counts == {"mnist": [5, 1, 12], "cifar10": [0, 3, 15]}
    assert "Five cells lose less, twelve lose more" in TEXT and "The other 15 lose more" in TEXT
    assert lost["mnist", "cnn"].between(10, 15)["fgsm"]
    assert lost["cifar10", "resnet18"].between(30, 50)[["ost", "fgsm"]].all()
    assert lost["cifar10", "googlenet"].between(30, 50)["ost"]

    of = {name: parameters["cifar10", name] for name in ("cnn", "googlenet", "resnet18")}
    assert sorted(of, key=of.get) == list(of)
    assert table_of(FIG2, "network, CIFAR-10", "parameters")[1:] == [
        [name, f"{n:,}", f"{lost['cifar10', name]['fgsm']:.0f}"] for name, n in of.items()
    ]
    shares = pd.DataFrame({name: fooled["cifar10", name] for name in of})
    assert (shares.idxmin(axis=1) == "resnet18").all()
    of = {name: parameters["mnist", name] for name in ("googlenet", "cnn", "resnet18")}
    assert sorted(of, key=of.get) == list(of)
    points = pd.DataFrame({name: lost["mnist", name] for name in of})
    assert (points.idxmax(axis=1) == "resnet18").all()
    assert (points.idxmin(axis=1) == "googlenet").sum() == 4 and "under four of six." in TEXT


def test_images_under_attack():
    """Fig. 1: accuracies of all test images, and what two of them are taken for."""
    _, _, *rows = table_of("docs/paper/fig1.md", "network", "test images")
    for (_, images, *cells), folder in zip(rows, ("fig1-paper", "fig1"), strict=True):
        of = record_of(folder)["results"]["cifar10-resnet18"]
        assert images == f"{of['test_images']:,}"
        assert cells == [f"{of['accuracy'][name]:.3f}" for name in ("none", "fgsm")]
    table = pd.read_csv(RESULTS / "fig1/table.csv")
    first, second = (table[table["image"] == i].set_index("condition") for i in (0, 1))
    _, *rows = table_of("docs/paper/fig1.md", "attack", "horse: prediction")
    assert [row[0] for row in rows] == list(first.index)
    for attack, *cells in rows:
        both = (first.loc[attack], second.loc[attack])
        assert cells == [
            x for of in both for x in (of["prediction"], f"{of['confidence']:.3f}", str(of["l0"]))
        ]


def test_the_paper_recipe():
    """Fig. 1 says when the training ended, the intervals, and what is left under more steps."""
    text = " ".join((ROOT / "docs/paper/fig1.md").read_text("utf-8").split())
    record, training = record_of("fig1-paper"), record_of("fig1-paper-training")
    assert training["settings"]["recipe"] == "paper" and training["settings"]["seed"] == 0
    (of,) = record["results"].values()
    assert of["epochs"] == next(iter(training["results"].values()))["epochs"]
    assert f"At half width, with seed 0, that was after epoch {of['epochs']}." in text
    table = pd.read_csv(RESULTS / "fig1-paper/table.csv").set_index("condition")
    assert table.loc["fgsm", "images"] == of["test_images"] == 10_000
    ends = ["accuracy", "low", "high"]
    clean, fgsm = ([f"{v:.3f}" for v in table.loc[c, ends]] for c in ("none", "fgsm"))
    assert "is then {} (95 % interval {} to {}). FGSM leaves".format(*clean) in text
    assert "FGSM leaves {} ({} to {}) of all 10,000 test images".format(*fgsm) in text
    more = record_of("fig1")["results"]["cifar10-resnet18"]["accuracy"]["fgsm"]
    assert f"FGSM leaves {100 * (more - of['accuracy']['fgsm']):.0f} points less" in text
    steps = pd.read_csv(RESULTS / "fig1-paper-steps/table.csv").set_index("condition")
    assert (steps.loc[["bim", "pgd"], ["accuracy", "images"]] == [0, 500]).all(axis=None)
    assert "BIM and PGD leave none of the first 500." in text


def test_the_epsilon_of_features_follows_them():
    """Fig. 5: 0.1 of their RMS, which grows; of the ResNet-18 there is one epoch."""
    _, cnn, resnet = table_of(FIG5, "network", "attacked at")
    table = pd.read_csv(RESULTS / "fig5-cifar10-cnn/table.csv")
    assert (table["epsilon"] / table["rms"]).round(4).unique().tolist() == [0.1]
    ends = table["epsilon"].iloc[[0, -1]].tolist()
    assert cnn[-1] == "{:.4f} after the first, {:.4f} after the last".format(*ends)
    assert f"Epsilon also grew by {ends[1] / ends[0] - 1:.0%}".replace("%", " %") in TEXT
    table = pd.read_csv(RESULTS / "fig5-cifar10-resnet18/table.csv")
    assert table["epoch"].unique().tolist() == [20]
    assert resnet[-1] == f"{table['epsilon'].iloc[0]:.4f}"


def test_more_steps():
    """Robust accuracies under other attacks than the usual six, with their intervals."""
    rows = list(shown_rows(["20 steps", "images"]))
    seen = set()
    for row in rows:
        folder = row.pop("20 steps").strip("`")
        table = pd.read_csv(RESULTS / folder / "table.csv").set_index("condition")
        assert record_of(folder)["settings"]["steps"] == 20
        assert int(row.pop("images")) == table.loc["none", "images"]
        for name, shown in row.items():
            of = table.loc[{"clean": "none"}.get(name, name), ["accuracy", "low", "high"]]
            assert shown == "{:.3f} ({:.3f} to {:.3f})".format(*of)
        seen.add(folder)
    assert seen == {*FOLDERS} - {folder for folder, _ in attacked()} - {*FIG1}


def test_beside_autoattack():
    rows = list(shown_rows(["results", "epsilon", "images"]))
    assert rows
    for row in rows:
        record = record_of(row["results"].strip("`"))
        n, left = record["images"], record["left"]
        assert int(row["images"]) == n
        assert float(Fraction(row["epsilon"])) == pytest.approx(record["epsilon"])
        for name in ("clean", "apgd", "apgdt"):
            shown = row.get(name) or row.get(f"`{name}`") or row[f"and `{name}`"]
            assert float(shown) == left[name] / n
        for column, name in (("and `blocks`", "llm_attack"), ("AutoAttack", "autoattack")):
            found = record["results"][name]
            shown = [float(x) for x in re.findall(r"\d\.\d+", row[column])]
            ends = [found[k] for k in ("accuracy", "low", "high")]
            assert shown == pytest.approx(ends, abs=5.1e-4)
        assert f" {left['blocks']} (" in TEXT  # images that stay right, as the page counts them
        for column, name in (("ours", "llm_attack"), ("AutoAttack", "autoattack")):
            assert int(row[f"seconds, {column}"]) == round(record["seconds"][name])


def test_sparsefool_beside_others():
    rows = list(shown_rows(["SparseFool", "coordinates", "of"]))
    names = {"`llm_attack`": "llm_attack", "the authors": "authors"}
    seen = set()
    for row in rows:
        folder = row["SparseFool"].strip("`")
        record = record_of(folder)
        name = names.get(row["of"], "torchattacks")
        medians, found = record["seconds"]["medians"], record["found"][name]
        assert int(row["coordinates"].replace(",", "")) == record["coordinates"]
        assert row["ms an image"] == f"{1e3 * medians[name]:.1f}"
        ratio = medians[name] / medians["llm_attack"]
        shown = "–" if ratio == 1 else f"{ratio:.{1 if ratio < 10 else 0}f} ×"
        assert row["ours is faster"] == shown
        assert row["fooled"] == f"{found['fooled']:.2f}"
        assert int(row["median L0"]) == found["median_l0"]
        seen.add((folder, name))
    assert len(seen) == len(rows) == 3 * len(folders("sparsefool"))


def test_the_relation_on_lines():
    table = pd.read_csv(RESULTS / "relation/lines.csv")
    reach = table["reach"]
    found = relation.means(table.assign(dx=table["dx"] / reach, dp=table["dp"] * reach))
    last = found[found["epoch"] == found["epoch"].max()]
    keys, rows = ["block", "direction"], list(shown_rows(["block", "direction"]))
    assert len(rows) == len(last) / 2
    apart = 0
    for row in rows:
        place = (last["block"] == row["block"]) & (last["direction"] == row["direction"])
        kinds = last[place].set_index("right")
        for kind in (True, False):
            for name, shown in (("dx", "Δx"), ("dp", "Δp"), ("product", "Δx · Δp")):
                values = [kinds.loc[kind, f"{name}{end}"] for end in ("", "_low", "_high")]
                text = row[f"{shown}, {'right' if kind else 'wrong'}"]
                assert [f"{v:.3g}" for v in values] == re.findall(r"[\d.]+", text), row
        assert row["bound"] == f"{kinds.loc[True, 'bound']:.3g}"
        of = table[(table["epoch"] == 4) & (table[keys] == [row[key] for key in keys]).all(axis=1)]
        below = (of["product"] < 0.5).mean()
        assert row["below ½"] == f"{below:.0%}"
        assert row["direction"] != "gradient" or 0.9 <= below <= 1
        assert kinds.loc[True, "dp"] > kinds.loc[False, "dp"]
        apart += kinds.loc[True, "dp_low"] > kinds.loc[False, "dp_high"]
    assert apart == 7 and "In seven of twelve" in TEXT
    assert len(table) == 2000 and (table["product"] - table["bound"]).min() > -1e-6


def test_what_falls_and_what_rises():
    """Between the first and the last epoch: where the two intervals do not meet."""
    rows = list(shown_rows(["results", "network", "condition"]))
    for row in rows:
        table = pd.read_csv(RESULTS / row["results"].strip("`") / "table.csv")
        table = table[table["network"] == row["network"]]
        of = table[table["condition"] == {"clean": "none"}.get(row["condition"], row["condition"])]
        first, last = of.iloc[0], of.iloc[-1]
        for name, there in (("first", first), ("last", last)):
            shown = [float(x) for x in re.findall(r"\d\.\d+", row[name])]
            assert shown == pytest.approx(list(there[["accuracy", "low", "high"]]), abs=5.1e-4)
        falls, rises = last["high"] < first["low"], last["low"] > first["high"]
        assert row["verdict"] == ("falls" if falls else "rises" if rises else "cannot be told")
    shown = [(row["results"].strip("`"), row["network"], row["condition"]) for row in rows]
    trained = [pair for pair in attacked() if record_of(pair[0])["settings"]["load"] is None]
    conditions = ("clean", *USUAL.split(","))
    assert sorted(shown) == sorted((*pair, name) for pair in trained for name in conditions)


def test_what_falls_and_what_rises_over_three_seeds():
    """The trends over the epochs: `trends.csv`, whose verdicts are those of the intervals."""
    rows = list(shown_rows(["three seeds", "condition"]))
    for row in rows:
        table = pd.read_csv(RESULTS / row["three seeds"].strip("`") / "trends.csv")
        (of,) = table[
            table["condition"] == {"clean": "none"}.get(row["condition"], row["condition"])
        ].to_dict("records")
        assert of["seeds"] == 3
        for name in ("first", "last"):
            assert row[name] == f"{of[name]:.{2 if row['condition'] == 'dp' else 3}f}"
        value, low, high = signed(of["trend"], of["low"], of["high"])
        assert row["trend"] == f"{value} ({low} to {high})"
        assert row["verdict"] == of["verdict"]
        assert (of["high"] < 0, of["low"] > 0) == tuple(
            of["verdict"] == name for name in ("falls", "rises")
        )
    assert len(rows) == (2 + len(USUAL.split(","))) * len(SEEDS) and {
        row["three seeds"].strip("`") for row in rows
    } == {*SEEDS}


SIX = USUAL.split(",")[:6]
VERDICTS = ("falls", "rises", "cannot be told")


def listed(verdicts, verdict):
    """The attacks with that verdict, as the page writes them."""
    return ", ".join(called(name) for name in SIX if verdicts[name] == verdict) or "–"


def test_what_falls_at_a_glance():
    """Fig. 2: under which attacks accuracy falls and rises, over seeds and in one training."""
    _, *rows = table_of(FIG2, "data", "falls")
    for data, *cells in rows:
        table = pd.read_csv(RESULTS / f"seeds-{data.lower().replace('-', '')}" / "trends.csv")
        of = table.set_index("condition")["verdict"]
        assert of["none"] == "rises"
        assert cells == [listed(of, verdict) for verdict in VERDICTS]
    assert len(rows) == len(SEEDS)
    single = {}
    for row in shown_rows(["results", "network", "condition"]):
        of = single.setdefault((row["results"].strip("`"), row["network"]), {})
        of[row["condition"]] = row["verdict"]
    folders = {
        "cnn, CIFAR-10": ("fig2-cifar10-cnn", "cnn"),
        "resnet18, CIFAR-10": ("fig2-cifar10-resnet18", "resnet18"),
        "resnet18 × 0.25, MNIST": ("fig2-mnist-quarter", "resnet18"),
        "googlenet × 0.25, MNIST": ("fig2-mnist-quarter", "googlenet"),
        "cnn, MNIST": ("fig2-mnist", "cnn"),
    }
    _, *rows = table_of(FIG2, "network, one training")
    assert [row[0] for row in rows] == list(folders)
    for name, *cells in rows:
        of = single[folders[name]]
        shown = [cell.replace("all six attacks", ", ".join(map(called, SIX))) for cell in cells]
        assert shown == [listed(of, verdict) for verdict in VERDICTS[:2]]


def test_robustness_and_accuracy():
    """After the last epoch: means over the seeds, and the lowest and highest of them."""
    seen = []
    for row in shown_rows(["trained", "network", "training"]):
        folder = row["trained"].strip("`")
        table = pd.read_csv(RESULTS / folder / "table.csv")
        network, width = row["network"].split(" × ")
        of = table[(table["network"] == network) & (table["width"] == float(width))]
        of = of[(of["training"] == row["training"]) & (of["epoch"] == of["epoch"].max())]
        for name, condition, column, digits in (
            ("clean", "none", "accuracy", 3),
            ("under PGD", "pgd", "accuracy", 3),
            ("dp", "none", "dp", 1),
        ):
            values = of.loc[of["condition"] == condition, column]
            mean, low, high = (f"{x:.{digits}f}" for x in (values.mean(), min(values), max(values)))
            assert row[name] == f"{mean} ({low} to {high})"
        seen.append((folder, row["network"], row["training"]))
    assert {folder for folder, _, _ in seen} == set(TRADEOFFS) and len(seen) == len(set(seen))
    shown = {
        (row["network"].split()[0], row["training"]): [
            float(row[name].split()[0]) for name in ("clean", "under PGD")
        ]
        for row in shown_rows(["trained", "network", "training"])
        if row["trained"] == "`tradeoff-digits`"
    }
    (clean, robust), (less, more) = shown["cnn", "none"], shown["cnn", "trades"]
    points = f"TRADES takes {100 * (clean - less):.0f} points of clean accuracy and gives"
    assert f"{points} {100 * (more - robust):.0f} of robust accuracy" in TEXT
    table = pd.read_csv(RESULTS / "tradeoff-cifar10/table.csv")
    last = table[(table["epoch"] == table["epoch"].max()) & (table["condition"] == "none")]
    clean, pgd = (last.loc[last["training"] == name, "accuracy"] for name in ("none", "pgd"))
    apart = f"but its two seeds are {100 * (pgd.max() - pgd.min()):.0f} apart"
    assert f"PGD costs {100 * (clean.mean() - pgd.mean()):.1f} points, {apart}" in TEXT


def test_correlations_of_robustness_and_accuracy():
    seen = set()
    for row in shown_rows(["correlations", "training", "points"]):
        folder = row["correlations"].strip("`")
        table = pd.read_csv(RESULTS / folder / "correlations.csv")
        table = table[table["attack"] == "pgd"]
        epochs = {"every epoch": "all", "last epoch": "last"}[row["points"]]
        of = table[(table["training"] == row["training"]) & (table["epochs"] == epochs)]
        assert int(row["n"]) == of["n"].max()
        for pair in of.to_dict("records"):
            value, low, high = signed(pair["correlation"], pair["low"], pair["high"])
            shown = "–" if pd.isna(pair["correlation"]) else f"{value} ({low} to {high})"
            assert row[f"{pair['x']}, {pair['y']}"] == shown
        seen.add(folder)
    assert seen == {*TRADEOFFS, *SEEDS}


def test_the_sentences_about_correlations():
    """What the intervals say of `fooled` and of dp, under PGD."""

    def ends(folder, training, x, y):
        table = pd.read_csv(RESULTS / folder / "correlations.csv")
        of = table[(table["attack"] == "pgd") & (table["epochs"] == "all")]
        (row,) = of[(of["training"] == training) & (of["x"] == x) & (of["y"] == y)].to_dict(
            "records"
        )
        assert min(row["low"], row["lowest"]) > 0 or row["low"] < 0  # and so in each seed
        return row["low"], row["high"]

    clean = {folder: ends(folder, "none", "clean", "fooled") for folder in [*SEEDS, *TRADEOFFS]}
    seen = {folder for folder, (low, _) in clean.items() if low > 0}
    assert seen == {"seeds-mnist", "seeds-cifar10", "tradeoff-cifar10"}
    attacked = {
        (folder, name): ends(folder, name, "clean", "fooled")
        for folder in TRADEOFFS
        for name in ("pgd", "trades")
    }
    assert {key for key, (low, _) in attacked.items() if low > 0} == {("tradeoff-digits", "pgd")}
    assert {key for key, (_, high) in attacked.items() if high < 0} == {
        ("tradeoff-digits", "trades")
    }
    for folder in [*SEEDS, *TRADEOFFS]:
        trainings = ("none",) if folder in SEEDS else ("all", "none", "pgd", "trades")
        assert all(ends(folder, training, "clean", "dp")[0] > 0 for training in trainings)
    assert all(ends(folder, "all", "clean", "robust")[0] > 0 for folder in TRADEOFFS)


def test_splits_at_equal_relative_amplitude():
    seen = set()
    for row in shown_rows(["splits of", "attack"]):
        folder = row["splits of"].strip("`")
        table = pd.read_csv(RESULTS / folder / "splits.csv")
        of = table[(table["condition"] == row["attack"])]
        of = of[of["relative"] == float(row["ε / RMS"])].set_index("point")
        points = list(row)[3:]
        shown = [point for point in points if row[point]]
        assert shown == list(of.index)
        for point in shown:
            assert float(row[point]) == pytest.approx(of.loc[point, "accuracy"], abs=5.1e-4)
        seen.add(folder)
    assert seen == {name for name in FOLDERS if name.startswith("fig5")}


def test_pixels_lose_most_and_the_last_split_least():
    """At shares of the root mean square up to 0.05; the intervals apart from the middle on."""
    for folder in (name for name in FOLDERS if name.startswith("fig5")):
        table = pd.read_csv(RESULTS / folder / "splits.csv")
        table = table[(table["condition"] == "fgsm") & (table["relative"] <= 0.05)]
        for _, of in table.groupby("relative"):
            first, *others = of.to_dict("records")
            assert first["point"] == "pixels"
            assert all(first["accuracy"] < other["accuracy"] for other in others), folder
            assert all(first["high"] < other["low"] for other in others[len(others) // 2 :]), folder
            assert others[-1]["accuracy"] == max(other["accuracy"] for other in others)
