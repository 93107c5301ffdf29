"""What is said about a scene, and whether something said about a scene is right.

Captions are lower case words and commas between spaces. Every caption names the colour and the
shape of every object, in the scene's naming order, except that a caption of the kind "relations"
of two objects names them the other way round.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations

from mplug_jax.data.sources.scene_layout import (
    COLOURS,
    LEVELS,
    Cell,
    Layout,
    SceneObject,
    clear_relation,
    holds,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
PLURALS = {h: f"{h}es" if h == "cross" else f"{h}s" for h in LEVELS["full"].shapes}
RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLACES: dict[Cell, str] = {
    (0, 0): "at the top left",
    (1, 0): "at the top",
    (2, 0): "at the top right",
    (0, 1): "on the left",
    (1, 1): "in the middle",
    (2, 1): "on the right",
    (0, 2): "at the bottom left",
    (1, 2): "at the bottom",
    (2, 2): "at the bottom right",
}
SHORT_PLACES: dict[Cell, str] = {
    (0, 0): "top left",
    (1, 0): "top middle",
    (2, 0): "top right",
    (0, 1): "middle left",
    (1, 1): "center",
    (2, 1): "middle right",
    (0, 2): "bottom left",
    (1, 2): "bottom middle",
    (2, 2): "bottom right",
}
VOCABULARY: dict[str, list[str]] = {
    "colours": list(COLOURS),
    "shapes": [*PLURALS, *PLURALS.values()],
    "sizes": list(LEVELS["full"].sizes),
    "numbers": list(NUMBERS),
    "places": [*PLACES.values(), *SHORT_PLACES.values()],
    "relations": list(RELATIONS.values()),
}


def join(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a , b and c"."""
    return " and ".join([p for p in (" , ".join(parts[:-1]), parts[-1]) if p])


def name(obj: SceneObject, size: bool = False) -> str:
    """ "red circle", or "small red circle"."""
    return f"{obj.size} {obj.colour} {obj.shape}" if size else f"{obj.colour} {obj.shape}"


def article(obj: SceneObject, size: bool = False) -> str:
    """The object's `name` with "a" or "an" before it."""
    words = name(obj, size)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _canonical(layout: Layout) -> str:
    """Size, colour and shape of every object, with its place, or for two with their relation."""
    names = [article(obj, size=True) for obj in layout.objects]
    if len(names) == 1:
        return f"{names[0]} {PLACES[layout.cell(0)]}"
    if len(names) == 2:
        return f"{names[0]} {RELATIONS[_relation(layout, 0, 1)]} {names[1]}"
    return " , ".join(f"{n} {SHORT_PLACES[layout.cell(i)]}" for i, n in enumerate(names))


def _relation(layout: Layout, i: int, j: int) -> str:
    relation = clear_relation(layout.objects[i], layout.objects[j], layout.pixels)
    if relation is None:
        raise ValueError(f"objects {i} and {j} have no clear relation in {layout}")
    return relation


def _places(layout: Layout) -> str:
    table = SHORT_PLACES if len(layout.objects) > 3 else PLACES
    return join([f"{article(obj)} {table[layout.cell(i)]}" for i, obj in enumerate(layout.objects)])


def _relations(layout: Layout) -> list[str]:
    """Two objects: the relation from the second to the first. More: the first clear pair, and the
    last clear pair the other way round, each with the other objects behind."""
    objects = layout.objects
    clear = [
        (i, j, relation)
        for i, j in combinations(range(len(objects)), 2)
        if (relation := clear_relation(objects[i], objects[j], layout.pixels))
    ]
    if not clear:
        return []
    (i, j, first), (k, m, last) = clear[0], clear[-1]
    told = [(m, k, OPPOSITE[last])]
    if len(objects) > 2:
        told.insert(0, (i, j, first))
    sentences = []
    for a, b, relation in told:
        rest = [article(obj) for n, obj in enumerate(objects) if n not in (a, b)]
        pair = f"{article(objects[a])} {RELATIONS[relation]} {article(objects[b])}"
        sentences.append(f"{pair} , with {join(rest)}" if rest else pair)
    return list(dict.fromkeys(sentences))  # with twins, both may read the same


def _counts(layout: Layout) -> str:
    objects = layout.objects
    if len(objects) == 1:
        return f"there is one object , {article(objects[0])}"
    if len(objects) == 2:
        return f"two objects , {join([article(obj) for obj in objects])}"
    groups = Counter((obj.colour, obj.shape) for obj in objects)
    parts = [
        f"{NUMBERS[n]} {colour} {shape if n == 1 else PLURALS[shape]}"
        for (colour, shape), n in groups.items()
    ]
    return f"{NUMBERS[len(objects)]} objects , {join(parts)}"


SIZED = 2  # captions that tell sizes, the first ones


def captions(layout: Layout) -> list[str]:
    """All captions of a scene: canonical, attributes, places, relations (none for one object, two
    for more than two, where a pair has a clear relation) and counts, in this order."""
    attributes = join([article(obj, size=True) for obj in layout.objects])
    relations = _relations(layout) if len(layout.objects) > 1 else []
    return [_canonical(layout), attributes, _places(layout), *relations, _counts(layout)]


# Reading a caption.


@dataclass
class Mention:
    """What a caption says about one object (or `number` alike ones); None where it says nothing."""

    shape: str | None
    colour: str | None = None
    size: str | None = None
    number: int = 1
    cell: Cell | None = None


@dataclass
class Claims:
    """A caption taken apart. `relations` holds (index of a mention, relation, index of another),
    `total` the number of objects where the caption tells it."""

    mentions: list[Mention] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    total: int | None = None


_SHAPE_WORDS = {h: h for h in PLURALS} | {plural: h for h, plural in PLURALS.items()}
_RELATION_WORDS = {tuple(words.split()): r for r, words in RELATIONS.items()}
_PLACE_WORDS = {
    tuple(words.split()): cell for table in (PLACES, SHORT_PLACES) for cell, words in table.items()
}
_LONGEST = max(len(words) for words in (*_RELATION_WORDS, *_PLACE_WORDS))


def _phrase_at(words: list[str], start: int) -> tuple[int, str | Cell | None]:
    """The longest phrase of place or relation at `start`: its length and meaning, or (0, None)."""
    for length in range(_LONGEST, 0, -1):
        phrase = tuple(words[start : start + length])
        if phrase in _RELATION_WORDS:
            return len(phrase), _RELATION_WORDS[phrase]
        if phrase in _PLACE_WORDS:
            return len(phrase), _PLACE_WORDS[phrase]
    return 0, None


def parse(text: str) -> Claims:
    """Takes any text apart; words that mean nothing here are passed over.

    A colour, a size or a number belongs to the next shape word; a place to the object named
    before it; a relation joins the objects named before and after it. A second colour before a
    shape counts as an object of unknown shape, which no scene holds.
    """
    words = text.lower().replace(",", " , ").replace(".", " ").split()
    claims, pending, relation = Claims(), Mention(shape=None), None
    position = 0
    while position < len(words):
        word = words[position]
        length, phrase = _phrase_at(words, position)
        position += max(length, 1)
        if isinstance(phrase, str):
            relation = (len(claims.mentions) - 1, phrase) if claims.mentions else None
        elif phrase is not None:
            if claims.mentions:
                claims.mentions[-1].cell = phrase
        elif word in COLOURS:
            if pending.colour is not None:
                claims.mentions.append(Mention(shape=None, colour=pending.colour))
            pending.colour = word
        elif word in VOCABULARY["sizes"]:
            pending.size = word
        elif word in NUMBERS:
            pending.number = NUMBERS.index(word)
        elif word in ("object", "objects"):
            claims.total, pending = pending.number, Mention(shape=None)
        elif word in _SHAPE_WORDS:
            pending.shape = _SHAPE_WORDS[word]
            claims.mentions.append(pending)
            if relation is not None:
                claims.relations.append((*relation, len(claims.mentions) - 1))
            pending, relation = Mention(shape=None), None
    if pending.colour is not None:
        claims.mentions.append(pending)
    return claims


def _satisfiable(
    layout: Layout,
    mentions: Sequence[Mention],
    satisfied: Callable[[Sequence[int]], bool],
) -> bool:
    """Whether some choice of distinct objects for the mentions agrees with their colours and
    shapes and with `satisfied` (called with an object's index for each mention)."""
    objects = layout.objects
    if len(mentions) > len(objects):
        return False
    return any(
        all(
            m.colour in (None, objects[i].colour) and m.shape in (None, objects[i].shape)
            for m, i in zip(mentions, chosen, strict=True)
        )
        and satisfied(chosen)
        for chosen in permutations(range(len(objects)), len(mentions))
    )


def check_caption(layout: Layout, text: str) -> dict[str, bool]:
    """Verifies what a caption claims, against the scene's pixels. Never raises.

    Returns:
        attributes: the (colour, shape) pairs named are those of the scene, each as often.
        colour, shape: the same for the colours alone and for the shapes alone.
        count: as many objects are named as there are; where the text tells a number of objects,
            that number is right too.
        size: only where a size is claimed: every object called so (in colour and shape) has it.
        place: only where a place is claimed: the object is in that cell of the 3 x 3 grid.
        relation: only where a relation between two named objects is claimed: the axis that
            separates them most is the one told, and in that direction.
    """
    claims = parse(text)
    named = [m for m in claims.mentions for _ in range(min(m.number, len(NUMBERS)))]
    objects = layout.objects

    def same(said: list[object], true: list[object]) -> bool:
        return Counter(said) == Counter(true)

    result = {
        "attributes": same(
            [(m.colour, m.shape) for m in named], [(o.colour, o.shape) for o in objects]
        ),
        "colour": same([m.colour for m in named], [o.colour for o in objects]),
        "shape": same([m.shape for m in named], [o.shape for o in objects]),
        "count": len(named) == len(objects) and claims.total in (None, len(objects)),
    }
    sized = [m for m in named if m.size is not None]
    if sized:
        result["size"] = _satisfiable(
            layout,
            sized,
            lambda at: all(objects[i].size == m.size for m, i in zip(sized, at, strict=True)),
        )
    placed = [m for m in named if m.cell is not None]
    if placed:
        result["place"] = _satisfiable(
            layout,
            placed,
            lambda at: all(layout.cell(i) == m.cell for m, i in zip(placed, at, strict=True)),
        )
    if claims.relations:
        result["relation"] = _relations_hold(layout, claims)
    return result


def _relations_hold(layout: Layout, claims: Claims) -> bool:
    objects = layout.objects
    used = sorted({i for a, _, b in claims.relations for i in (a, b)})
    where = {mention: n for n, mention in enumerate(used)}
    return _satisfiable(
        layout,
        [claims.mentions[i] for i in used],
        lambda at: all(
            holds(relation, objects[at[where[a]]], objects[at[where[b]]])
            for a, relation, b in claims.relations
        ),
    )
