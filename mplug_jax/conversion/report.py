"""What became of every tensor of a file and of every parameter of the model."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence


class ConversionError(ValueError):
    """A file that cannot be converted as asked; the message says which, why, and what to do."""


@dataclasses.dataclass
class Report:
    """The account of one conversion; every tensor and every parameter is in exactly one place.

    Attributes:
      used: parameters made from a tensor, by its name.
      resized: how a tensor among ``used`` was resampled, by its name.
      unused: why a tensor was left out, by its name.
      unexpected: a hint, by the name of a tensor that nothing here knows.
      initial: why a parameter (or a layer of it: 'path [3]') was left at init, by its path.
      missing: a hint, by the path of a parameter that should have been in the file.
      notes: what was inferred or checked, a line each.
    """

    used: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    resized: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: dict[str, str] = dataclasses.field(default_factory=dict)
    unexpected: dict[str, str] = dataclasses.field(default_factory=dict)
    initial: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def expect(self, unused: Sequence[str] = (), missing: Sequence[str] = ()) -> None:
        """Accepts unexpected tensors and missing parameters that match a pattern (re.search).

        Raises:
          ConversionError: some are left, each named with what comes closest.
        """
        self.unused |= _accept(self.unexpected, unused, "--expect_unused")
        self.initial |= _accept(self.missing, missing, "--expect_missing")
        lines = [f"  in the file, not in the model: {n}{h}" for n, h in self.unexpected.items()]
        lines += [f"  in the model, not in the file: {n}{h}" for n, h in self.missing.items()]
        if lines:
            raise ConversionError(
                f"{len(self.unexpected)} unexpected tensors, {len(self.missing)} parameters that "
                "no tensor fills:\n" + "\n".join(lines) + "\nIf this is as it should be, say so "
                "with --expect_unused=<pattern> or --expect_missing=<pattern>."
            )

    def merge(self, other: Report, label: str) -> None:
        """Adds the account of another file, whose tensors become 'label:name'."""
        for field in ("used", "resized", "unused", "unexpected"):
            theirs = getattr(other, field)
            getattr(self, field).update({f"{label}:{n}": value for n, value in theirs.items()})
        self.initial |= other.initial
        self.missing |= other.missing
        self.notes += other.notes

    def describe(self) -> str:
        """The whole account, one line a tensor and a parameter."""
        parts = [self.notes]
        for title, items in (
            (
                "used (tensor: parameters)",
                {
                    name: ", ".join(paths)
                    + (f" ({self.resized[name]})" if name in self.resized else "")
                    for name, paths in self.used.items()
                },
            ),
            ("not used (tensor: why)", self.unused),
            ("left at init (parameter: why)", self.initial),
        ):
            parts.append([f"{title}: {len(items)}", *(f"  {k}: {v}" for k, v in items.items())])
        return "\n".join("\n".join(lines) for lines in parts if lines) + "\n"

    def summary(self) -> str:
        """Counts and reasons, a few lines."""
        lines = [*self.notes, f"used: {len(self.used)} tensors"]
        lines += [f"  {name}: {how}" for name, how in self.resized.items()]
        for title, items in (
            ("not used: {} tensors", self.unused),
            ("left at init: {} parameters", self.initial),
        ):
            lines.append(title.format(len(items)))
            lines += [f"  {_abridged(names)}: {why}" for why, names in _grouped(items).items()]
        return "\n".join(lines)


def account_unused(
    report: Report,
    tensors: Collection[str],
    wanted: Collection[str],
    dead: Sequence[tuple[str, str]],
) -> None:
    """Explains every tensor that no parameter was made from.

    Args:
      wanted: names that were looked for and not found.
      dead: (pattern, why) of tensors that the model has no use for.
    """
    for name in tensors:
        if name in report.used or name in report.unused or name in report.unexpected:
            continue
        reason = next((why for pattern, why in dead if re.search(pattern, name)), None)
        if reason:
            report.unused[name] = reason
        else:
            report.unexpected[name] = closest(name, wanted or report.used)


def _accept(items: dict[str, str], patterns: Sequence[str], flag: str) -> dict[str, str]:
    """Moves what matches a pattern out of ``items``."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConversionError(f"{flag}={pattern}: {error}.") from error
    found = {
        name: f"accepted by {flag}={pattern}"
        for pattern in patterns
        for name in items
        if re.search(pattern, name)
    }
    for name in found:
        del items[name]
    return found


def _grouped(items: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, reason in items.items():
        groups[reason].append(name)
    return groups


def _abridged(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def closest(name: str, candidates: Collection[str]) -> str:
    """' (closest: ...)', or '' where nothing is alike."""
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" (closest: {found[0]})" if found else ""
