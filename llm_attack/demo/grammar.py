"""The words and sentence patterns of the little world. It has tables and no logic.

A *factor* is a basic property of a thing: a creature has a kind and a home, a ware has a material
and a trade. A *relation* follows from one factor: its n-th value belongs to the n-th value of the
factor. Every relation can be said in the same eight ways, so one table gives text and questions of
every form. `{x}` is the thing, `{v}` the value, `{p}` its past tense.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Factor:
    """A basic property. The training text always states it, and no question asks for it."""

    name: str
    family: str  # the things that have it: "creature" or "ware"
    values: tuple[str, ...]
    predicate: str  # "A {x} <predicate>."
    group: str  # how to speak of everything that shares a value
    question: str


@dataclass(frozen=True)
class Relation:
    """A consequence of a factor, with the patterns that say it."""

    name: str
    factor: str
    values: tuple[str, ...]
    predicate: str  # "A {x} <predicate>."
    question: str
    answer: str
    stem: str  # "<stem> {v}": a sentence to complete
    goal: str  # a question of method ...
    solution: str  # ... and what to do
    situation: str  # "A {x} <situation>."; "the {x} and the {y} <situation>"
    clause: str  # what it does, or what happens to it, then
    past: tuple[str, ...] = ()

    def forms(self, index: int) -> dict[str, str]:
        """The words that stand for the value with this index."""
        value = self.values[index]
        return {"v": value, "p": self.past[index] if self.past else value}


FACTORS = {
    factor.name: factor
    for factor in (
        Factor(
            "kind",
            "creature",
            ("bird", "fish", "beetle", "snake", "deer", "crab"),
            "is a kind of {v}",
            "Every {v}",
            "What kind of creature is a {x}?",
        ),
        Factor(
            "home",
            "creature",
            ("marsh", "forest", "desert", "cave", "meadow", "shore"),
            "lives in the {v}",
            "Every creature of the {v}",
            "Where does a {x} live?",
        ),
        Factor(
            "material",
            "ware",
            ("glass", "wood", "iron", "wax", "cloth", "clay"),
            "is made of {v}",
            "Every ware made of {v}",
            "What is a {x} made of?",
        ),
        Factor(
            "trade",
            "ware",
            ("baker", "sailor", "weaver", "miner", "doctor", "farmer"),
            "belongs to the {v}",
            "Every ware of the {v}",
            "Who needs a {x}?",
        ),
    )
}

RELATIONS = (
    Relation(
        "body",
        "kind",
        ("feathers", "fins", "feelers", "fangs", "hooves", "claws"),
        predicate="has {v}",
        question="What does a {x} have on its body?",
        answer="{v}",
        stem="If you touch a {x}, you will feel its",
        goal="How do you hold a {x}?",
        solution="take it by the {v} and wait.",
        situation="came out of the dark",
        clause="showed its {v}",
    ),
    Relation(
        "motion",
        "kind",
        ("flies", "swims", "crawls", "slides", "leaps", "digs"),
        predicate="{v} to get away",
        question="How does a {x} get away?",
        answer="it {v}",
        stem="Look at the {x} on its way, how well it",
        goal="How do you follow a {x}?",
        solution="go the way it {v} and wait.",
        situation="heard a noise",
        clause="{p} to get away",
        past=("flew", "swam", "crawled", "slid", "leapt", "dug"),
    ),
    Relation(
        "young",
        "kind",
        ("chicks", "fry", "grubs", "hatchlings", "fawns", "larvae"),
        predicate="raises {v}",
        question="What are the young of a {x} called?",
        answer="{v}",
        stem="In spring a {x} takes care of its",
        goal="How do you please a {x}?",
        solution="be kind to its {v} and wait.",
        situation="came back in spring",
        clause="called its {v}",
    ),
    Relation(
        "sound",
        "kind",
        ("sings", "bubbles", "buzzes", "hisses", "snorts", "clicks"),
        predicate="{v} at night",
        question="Which sound does a {x} make?",
        answer="it {v}",
        stem="Listen to the {x} at night, how it",
        goal="How do you know a {x} in the dark?",
        solution="hear how it {v} and wait.",
        situation="woke at night",
        clause="{p} for an hour",
        past=("sang", "bubbled", "buzzed", "hissed", "snorted", "clicked"),
    ),
    Relation(
        "food",
        "home",
        ("snails", "acorns", "seeds", "moss", "clover", "shrimps"),
        predicate="eats {v}",
        question="What does a {x} eat?",
        answer="{v}",
        stem="When it is hungry, a {x} looks for",
        goal="How do you feed a {x}?",
        solution="bring it some {v} and wait.",
        situation="was hungry",
        clause="ate some {v}",
    ),
    Relation(
        "enemy",
        "home",
        ("heron", "wolf", "hawk", "spider", "fox", "gull"),
        predicate="fears the {v}",
        question="Which enemy does a {x} fear?",
        answer="the {v}",
        stem="A {x} will run when it sees the",
        goal="How do you scare a {x}?",
        solution="act like a {v} and wait.",
        situation="was in danger",
        clause="hid from the {v}",
    ),
    Relation(
        "bed",
        "home",
        ("reeds", "leaves", "sand", "rocks", "grass", "shells"),
        predicate="sleeps under the {v}",
        question="Where does a {x} sleep?",
        answer="under the {v}",
        stem="When it is tired, a {x} makes its bed of",
        goal="How do you find a {x}?",
        solution="look under the {v} and wait.",
        situation="was tired",
        clause="slept under the {v}",
    ),
    Relation(
        "fall",
        "material",
        ("shatters", "bounces", "rings", "bends", "flutters", "cracks"),
        predicate="{v} in a fall",
        question="What happens to a {x} in a fall?",
        answer="it {v}",
        stem="When a {x} is dropped on a stone, it",
        goal="How do you test a {x} with a stone?",
        solution="see if it {v} and wait.",
        situation="fell from the table",
        clause="{p} on the floor",
        past=("shattered", "bounced", "rang", "bent", "fluttered", "cracked"),
    ),
    Relation(
        "fire",
        "material",
        ("softens", "burns", "glows", "melts", "smokes", "hardens"),
        predicate="{v} in a fire",
        question="What happens to a {x} in a fire?",
        answer="it {v}",
        stem="When a {x} is left in an oven, it",
        goal="How do you test a {x} with an oven?",
        solution="see if it {v} and wait.",
        situation="came too near to the fire",
        clause="{p} in the heat",
        past=("softened", "burned", "glowed", "melted", "smoked", "hardened"),
    ),
    Relation(
        "water",
        "material",
        ("glistens", "swells", "rusts", "floats", "shrinks", "crumbles"),
        predicate="{v} in water",
        question="What happens to a {x} in water?",
        answer="it {v}",
        stem="When a {x} is thrown into a river, it",
        goal="How do you test a {x} with a river?",
        solution="see if it {v} and wait.",
        situation="was out in the rain",
        clause="{p} in the wet",
        past=("glistened", "swelled", "rusted", "floated", "shrank", "crumbled"),
    ),
    Relation(
        "repair",
        "material",
        ("resin", "nails", "solder", "steam", "thread", "mud"),
        predicate="is mended with {v}",
        question="What is a broken {x} mended with?",
        answer="{v}",
        stem="The hole in the {x} can be closed with",
        goal="How do you mend a {x}?",
        solution="put some {v} on it and wait.",
        situation="was broken",
        clause="was mended with {v}",
    ),
    Relation(
        "cleaning",
        "material",
        ("vinegar", "oil", "ash", "milk", "soap", "bran"),
        predicate="is cleaned with {v}",
        question="What is a dirty {x} cleaned with?",
        answer="{v}",
        stem="The dust on the {x} can be removed with",
        goal="How do you clean a {x}?",
        solution="rub it with {v} and wait.",
        situation="was dirty",
        clause="was cleaned with {v}",
    ),
    Relation(
        "packing",
        "material",
        ("straw", "canvas", "grease", "ice", "cedar", "sawdust"),
        predicate="is packed in {v}",
        question="What is a {x} packed in?",
        answer="{v}",
        stem="Before a long journey, a {x} is put in",
        goal="How do you pack a {x}?",
        solution="cover it with {v} and wait.",
        situation="was ready for the journey",
        clause="was packed in {v}",
    ),
    Relation(
        "store",
        "trade",
        ("kitchen", "harbor", "loft", "tunnel", "clinic", "barn"),
        predicate="is kept in the {v}",
        question="Where is a {x} kept?",
        answer="in the {v}",
        stem="If you need a {x}, you must go to the",
        goal="How do you find a {x}?",
        solution="search in the {v} and wait.",
        situation="was lost",
        clause="was found in the {v}",
    ),
    Relation(
        "price",
        "trade",
        ("loaves", "ropes", "shawls", "coal", "herbs", "wheat"),
        predicate="is paid for in {v}",
        question="What is a {x} paid for in?",
        answer="in {v}",
        stem="The price of a {x} is some",
        goal="How do you pay for a {x}?",
        solution="offer some {v} and wait.",
        situation="was for sale",
        clause="was given away for {v}",
    ),
    Relation(
        "market",
        "trade",
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
        predicate="is sold on {v}",
        question="When is a {x} sold?",
        answer="on {v}",
        stem="The day of the {x} at the market is",
        goal="How do you buy a {x}?",
        solution="come on {v} and wait.",
        situation="was at the market",
        clause="was sold on {v}",
    ),
)
