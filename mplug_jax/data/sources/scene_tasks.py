"""What a scene offers beside captions: questions, referring phrases, a statement about two
pictures, and a hypothesis to be judged.

Labels are balanced in every run of consecutive indices (`turn`), and a wrong statement is as near
to the scene as it can be: the scene's own colours and shapes in another combination.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mplug_jax.data.records import Phrase
from mplug_jax.data.sources.scene_drawing import box, draw
from mplug_jax.data.sources.scene_language import (
    NUMBERS,
    OPPOSITE,
    PLACES,
    PLURALS,
    RELATIONS,
    name,
)
from mplug_jax.data.sources.scene_layout import (
    COLOURS,
    LEVELS,
    Layout,
    SceneObject,
    Stream,
    clear_relation,
    holds,
)


class LayoutSource(Protocol):
    """What the pair statement needs of `Scenes`: other scenes of the same split."""

    def __len__(self) -> int: ...

    def layout(self, index: int) -> Layout: ...


def turn(index: int, choices: int, purpose: int) -> int:
    """One of 0..choices-1; each comes once in every block of `choices` consecutive indices."""
    order = Stream(purpose, index // choices).shuffled(range(choices))
    return order[index % choices]


@dataclass(frozen=True)
class Description:
    """Some of an object's attributes; None is any."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, obj: SceneObject) -> bool:
        pairs = ((self.size, obj.size), (self.colour, obj.colour), (self.shape, obj.shape))
        return all(said in (None, true) for said, true in pairs)

    def count(self, layout: Layout) -> int:
        return sum(self.fits(obj) for obj in layout.objects)

    def __str__(self) -> str:
        return " ".join(w for w in (self.size, self.colour, self.shape or "object") if w)


def _one(description: Description) -> str:
    words = str(description)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _named(obj: SceneObject) -> Description:
    return Description(colour=obj.colour, shape=obj.shape)


def _unambiguous(layout: Layout) -> list[int]:
    """The objects that colour and shape tell from all others."""
    return [i for i, obj in enumerate(layout.objects) if _named(obj).count(layout) == 1]


def _by_relation(layout: Layout, index: int) -> list[str]:
    """ "to the left of the red circle", where that holds for object `index` alone and clearly."""
    told = []
    for anchor in _unambiguous(layout):
        if anchor == index:
            continue
        other = layout.objects[anchor]
        relation = clear_relation(layout.objects[index], other, layout.pixels)
        if relation and sum(holds(relation, obj, other) for obj in layout.objects) == 1:
            told.append(f"{RELATIONS[relation]} the {name(other)}")
    return told


def _by_place(layout: Layout, index: int) -> list[str]:
    """ "at the top left", where no other object is."""
    cells = [layout.cell(i) for i in range(len(layout.objects))]
    return [PLACES[cells[index]]] if cells.count(cells[index]) == 1 else []


def _references(layout: Layout, index: int, *hidden: str) -> list[str]:
    """Phrases that fit object `index` and no other, none of which tells a `hidden` attribute."""
    obj = layout.objects[index]
    subsets = (
        ("colour", "shape"),
        ("size", "colour", "shape"),
        ("colour",),
        ("shape",),
        ("size", "colour"),
        ("size", "shape"),
    )
    descriptions = [
        Description(**{a: getattr(obj, a) for a in subset})
        for subset in subsets
        if not set(hidden) & set(subset)
    ]
    if len(layout.objects) == 1:
        descriptions.append(Description())
    told = [str(d) for d in descriptions if d.count(layout) == 1]
    where = _by_relation(layout, index) + _by_place(layout, index)
    return told + [f"object {words}" for words in where]


def _pick_reference(references: Sequence[str], stream: Stream) -> str:
    """Any of some phrases, but every other time the colour alone, if it suffices: it is what people
    name first, and "the blue object", beside phrases with easier cues, takes practice to learn."""
    colour = [r for r in references if r.removesuffix(" object") in COLOURS]
    return stream.pick(colour if colour and stream.unit() < 0.5 else references)


def _hard_negative(layout: Layout, stream: Stream, *others: Layout) -> Description:
    """A colour and shape that the scene doesn't hold: preferably a pair of `others`, else colour
    and shape of two of its objects, else one object with one attribute changed."""
    spec, objects = LEVELS[layout.level], layout.objects
    near = [_named(obj) for other in others for obj in other.objects]
    near = near or [Description(None, a.colour, b.shape) for a in objects for b in objects]
    near = [d for d in near if not d.count(layout)]
    if near and stream.unit() < 0.6:
        return stream.pick(near)
    while True:
        obj = stream.pick(objects)
        colour, shape = obj.colour, obj.shape
        if stream.unit() < 0.5:
            colour = stream.pick(spec.colours)
        else:
            shape = stream.pick(spec.shapes)
        changed = Description(None, colour, shape)
        if not changed.count(layout):
            return changed


def _ask(question: str, answer: str, kind: str) -> dict[str, Any]:
    return {"question": question, "answers": {answer: 1.0}, "type": kind}


def _attribute_question(layout: Layout, stream: Stream, attribute: str) -> Iterator[dict[str, Any]]:
    """ "what colour is the large square": an object that the rest of the phrase tells apart."""
    candidates = [
        (references, obj)
        for i, obj in enumerate(layout.objects)
        if (references := _references(layout, i, attribute))
    ]
    if candidates:
        references, obj = stream.pick(candidates)
        phrase = _pick_reference(references, stream)
        yield _ask(f"what {attribute} is the {phrase}", getattr(obj, attribute), attribute)


def _count_question(layout: Layout, stream: Stream) -> dict[str, Any]:
    spec = LEVELS[layout.level]
    kind, obj = stream.below(3), stream.pick(layout.objects)
    absent = stream.unit() < 0.25
    if kind == 0:
        return _ask("how many objects are there", NUMBERS[len(layout.objects)], "count")
    if kind == 1:
        counted = Description(colour=stream.pick(spec.colours) if absent else obj.colour)
        words = f"{counted.colour} objects"
    else:
        counted = Description(shape=stream.pick(spec.shapes) if absent else obj.shape)
        words = PLURALS[str(counted.shape)]
    return _ask(f"how many {words} are there", NUMBERS[counted.count(layout)], "count")


def _relation_question(layout: Layout, stream: Stream, yes: bool) -> Iterator[dict[str, Any]]:
    """ "is the red circle above the blue square", for two that have a clear relation."""
    for relation, a, b in stream.shuffled(_clear_pairs(layout))[:1]:
        words = RELATIONS[relation if yes else OPPOSITE[relation]]
        question = f"is the {name(a)} {words} the {name(b)}"
        yield _ask(question, "yes" if yes else "no", "relation")


def _clear_pairs(layout: Layout) -> list[tuple[str, SceneObject, SceneObject]]:
    """(relation of a to b, a, b) of all that colour and shape tell apart, in both directions."""
    objects = [layout.objects[i] for i in _unambiguous(layout)]
    return [
        (relation, a, b)
        for a in objects
        for b in objects
        if a is not b and (relation := clear_relation(a, b, layout.pixels))
    ]


def questions(layout: Layout, index: int, stream: Stream) -> list[dict[str, Any]]:
    """One question of each type that the scene allows: colour, shape, size (where a phrase tells
    an object from the others), count, presence, relation (two objects or more)."""
    asked = [
        question
        for attribute in ("colour", "shape", "size")
        for question in _attribute_question(layout, stream, attribute)
    ]
    asked.append(_count_question(layout, stream))
    yes = turn(index, 2, purpose=1) == 1
    thing = _named(stream.pick(layout.objects)) if yes else _hard_negative(layout, stream)
    asked.append(_ask(f"is there {_one(thing)}", "yes" if yes else "no", "presence"))
    asked.extend(_relation_question(layout, stream, turn(index, 2, purpose=2) == 1))
    return asked


def phrases(layout: Layout, stream: Stream) -> list[Phrase]:
    """A phrase that fits one object alone, and its box, for each object that has such a phrase."""
    referred = [(obj, _references(layout, i)) for i, obj in enumerate(layout.objects)]
    return [
        {"phrase": f"the {_pick_reference(options, stream)}", "box": box(obj, layout.pixels)}
        for obj, options in referred
        if options
    ]


_COMPARED = {
    "more": ("more objects than", lambda left, right: left > right),
    "fewer": ("fewer objects than", lambda left, right: left < right),
    "same": ("as many objects as", lambda left, right: left == right),
}


def _shared_statements(left: Layout, right: Layout, subject: str) -> Iterator[tuple[str, bool]]:
    """ "both pictures show a red object", "exactly one picture shows a star", for every colour
    and shape of the two pictures."""
    told = {Description(colour=o.colour) for o in (*left.objects, *right.objects)}
    told |= {Description(shape=o.shape) for o in (*left.objects, *right.objects)}
    for description in sorted(told, key=str):
        in_both = bool(description.count(left)) and bool(description.count(right))
        yield f"{subject} {_one(description)}", in_both == subject.startswith("both")


def _pair_statements(
    left: Layout, right: Layout, kind: str, stream: Stream
) -> Iterator[tuple[str, bool]]:
    """Sentences of one kind about two pictures, and whether they are true."""
    n_left, n_right = len(left.objects), len(right.objects)
    if kind == "both":
        yield from _shared_statements(left, right, "both pictures show")
    elif kind == "one":
        yield from _shared_statements(left, right, "exactly one picture shows")
    elif kind == "total":
        for n in (n_left + n_right - 1, n_left + n_right, n_left + n_right + 1):
            if 2 <= n <= 2 * LEVELS[left.level].max_objects:
                words = f"there are {NUMBERS[n]} objects in the two pictures"
                yield words, n == n_left + n_right
    elif kind in _COMPARED:
        words, true = _COMPARED[kind]
        yield f"the left picture shows {words} the right picture", true(n_left, n_right)
    else:
        for side, this, other in (("left", left, right), ("right", right, left)):
            yield f"the {side} picture shows {_one(_named(stream.pick(this.objects)))}", True
            yield f"the {side} picture shows {_one(_hard_negative(this, stream, other))}", False


def pair(source: LayoutSource, index: int, layout: Layout, stream: Stream) -> dict[str, Any]:
    """A second picture of the split (the right one), a sentence about both, and its truth.

    The truth and the kind of sentence are chosen first and the second picture to suit them, so
    that the sentence alone tells little of its truth.
    """
    label = turn(index, 2, purpose=3) == 1
    kinds = ["shows", "shows", "both", "one", "total", "same"]
    # Only where the first picture leaves room for both truths.
    kinds += ["more"] if len(layout.objects) > 1 else []
    kinds += ["fewer"] if len(layout.objects) < LEVELS[layout.level].max_objects else []
    kind = stream.pick(kinds)
    for attempt in range(17):
        right = source.layout((index + 1 + stream.below(max(len(source) - 1, 1))) % len(source))
        if attempt == 16:
            kind = "shows"
        told = [s for s, true in _pair_statements(layout, right, kind, stream) if true == label]
        if told:
            break
    return {"image2": draw(right), "sentence": stream.pick(told), "label": label}


_INVISIBLE = ("made of wood", "made of glass", "very heavy", "warm", "brand new", "for sale")


def _facts(layout: Layout, stream: Stream, true: bool) -> list[str]:
    """Statements that the picture proves (or refutes), one of each kind it allows."""
    obj = stream.pick(layout.objects)
    told = [f"there is {_one(_named(obj) if true else _hard_negative(layout, stream))}"]
    spec, n = LEVELS[layout.level], len(layout.objects)
    if not true:
        n = stream.pick([k for k in range(1, spec.max_objects + 1) if k != n])
    told.append("there is one object" if n == 1 else f"there are {NUMBERS[n]} objects")
    alone = _unambiguous(layout)
    if alone:
        i = stream.pick(alone)
        obj, cell = layout.objects[i], layout.cell(i)
        places = [words for c, words in PLACES.items() if (c == cell) == true]
        sizes = [size for size in spec.sizes if (size == obj.size) == true]
        told.append(f"the {name(obj)} is {stream.pick(places)}")
        told.append(f"the {name(obj)} is {stream.pick(sizes)}")
    for relation, a, b in stream.shuffled(_clear_pairs(layout))[:1]:
        words = RELATIONS[relation if true else OPPOSITE[relation]]
        told.append(f"the {name(a)} is {words} the {name(b)}")
    return told


def entailment(layout: Layout, index: int, stream: Stream) -> dict[str, str]:
    """A hypothesis that the picture entails, leaves open (neutral) or contradicts.

    Half of the entailments and of the contradictions are about what the picture shows. The rest,
    and all neutral ones, are about what no such picture shows ("made of wood"): of an object that
    is there this stays open, of one that is not it is false that there is one and true that none
    is. So the words alone tell the label no better than one time in two.
    """
    label = ("entailment", "neutral", "contradiction")[turn(index, 3, purpose=4)]
    if label != "neutral" and stream.unit() < 0.5:
        return {
            "hypothesis": stream.pick(_facts(layout, stream, label == "entailment")),
            "label": label,
        }
    if label == "neutral":
        thing, none = _named(stream.pick(layout.objects)), stream.unit() < 0.5
    else:
        thing, none = _hard_negative(layout, stream), label == "entailment"
    secret = stream.pick(_INVISIBLE)
    claim = f"no {thing} is {secret}" if none else f"there is {_one(thing)} that is {secret}"
    return {"hypothesis": claim, "label": label}
