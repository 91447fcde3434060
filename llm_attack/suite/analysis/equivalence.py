"""Equivalence: are differences shown to be small? Imports neither torch nor lm-eval."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.stats import detectable, equivalence_test
from llm_attack.suite import plan
from llm_attack.suite.analysis.summary import MEAN, holm_over_tasks


def with_equivalence(table: pd.DataFrame, within: float | None) -> pd.DataFrame:
    """Adds equivalence tests to a table; returns it unchanged without `within`.

    Args:
        table: the result of `summarise` or `pairs.paired`.
        within: the equivalence margin in percentage points, chosen before the numbers were seen.

    Returns:
        The table with three more columns. `within` is the margin. `p_equivalence` is the p-value of
            `equivalence_test`: if it is small, the difference from `none` (or between the runs) is
            shown to be within the margin. `p_equivalence_holm` is adjusted over the tasks of a
            condition. A mean is one hypothesis and needs no adjustment.

    Raises:
        UsageError: `within` is not above 0 and at most 100, or nothing is compared.
    """
    if within is None:
        return table
    within = plan.within(within)
    measured = "drop" if "drop" in table else "difference"
    compared = table[measured].notna()
    if not compared.any():
        raise UsageError(f"equivalence={within:g}: needs the condition none and another one")
    table, tasks = table.assign(within=within, p_equivalence=np.nan), table["task"] != MEAN
    errors = table.loc[compared, "detectable"] / detectable([1])
    table.loc[compared, "p_equivalence"] = equivalence_test(
        table.loc[compared, measured], errors, within
    )
    table["p_equivalence_holm"] = table["p_equivalence"]
    table.loc[tasks, "p_equivalence_holm"] = holm_over_tasks(table[tasks], "p_equivalence")
    return table
