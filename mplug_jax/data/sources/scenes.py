"""The embedded data set: scenes of coloured shapes, drawn from their index, with no files.

Train, val and test hold different scenes by construction: a checksum of what the canonical
caption says decides the split (`scene_layout.split_of`), so that no canonical caption of val or
test is ever one of train.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from mplug_jax.data.records import Record
from mplug_jax.data.sources.scene_drawing import draw
from mplug_jax.data.sources.scene_language import SIZED, captions
from mplug_jax.data.sources.scene_layout import (
    LEVELS,
    SPLITS,
    Kind,
    Layout,
    LevelSpec,
    Stream,
    all_kinds,
    layout_key,
    semantic_key,
    split_of,
)
from mplug_jax.data.sources.scene_motion import clip
from mplug_jax.data.sources.scene_placement import (
    draw_kind,
    draw_kinds,
    draw_layout,
    finish_layout,
    place_one,
    place_pair,
    try_layout,
)
from mplug_jax.data.sources.scene_tasks import entailment, pair, phrases, questions

DEFAULT_SIZES = {
    "easy": {"train": 250_000, "val": 512, "test": 1024},
    "full": {"train": 100_000, "val": 512, "test": 1024},
}
FIELDS = ("captions", "questions", "phrases", "pair", "entailment", "clip")
Plan = tuple[tuple[Kind, ...], object]  # kinds in naming order, and their cell or axis


class Scenes:
    """Random access to scenes: `source[i]` is a `Record`, the same on every machine.

    Args:
        level: "easy" (32 x 32, one or two large objects on dark plain ground) or "full"
            (64 x 64, one to four objects that may overlap, on noisy gradients).
        split: "train", "val" or "test". Held-out scenes follow a balanced plan: at "easy" one
            in five holds one object (there are only 432 such captions, 1/8 of them a split's),
            at "full" one to four objects take turns. Colours and shapes are balanced. No
            canonical caption comes twice at "full", nor in the first 512 at "easy", where the
            about 600 captions of a split then come again, drawn anew.
        size: how many scenes; a larger size only appends.
        fields: what a record holds besides the image: any of FIELDS.
        seed: another seed is another set of scenes, with the same division into splits.
        cache: keep every record once drawn in memory (about 4 kB a scene at "easy", 15 kB at
            "full"), so that only the first epoch draws.
        video: records are clips of the scenes in motion: `video` [FRAMES, H, W, 3], and captions
            and questions of the motion.
        max_objects: a training scene holds 1 to this many objects; None takes the level's number.
        sized: only the captions that tell sizes, which are the first two.

    Raises:
        ValueError: an unknown level, split or field, a size below 1, or max_objects that the
            level does not have or that a held-out split was given.
    """

    def __init__(
        self,
        level: str,
        split: str,
        size: int | None = None,
        fields: tuple[str, ...] = ("captions",),
        seed: int = 0,
        cache: bool = False,
        max_objects: int | None = None,
        video: bool = False,
        sized: bool = False,
    ) -> None:
        if level not in LEVELS:
            raise ValueError(f"scenes: unknown level {level!r}; choose one of {list(LEVELS)}")
        if split not in SPLITS:
            raise ValueError(f"scenes: unknown split {split!r}; choose one of {list(SPLITS)}")
        if isinstance(fields, str) or not set(fields) <= set(FIELDS):
            raise ValueError(f"scenes: unknown fields in {fields!r}; choose from {list(FIELDS)}")
        self.size = DEFAULT_SIZES[level][split] if size is None else size
        if self.size < 1:
            raise ValueError(f"scenes: size must be at least 1, got {size}")
        most = LEVELS[level].max_objects
        if max_objects is not None and (split != "train" or not 1 <= max_objects <= most):
            raise ValueError(
                f"scenes: max_objects must be 1 to {most} at level {level!r}, and only training "
                f"scenes take it; got {max_objects} for {split!r}"
            )
        self.max_objects, self.video = most if max_objects is None else max_objects, video
        self.sized = sized
        self.level, self.split, self.fields, self.seed = level, split, tuple(fields), seed
        self._held_out: list[Layout] | None = None
        self._records: dict[int, Record] | None = {} if cache else None

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        kind = "clips" if self.video else "scenes"
        return f"Scenes({self.level!r}, {self.split!r}, {self.size} {kind})"

    def stream(self, index: int, purpose: int) -> Stream:
        """Random numbers of one scene for one purpose, independent of every other."""
        code = 10 * list(LEVELS).index(self.level) + SPLITS.index(self.split)
        return Stream(self.seed, code, index, purpose)

    def layout(self, index: int) -> Layout:
        """The description of scene `index`."""
        if not 0 <= index < self.size:
            raise IndexError(f"scenes: index {index} is outside 0..{self.size - 1}")
        spec = LEVELS[self.level]
        if self.split == "train":
            stream = self.stream(int(index), purpose=0)
            return draw_layout(spec, "train", stream, 1 + stream.below(self.max_objects))
        if self._held_out is None:
            plan = _held_out_layouts(spec, self.split, self.stream(0, purpose=1))
            self._held_out = list(islice(plan, self.size))
        return self._held_out[index]

    def __getitem__(self, index: int) -> Record:
        if self._records is None:
            return self._draw(index)
        if index not in self._records:
            self._records[index] = self._draw(index)
        return self._records[index]

    def _draw(self, index: int) -> Record:
        layout = self.layout(index)
        name = f"scenes/{self.level}/{self.split}/{index}"
        if self.video:
            moving = self._task("clip", int(index), layout)
            return {"id": name, "image": moving["video"][0], "image_id": int(index), **moving}
        record: Record = {"id": name, "image": draw(layout), "image_id": int(index)}
        if "captions" in self.fields:
            record["captions"] = captions(layout)[: SIZED if self.sized else None]
        for field in self.fields:
            if field != "captions":
                record[field] = self._task(field, int(index), layout)
        return record

    def _task(self, field: str, index: int, layout: Layout) -> Any:
        stream = self.stream(index, purpose=2 + FIELDS.index(field))
        if field == "questions":
            return questions(layout, index, stream)
        if field == "phrases":
            return phrases(layout, stream)
        if field == "pair":
            return pair(self, index, layout, stream)
        if field == "entailment":
            return entailment(layout, index, stream)
        return clip(layout, stream)


def _held_out_layouts(spec: LevelSpec, split: str, stream: Stream) -> Iterator[Layout]:
    """The scenes of a held-out split, without end. Each canonical caption comes once, until at
    "easy" all have."""
    if spec.name == "easy":
        return _easy_held_out(spec, split, stream)
    return _full_held_out(spec, split, stream)


def _one_object_plans(spec: LevelSpec, split: str) -> list[Plan]:
    return [
        ((kind,), (column, row))
        for kind in all_kinds(spec)
        for column in range(3)
        for row in range(3)
        if split_of(semantic_key(spec.name, [kind], (column, row))) == split
    ]


def _two_object_plans(spec: LevelSpec, split: str) -> list[Plan]:
    kinds = all_kinds(spec)
    return [
        ((a, b), axis)
        for a in kinds
        for b in kinds
        for axis in ("horizontal", "vertical")
        if a[1:] != b[1:] and split_of(semantic_key(spec.name, [a, b], axis)) == split
    ]


def _balanced(plans: Sequence[Plan], stream: Stream) -> Iterator[Plan]:
    """All plans once, in random order, at each step that one of the next 24 whose sizes, colours
    and shapes were used least."""
    waiting = deque(stream.shuffled(plans))
    window: list[Plan] = []
    used: Counter[str] = Counter()
    while waiting or window:
        while waiting and len(window) < 24:
            window.append(waiting.popleft())
        best = min(
            range(len(window)),
            key=lambda i: sum(used[w] for kind in window[i][0] for w in kind) / len(window[i][0]),
        )
        plan = window.pop(best)
        used.update(word for kind in plan[0] for word in kind)
        yield plan


def _easy_held_out(spec: LevelSpec, split: str, stream: Stream) -> Iterator[Layout]:
    while True:
        ones = _balanced(_one_object_plans(spec, split), stream)
        pairs = _balanced(_two_object_plans(spec, split), stream)
        position = 0
        while True:
            first, second = (ones, pairs) if position % 5 == 0 else (pairs, ones)
            plan = next(first, None) or next(second, None)
            if plan is None:
                break
            kinds, where = plan
            if len(kinds) == 1:
                objects = place_one(spec, stream, kinds[0], where)
            else:
                objects = place_pair(spec, stream, kinds, where)
            yield finish_layout(spec, stream, objects)
            position += 1


def _deck(spec: LevelSpec, stream: Stream) -> Iterator[tuple[str, str]]:
    """Pairs of colour and shape, each as often as any other."""
    cards = [(c, h) for c in spec.colours for h in spec.shapes]
    while True:
        yield from stream.shuffled(cards)


def _full_held_out(spec: LevelSpec, split: str, stream: Stream) -> Iterator[Layout]:
    ones = _balanced(_one_object_plans(spec, split), stream)
    deck = _deck(spec, stream)
    seen: set[str] = set()
    position = 0
    while True:
        n = 1 + position % spec.max_objects
        plan = next(ones, None) if n == 1 else None
        if plan is not None:
            layout = finish_layout(spec, stream, place_one(spec, stream, plan[0][0], plan[1]))
        else:
            layout = _unseen_layout(spec, split, stream, deck, max(n, 2), seen)
        seen.add(layout_key(layout))
        yield layout
        position += 1


def _unseen_layout(
    spec: LevelSpec,
    split: str,
    stream: Stream,
    deck: Iterator[tuple[str, str]],
    n: int,
    seen: set[str],
) -> Layout:
    """A new scene of `n` objects with colours and shapes from the deck; only sizes, twins and
    places change from one attempt to the next, until 64 have failed."""
    cards = list(islice(deck, n))
    while True:
        for _ in range(64):
            pattern = draw_kinds(spec, stream, n)
            kinds = [(kind[0], *card) for kind, card in zip(pattern, cards, strict=True)]
            if n > 2 and pattern[0][1:] == pattern[1][1:]:
                kinds[1] = (kinds[1][0], *kinds[0][1:])
            if kinds[0][1:] == kinds[1][1:] and n == 2:
                break
            layout = try_layout(spec, split, stream, kinds)
            if layout is not None and layout_key(layout) not in seen:
                return layout
        cards = [draw_kind(spec, stream)[1:] for _ in range(n)]
