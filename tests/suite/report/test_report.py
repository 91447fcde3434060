"""What goes into report.html, without a browser: words, data, and that no text becomes markup."""

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
from llm_attack.suite.report.words import in_words

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
        ("wino", "bim@0.01", 0.5, 46.8, 0.001, GUESSES),
    ]
    mean = {"none": (0.966, 0.0), "random@0.01": (0.9533, 1.27), "bim@0.01": (0.4, 56.6)}
    assert in_words(table(rows, mean)) == [
        "Without an attack the model answers 96.6 % of the questions rightly (mean over three"
        " tasks, 3,900 questions); guessing would give 33.3 %. Even without an attack one of the"
        " three tasks is indistinguishable from guessing (wino).",
        "Random noise costs 1.3 points at amplitude 0.01 (95.3 % left; significant on one of the"
        " three tasks). Every task stays above guessing.",
        "BIM costs 56.6 points at amplitude 0.01 (40.0 % left; significant on all three tasks)."
        " Under bim@0.01 two of the three tasks are indistinguishable from guessing (piqa and wino)"
        " and one of the three tasks is below guessing (arc).",
    ]


def test_several_amplitudes_of_an_attack_are_one_paragraph():
    drops = {"none": 0.0, "fgsm@0.001": -0.34, "fgsm@0.002": -0.04, "fgsm@0.01": 3.1}
    rows = [
        (task, condition, 0.9 - drop / 100, drop, 0.04, GUESSES if drop > 3 else ABOVE)
        for condition, drop in drops.items()
        for task in ("arc", "piqa")
    ]
    assert in_words(table(rows, {c: (0.9 - d / 100, d) for c, d in drops.items()}))[1:] == [
        "FGSM gains 0.3 points at amplitude 0.001 (90.3 % left; significant on both tasks), costs"
        " 0.0 points at 0.002 (90.0 % left; significant on both tasks) and 3.1 points at 0.01"
        " (86.9 % left; significant on both tasks). Under fgsm@0.01 both tasks are"
        " indistinguishable from guessing."
    ]


def test_an_amplitude_of_nothing():
    drops = {"none": 0.0, "fgsm@0": 0.0}
    rows = [("arc", condition, 0.9, drop, 1.0, ABOVE) for condition, drop in drops.items()]
    _, fgsm = in_words(table(rows, {c: (0.9, d) for c, d in drops.items()}))
    assert "at amplitude 0 (90.0 % left" in fgsm


def test_one_task_is_named_and_not_counted():
    rows = [
        ("arc", "none", 0.9, 0.0, np.nan, ABOVE),
        ("arc", "fgsm@0.01", 0.4, 50.0, 0.2, ABOVE),
        ("arc", "bim@0.01", 0.3, 60.0, 0.001, GUESSES),
    ]
    mean = {"none": (0.9, 0.0), "fgsm@0.01": (0.4, 50.0), "bim@0.01": (0.3, 60.0)}
    assert in_words(table(rows, mean)) == [
        "Without an attack the model answers 90.0 % of the questions rightly (arc, 1,300"
        " questions); guessing would give 33.3 %.",
        "FGSM costs 50.0 points at amplitude 0.01 (40.0 % left; not significant). It stays above"
        " guessing.",
        "BIM costs 60.0 points at amplitude 0.01 (30.0 % left; significant). Under bim@0.01 arc is"
        " indistinguishable from guessing.",
    ]


def test_without_a_clean_run_nothing_is_said_of_costs():
    rows = [
        ("arc", "fgsm@0.01", 0.4, np.nan, np.nan, ABOVE),
        ("arc", "fgsm@0.02", 0.35, np.nan, np.nan, ABOVE),
    ]
    mean = {"fgsm@0.01": (0.4, np.nan), "fgsm@0.02": (0.35, np.nan)}
    assert in_words(table(rows, mean)) == [
        "The run has no condition without an attack to compare with (arc, 1,300 questions);"
        " guessing would give 33.3 %.",
        "FGSM leaves 40.0 % at amplitude 0.01 and 35.0 % at 0.02. It stays above guessing.",
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
    assert ("alt", "What it shows") in page.attributes and "Title" in page.said
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
    assert "demo under attack" in text and text.count("zero gradient fraction –") == 1
    for pair in ("limit –", "stop x, 1", "of k: 0.5", "seconds 106.26"):
        key, value = pair.split(" ", 1)
        assert re.search(rf"\b{key}\s+{re.escape(value)}", text), pair
    assert re.search(r"snr db\s+–\s+9.62945\b", text)
    assert re.search(r"zero gradient fraction\s+–\s+0\b", text)
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
    under = "mean drop, points 0.0 1.0 likelihood, nats – -1.50 gold margin, nats – -0.25"
    assert f"33.3 {under} signal/noise, dB – 12.5" in text


def test_a_figure_of_another_type_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"figure\.pdf.*\.svg or \.png"):
        write(tmp_path, figures=[("Title", "Text", tmp_path / "figure.pdf")])
    assert list(tmp_path.iterdir()) == []
