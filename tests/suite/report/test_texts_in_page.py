"""Generated texts in the page: both of them, and the first token that differs."""

import pandas as pd
import pytest
from report_page import write

MARKED = """
return [...document.querySelectorAll('.details .text')].map(of => [
  of.textContent.replace(/ first difference: | ends here/, ''),
  of.querySelector('mark')?.textContent ?? null,
]);
"""
TARGETS = ["seeds", "mice", "<b>grass</b>", "5"]
# clean text, attacked text, whether each is right, and where they part
TEXTS = [
    ("it eats seeds", "it eats stones", 1, 0, (2, 8, "seeds", "stones")),
    ("🦙 eats mice", "🦙 eats mice and more", 0, 1, (3, 11, "", " and")),
    ("<b>grass</b>", "<i>grass</i>", 0, 0, (0, 0, "<b>", "<i>")),
    ("5", "5", 1, 1, None),
]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The path of a report on a task that generates text and one that scores whole texts."""
    samples, questions = [], []
    for i, target in enumerate([*TARGETS, None, None]):
        task = "sums" if target else "stories"
        place = {"task": task, "doc_id": i}
        prompt = f"prompt {i}?"
        empty = {"n_choices": 0, "gold": [], "doc_hash": str(i), "choices": [], "lengths": None}
        questions.append({**place, "question": prompt, "target": target, **empty})
        for attacked, condition in enumerate(("none", "fgsm@0.01")):
            row = {**place, "condition": condition, "attack": condition[:4], "cosine": None}
            row |= {"hookpoint": "embed", "epsilon": 0.01 * attacked, "n_choices": 0, "gold": []}
            row |= {"prediction": pd.NA, "prediction_norm": pd.NA, "acc_norm": None}
            parts = ["parts_at", "parts_from", "parts_none", "parts_token"]
            if target:
                *texts, before, after, part = TEXTS[i]
                row |= {"acc": float((before, after)[attacked]), "log_likelihoods": []}
                row |= {"text": texts[attacked], "score": "exact_match", "kind": "0 or 1"}
                found = part if attacked and part else [None] * 4
                row |= dict(zip(parts, found, strict=True))
                row |= {"request": "generate_until", "better": "higher"}
            else:
                row |= {"acc": 0.8 + attacked, "log_likelihoods": [-80.0 - attacked]}
                row |= {"text": None, "score": "nats_per_byte", "kind": "number"}
                row |= {**dict.fromkeys(parts), "better": "lower"}
                row |= {"request": "loglikelihood_rolling"}
            samples.append(row)
    samples = pd.DataFrame(samples).astype({"prediction": "Int64", "prediction_norm": "Int64"})
    return write(tmp_path_factory.mktemp("texts"), samples, pd.DataFrame(questions))


def test_both_texts_and_the_first_token_that_differs(page, generated):
    page.open(generated).unfold()
    for button in page.all("#table tbody [aria-expanded]"):
        page.press(button)
    shown = [tuple(found) for found in page.js(MARKED)]
    expected = []
    for i, (clean, attacked, _, _, part) in enumerate(TEXTS):
        before, after = (None, None) if part is None else (part[2] or "∎", part[3])
        ended = clean + "∎" if part is not None and not part[2] else clean
        expected += [(f"prompt {i}?", None), (ended, before), (attacked, after)]
    assert shown == expected
    details = [cell.text for cell in page.all(".details > td")]
    assert "The texts part at token 3." in details[0]
    assert "The texts are equal." in details[3]
    assert "−80.000" in details[4] and "−81.000" in details[4]


def test_flips_and_searches(page, generated):
    page.open(generated).unfold()
    rows = page.cells(page["table"], "innerText")[1:]
    changes = ["right → wrong", "wrong → right", "wrong → other wrong", "no", "–", "–"]
    assert [row[6] for row in rows] == changes
    assert [row[3] for row in rows] == [*TARGETS, "", ""]
    page.choose("change", "lost")
    assert page.rows() == [("sums", 0)]
    page.choose("change", "")
    page.choose("search", "grass")
    assert page.rows() == [("sums", 2)]
