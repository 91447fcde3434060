"""Word sentiment: cosines against torch.nn, word by word; splits; files."""

import functools
import json
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from llm_attack.base.errors import UsageError
from llm_attack.theory import bands, sentiment
from llm_attack.theory.bands import MANY
from llm_attack.theory.fig6 import draw, run, run_kind, trends
from llm_attack.theory.lexicon import LABELS, encode
from llm_attack.theory.sentiment import SentimentModel, cosines, summary
from llm_attack.theory.settings import MEASURED, Kind, SentimentSettings
from llm_attack.theory.stacked import StackedMLP, generators

SMALL = {"embedding_sizes": (2, 3), "seeds": 2, "epochs": 3, "width": 5, "device": "cpu"}


def table(n, seed=0):
    """Words of random letters, with random labels; only a memory can tell their labels."""
    draw = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (n, 6), generator=draw)
    words = ["".join(map(chr, row)) for row in letters.tolist()]
    labels = [LABELS[i] for i in torch.randint(3, (n,), generator=draw).tolist()]
    return pd.DataFrame({"word": words, "language": "en", "label": labels})


@pytest.fixture(scope="module")
def words_csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.csv"
    words = table(90)
    words.loc[len(words)] = ("好", "zh", "positive")
    words.to_csv(path, index=False)
    return str(path)


def test_cosines_word_by_word():
    """With layers of torch.nn, and a word's own characters alone as the point."""
    words = ["a", "abba", "cab", "bc"]
    ids, count = encode(words)
    model = SentimentModel(count, ids.shape[1], 3, 7, generators(0, 2))
    labels = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    right, cosine = cosines(model, ids.expand(2, -1, -1), labels)
    assert right.shape == cosine.shape == (2, 4)
    for seed in range(2):
        for i, word in enumerate(words):
            point = model.table[seed, ids[i, : len(word)]].detach().requires_grad_(True)
            x = F.pad(point.flatten(), (0, 3 * (4 - len(word))))
            for weight, bias in zip(model.classifier.weights, model.classifier.biases, strict=True):
                last = x @ weight[seed] + bias[seed, 0]
                x = last.tanh()
            assert right[seed, i] == (last.argmax() == labels[seed, i])
            F.cross_entropy(last, labels[seed, i]).backward()
            expected = F.cosine_similarity(point.flatten(), point.grad.flatten(), dim=0)
            assert cosine[seed, i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_padding_is_zero_and_stays_so():
    ids, count = encode(["a", "bcd"])
    model = SentimentModel(count, 3, 2, 4, generators(0, 2))
    point = model.embed(ids.expand(2, -1, -1))
    assert (point[:, 0, 1:] == 0).all()
    assert (point[:, 1] != 0).all()
    point.sum().backward()
    assert (model.table.grad[:, 0] == 0).all()
    assert (model.table.grad[:, 1:] == 1).all()


def test_a_linear_classifier_has_cosine_minus_one():
    """Where the embedding is what speaks for the label, the loss falls along it."""
    ids, count = encode(["ab"])
    model = SentimentModel(count, 2, 2, 1, generators(0, 1))
    row = model.table[0, 1:].detach().flatten()
    model.forward = lambda point: torch.stack(
        [point.flatten(2) @ row, point.flatten(2) @ -row, 0 * point[..., 0, 0]], -1
    )
    for label, sign in ((0, -1), (1, 1)):
        right, cosine = cosines(model, ids[None], torch.tensor([[label]]))
        assert right.item() == (label == 0)
        assert cosine.item() == pytest.approx(sign, abs=1e-6)


def test_summary():
    right = torch.tensor([[True, False, True, False], [True, True, True, True]])
    cosine = torch.tensor([[0.1, 0.5, 0.3, -0.1], [0.4, 0.4, 0.0, 0.0]])
    found = summary(right, cosine)
    assert tuple(found) == MEASURED
    assert found["accuracy"] == [0.5, 1.0] and found["wrong"] == [2, 0]
    assert found["cosine_right"] == pytest.approx([0.2, 0.2])
    assert found["cosine_wrong"][0] == pytest.approx(0.2)
    assert math.isnan(found["cosine_wrong"][1])


@pytest.fixture
def exact(monkeypatch):
    """Training in float64, so that no word's class is a matter of rounding."""
    exact = functools.partial(StackedMLP, dtype=torch.float64)
    monkeypatch.setattr(sentiment, "StackedMLP", exact)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_seed_in_company_is_that_seed_alone(exact):
    both = run_kind(table(60), Kind(3), SentimentSettings(**SMALL))
    alone = run_kind(table(60), Kind(3), SentimentSettings(**{**SMALL, "seeds": 1}, seed=1))
    ours = both[both.seed == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, alone, rtol=1e-9, atol=1e-9)
    assert both.groupby(["epoch", "split"]).size().to_dict() == {
        (epoch, split): 2 for epoch in range(4) for split in ("test", "train")
    }
    assert (both["size"] == 3).all()


def test_words_held_out_are_not_learnt():
    """Labels are random: what was seen is learnt by heart, the rest is guessed."""
    settings = SentimentSettings(
        seeds=3, epochs=60, learning_rate=0.05, test_share=0.5, device="cpu"
    )
    found = run_kind(table(120), Kind(4), settings)
    last = found[found.epoch == 60].groupby("split").accuracy
    assert last.min()["train"] == 1
    assert last.max()["test"] < 0.6


def test_the_share_held_out():
    """Accuracies are multiples of one word."""
    found = run_kind(table(50), Kind(2), SentimentSettings(**SMALL, test_share=0.14))
    for split, n in (("test", 7), ("train", 43)):
        counts = found[found.split == split].accuracy * n
        assert (counts - counts.round()).abs().max() < 1e-9


def test_what_is_written(tmp_path, words_csv):
    for folder in "ab":
        settings = SentimentSettings(**SMALL, words=words_csv)
        results = run(settings, tmp_path / folder)
    names = ["curves.csv", "figure.png", "figure.svg", "networks.csv"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    curves = pd.read_csv(tmp_path / "a" / "curves.csv")
    assert len(curves) == 2 * 4 * 2  # sizes, epochs, splits
    last = curves[(curves.epoch == 3) & (curves["size"] == 2) & (curves.split == "test")].iloc[0]
    networks = pd.read_csv(tmp_path / "a" / "networks.csv")
    assert len(networks) == 2 * 2 * 2  # sizes, seeds, splits
    found = networks[(networks["size"] == 2) & (networks.split == "test")]
    for name in MEASURED:
        assert last[f"{name}_mean"] == pytest.approx(sum(found[name]) / 2, abs=1e-4)
        assert last[f"{name}_min"] == pytest.approx(min(found[name]), abs=1e-4)
        assert last[f"{name}_max"] == pytest.approx(max(found[name]), abs=1e-4)
    assert sum(results["words"]["en"].values()) == 90
    assert results["words"]["zh"] == {"negative": 0, "neutral": 0, "positive": 1}
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize("epochs", (3, 2 * MANY))
def test_the_figure_is_drawn_from_the_file(tmp_path, epochs):
    """Curves of many epochs are pixels in the SVG; text and axes are not."""
    columns = [f"{name}_{end}" for name in MEASURED for end in ("mean", "min", "max")]
    rows = [[2, e, s, *[0.5] * 9, *[30] * 3] for e in range(epochs + 1) for s in ("test", "train")]
    table = pd.DataFrame(rows, columns=["size", "epoch", "split", *columns])
    table.to_csv(tmp_path / "curves.csv", index=False)
    networks = pd.DataFrame([Kind(2)]).assign(split="test", accuracy=0.5)
    networks.to_csv(tmp_path / "networks.csv", index=False)
    draw(tmp_path)
    text = (tmp_path / "figure.svg").read_text()
    assert text.count("<image") == (3 if epochs > MANY else 0)  # one a panel
    assert "embedding size 2</text>" in text
    assert text.count("\n") < 1000


def test_the_cosine_of_few_wrong_words_is_not_drawn(tmp_path, monkeypatch):
    """Of training words there are 20 up to epoch 5; of test words there are always enough."""
    columns = [f"{name}_{end}" for name in MEASURED for end in ("mean", "min", "max")]
    rows = [
        [2, e, s, *[0.5] * 9, *[25 - e if s == "train" else 90] * 3]
        for e in range(11)
        for s in ("test", "train")
    ]
    table = pd.DataFrame(rows, columns=["size", "epoch", "split", *columns])
    table.to_csv(tmp_path / "curves.csv", index=False)
    pd.DataFrame([Kind(2)]).assign(split="test").to_csv(tmp_path / "networks.csv", index=False)
    drawn, shaded = {}, bands.shaded

    def seen(ax, table, column, colour, **options):
        drawn[(column, options["label"])] = table["epoch"].max()
        shaded(ax, table, column, colour, **options)

    monkeypatch.setattr(bands, "shaded", seen)
    draw(tmp_path)
    assert drawn[("cosine_wrong", "wrong, train")] == 5
    assert drawn[("cosine_wrong", "wrong, test")] == drawn[("wrong", "wrong, train")] == 10


def test_no_wrong_words_have_no_cosine(tmp_path, words_csv):
    settings = {**SMALL, "epochs": 60, "embedding_sizes": (4,), "learning_rate": 0.05, "width": 64}
    results = run(SentimentSettings(**settings, words=words_csv), tmp_path)
    networks = pd.read_csv(tmp_path / "networks.csv")
    learnt = networks[networks.split == "train"]
    assert learnt["accuracy"].tolist() == [1, 1] and learnt["cosine_wrong"].isna().all()
    assert results["trends"]["cosine_right"]["correlation"] is None  # of one kind
    json.dumps(results, allow_nan=False)


def test_pieces_of_words():
    """Overlapping, in the order of the word; a shorter word is one."""
    ids, count = encode(["abab", "b", "ba"], 2)
    assert count == 4  # ab, b, ba, and the padding
    assert ids.tolist() == [[1, 3, 1], [2, 0, 0], [3, 0, 0]]


def test_shares_and_noise(monkeypatch):
    """What is learnt from: so many words, and of them so many with another label."""
    seen = []
    measure = sentiment.cosines
    monkeypatch.setattr(
        sentiment,
        "cosines",
        lambda m, ids, labels: seen.append((ids, labels)) or measure(m, ids, labels),
    )
    settings = SentimentSettings(seeds=2, epochs=1, test_share=0.2, width=4, device="cpu")
    words = table(100)
    for kind in (Kind(2), Kind(2, train_share=0.25), Kind(2, train_share=0.25, noise=0.5)):
        run_kind(words, kind, settings)
    whole, part, noisy = (seen[i] for i in (0, 2, 4))
    assert (whole[0].shape[1], part[0].shape[1], noisy[0].shape[1]) == (100, 40, 40)
    for now in (part, noisy):
        assert torch.equal(now[0], whole[0][:, :40])
    assert torch.equal(part[1], whole[1][:, :40])
    changed = noisy[1] != part[1]
    assert changed[:, 20:30].all() and changed.sum() == 20  # ten of twenty words, in each seed
    assert len(noisy[1][:, 20:30].unique()) == 3


def test_trends():
    """Of the kinds' means, on new words, in units of 1 / √size."""
    rows = [
        {**Kind(size, noise=noise)._asdict(), "split": split, "accuracy": 0.9 - noise + seed / 100}
        | {"cosine_right": -(0.9 - noise) / size**0.5 * (split == "test"), "cosine_wrong": 0.1}
        for size in (4, 16)
        for noise in (0.1, 0.2, 0.4)
        for seed in (0, 1)
        for split in ("test", "train")
    ]
    found = trends(pd.DataFrame(rows))
    assert found["cosine_right"]["correlation"] == pytest.approx(-1)
    assert found["cosine_right"]["kinds"] == 6
    assert found["cosine_right"]["high"] < 0 and found["cosine_right"]["p"] < 0.05
    assert found["cosine_wrong"]["low"] < 0 < found["cosine_wrong"]["high"]


def test_networks_that_differ_are_points(tmp_path, words_csv):
    settings = {**SMALL, "embedding_sizes": (2,), "label_noise": (0.0, 0.5), "ngrams": (1, 2)}
    run(SentimentSettings(**settings, words=words_csv), tmp_path)
    text = (tmp_path / "figure.svg").read_text()
    assert "accuracy on new words</text>" in text
    networks = pd.read_csv(tmp_path / "networks.csv")
    assert networks.groupby(["ngram", "noise"]).size().tolist() == [4] * 4  # seeds and splits


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"embedding_sizes": (4, 0)}, r"embedding_sizes=\(4, 0\): must be .*1 or more"),
        ({"embedding_sizes": ()}, r"embedding_sizes=\(\): must be .*1 or more"),
        ({"epochs": 0}, "epochs=0: must be an integer, 1 or more"),
        ({"test_share": 0.0}, "test_share=0.0: must be between 0 and 1"),
        ({"test_share": 1.0}, "test_share=1.0: must be between 0 and 1"),
        ({"train_shares": (1.0, 0.0)}, "train_shares=0.0: must be above 0 and at most 1"),
        ({"label_noise": (1.5,)}, "label_noise=1.5: must be from 0 to 1"),
        ({"ngrams": (0,)}, r"ngrams=\(0,\): must be .*1 or more"),
    ),
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        SentimentSettings(**settings)
