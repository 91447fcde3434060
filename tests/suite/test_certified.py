"""Certificates from votes: Clopper-Pearson, closed forms, counts by hand, a run of the demo."""

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from invented import build
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.stats import least_share, wilson
from llm_attack.suite import commands, results
from llm_attack.suite.analysis import certified
from llm_attack.suite.analysis.conditions import Condition
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.evaluate import evaluate
from llm_attack.suite.plan import Plan
from llm_attack.suite.studies import certificates


@given(st.data())
def test_the_bound_is_that_of_clopper_and_pearson(data):
    n = data.draw(st.integers(1, 5000))
    hits, level = data.draw(st.integers(0, n)), data.draw(st.sampled_from([0.05, 0.001, 1e-6]))
    test = binomtest(hits, n, alternative="greater")
    expected = test.proportion_ci(1 - level, method="exact").low
    assert least_share(hits, n, level) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("level", [0.05, 0.001])
@pytest.mark.parametrize("share", [0.52, 0.8, 0.99])
def test_the_bound_covers_in_ten_thousand_runs(share, level):
    """It is above the truth in at most this part of them; and not much less often at 0.05."""
    hits = np.random.default_rng(7).binomial(1000, share, 10_000)
    wrong = np.mean(least_share(hits, 1000, level) > share)
    assert wrong <= level + 4 * np.sqrt(level * (1 - level) / 10_000)
    if level == 0.05:
        assert wrong > 0.02


@pytest.mark.parametrize("distance", [0.05, 0.4, 1.0, 2.0])
def test_no_radius_exceeds_the_distance_of_a_linear_model(distance):
    """10,000 certificates by CERTIFY. Noise leaves the answer with probability Φ(d / sigma)."""
    rng, level, sigma, n = np.random.default_rng(11), 0.01, 0.7, 500
    share = ndtr(distance / sigma)
    first, second = (rng.binomial(count, share, 10_000) for count in (20, n))
    frame = pd.DataFrame(
        {
            "sigma": sigma,
            "gold": [[0]] * 10_000,
            "selection_votes": [[k, 20 - k] for k in first],
            "votes": [[k, n - k] for k in second],
        }
    )
    made = certified.certified(frame, level)
    above = made["right"] & (made["radius"] > distance)
    beyond = made["vote"].ne(0) & ~made["abstained"]  # the answer is the wrong one
    assert (above | beyond).mean() <= level + 4 * np.sqrt(level * (1 - level) / 10_000)
    best = made["radius"].max()
    assert best <= certified.largest_radius(sigma, n, level)
    if share < 0.9:  # the radius is near the distance, and not only below it
        assert made.loc[made["right"], "radius"].median() == pytest.approx(distance, abs=0.15)


def test_radius():
    assert certified.radius(ndtr(1.5), 2.0) == pytest.approx(3.0)
    assert certified.radius([0.5, 0.3, 0.0, 1.0], 1.0).tolist() == [0, 0, 0, np.inf]
    most = certified.largest_radius(2.0, 1000, 0.001)
    assert most == pytest.approx(2 * ndtri(0.001 ** (1 / 1000)))


def counts(rows, cluster=None):
    """Counts from (task, doc_id, smoothing, gold, selection_votes, votes)."""
    names = ["task", "doc_id", "smoothing", "gold", "selection_votes", "votes"]
    frame = pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows])
    sizes = frame["smoothing"].map(lambda name: float(name.removesuffix("rms")) / 10)
    n = frame["votes"].map(len)
    return frame.assign(
        sigma=sizes, n_choices=n, cluster=pd.Series([cluster] * n.size, dtype="Int64")
    )


def test_certificates_by_hand():
    made = certified.certified(
        counts(
            [
                ("t", 0, "0.4rms", [1], [1, 5, 4], [20, 80, 0]),
                ("t", 1, "0.4rms", [1], [5, 5, 0], [99, 1, 0]),  # equal: the first, which is wrong
                ("t", 2, "0.4rms", [0, 2], [0, 1, 9], [50, 0, 50]),  # abstains
                ("t", 3, "0.4rms", [0, 2], [0, 1, 9], [0, 0, 100]),
                ("t", 4, "0.4rms", [0], [6, 4, 0], [40, 60, 0]),  # selected one, certified not
            ]
        ),
        0.01,
    )
    assert made["vote"].tolist() == [1, 0, 2, 2, 0]
    assert made["hits"].tolist() == [80, 99, 50, 100, 40]
    bounds = [binomtest(k, 100, alternative="greater") for k in made["hits"]]
    lower = [test.proportion_ci(0.99, method="exact").low for test in bounds]
    assert made["p_lower"].tolist() == pytest.approx(lower)
    expected = [0.04 * ndtri(p) if p > 0.5 else 0 for p in lower]
    assert made["radius"].tolist() == pytest.approx(expected)
    assert made["abstained"].tolist() == [False, False, True, False, True]
    assert made["right"].tolist() == [True, False, False, True, False]


def two_tasks():
    """Certificates of five questions, and samples with critical epsilons in L2."""
    all_, most = [0, 100], [10, 90]
    rows = [
        ("a", 0, "0.4rms", [1], all_, all_),
        ("a", 1, "0.4rms", [1], all_, most),
        ("a", 2, "0.4rms", [0], all_, all_),
        ("a", 3, "0.4rms", [1], all_, [50, 50]),
        ("b", 0, "0.4rms", [1], all_, most),
    ]
    frame = certified.certified(counts(rows), 0.001)
    samples, _ = build({"a": (4, 2), "b": (1, 2)}, {"none": 9.0, "critical@1": 0.0})
    found = np.repeat([0.5, 0.01, 0.2, 0.1, np.inf], 2)
    found[::2] = np.nan
    samples = samples.assign(critical_epsilon=found, hookpoint="embed")
    known = {
        "none": Condition("none", "none", ()),
        "critical@1": Condition("critical@1", "critical", (("norm", "l2"),)),
    }
    return frame, samples, known


RECORD = {
    "draws": 100,
    "failure_probability": 0.001,
    "largest_radii": {"0.4rms": certified.largest_radius(0.04, 100, 0.001)},
    "unit": "rms",
    "unit_l2": 0.2,
}


def test_certified_accuracy_by_hand():
    frame, _, _ = two_tasks()
    curve = certified.accuracies(frame, RECORD["largest_radii"])
    radii = frame["radius"].to_numpy() / 0.04
    assert radii[1] < 1 < 1.5 < radii[0] < 2  # 90 and 100 of 100 draws
    assert list(curve["task"].unique()) == ["a", "b", MEAN]
    by_task = {task: group for task, group in curve.groupby("task")}
    assert by_task["a"]["radius_in_sigma"].tolist() == [0, 0.5, 1, 1.5]
    assert by_task["a"]["radius"].tolist() == pytest.approx([0, 0.02, 0.04, 0.06])
    assert by_task["a"]["certified"].tolist() == [0.5, 0.5, 0.25, 0.25]
    assert by_task["b"]["certified"].tolist() == [1, 1, 0, 0]
    assert by_task[MEAN]["certified"].tolist() == [0.75, 0.75, 0.125, 0.125]
    assert by_task[MEAN]["n"].tolist() == [5] * 4
    ends = by_task["a"][["low", "high"]].to_numpy()
    assert ends == pytest.approx(np.array([wilson(k, 4) for k in (2, 2, 1, 1)]))


def test_intervals_allow_for_shared_sources():
    frame, _, _ = two_tasks()
    of_task = frame[frame["task"] == "a"]
    shared = of_task.assign(cluster=pd.Series([0, 0, 1, 1], dtype="Int64"))
    widths = [
        (c["high"] - c["low"]).iloc[0]
        for c in (certified.accuracies(f, RECORD["largest_radii"]) for f in (of_task, shared))
    ]
    assert widths[1] > widths[0]


def test_beside_critical_epsilons_by_hand():
    frame, samples, known = two_tasks()
    made = certified.beside(frame, samples, known).set_index("task")
    low, high = sorted({*frame["radius"]} - {0})
    assert made["n"].tolist() == [4, 1, 5] and made["abstained"].tolist() == [1, 0, 1]
    assert made["clean"].tolist() == [1, 1, 1]
    assert made["vote"].tolist() == [0.5, 1, 0.75]
    assert made["median_radius"].tolist() == pytest.approx([(low + high) / 2, low, low])
    assert made["median_critical"].tolist() == [0.255, np.inf, 0.5]
    ratios = [(0.5 / high + 0.01 / low) / 2, np.inf, 0.5 / high]
    assert made["ratio"].tolist() == pytest.approx(ratios)
    assert made["nearer"].tolist() == [1, 0, 1]
    # the table shows lengths in the unit of the sigmas
    shown = certificates.Certificates(frame, samples, known, RECORD)
    cells, _ = certificates.tables(shown)[certificates.BESIDE]
    place = [cells.heading.index(name) for name in ("radius", "critical epsilon", "nearer")]
    radii = [f"{r / 0.2:.3g}" for r in ((low + high) / 2, low, low)]
    expected = [list(row) for row in zip(radii, ("1.27", "∞", "2.5"), "101", strict=True)]
    assert [[row[i] for i in place] for row in cells.rows] == expected


@pytest.mark.parametrize("norm", ["linf", "l2_token"])
def test_critical_epsilons_of_other_norms_are_not_compared(norm):
    frame, samples, known = two_tasks()
    known["critical@1"] = Condition("critical@1", "critical", (("norm", norm),))
    made = certified.beside(frame, samples, known)
    assert made[["median_critical", "ratio", "nearer"]].isna().all(axis=None)
    shown = certificates.Certificates(frame, samples, known, RECORD)
    cells, _ = certificates.tables(shown)[certificates.BESIDE]
    assert cells.heading[-1] == "radius"
    assert all(line.get_label() != certificates.FOUND for line in lines_of(shown))


def lines_of(shown):
    return [line for axes in certificates.figure(shown).axes for line in axes.lines]


def test_figure_shows_the_numbers():
    """In the unit of the sigmas: certified accuracy, and what the attack leaves of the network."""
    frame, samples, known = two_tasks()
    shown = certificates.Certificates(frame, samples, known, RECORD)
    of_vote, of_network = lines_of(shown)[:2]
    low, high = sorted({*frame["radius"]} - {0})
    assert of_vote.get_xdata() == pytest.approx(np.array([0, low, high]) / 0.2)
    assert of_vote.get_ydata().tolist() == [0.5, 0.25, 0]
    assert of_network.get_xdata() == pytest.approx(np.array([0, 0.01, 0.1, 0.2, 0.5]) / 0.2)
    assert of_network.get_ydata().tolist() == [1, 0.75, 0.5, 0.25, 0]
    figure = certificates.figure(shown)
    assert figure.get_supxlabel() == "length of the perturbation in L2 (rms)"
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", MEAN]
    # the axis shows every radius, and nine tenths of the critical epsilons
    farthest = max(RECORD["largest_radii"]["0.4rms"], np.quantile([0.5, 0.01, 0.2, 0.1], 0.9))
    assert figure.axes[0].get_xlim() == pytest.approx((0, 1.05 * farthest / 0.2))
    (band,) = figure.axes[0].collections
    assert band.get_paths()[0].vertices[:, 0].max() == pytest.approx(1.5 * 0.04 / 0.2)
    cells, _ = certificates.tables(shown)[certificates.CURVE]
    low, high = wilson(2, 4)
    assert cells.rows[0][3] == f"0.500 ({low:.3f}–{high:.3f})"


def test_runs_without_certificates_have_no_such_files(tmp_path):
    samples, _ = build()
    assert certificates.Certificates.of(None, samples, {}, {}) is None
    assert certificates.tables(None) == {} and certificates.figure(None) is None
    certificates.save({}, tmp_path)
    assert not list(tmp_path.iterdir())


SETTINGS = {
    "model": "demo",
    "tasks": "demo_piqa",
    "attacks": "none,fgsm,critical",
    "norm": "l2",
    "epsilons": "0.1rms",
    "loss": "margin",
    "steps": 2,
    "rounds": 2,
    "limit": 3,
}
NOISE = {"sigmas": "0.4rms,0.8rms", "draws": 12, "selection_draws": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with certificates, and its folder."""
    folder = tmp_path_factory.mktemp("certified") / "run"
    return evaluate(Plan(**SETTINGS, **NOISE), output=folder, progress="quiet"), folder


def test_of_a_run(run):
    result, folder = run
    written = {path.name for path in folder.iterdir()}
    assert {"certificates.parquet", "certified.csv", "certified.md", "certified.png"} <= written
    frame, record = result.certificates, result.run["smoothing"]
    assert len(frame) == 6 and list(frame["smoothing"].unique()) == ["0.4rms", "0.8rms"]
    rms = result.run["attacks"]["critical@0.1rms-l2"]["embedding_rms"]
    assert record["sigmas"] == pytest.approx({"0.4rms": 0.4 * rms, "0.8rms": 0.8 * rms})
    assert record["unit_l2"] == pytest.approx(rms * 128**0.5)
    assert frame["votes"].map(sum).eq(12).all() and frame["selection_votes"].map(sum).eq(2).all()
    again = certified.certified(frame, record["failure_probability"])
    pd.testing.assert_frame_equal(again, frame)
    text = (folder / "report.html").read_text("utf-8")
    assert certificates.BESIDE.capitalize() in text or certificates.BESIDE in text


def test_nothing_else_of_a_run_changes(run):
    """The vote is no attack: it enters neither the table nor the worst cases nor the drops."""
    result, _ = run
    plain = evaluate(Plan(**SETTINGS), progress="quiet")
    numbers = [frame.round(6) for frame in (result.table, plain.table)]
    pd.testing.assert_frame_equal(*numbers)
    assert {*result.worst()["condition"]} == {*plain.worst()["condition"]}
    assert plain.certificates is None and "smoothing" not in plain.run
    assert not {*NOISE} & {*plain.run["fingerprint"]}


def test_a_finished_run_is_read_again(run):
    result, folder = run
    loaded = results.load(folder)
    pd.testing.assert_frame_equal(
        loaded.certificates, result.certificates, check_dtype=False, check_like=True
    )
    before = (folder / "certified.md").read_text("utf-8")
    (folder / "certified.md").unlink()
    commands.report(folder, None)
    assert (folder / "certified.md").read_text("utf-8") == before
    # with other draws the folder is of another run
    assert {"draws": 12, "failure_probability": 0.001}.items() <= loaded.run["fingerprint"].items()


@pytest.mark.parametrize("fault", ["missing", "column", "questions"])
def test_a_damaged_file_is_refused(run, tmp_path, fault):
    _, folder = run
    for path in folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "certificates.parquet"
    frame = pd.read_parquet(path)
    path.unlink()
    if fault == "column":
        results.save_frames(tmp_path, certificates=frame.drop(columns="votes"))
    elif fault == "questions":
        results.save_frames(tmp_path, certificates=frame.assign(doc_id=99))
    with pytest.raises(UsageError, match=r"certificates\.parquet"):
        results.load(tmp_path)


def test_dry_run_counts_the_draws():
    """Each draw is a forward pass of the answers."""
    from rich.console import Console

    from llm_attack.suite.run import estimate
    from llm_attack.suite.run.execute import prepare

    flop = {}
    for draws in (20, 30):
        settings = SETTINGS | NOISE | {"attacks": "none", "draws": draws}
        for name in ("steps", "rounds", "epsilons"):
            settings.pop(name)
        prepared = prepare(Plan(**settings), "quiet", Console(quiet=True))
        flop[draws] = estimate.estimate(prepared, 0.0).counts.forwards
    # none, and for each of two sigmas 2 draws that select and `draws` more
    assert flop[30] / flop[20] == pytest.approx((1 + 2 * 32) / (1 + 2 * 22))


def test_help_names_the_settings():
    text = CliRunner().invoke(main, ["run", "--help"]).output
    assert all(f"--{name}" in text for name in ("sigmas", "draws", "failure_probability"))
    assert "--sigmas" not in CliRunner().invoke(main, ["doctor", "--help"]).output
