"""Training under attack: files when it stops, its end, its measurements."""

from dataclasses import replace

import pytest

from llm_attack.base.errors import UsageError
from llm_attack.base.record import Stopwatch
from llm_attack.vision import fig2, stages
from llm_attack.vision.data import load_dataset
from llm_attack.vision.rights import clean_accuracy

SETTINGS = fig2.Settings(width=0.25, epochs=3, train_size=200, test_size=60, batch_size=20)


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("digits", SETTINGS)


def trained(dataset, settings=SETTINGS, **options):
    how = {"epsilon": 0.1, **options}
    return stages.trained(dataset, "cnn", settings, ["fgsm"], Stopwatch(), **how)


def test_a_stop_during_the_attacks_costs_no_training(dataset, tmp_path, monkeypatch):
    _, whole = trained(dataset)
    state, measure, train = tmp_path / "state.pt", stages.measure, stages.train
    epochs = []

    def seen(*args, **options):
        for epoch in train(*args, **options):
            epochs.append(epoch.number)
            yield epoch

    def stops(*args, **options):
        if epochs[-1] == 2:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(stages, "train", seen)
    monkeypatch.setattr(stages, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        trained(dataset, state=state)
    monkeypatch.setattr(stages, "measure", measure)
    _, rows = trained(dataset, state=state)
    # the second is taken from the file and attacked, not trained again
    assert epochs == [1, 2, 2, 3] and rows == whole
    # a finished run is neither trained nor attacked
    monkeypatch.setattr(stages, "measure", lambda *a, **k: pytest.fail("attacked"))
    assert trained(dataset, state=state)[1] == whole and epochs == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("content", ("", "{", "[1]", "[{}]"))
def test_rows_that_cannot_be_read_are_refused(dataset, tmp_path, content):
    state = tmp_path / "state.pt"
    trained(dataset, replace(SETTINGS, epochs=1), state=state)
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UsageError, match=r"state\.json: must be a file that the attacks wrote"):
        trained(dataset, replace(SETTINGS, epochs=1), state=state)


def test_training_ends_at_the_accuracy_asked_for(dataset):
    clean = []
    trained(dataset, besides=lambda net: clean.append(clean_accuracy(net, dataset.test)) or {})
    assert clean[0] < clean[2]  # so that some accuracy is reached in the midst
    ends = next(i for i, value in enumerate(clean) if value > clean[0])
    settings = replace(SETTINGS, stop_at=clean[ends])
    network, rows = trained(dataset, settings, attacked_epochs=1)
    assert {row["epoch"] for row in rows} == {ends + 1}
    (everything,) = (row["accuracy"] for row in rows if row["condition"] == "all")
    assert everything == clean_accuracy(network, dataset.test) == clean[ends]
    # one that is never reached ends nothing
    _, rows = trained(dataset, replace(SETTINGS, stop_at=1.0), attacked_epochs=1)
    assert {row["epoch"] for row in rows} == {3}
