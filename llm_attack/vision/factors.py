"""A factorial experiment: which choice of the training decides what FGSM leaves?

No torch is imported here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.base.declare import again, parts, setting
from llm_attack.base.drawing import COLOURS, new_figure
from llm_attack.base.errors import invalid
from llm_attack.base.options import Numbers
from llm_attack.base.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.vision import fig2
from llm_attack.vision.settings import KNOWN, QUICK, Amplitude, shown

if TYPE_CHECKING:
    import pandas as pd

AUGMENTATIONS = ("none", "usual")
SCHEDULES = ("cycle", "steps", "constant")


@dataclass(frozen=True)
class Settings(fig2.SeveralNetworks):
    """The settings: one data set, and one or more networks, widths, seeds and factors."""

    attacks: str = again(fig2.Settings, "attacks", "fgsm,pgd,apgdt")
    steps: int = again(fig2.Settings, "steps", 20)
    label_smoothings: tuple[float, ...] = setting(
        (0.0, 0.1),
        "Shares of the labels that are spread over all classes in training",
        option=Numbers(Amplitude()),
        minimum=0,
        group="training",
    )
    augmentations: str = setting(
        "none,usual",
        "Augmentations, separated by commas: none, or usual, which follows --crop and --flip",
        group="training",
    )
    schedules: str = setting(
        "constant,cycle",
        f"Schedules of the learning rate, separated by commas: {', '.join(SCHEDULES)}",
        group="training",
    )


PRESETS = {
    "quick": Settings(**{**QUICK, "epochs": 4}, subset=100),
    "paper": Settings(
        dataset="cifar10", network="resnet18", width=0.25, epochs=8, subset=200, seeds=2
    ),
}
FACTORS = ["network", "width", "smoothing", "augmentation", "schedule"]
GAP = ("fgsm", "apgdt")
_DASHES = ("-", "--", ":")
DIAGNOSTICS = ("cosine", "kept", "zero", "vanished")


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Show which choice of the training decides what FGSM leaves.

    Every combination is trained. After every epoch, attacks and signs of masked gradients are
    measured. effects.csv shows what each choice changes.
    """
    import pandas as pd

    clock = Stopwatch()
    table = pd.DataFrame(_rows(settings, folder, clock))
    changes = effects(table)
    for name, frame in (("table", table), ("effects", changes)):
        write_text(folder / f"{name}.csv", as_csv(frame, "%.6g"))
    draw(folder)
    last = table[table["epoch"] == table["epoch"].max()]
    kept = last[last["condition"].isin(["all", *parts(settings.attacks)])]
    columns = [*FACTORS, "seed", "condition", "accuracy"]
    return {"last_epoch": kept[columns].round(4).to_dict("records"), "seconds": clock}


def _rows(settings: Settings, folder: Path, clock: Stopwatch) -> Iterator[dict[str, Any]]:
    """Trains and attacks all networks. Yields rows of `measure` with diagnostics."""
    from llm_attack.vision import stages
    from llm_attack.vision.data import load_dataset
    from llm_attack.vision.masked import gradients

    for name in ("load", "weights"):
        if getattr(settings, name) is not None:
            raise invalid(name, getattr(settings, name), "absent: networks are trained here")
    attacks = stages.listed("attacks", settings.attacks, KNOWN)
    augmentations = stages.listed("augmentations", settings.augmentations, AUGMENTATIONS)
    schedules = stages.listed("schedules", settings.schedules, SCHEDULES)
    names = stages.networks(settings)
    if "," in settings.dataset:
        raise invalid("dataset", settings.dataset, "one data set")
    smoothings = settings.label_smoothings
    combinations: list[dict[str, Any]] = [
        dict(zip(FACTORS, values, strict=True))
        for values in itertools.product(
            names, settings.widths, smoothings, augmentations, schedules
        )
    ]
    dataset = load_dataset(settings.dataset, settings)
    epsilon = stages.amplitude(settings, dataset)
    trainings = {}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for known in combinations:
            label = "-".join(f"{part}" for part in (dataset.name, *known.values(), seed))
            trainings[label] = (_settings_of(settings, known, seed), {**known, "seed": seed})
    for label, (own, known) in trainings.items():
        stages.kept_in(own, label)
        stages.untrained(dataset, known["network"], own)
    clock.lap("data")
    for label, (own, known) in trainings.items():
        few = dataset.test[: settings.subset]
        _, rows = stages.trained(
            dataset,
            known["network"],
            own,
            attacks,
            clock,
            label=label,
            besides=partial(gradients, images=few, epsilon=epsilon),
            state=stages.state_file(folder, label),
            epsilon=epsilon,
            subset=settings.subset,
            attacked_epochs=settings.attacked_epochs,
        )
        for row in rows:
            yield {**known, **row, "kept": _ratio(row["rise"], row["promised"])}


def _settings_of(settings: Settings, known: dict[str, Any], seed: int) -> Settings:
    """The settings of one training."""
    plain: Any = {"crop": 0, "flip": False} if known["augmentation"] == "none" else {}
    return replace(
        settings,
        width=settings.width * known["width"],
        label_smoothing=known["smoothing"],
        schedule=known["schedule"],
        seed=seed,
        **plain,
    )


def _ratio(rise: float | None, promised: float | None) -> float | None:
    return rise / promised if rise is not None and promised else None


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """The effect of each factor at the last epoch, all others equal, and the effect of the epochs.

    Args:
        table: rows of `table.csv`.

    Returns:
        A row for each factor, two of its levels (`before`, `after`), and each accuracy, each
            diagnostic, and the `gap`, which is the accuracy that FGSM leaves minus that of APGD-T.
            `difference` is the mean over the pairs of trainings that differ only in this factor,
            `pairs` is their number, and `low` and `high` are its 95 % interval. The interval is
            Student's t over the pairs, which are taken as independent. It is NaN for one pair.
    """
    import pandas as pd

    from llm_attack.vision.trends import t_interval

    keys = [*FACTORS, "seed", "epoch"]
    accuracies = table.pivot(index=keys, columns="condition", values="accuracy")
    accuracies = accuracies.drop(columns=["lowest", "highest", "all"], errors="ignore")
    once = table[table["condition"] == "none"].set_index(keys)[list(DIAGNOSTICS)]
    if {*GAP} <= {*accuracies}:
        accuracies["gap"] = accuracies[GAP[0]] - accuracies[GAP[1]]
    values = accuracies.rename(columns={"none": "clean"}).join(once).astype(float).reset_index()
    ends = (values["epoch"].min(), values["epoch"].max())
    rows = []
    for factor in ("epoch", *FACTORS):
        some = values if factor == "epoch" else values[values["epoch"] == ends[1]]
        levels = ends if factor == "epoch" else tuple(dict.fromkeys(some[factor]))
        others = [key for key in keys if key != factor]
        for before, after in itertools.combinations(dict.fromkeys(levels), 2):
            first, second = (
                some[some[factor] == level].drop(columns=factor).set_index(others)
                for level in (before, after)
            )
            for name, changes in (second - first).items():
                mean, low, high = t_interval(changes.dropna())
                rows.append(
                    {
                        **{"factor": factor, "before": before, "after": after, "of": name},
                        **{"pairs": int(changes.notna().sum())},
                        **{"difference": mean, "low": low, "high": high},
                    }
                )
    columns = ["factor", "before", "after", "of", "pairs", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def draw(folder: Path) -> None:
    """Draws table.csv: accuracies above, the cosine of gradients below, against epoch.

    There is a column for each smoothing and augmentation. Dashes show the schedule.
    """
    import pandas as pd

    table = pd.read_csv(folder / "table.csv", keep_default_na=False, na_values=[""])
    panels = list(table.groupby(["smoothing", "augmentation"], sort=False))
    schedules = list(table["schedule"].unique())
    attacks = [name for name in table["condition"].unique() if name not in fig2.NOT_ATTACKS]
    colours = {"all": COLOURS[-1], **dict(zip(attacks, COLOURS, strict=False))}
    with new_figure(folder, (2.2 * len(panels) + 1.8, 4.4)) as figure:
        axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
        for ((smoothing, augmentation), panel), (above, below) in zip(panels, axes.T, strict=True):
            for line, schedule in zip(_DASHES, schedules, strict=False):
                those = panel[panel["schedule"] == schedule]
                for _, one in those.groupby(["network", "width", "seed"]):
                    for condition, colour in colours.items():
                        curve = one[one["condition"] == condition]
                        look: Any = {"color": colour, "linestyle": line, "linewidth": 1.1}
                        above.plot(curve["epoch"], curve["accuracy"], **look)
                    curve = one[one["condition"] == "none"]
                    below.plot(curve["epoch"], curve["cosine"], color=COLOURS[-1], linestyle=line)
            above.set_title(f"smoothing {smoothing:g},\naugmentation {augmentation}", fontsize=8)
            below.set_xlabel("epoch")
            below.axhline(0, color="0.5", linewidth=0.6)
            below.xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].set(ylabel="accuracy", ylim=(-0.03, 1.03))
        axes[1, 0].set(ylabel="cosine of the gradients\nat x and x + δ")
        figure.legend(handles=_legend(colours, schedules), loc="outside right center")


def _legend(colours: dict[str, str], schedules: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    names = {"all": "clean"}
    lines = [
        Line2D([], [], color=colour, label=names.get(name, shown(name)))
        for name, colour in colours.items()
    ]
    dashes: Any = zip(_DASHES, schedules, strict=False)
    return [*lines, *(Line2D([], [], color="0.4", ls=line, label=name) for line, name in dashes)]


# Networks are trained here, so none is loaded. The factors have their own options.
_NO_OPTIONS = ("load", "weights", "momentum", "label_smoothing", "schedule", "stop_at")

COMMAND = figure_command(
    "factors", PRESETS, run, "llm_attack.vision.settings:with_recipe", without=_NO_OPTIONS
)
