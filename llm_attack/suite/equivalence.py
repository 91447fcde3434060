"""Whether differences are shown to be small. Imports neither torch nor lm-eval."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_attack.errors import UsageError
from llm_attack.inference import equivalence_test
from llm_attack.suite import plan
from llm_attack.suite.changes import effective
from llm_attack.suite.summary import MEAN, holm_over_tasks


def with_equivalence(table: pd.DataFrame, within: float | None) -> pd.DataFrame:
    """A table and, where `within` is given, whether its differences are that small at most.

    Args:
        table: of `summarise`, or of `pairs.paired`.
        within: points of a percent, stated before the numbers were seen.

    Returns:
        The table, with three columns more: `within`, `p_equivalence` (`equivalence_test`: small
        where the difference from `none`, or between the runs, is shown to be no larger), and
        `p_equivalence_holm`, adjusted over the tasks of a condition; of a mean there is one.

    Raises:
        UsageError: `within` is not above 0 and at most 100, or nothing is compared.
    """
    if within is None:
        return table
    within = plan.within(within)
    compared = table["lost"].notna()
    if not compared.any():
        raise UsageError(f"equivalence={within:g}: must go with conditions beside none, and none")
    table, tasks = table.assign(within=within, p_equivalence=np.nan), table["task"] != MEAN
    for condition in table.loc[compared, "condition"].unique():
        here = compared & (table["condition"] == condition)
        down, up, n = effective(table[here & tasks])
        each = equivalence_test(down[:, None], up[:, None], n[:, None], within / 100)
        table.loc[here & tasks, "p_equivalence"] = each
        pooled = equivalence_test(down, up, n, within / 100)
        table.loc[here & ~tasks, "p_equivalence"] = pooled
    table["p_equivalence_holm"] = table["p_equivalence"]
    table.loc[tasks, "p_equivalence_holm"] = holm_over_tasks(table[tasks], "p_equivalence")
    return table
