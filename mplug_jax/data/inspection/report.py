"""Puts what was found into sections of a report, which `pages` turns into text and HTML."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mplug_jax.data.inspection.overlaps import Fingerprints, Overlap
from mplug_jax.data.inspection.samples import Sample, Sampled
from mplug_jax.data.inspection.survey import Room, Survey

# Bars up to the room that the model has for a text, as many beyond it, and one for the rest.
BARS = 10
# Rows of a list of bad records or of cut texts.
LISTED = 50


@dataclass(frozen=True)
class Paragraph:
    """A sentence; `warning` where it is about something to look at."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """Rows below a header; the first column names, numbers stand to the right."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Bars:
    """A histogram: (label, count, whether these texts are cut) of each bar."""

    title: str
    bars: list[tuple[str, int, bool]]


@dataclass(frozen=True)
class Cards:
    """Examples with their pictures."""

    title: str
    samples: list[Sample]


Block = Paragraph | Table | Bars | Cards


@dataclass
class Section:
    """A title and what stands below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Findings:
    """Everything that was found out about a config's data.

    Attributes:
      surveys, sampled, prints: of each source, training sources first; `prints` is empty where no
        pictures were compared.
      overlaps: between training and held-out sources.
      rooms: of the kinds of text that the model reads.
    """

    surveys: list[Survey]
    sampled: list[Sampled]
    prints: list[Fingerprints]
    overlaps: list[Overlap]
    rooms: Mapping[str, Room]


def report(findings: Findings) -> list[Section]:
    """The sections, in the order in which they are read."""
    return [
        _sources(findings.surveys),
        _overlaps(findings),
        _lengths(findings.surveys, findings.rooms),
        _unusable(findings),
        _loading(findings.sampled),
        _samples(findings.sampled),
    ]


def _sources(surveys: Sequence[Survey]) -> Section:
    kinds = [kind for kind in _kinds() if any(survey.counts[kind] for survey in surveys)]
    # Sources that draw or hold their pictures name no files.
    files = ("files",) if any(survey.paths for survey in surveys) else ()
    rows = [
        (
            survey.of.name,
            _described(survey),
            f"{len(survey.of.source):,}",
            *(f"{len(survey.paths):,}" for _ in files),
            *(f"{survey.counts[kind]:,}" for kind in kinds),
        )
        for survey in surveys
    ]
    header = ("source", "what", "records", *files, *kinds)
    section = Section("Sources", [Table(header, rows)])
    for survey in surveys:
        if survey.read < len(survey.of.source):
            section.blocks.append(
                Paragraph(
                    f"{survey.of.name}: texts and pictures are counted in {survey.read:,} of its "
                    f"{len(survey.of.source):,} records, evenly spaced."
                )
            )
    return section


def _kinds() -> tuple[str, ...]:
    return ("captions", "questions", "answers", "phrases", "sentences", "hypotheses")


def _described(survey: Survey) -> str:
    spec = survey.of.spec
    shown = [spec["kind"], *(str(spec[key]) for key in ("path", "level", "split") if spec.get(key))]
    return " ".join(shown)


def _overlaps(findings: Findings) -> Section:
    section = Section("Pictures in both training and held-out data")
    for overlap in findings.overlaps:
        section.blocks.append(
            Paragraph(
                f"{overlap.count:,} of the pictures of {overlap.held_out} are in {overlap.train}, "
                f"too: by {overlap.by}.",
                warning=True,
            )
        )
        header = ("shared", overlap.train, overlap.held_out)
        section.blocks.append(Table(header, list(overlap.examples)))
    if not findings.overlaps:
        section.blocks.append(Paragraph("None was found."))
    compared = [f"{p.compared:,} of {p.total:,} of {p.name}" for p in findings.prints]
    text = (
        f"Paths of all records read are compared; pixels of {', '.join(compared)}."
        if compared
        else "Paths of all records read are compared; --hash=N also compares pixels."
    )
    section.blocks.append(Paragraph(text))
    return section


def _lengths(surveys: Sequence[Survey], rooms: Mapping[str, Room]) -> Section:
    section = Section("Lengths of texts in tokens, [CLS] and [SEP] included")
    for survey in surveys:
        for kind, lengths in survey.lengths.items():
            room, total = rooms[kind], lengths.total()
            cut = sum(count for length, count in lengths.items() if length > room.tokens)
            section.blocks.append(Bars(f"{kind} of {survey.of.name}", bars(lengths, room.tokens)))
            section.blocks.append(
                Paragraph(
                    f"{cut:,} of {total:,} {kind} ({cut / total:.1%}) are cut at {room.tokens} "
                    f"tokens, {room.setting}; the longest has {max(lengths)}.",
                    warning=cut > 0,
                )
            )
            longest = sorted(survey.longest[kind], reverse=True)
            rows = [(record_id, str(length), text) for length, record_id, text in longest]
            if rows:
                section.blocks.append(Table(("record", "tokens", "a text that is cut"), rows))
    if not section.blocks:
        section.blocks.append(Paragraph("The records hold no texts that the task reads."))
    return section


def bars(lengths: Counter[int], room: int) -> list[tuple[str, int, bool]]:
    """(label, texts, whether they are cut) of bars of equal width, one of which ends at `room`.

    Texts longer than about twice the room share the last bar.
    """
    width = -(-room // BARS)
    counts: Counter[int] = Counter()
    for length, count in lengths.items():
        # Bar 0 ends at the room, bar 1 begins beyond it.
        counts[min(-((room - length) // width), BARS + 1)] += count
    made = []
    for bar in range(min(counts), max(counts) + 1):
        low, high = room + (bar - 1) * width + 1, room + bar * width
        label = f"over {low - 1}" if bar > BARS else str(high) if width == 1 else f"{low}–{high}"
        made.append((label, counts[bar], bar > 0))
    return made


def _unusable(findings: Findings) -> Section:
    section = Section("Records that cannot be used")
    for place, survey in enumerate(findings.surveys):
        bad, total = len(survey.unusable), len(survey.of.source) + len(survey.unusable)
        allowed = survey.of.max_bad_fraction
        if bad:
            text = f"{survey.of.name}: {bad:,} of {total:,} records are left out."
            if bad > allowed * total:
                text += f" max_bad_fraction={allowed} allows fewer: a run ends before it starts."
            section.blocks.append(Paragraph(text, warning=True))
            section.blocks.append(_listed(("where", "reason"), survey.unusable))
        if survey.left_out:
            text = f"{survey.of.name}: its data set marks {survey.left_out:,} rows as not for use."
            section.blocks.append(Paragraph(text))
        section.blocks += _failures(findings, place)
    if not section.blocks:
        section.blocks.append(Paragraph("None was found among those read."))
    return section


def _failures(findings: Findings, place: int) -> list[Block]:
    """What could not be loaded of a source, in the samples and while pixels were compared."""
    sampled = findings.sampled[place]
    failed = dict(sampled.failures)
    text = f"{sampled.of.name}: {len(failed):,} of {sampled.tried:,} sampled records cannot be used"
    if findings.prints:
        failed |= dict(findings.prints[place].failures)
        text += f", {len(failed):,} with those compared by pixels"
    if not failed:
        return []
    allowed = sampled.of.max_bad_fraction
    if not sampled.of.held_out and len(sampled.failures) > allowed * sampled.tried:
        text += f". If all are like these, a run ends: max_bad_fraction={allowed} allows fewer"
    table = _listed(("record", "reason"), list(failed.items()))
    return [Paragraph(f"{text}.", warning=True), table]


def _listed(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> Table:
    listed = list(rows[:LISTED])
    if len(rows) > LISTED:
        listed.append(("…", f"and {len(rows) - LISTED:,} more"))
    return Table(header, listed)


def _loading(sampled: Sequence[Sampled]) -> Section:
    rows = [
        (
            each.of.name,
            "decoded and resized" if each.of.held_out else "decoded and augmented",
            f"{each.pictures:,}",
            f"{each.rate:,.0f}" if each.pictures else "",
        )
        for each in sampled
    ]
    header = ("source", "what was done", "pictures", "pictures/s, one thread")
    return Section("Loading", [Table(header, rows)])


def _samples(sampled: Sequence[Sampled]) -> Section:
    section = Section("Training samples as the model gets them")
    section.blocks += [Cards(each.of.name, each.shown) for each in sampled if each.shown]
    if not section.blocks:
        section.blocks.append(Paragraph("No training record could be used."))
    return section
