"""How critical epsilons depend on the size of a model: a power law, with censoring kept.

The law is log(critical epsilon) = constant + exponent log(parameters) + slope (clean accuracy).
Only questions that are right without an attack count. A question without a known wrong answer has a
critical epsilon above the largest that was tried: it is censored. All functions are pure functions
over the frame of `distances`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_ndtr

from llm_attack.stats import ALPHA

Numbers = NDArray[np.float64]

RESAMPLES = 200
MEDIANS, TOBIT = "medians", "Tobit"
_LOG_ROOT = 0.5 * np.log(2 * np.pi)


class Law(NamedTuple):
    """A fitted law.

    Attributes:
        constant: log of the critical epsilon of a model with one parameter and accuracy 0.
        exponent: power of the number of parameters.
        slope: change of the log per unit of clean accuracy; NaN if it is left out.
        sigma: standard deviation of the log about the law.
    """

    constant: float
    exponent: float
    slope: float
    sigma: float


def distances(samples: pd.DataFrame, condition: str, parameters: int, unit: float) -> pd.DataFrame:
    """The questions of one run that are right without an attack.

    Args:
        samples: as in `samples.parquet`, the result of `critical.of_score`.
        condition: the condition that searched for critical epsilons.
        parameters: the number of the model's parameters.
        unit: the critical epsilon that counts as 1, such as the RMS of the embeddings.

    Returns:
        Columns: `question`, `parameters`, `accuracy`, `asked` (both of the run), `epsilon` (the
        critical epsilon, or the largest that was tried), `censored`.
    """
    rows = samples[samples["condition"] == condition]
    right = rows[rows["critical_epsilon"] > 0]
    censored = np.isinf(right["critical_epsilon"])
    return pd.DataFrame(
        {
            "question": right["task"] + "/" + right["doc_id"].astype(str),
            "parameters": parameters,
            "accuracy": len(right) / len(rows),
            "asked": len(rows),
            "epsilon": right["critical_epsilon"].where(~censored, right["epsilon"]) / unit,
            "censored": censored,
        }
    )


def below(frame: pd.DataFrame, ceiling: float) -> pd.DataFrame:
    """The same questions, as if no epsilon above `ceiling` had been tried."""
    above = frame["epsilon"] > ceiling
    epsilons = frame["epsilon"].clip(upper=ceiling)
    return frame.assign(epsilon=epsilons, censored=frame["censored"] | above)


def median(epsilons: Numbers, censored: NDArray[np.bool_]) -> float:
    """The Kaplan-Meier median; infinite if less than half of the questions fell."""
    from scipy.stats import CensoredData, ecdf  # slow to import

    if not len(epsilons):
        return np.nan
    data = CensoredData(uncensored=epsilons[~censored], right=epsilons[censored])
    survival = ecdf(data).sf
    fallen = np.flatnonzero(survival.probabilities <= 0.5 + 1e-12)
    return float(survival.quantiles[fallen[0]]) if len(fallen) else np.inf


def of_models(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per model: `model`, `parameters`, `asked`, `accuracy`, `right`, `censored`, `median`.

    Args:
        frame: frames of `distances`, with the column `model`.
    """
    rows = []
    for model, own in frame.groupby("model", sort=False):
        first = own.iloc[0]
        rows.append(
            {
                "model": model,
                **{name: first[name] for name in ("parameters", "asked", "accuracy")},
                "right": len(own),
                "censored": int(own["censored"].sum()),
                "median": median(own["epsilon"].to_numpy(float), own["censored"].to_numpy(bool)),
            }
        )
    return pd.DataFrame(rows)


def of_medians(models: pd.DataFrame, covariate: bool = True) -> Law:
    """The law by least squares of the logs of the medians. Infinite medians are left out."""
    known = models[np.isfinite(models["median"])]
    design, y = _design(known, covariate), np.log(known["median"].to_numpy(float))
    law, *_ = np.linalg.lstsq(design, y, rcond=None)
    left = max(len(y) - design.shape[1], 1)
    sigma = np.sqrt(np.square(y - design @ law).sum() / left)
    return Law(law[0], law[1], law[2] if covariate else np.nan, float(sigma))


def of_questions(
    frame: pd.DataFrame, covariate: bool = True, weights: Numbers | None = None
) -> Law:
    """The law by maximum likelihood of all questions, with normal logs (Tobin 1958).

    Args:
        frame: frames of `distances`.
        covariate: whether the clean accuracy is part of the law.
        weights: how often each row counts; None: once.
    """
    design = _design(frame, covariate)
    y, censored = np.log(frame["epsilon"].to_numpy(float)), frame["censored"].to_numpy(bool)
    law, sigma = tobit(design, y, censored, weights)
    return Law(law[0], law[1], law[2] if covariate else np.nan, sigma)


def _design(frame: pd.DataFrame, covariate: bool) -> Numbers:
    columns = [np.ones(len(frame)), np.log(frame["parameters"].to_numpy(float))]
    columns += [frame["accuracy"].to_numpy(float)] if covariate else []
    return np.stack(columns, 1)


def tobit(
    design: Numbers, y: Numbers, censored: NDArray[np.bool_], weights: Numbers | None = None
) -> tuple[Numbers, float]:
    """Maximum likelihood of a linear law with normal errors, censored from above.

    The likelihood is concave in the coefficients divided by sigma, and in 1 / sigma (Olsen 1978).

    Args:
        design: (N, K) regressors.
        y: (N,) values; for censored rows, the bounds that they are above.
        censored: (N,) booleans.
        weights: (N,) how often each row counts; None: once.

    Returns:
        The (K,) coefficients, and sigma.
    """
    weights = np.ones(len(y)) if weights is None else weights
    # The same law of regressors with mean 0 and deviation 1, so that the search has one scale.
    shift, scale = design.mean(0), design.std(0)
    shift, scale = np.where(scale > 0, shift, 0.0), np.where(scale > 0, scale, 1.0)
    x = (design - shift) / scale

    def lost(law: Numbers) -> tuple[float, Numbers]:
        gamma, inverse = law[:-1], np.exp(law[-1])
        z = inverse * y - x @ gamma
        log_tail = log_ndtr(-z)
        hazard = np.exp(np.minimum(-0.5 * z**2 - _LOG_ROOT - log_tail, 700))
        value = np.where(censored, -log_tail, 0.5 * z**2 - law[-1])
        of_z = weights * np.where(censored, hazard, z)
        of_inverse = (of_z * y * inverse).sum() - weights[~censored].sum()
        return float((weights * value).sum()), np.append(-(x.T @ of_z), of_inverse)

    start, *_ = np.linalg.lstsq(x, y, rcond=None)
    inverse = 1 / max(float(np.std(y - x @ start)), 1e-6)
    first = np.append(start * inverse, np.log(inverse))
    found = minimize(lost, first, jac=True, method="L-BFGS-B", options={"ftol": 1e-13}).x
    sigma = float(np.exp(-found[-1]))
    law = found[:-1] * sigma / scale
    constant = np.flatnonzero(design.std(0) == 0)
    law[constant] -= (law * shift).sum() / design[0, constant]
    return law, sigma


def laws(frame: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """The law by both methods, without and with the clean accuracy.

    Args:
        frame: frames of `distances`, with the column `model`.
        resamples: number of bootstrap samples of the questions.

    Returns:
        Columns: `method`, `covariate`, the fields of `Law`, `low` and `high` (95 % bootstrap
        interval of the exponent: questions are drawn with replacement, each for all models
        together), `lowest` and `highest` (of the exponents if one number of parameters is left
        out).
    """
    models = of_models(frame)
    drawn: dict[tuple[str, bool], list[float]] = {}
    for again in _redrawn(frame, resamples):
        rows = frame.loc[np.repeat(frame.index, again)]
        some = of_models(rows)
        for covariate in (False, True):
            of_draw = _both(some, frame, covariate, again.astype(float))
            for method, law in of_draw.items():
                drawn.setdefault((method, covariate), []).append(law.exponent)
    result = []
    for covariate in (False, True):
        without = [
            _both(models[models["parameters"] != n], frame[frame["parameters"] != n], covariate)
            for n in sorted(set(models["parameters"]))
        ]
        for method, law in _both(models, frame, covariate).items():
            others = [one[method].exponent for one in without]
            exponents = drawn.get((method, covariate), [np.nan])
            low, high = np.quantile(exponents, [ALPHA / 2, 1 - ALPHA / 2])
            ends: dict[str, Any] = {"low": low, "high": high}
            ends |= {"lowest": min(others), "highest": max(others)}
            row = {"method": method, "covariate": covariate, **law._asdict(), **ends}
            result.append(row)
    return pd.DataFrame(result)


def _both(
    models: pd.DataFrame, frame: pd.DataFrame, covariate: bool, weights: Numbers | None = None
) -> dict[str, Law]:
    of_each = of_questions(frame, covariate, weights)
    return {MEDIANS: of_medians(models, covariate), TOBIT: of_each}


def _redrawn(frame: pd.DataFrame, resamples: int) -> Iterator[NDArray[np.int64]]:
    """How often each row counts, if the questions are drawn with replacement."""
    names, of_row = np.unique(frame["question"].to_numpy(str), return_inverse=True)
    generator = np.random.default_rng(0)
    for _ in range(resamples):
        drawn = generator.integers(len(names), size=len(names))
        yield np.bincount(drawn, minlength=len(names))[of_row]
