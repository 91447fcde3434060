"""The power law of critical epsilons: SciPy, statsmodels, least squares, and a known exponent."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from invented import build
from scipy.stats import CensoredData, norm
from statsmodels.duration.survfunc import SurvfuncRight

from llm_attack.base.errors import UsageError
from llm_attack.suite import commands, results
from llm_attack.suite.analysis import scaling
from llm_attack.suite.analysis.scaling import MEDIANS, TOBIT
from llm_attack.suite.results import Result
from llm_attack.suite.studies import scaling as study

EXPONENT, SLOPE, SIGMA, CEILING = -0.3, 1.2, 0.8, 0.15


def world(ceiling=CEILING, questions=150, seed=0):
    """Eight models of a known law. Questions have a difficulty that all models share."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(0, SIGMA * 0.6, questions)
    frames = []
    for i, parameters in enumerate([3e4, 1e5, 1e5, 3e5, 3e5, 1e6, 3e6, 1e7]):
        accuracy = 0.5 + 0.05 * ((3 * i) % 8)  # not in the order of the sizes
        right = generator.random(questions) < accuracy
        log = 1.0 + EXPONENT * np.log(parameters) + SLOPE * right.mean() + difficulty
        log = log + generator.normal(0, SIGMA * 0.8, questions)
        samples = pd.DataFrame(
            {
                "task": "t",
                "doc_id": np.arange(questions),
                "condition": "critical@1",
                "epsilon": 2 * ceiling,
                "critical_epsilon": np.where(right, 2 * np.exp(log), 0.0),
            }
        )
        beyond = samples["critical_epsilon"] > samples["epsilon"]
        samples.loc[beyond, "critical_epsilon"] = np.inf
        of_model = scaling.distances(samples, "critical@1", int(parameters), 2.0)
        frames.append(of_model.assign(model=f"m{i}"))
    return pd.concat(frames, ignore_index=True)


def test_distances():
    """Wrong answers do not count, censored ones have the ceiling, all in units."""
    frame = world()
    assert frame["epsilon"].max() == pytest.approx(CEILING)
    assert (frame.loc[frame["censored"], "epsilon"] == CEILING).all()
    models = scaling.of_models(frame)
    assert list(models["right"] / models["asked"]) == pytest.approx(list(models["accuracy"]))
    assert 0.3 < frame["censored"].mean() < 0.6


def test_a_ceiling_is_what_a_search_with_a_smaller_largest_epsilon_finds():
    pd.testing.assert_frame_equal(scaling.below(world(), 0.05), world(0.05))


@pytest.mark.parametrize("seed", range(3))
def test_a_known_exponent_with_censoring(seed):
    """Within four standard errors, and nearer than a fit that drops what is censored."""
    frame = world(questions=2000, seed=seed)
    law = scaling.of_questions(frame)
    assert law.exponent == pytest.approx(EXPONENT, abs=0.03)
    assert law.slope == pytest.approx(SLOPE, abs=0.4)
    assert law.sigma == pytest.approx(SIGMA, rel=0.05)
    assert scaling.of_medians(scaling.of_models(frame)).exponent == pytest.approx(
        EXPONENT, abs=0.06
    )
    naive = scaling.of_questions(frame[~frame["censored"]])
    assert abs(naive.exponent - EXPONENT) > 0.1


def test_intervals_cover_the_exponent():
    found = scaling.laws(world(), resamples=20).query("covariate").set_index("method")
    for method in (MEDIANS, TOBIT):
        row = found.loc[method]
        assert row["low"] < EXPONENT < row["high"]
        assert row["lowest"] < row["exponent"] < row["highest"]
        assert row["high"] - row["low"] < 0.4


def test_without_censoring_it_is_least_squares():
    frame = world(ceiling=np.inf)
    assert not frame["censored"].any()
    x = np.stack([np.ones(len(frame)), np.log(frame["parameters"]), frame["accuracy"]], 1)
    y = np.log(frame["epsilon"])
    expected, (rest,), *_ = np.linalg.lstsq(x, y, rcond=None)
    law = scaling.of_questions(frame)
    assert law[:3] == pytest.approx(tuple(expected), rel=1e-5)
    assert law.sigma == pytest.approx(np.sqrt(rest / len(y)), rel=1e-6)


def test_a_constant_is_scipys_censored_normal():
    frame = world()
    y, censored = np.log(frame["epsilon"].to_numpy()), frame["censored"].to_numpy()
    mean, sigma = norm.fit(CensoredData(uncensored=y[~censored], right=y[censored]))
    law, own = scaling.tobit(np.ones((len(y), 1)), y, censored)
    assert (law[0], own) == pytest.approx((mean, sigma), rel=1e-3)


def test_weights_count_rows():
    frame = world()
    weights = np.arange(len(frame)) % 3
    repeated = frame.loc[np.repeat(frame.index, weights)]
    weighted = scaling.of_questions(frame, weights=weights.astype(float))
    assert weighted == pytest.approx(tuple(scaling.of_questions(repeated)), rel=1e-4)


@pytest.mark.parametrize("ceiling", [0.03, CEILING, np.inf])
def test_medians_are_those_of_kaplan_and_meier(ceiling):
    frame = world(ceiling)
    models = scaling.of_models(frame).set_index("model")
    for name, own in frame.groupby("model"):
        other = SurvfuncRight(own["epsilon"], ~own["censored"])
        fallen = other.surv_times[other.surv_prob <= 0.5 + 1e-12]
        expected = min(fallen, default=np.inf)
        assert models.loc[name, "median"] == pytest.approx(expected)
    assert np.isinf(models["median"]).any() == np.isfinite(ceiling)


def run_of(parameters, seed=0, task="t"):
    """A run whose epsilons of 1 are 4 RMS, and whose critical epsilons are a power of the size."""
    samples, questions = build({task: (30, 2)}, {"none": 3.0, "critical@1": -9.0}, seed=0)
    samples["critical_epsilon"] = np.nan
    searched = samples["condition"] == "critical@1"
    values = np.random.default_rng(seed).lognormal(0, 0.3, searched.sum())
    samples.loc[searched, "critical_epsilon"] = values * max(parameters, 1) ** EXPONENT
    run = {"attacks": {"critical@1": {"embedding_rms": 0.25, "hookpoint": "embed"}}}
    run |= {"of_model": {"parameters": parameters}} if parameters else {}
    return Result(pd.DataFrame(), samples.assign(hookpoint="embed"), questions, run, {})


@pytest.fixture(scope="module")
def runs():
    return {f"m{n}": run_of(n, n) for n in (10**4, 2 * 10**5, 10**6, 10**7)}


def test_runs(runs):
    """In RMS, of the questions that are right, which the condition's answers do not change."""
    models, laws = study.scaling(runs, resamples=3)
    right = runs["m10000"].samples.query("condition == 'none'")["acc"].sum()
    assert models["right"].tolist() == [right] * 4 and models["asked"].tolist() == [30] * 4
    assert models["censored"].sum() == 0
    assert models["median"].iloc[0] == pytest.approx(4 * 10 ** (4 * EXPONENT), rel=0.3)
    tobit = laws.query(f"method == '{TOBIT}' and not covariate").iloc[0]
    assert tobit["exponent"] == pytest.approx(EXPONENT, abs=0.03)


def test_the_command(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "load", lambda folder: runs[folder.name])
    monkeypatch.setattr(commands.scalings, "scaling", partial(study.scaling, resamples=2))
    commands.scaling([tmp_path / name for name in runs], str(tmp_path / "out.csv"))
    names = {"out.csv", "out-laws.csv", "out.png", "out.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(pd.read_csv(tmp_path / "out.csv")) == 4
    assert len(pd.read_csv(tmp_path / "out-laws.csv")) == 4
    assert "10,000,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": run_of(10**5, task="other")}, "m10000 and x asked different questions"),
        ({"x": run_of(0)}, "x: does not know its model's number of parameters"),
        ({"m10000": run_of(10**6), "m10000000": run_of(10**6)}, "2 numbers of parameters in 4"),
    ],
)
def test_what_is_refused(runs, change, words):
    with pytest.raises(UsageError, match=words):
        study.scaling({**runs, **change}, resamples=1)
