"""The content of report.html, without a browser: words and data; no text becomes markup."""

import base64
import gzip
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from report_input import HOSTILE, build, table, table_of

from llm_attack.suite.report.page import columns, write_report
from llm_attack.suite.report.words import headlines, in_words, of_fixed, strongest

ABOVE, GUESSES, BELOW = "above guessing", "indistinguishable from guessing", "below guessing"
RUN = {
    "command": ["llm-attack", "run", "--model", "a b"],
    "model": "models/demo",
    "model_name": "demo",
    "settings": {"limit": None, "stop": ["x", 1], "of": {"k": 0.5}},
    "attacks": {
        "none": {"epsilon": 0.01},
        "fgsm@0.01": {"snr_db": 9.6294516, "zero_gradient_fraction": 0.0},
    },
    "seconds": 106.26,
}


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.said = [], [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())


def data_of(path):
    packed = re.search(r'id="data">([^<]*)</script>', path.read_text("utf-8"))[1]
    return json.loads(gzip.decompress(base64.b64decode(packed, validate=True)))


def write(folder, samples=None, questions=None, figures=(), run=RUN, tables=None):
    if samples is None:
        samples, questions = build(12)
    tables = table_of(samples) if tables is None else tables
    return write_report(folder, samples, questions, tables, figures, run)


# ---- words


def test_the_table_in_words():
    rows = [
        ("arc", "none", 0.95, 0.0, np.nan, ABOVE),
        ("piqa", "none", 0.98, 0.0, np.nan, ABOVE),
        ("wino", "none", 0.968, 0.0, np.nan, GUESSES),
        ("arc", "random@0.01", 0.93, 2.0, 0.06, ABOVE),
        ("piqa", "random@0.01", 0.97, 1.0, 0.05, ABOVE),
        ("wino", "random@0.01", 0.96, 0.8, 0.2, ABOVE),
        ("arc", "bim@0.01", 0.2, 75.0, 0.001, BELOW),
        ("piqa", "bim@0.01", 0.5, 48.0, 0.001, GUESSES),
        ("wino", "bim@0.01", 0.6, 46.8, 0.001, ABOVE),
    ]
    mean = {"none": (0.966, 0.0), "random@0.01": (0.9533, 1.27), "bim@0.01": (0.4, 56.6)}
    frame = table(rows, mean)
    ends = (frame["task"] == "mean") & (frame["condition"] == "bim@0.01")
    frame.loc[ends, ["drop_low", "drop_high"]] = 54.2, 58.9
    assert in_words(frame) == [
        "No attack: 96.6 % right (91.6 to 101.6 %; mean over three tasks, 3,900 questions)."
        " Guessing gives 33.3 %. Not above guessing even without an attack: wino.",
        "Random noise at 0.01: costs 1.3 points, 95.3 % left. Every task stays above guessing.",
        "BIM at 0.01: costs 56.6 points (54.2 to 58.9), 40.0 % left. Two of the three tasks are not"
        " above guessing.",
    ]
    assert headlines(frame) == [
        ("96.6 %", "without an attack", "91.6 to 101.6 %"),
        ("40.0 %", "under the strongest attack, BIM at 0.01", "35.0 to 45.0 %"),
        ("33.3 %", "by guessing", ""),
    ]


def ladder(drops, p, verdicts, detectable=1.5):
    """Of one attack at several amplitudes, on two tasks; guesses give a third."""
    names = ["none", *(f"fgsm@{epsilon}" for epsilon in (0.001, 0.002, 0.01)[: len(drops)])]
    each = list(zip(names, [0.0, *drops], [np.nan, *p], [ABOVE, *verdicts], strict=True))
    rows = [(t, c, 0.9 - d / 100, d, q, v) for c, d, q, v in each for t in ("arc", "piqa")]
    return table(rows, {c: (0.9 - d / 100, d) for c, d, *_ in each}).assign(detectable=detectable)


def test_several_amplitudes_of_an_attack_are_one_line():
    """What the largest costs, from which on it is seen, and from which on nothing is left."""
    (said,) = in_words(ladder((0.34, 60, 80), (0.9, 0.01, 0.01), (ABOVE, GUESSES, BELOW)))[1:]
    assert said == (
        "FGSM at 0.01: costs 80.0 points, 10.0 % left. Below 0.002 no detectable change. From 0.002"
        " on nothing is left above guessing."
    )
    # a mean above that of guesses is something, whatever few questions can show
    (said,) = in_words(ladder((0.34, 50, 80), (0.9, 0.01, 0.01), (ABOVE, GUESSES, BELOW)))[1:]
    assert said.endswith(" Below 0.002 no detectable change. Nothing is left above guessing.")
    # what a larger amplitude leaves is left
    (said,) = in_words(ladder((60, 70, 50), (0.01, 0.01, 0.01), (GUESSES, BELOW, ABOVE)))[1:]
    assert said == "FGSM at 0.01: costs 50.0 points, 40.0 % left. Every task stays above guessing."


def test_what_is_not_seen_is_told_with_what_could_be():
    (said,) = in_words(ladder((0.34, -0.1, 1.0), (0.9, 0.7, 0.2), (ABOVE, ABOVE, ABOVE)))[1:]
    assert said == (
        "FGSM at 0.001 to 0.01: no detectable change (89.0 to 90.1 %; with 2,600 questions we could"
        " detect 1.5 points)."
    )
    (said,) = in_words(ladder((0.34,), (0.9,), (ABOVE,)))[1:]
    assert said.startswith("FGSM at 0.001: no detectable change (89.7 %; with 2,600 questions")
    (said,) = in_words(ladder((20, 0.3), (0.01, 0.8), (ABOVE, ABOVE)))[1:]
    assert "at 0.002: no detectable change (89.7 %), but at 0.001 there is one." in said
    (said,) = in_words(ladder((-4.0,), (0.01,), (ABOVE,)))[1:]
    assert said.startswith("FGSM at 0.001: gains 4.0 points, 94.0 % right.")


@pytest.mark.parametrize(
    ("about", "info", "says"),
    [
        (
            {"share": "all", "fitted_to": "134", "attack": "apgd", "amplitude": "0.3rms"},
            {"embedding_rms": 0.02},
            "is universal (all). It was fitted to 134 questions under demo by apgd@0.3rms.",
        ),
        (
            {"condition": "bim@0.3rms"},
            {"hookpoint_rms": 0.02},
            "was found for each question under demo by bim@0.3rms.",
        ),
    ],
)
def test_where_a_fixed_perturbation_is_from(about, info, says, tmp_path):
    about |= {"model": "demo", "norm": "linf", "epsilon_absolute": 0.006}
    attacks = {"none": {"attack": "none"}, "fixed@0.006": {"attack": "fixed", **info}}
    run = {"perturbation": about, "attacks": attacks}
    size = "Its amplitude is in absolute units: 0.006 in the norm"
    expected = [f"The fixed perturbation {says}", f"{size} linf, or 0.3 RMS of this model."]
    assert of_fixed(run) == expected
    about["norm"] = "l2_token"  # in which one RMS has another length
    assert of_fixed(run)[1] == f"{size} l2_token."
    assert of_fixed({"attacks": attacks}) == of_fixed({"perturbation": about}) == []
    attacks = {name: {**RUN, **of_attack} for name, of_attack in attacks.items()}
    page = Page(write(tmp_path, run={"model": "m", "perturbation": about, "attacks": attacks}))
    assert f"The fixed perturbation {says}" in page.text


def test_the_strongest_attack():
    """The one that costs most; of equals the smaller; neither none nor a worst of several."""
    assert strongest(ladder((10, 50, 50), [0.01] * 3, [ABOVE] * 3)) == "fgsm@0.002"
    frame = ladder((10, 20), [0.01] * 2, [ABOVE] * 2)
    worst = frame["condition"] == "fgsm@0.002"
    assert strongest(frame.assign(attack=frame["attack"].mask(worst, "worst"))) == "fgsm@0.001"
    assert strongest(frame[frame["condition"] == "none"]) is None
    alone = frame[frame["condition"] != "none"].assign(drop=np.nan)
    assert strongest(alone) == "fgsm@0.002"
    assert strongest(alone.assign(better="lower")) == "fgsm@0.001"


def test_an_amplitude_of_nothing():
    drops = {"none": 0.0, "fgsm@0": 0.0}
    rows = [("arc", condition, 0.9, drop, 1.0, ABOVE) for condition, drop in drops.items()]
    _, fgsm = in_words(table(rows, {c: (0.9, d) for c, d in drops.items()}))
    assert fgsm == "FGSM at 0: no detectable change (90.0 %)."


def test_one_task_is_named_and_not_counted():
    rows = [
        ("arc", "none", 0.9, 0.0, np.nan, ABOVE),
        ("arc", "fgsm@0.01", 0.4, 50.0, 0.2, ABOVE),
        ("arc", "bim@0.01", 0.34, 56.0, 0.001, GUESSES),
    ]
    mean = {"none": (0.9, 0.0), "fgsm@0.01": (0.4, 50.0), "bim@0.01": (0.34, 56.0)}
    assert in_words(table(rows, mean)) == [
        "No attack: 90.0 % right (85.0 to 95.0 %; arc, 1,300 questions). Guessing gives 33.3 %.",
        "FGSM at 0.01: no detectable change (40.0 %).",
        "BIM at 0.01: costs 56.0 points, 34.0 % left. It is not above guessing.",
    ]


def test_without_a_clean_run_nothing_is_said_of_costs():
    rows = [
        ("arc", "fgsm@0.01", 0.4, np.nan, np.nan, ABOVE),
        ("arc", "fgsm@0.02", 0.35, np.nan, np.nan, ABOVE),
    ]
    mean = {"fgsm@0.01": (0.4, np.nan), "fgsm@0.02": (0.35, np.nan)}
    assert in_words(table(rows, mean)) == [
        "The run has no condition without an attack to compare with (arc, 1,300 questions)."
        " Guessing gives 33.3 %.",
        "FGSM at 0.02: 35.0 % left (30.0 to 40.0 %). It stays above guessing.",
    ]


# ---- data


def test_the_page_holds_every_question_and_answer(tmp_path):
    samples, questions = build()
    data = data_of(write(tmp_path, samples, questions.sample(frac=1, random_state=0)))
    assert data == columns(samples, questions)
    by_place = samples.set_index(["task", "doc_id", "condition"])
    texts = questions.set_index(["task", "doc_id"])
    assert len(data["id"]) == len(texts) == 180
    assert data["tasks"] == ["piqa", "arc", "Wino"]
    for i, (task, doc_id) in enumerate(zip(data["task"], data["id"], strict=True)):
        place = data["tasks"][task], doc_id
        assert data["question"][i] == texts.loc[place, "question"]
        assert data["choices"][i] == texts.loc[place, "choices"]
        assert data["gold"][i] == texts.loc[place, "gold"]
        for c, condition in enumerate(data["conditions"]):
            answer = by_place.loc[(*place, condition)]
            assert data["prediction"][c][i] == answer["prediction"]
            assert data["cosine"][i] == pytest.approx(answer["cosine"], abs=5e-5)
            values = [x if math.isfinite(x) else None for x in answer["log_likelihoods"]]
            assert data["log_likelihoods"][c][i] == values


def test_what_is_missing_is_null():
    samples, questions = build(3)
    samples["cosine"] = None
    samples["prediction"] = samples["prediction"].astype("Int64")
    data = columns(samples.drop(index=5), questions)  # the second question under random@0.01
    assert data["prediction"][1][1] is None and data["log_likelihoods"][1][1] is None
    assert None not in data["prediction"][0] + data["log_likelihoods"][0]
    assert data["cosine"] == [None] * 9


def test_frames_may_come_from_parquet_files(tmp_path):
    samples, questions = build(9)
    for name, frame in (("s", samples), ("q", questions)):
        frame.to_parquet(tmp_path / name)
    stored = columns(pd.read_parquet(tmp_path / "s"), pd.read_parquet(tmp_path / "q"))
    assert stored == columns(samples, questions)


def test_log_likelihoods_are_rounded_to_four_decimals():
    samples, questions = build(1, tasks=("arc",), conditions=["none"])
    samples.at[0, "log_likelihoods"] = [-1.23456, -0.00004]
    assert columns(samples, questions)["log_likelihoods"] == [[[-1.2346, -0.0]]]


def test_rounding_is_exact():
    """As `round` does it, also half-way between two decimals and where 1e4 times a number is not
    exact; what is no number is None.
    """
    rng = np.random.default_rng(0)
    near = np.nextafter(rng.integers(-(10**6), 10**6, 500) / 1e4 + 5e-5, [[-np.inf], [np.inf]])
    numbers = [*rng.normal(0, 50, 500), *near.ravel(), 2.00005, -0.00004, 1e13 / 3, 0.0, 1e300]
    samples, questions = build(1, tasks=("arc",), conditions=["none"])
    samples.at[0, "log_likelihoods"] = [*numbers, np.nan, -np.inf]
    ((found,),) = columns(samples, questions)["log_likelihoods"]
    assert list(map(repr, found)) == [*(repr(round(float(x), 4)) for x in numbers), "None", "None"]


def test_a_question_without_text_is_an_error():
    samples, questions = build(3)
    with pytest.raises(ValueError, match="1 of 9 questions"):
        columns(samples, questions.drop(index=4))


# ---- page


def test_equal_input_gives_equal_bytes(tmp_path, monkeypatch):
    paths = []
    for seconds in (1, 2):  # since 1970
        monkeypatch.setattr("time.time", lambda seconds=seconds: seconds)
        paths.append(write(tmp_path / "ab"[seconds - 1]))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0] == tmp_path / "a" / "report.html"
    assert [path.name for path in paths[0].parent.iterdir()] == ["report.html"]


def test_the_page_refers_to_nothing_outside_and_allows_only_its_own_script(tmp_path):
    figure = tmp_path / "figure.svg"
    figure.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    page = Page(write(tmp_path, figures=[("Title", "What it shows", figure)]))
    sources = [v for k, v in page.attributes if k in ("src", "href", "action", "srcset", "data")]
    assert all(source.startswith(("#", "data:")) for source in sources)
    assert ("alt", "What it shows") in page.attributes and "Title" in page.text
    image = next(source for source in sources if source.startswith("data:image"))
    assert base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")) == figure.read_bytes()
    policy = next(v for k, v in page.attributes if v and v.startswith("default-src 'none';"))
    assert "unsafe" not in policy and "http" not in policy


def test_no_text_becomes_markup(tmp_path):
    samples, questions = build(3, tasks=("a", "b"))

    def page(text):
        # the letter first: pandas before 3 compares keys up to a NUL only
        names = {"a": f"a{text}", "b": f"b{text}"}
        run = {"command": f"{text}.", "settings": {f"x{text}": text}, "attacks": {f"{text}.": RUN}}
        renamed = (frame.replace({"task": names}) for frame in (samples, questions))
        return Page(write(tmp_path, *renamed, run={**run, "model": f"{text}.", f"y{text}": 1}))

    harmless = page("text")
    for text in HOSTILE:
        hostile = page(text)
        assert Counter(hostile.tags) == Counter(harmless.tags)
        assert len(hostile.attributes) == len(harmless.attributes)
        assert hostile.text.count(" ".join(text.split())) >= 10


def test_the_style_and_the_script_do_not_end_early(tmp_path):
    html = write(tmp_path).read_text("utf-8")
    assert html.count("</script") == html.count("<script") == 2
    assert html.count("</style") == html.count("<style") == 1
    assert "<!--" not in html


def test_how_it_was_made(tmp_path):
    text = Page(write(tmp_path)).text
    assert text.count("llm-attack run --model 'a b'") == 1
    assert "demo under attack" in text
    for pair in ("limit –", "stop x, 1", "of k: 0.5", "seconds 106.26"):
        key, value = pair.split(" ", 1)
        assert re.search(rf"\b{key}\s+{re.escape(value)}", text), pair
    heading = "condition epsilon snr db zero gradient fraction"
    assert f"{heading} none 0.01 – – fgsm@0.01 – 9.62945 0" in text
    attacks = {
        "none": {"epsilon": 0},
        "a": {"epsilon": 1, "steps": 3},
        "b": {"epsilon": 2, "steps": 3},
    }
    text = Page(write(tmp_path, run={"attacks": attacks})).text
    assert "condition epsilon none 0 a 1 b 2 " in text
    assert "The same for all attacks steps 3 " in text
    assert "Accuracy under attack" in Page(write(tmp_path, run={})).text
    half_a_pair = {"command": "run \ud83e"}  # from arguments that are not valid UTF-8
    assert "run ?" in Page(write(tmp_path, run=half_a_pair)).text


def test_the_table_of_accuracies(tmp_path):
    samples, questions = build(12)
    rows = [(t, c, 0.25, 1.0, 0.5, BELOW) for t in ("piqa", "arc") for c in ("none", "bim@0.1")]
    tables = table(rows, {"none": (0.5, 0.0), "bim@0.1": (0.625, 1.0)})
    tables.loc[5, ["acc_low", "acc_high"]] = np.nan
    text = Page(write(tmp_path, samples, questions, tables=tables)).text
    row = "25.0 20.0–30.0 below guessing"
    assert f"piqa {row} {row} 33.3 arc {row} {row} 33.3 mean 50.0 45.0–55.0 62.5 33.3" in text
    measures = "mean drop, points likelihood, nats gold margin, nats signal/noise, dB"
    assert f"condition {measures} none 0.0 – – – bim@0.1 1.0 -1.50 -0.25 12.5" in text


def test_the_first_table_has_one_condition_of_each_attack_where_there_are_many(tmp_path):
    names = ["none", *(f"{a}@{e}" for a in ("random", "fgsm") for e in (0.01, 0.02, 0.03))]
    samples, questions = build(6, conditions=names)
    page = Page(write(tmp_path, samples, questions))
    labels = [v for k, v in page.attributes if k == "data-label"]
    first = ["none", "random@0.03", "fgsm@0.03", "guessing"]
    assert labels[: 4 * len(first)] == first * 4
    tasks = ["piqa", "arc", "Wino", "mean"]
    assert labels[4 * len(first) :][: 8 * 4] == tasks * 8  # a row for each condition, and guessing
    assert page.text.count("of each attack the largest amplitude") == 1
    rows = " ".join(f"{name} [^@]*?" for name in [*names[1:], "guessing"])
    assert re.search(f"condition piqa arc Wino mean none .*?{rows}33.3 33.3 33.3 33.3", page.text)


def test_a_figure_of_another_type_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"figure\.pdf.*\.svg or \.png"):
        write(tmp_path, figures=[("Title", "Text", tmp_path / "figure.pdf")])
    assert list(tmp_path.iterdir()) == []
