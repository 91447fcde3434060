"""Figures show the numbers of the frames. No test compares pixels."""

import re
from itertools import pairwise

import matplotlib.collections
import numpy as np
import pandas as pd
import pytest
from invented import SHIFTS, SIX, build
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from llm_attack.base.drawing import COLOURS, save_figure
from llm_attack.suite.analysis import summary
from llm_attack.suite.report import figures
from llm_attack.suite.report.layout import Unit, panels, paper_style, print_style, wrapped

LADDER = {"none": 3.0} | {
    f"{attack}@{epsilon}": 2.9 - (1 + i) * 40 * epsilon - i
    for i, attack in enumerate(("random", "fgsm", "bim"))
    for epsilon in (0.002, 0.005, 0.01, 0.02)
}
EIGHT = {**SIX, "truthfulqa_mc1_of_a_long_name": (40, (3, 4, 8)), "HendrycksHighSchool": (30, 4)}
MANY = dict.fromkeys(("none", *(f"{a}@0.1" for a in ("random", "fgsm", "bim", "pgd", "ost"))), 2.0)
CASES = {
    "paper": (SIX, SHIFTS),
    "one": ({"piqa": (20, 2)}, {"none": 2.0}),
    "without none": ({"piqa": (20, 2), "arc": (9, (3, 4, 5))}, {"bim@0.1": 1.0, "new@0.1": 0.5}),
    "eight": (EIGHT, {**MANY, "illc@0.1": 0.0, "ost@0.2": 0.1}),
    "ladder": (SIX, LADDER),
    "narrow": ({f"t{i}": (9, ((3, 4, 5), 2)[i % 2]) for i in range(12)}, {"none": 2.0}),
}


@pytest.fixture(params=CASES, scope="module")
def run(request):
    """Samples and table of every case."""
    samples, _ = build(*CASES[request.param])
    return samples, summary.summarise(samples)


@pytest.fixture
def ladder(frames):
    samples, _ = frames({"zeta_task": (60, 4), "alpha": (40, 2)}, LADDER)
    return samples, summary.summarise(samples)


def of_tasks(table):
    return table[table["task"] != "mean"]


def lines_of(axes, kind=matplotlib.collections.LineCollection):
    return [c for c in axes.collections if type(c) is kind]


def names_of(axes):
    return [label.get_text().replace("\n", "") for label in axes.get_xticklabels()]


@pytest.mark.sampled(2)
def test_bars_are_the_table(run):
    """Heights, error bars, baselines and written values, found by task and condition."""
    table = of_tasks(run[1])
    figure = figures.bars(run[1])
    conditions = list(table["condition"].unique())
    assert [t for axes in figure.axes for t in names_of(axes)] == list(table["task"].unique())
    seen = 0
    for axes in figure.axes:
        tasks = names_of(axes)
        bars, errors = axes.containers[::2], axes.containers[1::2]
        assert [b.get_label() for b in bars] == conditions
        (baseline,) = (c for c in lines_of(axes) if c not in [e[2][0] for e in errors])
        of_task = table.drop_duplicates("task").set_index("task").loc[tasks]
        drawn = np.array(baseline.get_segments())
        np.testing.assert_allclose(drawn[:, :, 1], of_task[["baseline"] * 2])
        np.testing.assert_allclose(drawn[:, :, 0].mean(1), np.arange(len(tasks)))
        for condition, bar, error in zip(conditions, bars, errors, strict=True):
            rows = table[table["condition"] == condition].set_index("task").loc[tasks]
            np.testing.assert_allclose([b.get_height() for b in bar], rows["acc"])
            ends = np.array(error[2][0].get_segments())
            np.testing.assert_allclose(ends[:, :, 1], rows[["acc_low", "acc_high"]])
            centres = np.array([b.get_x() + b.get_width() / 2 for b in bar])
            np.testing.assert_allclose(ends[:, 0, 0], centres)
            assert (np.abs(centres - np.arange(len(tasks))) < 0.5).all()
            for centre, value in zip(centres, rows["acc"], strict=True):
                at = [t for t in axes.texts if np.isclose(t.get_position()[0], centre)]
                assert [t.get_text() for t in at if t.get_rotation()] == [f"{value:.3f}"]
            seen += len(bar)
    assert seen == len(table)
    (legend,) = figure.legends
    labels = {t.get_text() for t in legend.get_texts()} - {""}
    assert labels == {*conditions, "random guess"}


@pytest.mark.sampled(2)
def test_bars_of_a_task_do_not_overlap(run):
    for axes in figures.bars(run[1]).axes:
        edges = sorted(
            (b.get_x(), b.get_x() + b.get_width()) for c in axes.containers[::2] for b in c
        )
        assert all(left[1] <= right[0] for left, right in pairwise(edges))


def test_bars_have_an_edge_of_their_height_and_the_axis_ends_at_one(run):
    """The edge is 3:1 against the ground, however pale a bar is."""
    figure = figures.bars(run[1])
    for axes in figure.axes:
        edges = [c for c in axes.collections if type(c) is matplotlib.collections.PolyCollection]
        for bars, edge in zip(axes.containers[::2], edges, strict=True):
            boxes = [path.get_extents() for path in edge.get_paths()]
            expected = [(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in bars]
            np.testing.assert_allclose([box.bounds for box in boxes], expected, atol=1e-12)
            grounds = [p.get_facecolor() for p in axes.patches if p.get_width() >= 1]
            for ground in grounds:
                assert contrast(edge.get_edgecolor()[0], ground) > 3
        assert axes.spines["left"].get_bounds() == (0, 1)
        assert axes.get_yticks()[-1] == 1


def contrast(a, b):
    """Of WCAG 2.2."""
    linear = [np.where((c := np.array(x[:3])) <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
              for x in (a, b)]  # fmt: skip
    dark, light = sorted(float(of @ (0.2126, 0.7152, 0.0722)) for of in linear)
    return (light + 0.05) / (dark + 0.05)


def test_background_by_options(frames):
    """More options, darker; neighbours with the same number share a span."""
    tasks = {"a": (4, 2), "b": (4, 2), "c": (4, (3, 5)), "d": (4, 8)}
    (axes,) = figures.bars(summary.summarise(frames(tasks)[0])).axes
    spans = []
    for patch in axes.patches:
        box = patch.get_path().transformed(patch.get_patch_transform()).get_extents()
        if box.width >= 1:
            spans.append((box, patch.get_facecolor()[0]))
    assert [(box.x0, box.width) for box, _ in spans] == [(-0.5, 2), (1.5, 1), (2.5, 1)]
    greys = [grey for _, grey in spans]
    assert greys == sorted(greys, reverse=True) and len(set(greys)) == 3
    texts = [t.get_text().replace("\n", " ") for t in axes.texts if not t.get_rotation()]
    assert texts == ["2 options", "3–5 options", "8 options"]


def test_smaller_epsilons_are_paler(ladder):
    """The largest epsilon of each attack has the attack's colour; none stays as it is."""
    (axes,) = figures.bars(ladder[1]).axes
    of = {c.get_label(): np.array(c[0].get_facecolor()[:3]) for c in axes.containers[::2]}
    steps = [of[f"fgsm@{e}"] for e in (0.02, 0.01, 0.005, 0.002)]
    np.testing.assert_allclose(steps[0], to_rgb(COLOURS[3]))
    whiteness = [step.sum() for step in steps]
    assert whiteness == sorted(whiteness) and whiteness[3] - whiteness[0] > 0.5
    np.testing.assert_allclose(of["none"], to_rgb("#BBBBBB"))
    assert len({c[0].get_hatch() for c in axes.containers[::2]}) == 4


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (2, (1, 2)), (4, (1, 4)), (7, (2, 4)),
                                          (8, (3, 3)), (12, (4, 3)), (13, (4, 4))])  # fmt: skip
def test_panels_fill_the_grid_from_below(count, shape):
    """In the order of reading; only the first row may be short."""
    names = [f"panel {i}" for i in range(count)]
    _, grid = panels(names)
    assert list(grid) == names == [a.get_title() for a in grid.values()]
    specs = [a.get_subplotspec() for a in grid.values()]
    assert specs[0].get_gridspec().get_geometry() == shape
    places = [(s.rowspan.start, s.colspan.start) for s in specs]
    assert places == sorted(places)
    assert {p for p in places if p[0]} == {
        (r, c) for r in range(1, shape[0]) for c in range(shape[1])
    }


def test_curves_are_the_table(ladder):
    """Each line goes through none at 0 and the attack's accuracies; the bands are intervals."""
    figure = figures.curves(ladder[1])
    assert {a.get_title().replace("\n", "") for a in figure.axes} == {"zeta_task", "alpha", "mean"}
    for axes in figure.axes:
        rows = ladder[1][ladder[1]["task"] == axes.get_title().replace("\n", "")]
        *lines, baseline = axes.get_lines()
        assert [line.get_label() for line in lines] == ["random", "fgsm", "bim"]
        assert set(baseline.get_ydata()) == {rows["baseline"].iloc[0]}
        bands = axes.collections
        for line, band in zip(lines, bands, strict=True):
            curve = rows[rows["attack"].isin(["none", line.get_label()])].sort_values("epsilon")
            assert line.get_xdata().tolist() == [0, 0.002, 0.005, 0.01, 0.02]
            np.testing.assert_allclose(line.get_ydata(), curve["acc"])
            corners = band.get_paths()[0].vertices
            for column in ("acc_low", "acc_high"):
                for point in curve[["epsilon", column]].to_numpy():
                    assert np.isclose(corners, point).all(axis=1).any()


def test_the_worst_case_starts_where_it_is_known(frames):
    """FGSM alone at 0.1, two attacks from 0.2 on: no line goes from none past FGSM."""
    samples, _ = frames({"a": (9, 2)}, {"none": 3.0, "fgsm@0.1": -1.0, "fgsm@0.2": -2.0})
    at_last = samples[samples["condition"] == "fgsm@0.2"]
    worst = at_last.assign(condition="worst@0.2", attack="worst")
    axes = figures.curves(summary.summarise(pd.concat([samples, worst]))).axes[0]
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert lines["fgsm"] == [0, 0.1, 0.2] and lines["worst"] == [0.2]
    early = samples[samples["condition"] == "fgsm@0.1"]
    more = early.assign(condition="worst@0.1", attack="worst")
    axes = figures.curves(summary.summarise(pd.concat([samples, more, worst]))).axes[0]
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert lines["worst"] == [0, 0.1, 0.2]


def test_intervals_are_seen_on_dark_bars(run):
    """Black lines with a white edge."""
    _, table = run
    for axes in figures.bars(table).axes:
        parts = [of for of in axes.containers if hasattr(of, "has_yerr")]
        assert parts
        for _, caps, lines in parts:
            assert all(part.get_path_effects() for part in (*caps, *lines))


def test_curves_need_several_epsilons(frames):
    for conditions in (SHIFTS, {"none": 1.0}):
        assert figures.curves(summary.summarise(frames({"a": (5, 4)}, conditions)[0])) is None
    two = frames({"a": (5, 4)}, {"fgsm@0.1": 1.0, "fgsm@0": 2.0, "bim@0.1": 0.5})[0]
    (axes, _) = figures.curves(summary.summarise(two)).axes
    assert [line.get_xdata().tolist() for line in axes.get_lines()[:2]] == [[0, 0.1], [0.1]]


def test_curves_of_several_norms_have_panels_of_their_own(frames):
    """One unit: in the units of the point it is eight times as long in one norm as in the other."""
    shifts = {f"fgsm@{e}": -e for e in (0.1, 0.2, 0.8, 1.6)}
    samples, _ = frames({"a": (9, 2), "b": (9, 2)}, {"none": 3.0, **shifts})
    names = {f"fgsm@{e}": f"fgsm@{e}rms" for e in (0.1, 0.2)}
    names |= {"fgsm@0.8": "fgsm@0.1rms-l2_token", "fgsm@1.6": "fgsm@0.2rms-l2_token"}
    table = summary.summarise(samples.replace({"condition": names}))
    table["epsilon"] *= 0.5
    figure = figures.curves(table, Unit(" (rms)", 0.5))
    assert [a.get_title().replace("\n", " ") for a in figure.axes] == [
        f"{task} {norm}" for norm in ("linf", "l2_token") for task in ("a", "b", "mean")
    ]
    for axes in figure.axes:
        task, norm = axes.get_title().split()
        rows = table[table["task"] == task].set_index("condition")["acc"]
        names = [f"fgsm@{e}rms{'' if norm == 'linf' else '-l2_token'}" for e in (0.1, 0.2)]
        line, _ = axes.get_lines()
        assert list(line.get_xdata()) == [0, 0.1, 0.2]
        np.testing.assert_allclose(line.get_ydata(), rows[["none", *names]])


def test_margins_right_of_zero_are_right_answers(run):
    """Tasks of unequal size weigh the same, so the area above 0 is the mean accuracy."""
    samples, table = run
    means = table[table["task"] == "mean"].set_index("condition")["acc"]
    attacked = [c for c in means.index if c != "none"]
    figure = figures.margins(samples)
    assert [a.get_title().replace("\n", "") for a in figure.axes] == (attacked or ["none"])
    for axes in figure.axes:
        condition = axes.get_title().replace("\n", "")
        shown = [p for p in axes.patches if isinstance(p, matplotlib.patches.StepPatch)]
        expected = [c for c in ("none", condition) if c in means.index]
        assert len(shown) == len(dict.fromkeys(expected))
        for condition, patch in zip(dict.fromkeys(expected), shown, strict=True):
            shares, edges, _ = patch.get_data()
            assert shares.sum() == pytest.approx(1)
            assert shares[edges[:-1] >= 0].sum() == pytest.approx(means[condition])
            assert len(edges) < 60
            assert patch.get_fill() == (condition == "none")


def test_margins_at_the_ends_are_kept(frames):
    """An outlier is counted in the last bin and does not stretch the axis."""
    samples, _ = frames({"a": (200, 4)}, {"none": 1.0})
    usual = figures.margins(samples).axes[0].patches[0].get_data().edges
    samples.at[0, "log_likelihoods"] = [-1e6 if i != g else 0 for i in range(4) for g in [0]]
    samples.at[0, "gold"] = [0]
    shares, edges, _ = figures.margins(samples).axes[0].patches[0].get_data()
    assert shares.sum() == pytest.approx(1) and shares[-1] >= 1 / 200
    assert edges[-1] < 2 * usual[-1]


def test_margins_of_nothing_and_of_one_value(frames):
    samples, _ = frames({"a": (3, 2)}, {"none": 1.0})
    samples["log_likelihoods"] = [[-2.0, -2.0]] * 3
    shares, edges, _ = figures.margins(samples).axes[0].patches[0].get_data()
    assert (shares.tolist(), edges[0]) == ([1.0], 0)
    samples["log_likelihoods"] = [[-np.inf, -np.inf]] * 3
    assert figures.margins(samples) is None


@pytest.mark.parametrize("size", [1e17, -1e17, 1e200])
@pytest.mark.parametrize("more", [0.0, 16.0])
def test_margins_that_are_far_and_near_each_other(frames, size, more):
    """Edges of bins are apart, however large margins are."""
    samples, _ = frames({"a": (30, 2)}, {"none": 1.0})
    samples = samples.assign(gold=[[0]] * len(samples))
    values = [[size + more * (i % 2), 0.0] for i in range(len(samples))]
    shares, edges, _ = (
        figures.margins(samples.assign(log_likelihoods=values)).axes[0].patches[0].get_data()
    )
    assert (np.diff(edges) > 0).all() and shares.sum() == pytest.approx(1)


def test_cosines_are_the_samples(frames):
    samples, _ = frames({"a_b": (200, 4), "c": (50, 2), "d": (9, 2)}, {"fgsm@1": 0.0, "none": 0.4})
    samples.loc[samples["task"] == "d", "acc"] = 1.0
    (axes,) = figures.cosines(samples).axes
    clean = samples[samples["condition"] == "none"]
    places = [(t, a) for a in (1, 0) for t in ("a_b", "c", "d")]
    groups = [clean[(clean["task"] == t) & (clean["acc"] == a)]["cosine"] for t, a in places]
    medians = [c for c in axes.collections if c.get_linewidth()[0] == 1.2]
    segments = np.array(
        [path.vertices for c in medians for path in c.get_paths()]
    )  # (groups, ends, x and y)
    np.testing.assert_allclose(segments[:, 0, 1], [g.median() for g in groups])
    centres = segments[:5, :, 0].mean(1)  # task d has no wrong answer
    np.testing.assert_allclose(centres, [-0.2, 0.8, 1.8, 0.2, 1.2])
    ends = [(p.get_y(), p.get_y() + p.get_height()) for p in axes.patches]
    np.testing.assert_allclose(ends, [g.quantile([0.25, 0.75]) for g in groups])
    whiskers = [c for c in axes.collections if c.get_linewidth()[0] == 0.7][::2]
    heights = [path.vertices[:, 1] for path in whiskers[0].get_paths()]
    drawn = [(heights[i][0], heights[i + 3][1]) for i in range(3)]
    np.testing.assert_allclose(drawn, [g.quantile([0.05, 0.95]) for g in groups[:3]])
    assert [t.get_text() for t in axes.texts] == [*(f"{len(g)}" for g in groups), "n"]
    (legend,) = axes.figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["right", "wrong"]


def test_cosines_need_gradients_and_the_clean_run(frames):
    assert figures.cosines(frames({"a": (5, 4)}, cosine=False)[0]) is None
    assert figures.cosines(frames({"a": (5, 4)}, {"fgsm@1": 0.0})[0]) is None


def boxes_of(texts, renderer):
    return [t.get_window_extent(renderer) for t in texts if t.get_text() and t.get_visible()]


@pytest.mark.sampled(3)
def test_labels_do_not_overlap(run):
    """Names of tasks, titles, numbers of options, and the legend, as laid out for print."""
    samples, table = run
    for figure in (figures.bars(table), figures.curves(table), figures.cosines(samples)):
        if figure is None:
            continue
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = [t for a in figure.axes for t in (*a.get_xticklabels(), a.title)]
        texts += [t for a in figure.axes for t in a.get_yticklabels()]
        texts += [t for a in figure.axes for t in a.texts if not t.get_rotation()]
        boxes = boxes_of(texts, renderer) + [g.get_window_extent(renderer) for g in figure.legends]
        for i, box in enumerate(boxes):
            assert not any(box.shrunk(0.98, 0.9).overlaps(other) for other in boxes[i + 1 :])
            assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1
        assert figure.get_figwidth() <= 7.2


def test_long_names_are_whole():
    name = "global_mmlu_full_HighSchoolGovernmentAndPolitics_x-y"
    lines = wrapped(name, 12).split("\n")
    assert "".join(lines) == name and max(map(len, lines)) <= 12
    assert wrapped("demo_arc_challenge", 10) == "demo_arc_\nchallenge"


def test_draw_all_twice_gives_the_same_bytes(frames, tmp_path):
    samples, _ = frames({"zeta_task": (60, 4)}, {"none": 2.0, "fgsm@0.1": 1.0, "fgsm@1": 0.0})
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        table = summary.summarise(samples)
        assert figures.draw_all(samples, table, folder) == ["figure", "epsilon", "margin", "cosine"]
    names = sorted(p.name for p in folders[0].iterdir())
    kinds = ("png", "svg")
    assert names == sorted(
        f"{n}.{k}" for n in ("figure", "epsilon", "margin", "cosine") for k in kinds
    )
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert "zeta_task" in (folders[0] / "figure.svg").read_text()


def test_a_paper_has_its_own_style_inside_of_another():
    with print_style(), print_style():
        outside = rcParams["legend.fontsize"]
        with paper_style():
            assert rcParams["legend.fontsize"] == 8 != outside
        assert rcParams["legend.fontsize"] == outside


def test_files_are_those_of_savefig(frames, tmp_path):
    """It draws twice, first for the layout alone; the layout is the same for both forms."""
    samples, _ = frames({"zeta_task": (60, 4)}, {"none": 2.0, "fgsm@0.1": 1.0, "fgsm@1": 0.0})
    table = summary.summarise(samples)
    with print_style():
        save_figure(figures.bars(table), tmp_path, title="t")
        drawn = figures.bars(table)
        drawn.savefig(tmp_path / "s.png", metadata={"Software": None})
        drawn.set_layout_engine("none")
        drawn.savefig(tmp_path / "s.svg", metadata={"Date": None, "Title": "t"})
    for form in ("png", "svg"):
        assert (tmp_path / f"figure.{form}").read_bytes() == (tmp_path / f"s.{form}").read_bytes()


def test_svg_files_have_a_title(frames, tmp_path):
    samples, _ = frames({"a": (9, 4)}, {"none": 2.0})
    figures.draw_all(samples, summary.summarise(samples), tmp_path)
    for name in ("figure", "margin"):
        title = re.search("<title>(.*?)</title>", (tmp_path / f"{name}.svg").read_text())
        assert title[1] == figures.TITLES[name]


def test_draw_all_leaves_out_what_there_is_no_data_for(frames, tmp_path):
    samples, _ = frames({"a": (10, 4)}, {"none": 1.0}, cosine=False)
    drawn = figures.draw_all(samples, summary.summarise(samples), tmp_path)
    assert drawn == ["figure", "margin"]
    assert {p.stem for p in tmp_path.iterdir()} == {"figure", "margin"}
