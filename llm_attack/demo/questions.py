"""Six question sets about the little world, and the training text in the same six forms.

A maker turns facts into one `Question`, from one side of the split. Held-out facts give the
questions of a set. The other facts give training text: the context with the right answer after it,
joined as lm-eval joins them. This module imports only the standard library.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .grammar import FACTORS, Relation
from .world import SEED, Thing, World, factors_of, relations_of

QUESTIONS_PER_SET = 300


@dataclass(frozen=True)
class Question:
    """A context with several choices, and one of them is true.

    A request is (context, " " + choice); if `ending` is set, as in WinoGrande, the choices belong
    to the context: (context + " " + choice, " " + ending).
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    asks: tuple[tuple[str, str], ...]  # the (thing, relation) pairs that the answer rests on
    ending: str = ""

    def texts(self) -> list[str]:
        """The whole text of every choice."""
        return [f"{self.context} {choice} {self.ending}".rstrip() for choice in self.choices]


Pair = tuple[Thing, Relation]
Maker = Callable[[World, random.Random, Pair, bool], Question | None]


def _shuffled(
    rng: random.Random,
    context: str,
    gold: str,
    others: list[str],
    asks: list[Pair],
    ending: str = "",
) -> Question:
    choices = [gold, *others]
    rng.shuffle(choices)
    names = tuple((thing.name, relation.name) for thing, relation in asks)
    return Question(context, tuple(choices), choices.index(gold), names, ending)


def _others(rng: random.Random, relation: Relation, gold: int, count: int) -> list[int]:
    return rng.sample([i for i in range(len(relation.values)) if i != gold], count)


def _partner(
    world: World, rng: random.Random, thing: Thing, relation: Relation, held_out: bool
) -> Relation | None:
    """A relation of the thing's other factor, on the same side of the split."""
    options = [
        other
        for other in relations_of(thing.family)
        if other.factor != relation.factor and world.held_out(thing, other) == held_out
    ]
    return rng.choice(options) if options else None


def _unlike(world: World, rng: random.Random, pair: Pair, held_out: bool) -> Thing:
    """Another thing, on the same side of the split, for which the relation has another value."""
    thing, relation = pair
    gold = world.value(thing, relation)
    things = world.things_of(relation, held_out)
    return rng.choice([other for other in things if world.value(other, relation) != gold])


def arc_easy(world: World, rng: random.Random, pair: Pair, held_out: bool) -> Question:
    """One fact, asked directly: "What does a morlet eat?"."""
    thing, relation = pair
    gold = world.value(thing, relation)
    answers = [relation.answer.format(**relation.forms(i)) for i in range(len(relation.values))]
    context = f"Question: {relation.question.format(x=thing.name)}\nAnswer:"
    others = [answers[i] for i in _others(rng, relation, gold, 3)]
    return _shuffled(rng, context, answers[gold], others, [pair])


def arc_challenge(world: World, rng: random.Random, pair: Pair, held_out: bool) -> Question:
    """One fact, with a second thing in the question whose value is among the choices."""
    thing, relation = pair
    gold = world.value(thing, relation)
    other = _unlike(world, rng, pair, held_out)
    trap = world.value(other, relation)
    answers = [relation.answer.format(**relation.forms(i)) for i in range(len(relation.values))]
    names = [thing.name, other.name]
    rng.shuffle(names)
    asked = relation.question.format(x=thing.name)
    context = f"Question: You see a {names[0]} and a {names[1]}. {asked}\nAnswer:"
    rest = rng.sample([i for i in range(len(answers)) if i not in (gold, trap)], 2)
    others = [answers[i] for i in (trap, *rest)]
    return _shuffled(rng, context, answers[gold], others, [pair, (other, relation)])


def hellaswag(world: World, rng: random.Random, pair: Pair, held_out: bool) -> Question | None:
    """A story to be continued by two clauses."""
    thing, first = pair
    second = _partner(world, rng, thing, first, held_out)
    if second is None:
        return None
    i, j = world.value(thing, first), world.value(thing, second)

    def ending(a: int, b: int) -> str:
        says = [r.clause.format(**r.forms(k)) for r, k in ((first, a), (second, b))]
        return f"{says[0]} and {says[1]}."

    # Wrong in both clauses, and no value twice: what the choices share tells nothing.
    wrong = zip(_others(rng, first, i, 3), _others(rng, second, j, 3), strict=True)
    return _shuffled(
        rng,
        f"One day a {thing.name} {first.situation}. It",
        ending(i, j),
        [ending(a, b) for a, b in wrong],
        [(thing, first), (thing, second)],
    )


def openbookqa(world: World, rng: random.Random, pair: Pair, held_out: bool) -> Question:
    """The stem of a sentence, to be completed."""
    thing, relation = pair
    gold = world.value(thing, relation)
    others = [relation.values[i] for i in _others(rng, relation, gold, 3)]
    stem = relation.stem.format(x=thing.name)
    return _shuffled(rng, stem, relation.values[gold], others, [pair])


def piqa(world: World, rng: random.Random, pair: Pair, held_out: bool) -> Question:
    """A goal and two ways to reach it."""
    thing, relation = pair
    gold = world.value(thing, relation)
    ways = [relation.solution.format(**relation.forms(i)) for i in range(len(relation.values))]
    context = f"Question: {relation.goal.format(x=thing.name)}\nAnswer:"
    others = [ways[i] for i in _others(rng, relation, gold, 1)]
    return _shuffled(rng, context, ways[gold], others, [pair])


def winogrande(world: World, rng: random.Random, pair: Pair, held_out: bool) -> Question:
    """Two things in one situation. For which is the ending true? The choices are contexts."""
    thing, relation = pair
    gold = world.value(thing, relation)
    other = _unlike(world, rng, pair, held_out)
    names = [thing.name, other.name]
    rng.shuffle(names)
    situation = relation.situation.replace("was ", "were ")
    return _shuffled(
        rng,
        f"The {names[0]} and the {names[1]} {situation}, and the",
        thing.name,
        [other.name],
        [pair, (other, relation)],
        ending=relation.clause.format(**relation.forms(gold)) + ".",
    )


MAKERS: dict[str, Maker] = {
    "arc_challenge": arc_challenge,
    "arc_easy": arc_easy,
    "hellaswag": hellaswag,
    "openbookqa": openbookqa,
    "piqa": piqa,
    "winogrande": winogrande,
}


def question_set(name: str, seed: int = SEED, count: int = QUESTIONS_PER_SET) -> list[Question]:
    """`count` different questions of one set, all of them about held-out facts.

    Raises KeyError for a name that is not in `MAKERS`.
    """
    make = MAKERS[name]
    world = World(seed)
    rng = random.Random(f"{name}/{seed}")
    questions: dict[str, Question] = {}
    while len(questions) < count:
        pairs = list(world.pairs(held_out=True))
        rng.shuffle(pairs)
        for pair in pairs:
            question = make(world, rng, pair, True)
            if question is not None:
                # Distractors differ from round to round: known by all of its texts.
                questions.setdefault("\n".join(sorted(question.texts())), question)
    return list(questions.values())[:count]


def training_texts(world: World, count: int) -> Iterator[str]:
    """`count` short texts with all factors, all laws and every fact that is not held out."""
    rng = random.Random(f"text/{world.seed}")
    stated = world.pairs(held_out=False)
    makers = list(MAKERS.values())
    for _ in range(count):
        shape = rng.randrange(10)
        if shape == 0:
            yield _law(world, rng)
        elif shape == 1:
            yield _factor(world, rng)
        elif shape == 2:
            thing, relation = rng.choice(stated)
            yield f"A {thing.name} {_predicate(relation, world.value(thing, relation))}."
        else:
            question = None
            while question is None:
                question = rng.choice(makers)(world, rng, rng.choice(stated), False)
            yield question.texts()[question.gold]


def _predicate(relation: Relation, index: int) -> str:
    return relation.predicate.format(**relation.forms(index))


def _law(world: World, rng: random.Random) -> str:
    """Says what holds for all things that share a factor's value: "Every bird has feathers."."""
    relation = rng.choice(world.relations)
    factor = FACTORS[relation.factor]
    index = rng.randrange(len(factor.values))
    return f"{factor.group.format(v=factor.values[index])} {_predicate(relation, index)}."


def _factor(world: World, rng: random.Random) -> str:
    """Says what a thing is: "A morlet is a kind of bird.", said or asked."""
    thing = rng.choice(world.things)
    factor = rng.choice(factors_of(thing.family))
    value = factor.values[thing.index(factor.name)]
    if rng.random() < 0.5:
        return f"A {thing.name} {factor.predicate.format(v=value)}."
    return f"Question: {factor.question.format(x=thing.name)}\nAnswer: {value}"
