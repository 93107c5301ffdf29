"""A report as text for a terminal, and as one HTML file that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mplug_jax.data.inspection.report import Bars, Block, Paragraph, Section, Table
from mplug_jax.data.inspection.samples import Sample

# Sides of the pictures shown: small ones are magnified, large ones shrunk.
SMALL_SIDE, LARGE_SIDE = 192, 320
BOX_COLOUR = "#ff2d20"
# Widths in characters of a histogram's longest bar, and of a cell.
BAR_WIDTH, CELL_WIDTH = 40, 100
# Joins scripts and emoji; other characters that cannot be seen are shown by number.
JOINERS = "\u200c\u200d"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: .9rem; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .75rem .25rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.warning { color: #b3261e; }
.bar { display: inline-block; height: .8rem; background: #0072b2; }
.bar.cut { background: #d55e00; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { border: 1px solid #ddd; border-radius: .5rem; padding: .75rem; max-width: 100%;
  width: 21rem; box-sizing: border-box; font-size: .85rem; overflow-wrap: anywhere; }
.card img { max-width: 100%; margin: 0 .25rem .25rem 0; }
.card dl { margin: .25rem 0 0; display: grid; grid-template-columns: auto 1fr; gap: 0 .5rem; }
.card dt { color: #666; } .card dd { margin: 0; unicode-bidi: isolate; }
"""


def printable(text: str) -> str:
    """The text with its control characters and the like written as escapes."""
    return "".join(
        c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in text
    )


def as_text(title: str, sections: Sequence[Section]) -> str:
    """The report for a terminal; of the samples, only how many there are."""
    lines = [title]
    for section in sections:
        lines += ["", section.title, "-" * len(section.title)]
        for block in section.blocks:
            lines += _text_lines(block)
    return "\n".join(lines) + "\n"


def _text_lines(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return [("! " if block.warning else "  ") + printable(block.text)]
    if isinstance(block, Table):
        return _text_table(block)
    if isinstance(block, Bars):
        return _text_bars(block)
    lines = [f"  {len(block.samples)} of {printable(block.title)} are drawn in the HTML file:"]
    for sample in block.samples:
        texts = "; ".join(f"{name}: {text}" for name, text in (*sample.made, *_warned(sample)))
        lines.append(_shortened(f"    {printable(sample.record_id)}: {printable(texts)}"))
    return lines


def _warned(sample: Sample) -> list[tuple[str, str]]:
    return [("warning", warning) for warning in sample.warnings]


def _text_table(table: Table) -> list[str]:
    rows = [[_shortened(printable(cell)) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _text_bars(block: Bars) -> list[str]:
    most = max(count for _, count, _ in block.bars)
    lines = [f"  {printable(block.title)}"]
    for label, count, cut in block.bars:
        length = -(-BAR_WIDTH * count // most)
        lines.append(f"  {label:>9} {('x' if cut else '#') * length} {count:,}")
    return lines


def _shortened(text: str) -> str:
    """Cut in the middle: of a long path the end, a file and its line, is what one looks for."""
    if len(text) <= CELL_WIDTH:
        return text
    head = CELL_WIDTH // 2
    return text[:head] + "…" + text[head + 1 - CELL_WIDTH :]


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").isdecimal()


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The report as one HTML document, its pictures as data: URIs."""
    body = [f"<h1>{_escaped(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{_escaped(section.title)}</h2>")
        body += map(_html_block, section.blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_escaped(title)}</title>\n<style>{STYLE}</style>\n" + "\n".join(body) + "\n"
    )


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _html_block(block: Block) -> str:
    if isinstance(block, Paragraph):
        mark = ' class="warning"' if block.warning else ""
        return f"<p{mark}>{_escaped(block.text)}</p>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Bars):
        return _html_bars(block)
    cards = "\n".join(map(_card, block.samples))
    return f'<h3>{_escaped(block.title)}</h3>\n<div class="cards">\n{cards}\n</div>'


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_escaped(cell)}</th>" for cell in table.header)
    rows = ["".join(map(_cell, row)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _cell(text: str) -> str:
    kind = ' class="number"' if _is_number(text) else ' dir="auto"'
    return f"<td{kind}>{_escaped(text)}</td>"


def _html_bars(block: Bars) -> str:
    most = max(count for _, count, _ in block.bars)
    rows = [
        f'<tr><td class="number">{label}</td><td><span class="bar{" cut" if cut else ""}" '
        f'style="width: {20 * count / most:.2f}rem"></span> {count:,}</td></tr>'
        for label, count, cut in block.bars
    ]
    return f"<h3>{_escaped(block.title)}</h3>\n<table>\n" + "\n".join(rows) + "\n</table>"


def _card(sample: Sample) -> str:
    pictures = "".join(
        f'<img src="{_data_uri(picture, sample.box)}" alt="{_escaped(sample.record_id)}">'
        for picture in sample.pictures
    )
    given = [(f"given: {kind}", text) for kind, text in sample.given]
    texts = "".join(
        f'<dt>{_escaped(name)}</dt><dd dir="auto">{_escaped(text)}</dd>'
        for name, text in (*given, *sample.made)
    )
    warnings = "".join(f'<p class="warning">{_escaped(text)}</p>' for text in sample.warnings)
    name = f"<strong>{_escaped(sample.record_id)}</strong>"
    return f'<div class="card">{pictures}<div>{name}</div><dl>{texts}</dl>{warnings}</div>'


def _data_uri(picture: np.ndarray, box: tuple[float, float, float, float] | None) -> str:
    buffer = io.BytesIO()
    shown(picture, box).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown(picture: np.ndarray, box: tuple[float, float, float, float] | None) -> Image.Image:
    """The picture at a size that can be looked at, with its box.

    Args:
      picture: uint8 [H, W, 3].
      box: x1, y1, x2, y2 as fractions of the picture, or None.
    """
    image = Image.fromarray(picture)
    if image.width < SMALL_SIDE:
        factor = -(-SMALL_SIDE // image.width)
        size = (image.width * factor, image.height * factor)
        image = image.resize(size, Image.Resampling.NEAREST)
    elif image.width > LARGE_SIDE:
        height = max(round(image.height * LARGE_SIDE / image.width), 1)
        image = image.resize((LARGE_SIDE, height), Image.Resampling.LANCZOS)
    if box is not None:
        sides = (image.width, image.height) * 2
        edges = [
            min(max(round(edge * side), 0), side - 1) for edge, side in zip(box, sides, strict=True)
        ]
        ImageDraw.Draw(image).rectangle(edges, outline=BOX_COLOUR, width=2)
    return image
