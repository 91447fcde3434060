"""The bundled demo: its world and split, question sets, tokenizer, model and lm-eval tasks."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from llm_attack.demo import MODEL_PATH
from llm_attack.demo.grammar import FACTORS, RELATIONS
from llm_attack.demo.questions import MAKERS, Question, question_set, training_texts
from llm_attack.demo.world import SEED, World

TASKS = Path(__file__).resolve().parent.parent / "tasks"
SETS = sorted(MAKERS)
CHOICES = {"piqa": 2, "winogrande": 2}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL_PATH)


def request_pairs(question: Question) -> list[tuple[str, str]]:
    """(context, continuation) of every choice, in the way of lm-eval."""
    if question.ending:
        return [(f"{question.context} {c}", f" {question.ending}") for c in question.choices]
    return [(question.context, f" {c}") for c in question.choices]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_the_same_seed_makes_the_same_world_and_another_seed_another():
    assert World(3).things == World(3).things
    assert World(3).things != World(4).things
    assert list(training_texts(World(3), 200)) == list(training_texts(World(3), 200))
    assert question_set("piqa", 3, 40) == question_set("piqa", 3, 40)
    assert question_set("piqa", 3, 40) != question_set("piqa", 4, 40)


def test_a_word_means_one_thing_only(world):
    # The check of the split below goes by words, so no word may serve two values.
    counts = Counter(t.name for t in world.things)
    for factor in FACTORS.values():
        counts.update(factor.values)
    for relation in RELATIONS:
        counts.update(relation.values + relation.past)
    assert [word for word, n in counts.items() if n > 1] == []


def test_laws_and_factors_are_told_but_held_out_pairs_never(world):
    held_out_values = {}  # thing -> words of its held-out values
    for thing, relation in world.pairs(held_out=True):
        forms = relation.forms(world.value(thing, relation))
        held_out_values.setdefault(thing.name, set()).update(forms.values())
    texts = list(training_texts(world, 128_000))
    for text in texts:
        said = set(words(text))
        for name in said & held_out_values.keys():
            assert not said & held_out_values[name], text

    told = set(texts)
    for relation in RELATIONS:
        factor = FACTORS[relation.factor]
        for i, value in enumerate(factor.values):
            predicate = relation.predicate.format(**relation.forms(i))
            assert f"{factor.group.format(v=value)} {predicate}." in told
    for thing in world.things:
        for name, i in thing.factors:
            predicate = FACTORS[name].predicate.format(v=FACTORS[name].values[i])
            assert f"A {thing.name} {predicate}." in told


@pytest.mark.parametrize("name", SETS)
def test_questions_ask_held_out_facts_and_have_one_true_choice(name, world):
    things = {thing.name: thing for thing in world.things}
    relations = {relation.name: relation for relation in RELATIONS}
    questions = question_set(name)
    assert len(questions) == 300
    assert len({tuple(sorted(q.texts())) for q in questions}) == 300
    for q in questions:
        assert len(q.choices) == len(set(q.choices)) == CHOICES.get(name, 4)
        assert all(world.held_out(things[t], relations[r]) for t, r in q.asks)
        facts = [
            set(relations[r].forms(world.value(things[t], relations[r])).values())
            for t, r in q.asks
        ]
        if name == "winogrande":
            # The choices are the two things; the ending is true of the gold and not of the other.
            assert facts[0] & set(words(q.ending)) and not facts[1] & set(words(q.ending))
            fits = [choice == q.asks[0][0] for choice in q.choices]
        else:
            if name == "arc_challenge":
                # The second fact is the trap: about the other thing in view, so never right.
                trap = facts.pop()
                assert any(trap & set(words(choice)) for choice in q.choices)
            fits = [all(fact & set(words(choice)) for fact in facts) for choice in q.choices]
        assert fits == [i == q.gold for i in range(len(q.choices))]


@pytest.mark.parametrize("name", SETS)
def test_the_gold_is_at_every_position_equally_often(name):
    golds = Counter(q.gold for q in question_set(name))
    share = 300 / CHOICES.get(name, 4)
    assert sum((golds[i] - share) ** 2 / share for i in range(CHOICES.get(name, 4))) < 12


@pytest.mark.parametrize("name", SETS)
def test_length_does_not_give_the_gold_away(name):
    questions = question_set(name)
    chance = 1 / CHOICES.get(name, 4)
    for sign in (1, -1):
        hits = 0.0
        for q in questions:
            sizes = [sign * len(choice) for choice in q.choices]
            best = [i for i, size in enumerate(sizes) if size == max(sizes)]
            hits += (q.gold in best) / len(best)
        assert abs(hits / len(questions) - chance) < 0.1


@pytest.mark.parametrize("name", SETS)
def test_tokens_are_known_and_stable_under_continuation(name, tokenizer):
    for question in question_set(name):
        for context, continuation in request_pairs(question):
            whole = tokenizer.encode(context + continuation)
            prefix = tokenizer.encode(context)
            assert whole[: len(prefix)] == prefix
            assert len(whole) > len(prefix)
            assert not set(whole) & set(tokenizer.all_special_ids)
            assert tokenizer.decode(whole) == context + continuation


def test_unknown_words_become_unk(tokenizer):
    ids = tokenizer.encode("A quokka eats snails.", add_special_tokens=False)
    assert [i == tokenizer.unk_token_id for i in ids] == [False, True, False, False, False]


def test_the_model_folder_is_small():
    files = {f.name: f.stat().st_size for f in MODEL_PATH.iterdir()}
    assert sum(files.values()) <= 4 * 2**20
    assert files.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_model_answers_held_out_questions(tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM
    from versions import dtype_of

    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, **dtype_of("auto")).eval()
    assert model.dtype == torch.float32
    for name in SETS:
        questions = question_set(name)[:60]
        pairs = [pair for question in questions for pair in request_pairs(question)]
        wholes = [tokenizer.encode(context + continuation) for context, continuation in pairs]
        ids = torch.full((len(wholes), max(map(len, wholes))), tokenizer.pad_token_id)
        scored = torch.zeros(ids.shape, dtype=torch.bool)
        for i, (whole, (context, _)) in enumerate(zip(wholes, pairs, strict=True)):
            ids[i, : len(whole)] = torch.tensor(whole)
            scored[i, len(tokenizer.encode(context)) : len(whole)] = True
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        each = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
        scores = (each * scored[:, 1:]).sum(1).view(60, -1)
        golds = torch.tensor([question.gold for question in questions])
        assert (scores.argmax(1) == golds).float().mean() >= 0.7, name


@pytest.fixture(scope="module")
def demo_tasks(tmp_path_factory):
    """The demo tasks as lm-eval loads them from a copy of the folder in another place."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager, get_task_dict

    copy = tmp_path_factory.mktemp("elsewhere") / "tasks"
    shutil.copytree(TASKS, copy)
    manager = TaskManager(include_path=str(copy), include_defaults=False)
    return get_task_dict([f"demo_{name}" for name in SETS], manager)


@pytest.mark.parametrize("name", SETS)
def test_lm_eval_asks_the_same_requests(name, demo_tasks):
    task = demo_tasks[f"demo_{name}"]
    task.build_all_requests(limit=60, rank=0, world_size=1)
    questions = question_set(name)[:60]
    asked = {}
    for instance in task.instances:
        asked.setdefault(instance.doc_id, []).append(instance.args)
    assert [asked[i] for i in range(60)] == [request_pairs(q) for q in questions]
    assert len(task.test_docs()) == 300
    for document, question in zip(task.test_docs(), questions, strict=False):
        # Right when the gold is the likeliest, wrong otherwise.
        for choice in range(len(question.choices)):
            answers = [(0.0 if c == choice else -9.0, False) for c in range(len(question.choices))]
            result = task.process_results(document, answers)
            assert result["acc"] == (choice == question.gold)


def test_seed_is_the_one_the_model_was_trained_on(world, tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert world.seed == SEED
    assert all(thing.name in vocabulary for thing in world.things)
