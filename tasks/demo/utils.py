"""Documents of the demo tasks, made by `llm_attack.demo` from a seed, with the stock tasks' fields.

lm-eval calls `load` with the `metadata` and the `dataset_kwargs` of the task's YAML. lm-eval finds
this file beside the YAML files, so the folder can be copied anywhere.
"""

from typing import Any

import datasets

from llm_attack.demo.questions import Question, question_set


def load(questions: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The only split, `test`, of a question set (a key of `llm_attack.demo.questions.MAKERS`)."""
    as_document = {"hellaswag": hellaswag, "openbookqa": openbookqa, "piqa": piqa}
    as_document |= {"winogrande": winogrande, "arc_easy": arc, "arc_challenge": arc}
    documents = [as_document[questions](question) for question in question_set(questions)]
    return {"test": datasets.Dataset.from_list(documents)}


def answers(**_: Any) -> dict[str, datasets.Dataset]:
    """The questions of `arc_easy`; the text of the right answer is to be generated."""
    questions = question_set("arc_easy")
    documents = [{"question": _inside(q.context), "answer": q.choices[q.gold]} for q in questions]
    return {"test": datasets.Dataset.from_list(documents)}


def texts(sentences: int, **_: Any) -> dict[str, datasets.Dataset]:
    """True stories of `hellaswag`, `sentences` of them in each text."""
    stories = [question.texts()[question.gold] for question in question_set("hellaswag")]
    starts = range(0, len(stories), sentences)
    documents = [{"text": " ".join(stories[i : i + sentences])} for i in starts]
    return {"test": datasets.Dataset.from_list(documents)}


def _lettered(question: Question) -> dict[str, Any]:
    labels = list("ABCD")
    return {
        "choices": {"text": list(question.choices), "label": labels},
        "answerKey": labels[question.gold],
    }


def _inside(context: str) -> str:
    """The question without "Question:" and "Answer:", which the YAML adds as stock tasks do."""
    return context.removeprefix("Question: ").removesuffix("\nAnswer:")


def arc(question: Question) -> dict[str, Any]:
    """A document in the form of allenai/ai2_arc."""
    return {"question": _inside(question.context), **_lettered(question)}


def openbookqa(question: Question) -> dict[str, Any]:
    """A document in the form of allenai/openbookqa."""
    return {"question_stem": question.context, **_lettered(question)}


def hellaswag(question: Question) -> dict[str, Any]:
    """A document in the form of Rowan/hellaswag after the clean-up by the stock task."""
    return {
        "query": question.context,
        "choices": list(question.choices),
        "label": str(question.gold),
    }


def piqa(question: Question) -> dict[str, Any]:
    """A document in the form of baber/piqa."""
    first, second = question.choices
    return {
        "goal": _inside(question.context),
        "sol1": first,
        "sol2": second,
        "label": question.gold,
    }


def winogrande(question: Question) -> dict[str, Any]:
    """A document in the form of allenai/winogrande: sentence with a blank, options, "1" or "2"."""
    first, second = question.choices
    return {
        "sentence": f"{question.context} _ {question.ending}",
        "option1": first,
        "option2": second,
        "answer": str(question.gold + 1),
    }


def blank_gold(document: dict[str, Any]) -> int:
    """`doc_to_text` of a task whose choices are contexts: the index of the gold choice."""
    return int(document["answer"]) - 1


def blank_contexts(document: dict[str, Any]) -> list[str]:
    """`doc_to_choice`: the sentence up to the blank, with either option in it."""
    before = document["sentence"].split("_")[0]
    return [before + document["option1"], before + document["option2"]]


def blank_ending(document: dict[str, Any]) -> str:
    """`doc_to_target`: the text after the blank, the same for both."""
    return document["sentence"].split("_")[1].strip()
