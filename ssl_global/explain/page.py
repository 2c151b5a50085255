"""One page about a backbone or a run: a single HTML file that needs nothing else.

    write(Path("report/index.html"), title="dino", subtitle="...", sections=[Section("What it sees", "...", [picture])])

Pictures are data: URIs, the style and the few lines of script stand in the page, and its Content-Security-Policy
forbids all else: opened from a disk or a server it asks nobody for anything, and a name that holds <script> stays a
name. It is light or dark as its reader has chosen, and made for a phone, a desk and paper (page.css).

What stands in a section is anything with `html()`: pictures, tables and listings from here, charts from curves.py.
"""

import base64
import hashlib
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeGuard

import numpy as np
from PIL import Image

from ssl_global.data.files import whole

HERE = Path(__file__).parent
LOSSLESS: dict[str, dict[str, object]] = {"PNG": {"optimize": True}, "WEBP": {"lossless": True, "exact": True}}
JPEG: dict[str, object] = {"quality": 92, "subsampling": 0}  # ours; colours keep their edges in maps
LARGEST = {"WEBP": 16_383, "JPEG": 65_500}  # pixels of a side that the formats can hold
MOST_ERROR = 4.0  # ours, of 255, root mean square: more is lost by JPEG, and the picture is kept exactly
SMALL, MEDIUM = 160, 420  # ours, pixels of width: up to there a picture is shown several to a line
BEYOND = 1e100  # ours: so large a number says no more than that it is
NARROW_SPACE = "\u202f"  # does not break a line
PIXELATED = 96  # ours: up to this width a picture is shown larger than it is, and its pixels stay squares

SCRIPT = """\
const large = document.querySelector("dialog");
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.enlarge");
  if (button) {
    large.firstElementChild.replaceChildren(button.firstElementChild.cloneNode());
    large.showModal();
  } else if (large.contains(event.target)) {
    large.close();
  }
});
"""


class Part(Protocol):
    """Something that stands in a section."""

    def html(self) -> str: ...


class Code(str):
    """A name, path or command: in a table it is set in letters of one width."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Raises ValueError without a caption, or without the words (`alt`) for people who do not see it."""

    image: Image.Image  # any mode and size
    caption: str
    alt: str

    def __post_init__(self) -> None:
        if not (self.caption.strip() and self.alt.strip()):
            raise ValueError("a picture needs a caption and a description (alt)")

    def html(self) -> str:
        small = ' class="pixels"' if self.image.width <= PIXELATED else ""
        size = f'width="{self.image.width}" height="{self.image.height}"'
        image = f'<img src="{data_uri(self.image)}" alt="{escaped(self.alt)}" {size}{small}>'
        button = f'<button type="button" class="enlarge" aria-haspopup="dialog">{image}</button>'
        return f'<figure class="picture">{button}<figcaption>{escaped(self.caption)}</figcaption></figure>'


@dataclass(frozen=True)
class Row:
    """Pictures side by side, as many to a line as there is room for, with words for all of them below."""

    pictures: Sequence[Picture]
    caption: str = ""

    def html(self) -> str:
        widest = max((picture.image.width for picture in self.pictures), default=0)
        size = "small" if widest <= SMALL else "medium" if widest <= MEDIUM else "large"
        caption = f"<figcaption>{escaped(self.caption)}</figcaption>" if self.caption else ""
        pictures = "".join(picture.html() for picture in self.pictures)
        return f'<figure class="row"><div class="cells {size}">{pictures}</div>{caption}</figure>'


@dataclass(frozen=True)
class Table:
    """A column of numbers is set to the right; None is a dash, a bool yes or no, and Code has letters of one width."""

    head: Sequence[str]  # empty: none
    rows: Sequence[Sequence[object]]
    caption: str = ""
    decimals: int | None = None  # of all numbers that are no integers; None: four significant digits each

    def __post_init__(self) -> None:
        widths = {len(row) for row in (*self.rows, *([self.head] if self.head else []))}
        if len(widths) > 1:
            raise ValueError(f"rows of {sorted(widths)} cells do not make a table")

    def html(self) -> str:
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.head)
        right = [all(is_number(cell) or cell is None for cell in column) for column in columns]
        caption = f"<caption>{escaped(self.caption)}</caption>" if self.caption else ""
        names = "".join(
            f'<th scope="col"{" class=number" if to_right else ""}>{escaped(name)}</th>'
            for name, to_right in zip(self.head, right, strict=False)  # a table may have no head
        )
        head = f"<thead><tr>{names}</tr></thead>" if self.head else ""
        body = "".join(f"<tr>{''.join(map(self.cell, row, right))}</tr>" for row in self.rows)
        # Wide tables are scrolled in their own box, which needs a name and the keyboard's focus for that.
        name = escaped(self.caption or "table")
        box = f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">'
        return f"{box}<table>{caption}{head}<tbody>{body}</tbody></table></div>"

    def cell(self, value: object, to_right: bool) -> str:
        if is_number(value) or value is None:
            fixed = isinstance(value, float) and self.decimals is not None and abs(value) < BEYOND
            shown = f"{value:.{self.decimals}f}" if fixed else number(value)
            return f"<td{' class=number' if to_right else ''}>{shown}</td>"
        text = ("no", "yes")[value] if isinstance(value, bool) else str(value)
        return f"<td><code>{escaped(text)}</code></td>" if isinstance(value, Code) else f"<td>{escaped(text)}</td>"


@dataclass(frozen=True)
class Columns:
    """Short tables or charts beside and below each other."""

    parts: Sequence[Part]

    def html(self) -> str:
        kind = "tables" if all(isinstance(part, Table) for part in self.parts) else "charts"
        return f'<div class="{kind}">{"".join(part.html() for part in self.parts)}</div>'


@dataclass(frozen=True)
class Listing:
    """Lines of a program or a command, as they are."""

    text: str

    def html(self) -> str:
        return f'<pre tabindex="0"><code>{escaped(self.text)}</code></pre>'


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""  # paragraphs, with an empty line between two
    parts: Sequence[Part] = ()

    def html(self, number: int) -> str:
        paragraphs = "".join(f"<p>{escaped(p.strip())}</p>" for p in self.text.split("\n\n") if p.strip())
        parts = "".join(part.html() for part in self.parts)
        title = f'<h2 id="section-{number}-title">{escaped(self.title)}</h2>'
        labelled = f'id="section-{number}" aria-labelledby="section-{number}-title"'
        return f"<section {labelled}>{title}{paragraphs}{parts}</section>\n"


def write(path: Path, *, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """The page, whole or not at all; a file that was there is replaced. Raises UserError if it cannot be written."""
    content = page(title, subtitle, sections)
    with whole(path) as file:
        file.write(content)


def page(title: str, subtitle: str, sections: Sequence[Section]) -> bytes:
    style, script = (HERE / "page.css").read_text(), SCRIPT
    body = "".join(section.html(number) for number, section in enumerate(sections, start=1))
    contents = "".join(
        f'<li><a href="#section-{number}">{escaped(section.title)}</a></li>'
        for number, section in enumerate(sections, start=1)
    )
    policy = f"default-src 'none'; img-src data:; style-src '{sha256(style)}'; script-src '{sha256(script)}'"
    num_pictures = body.count("<img ")
    pictures = f"{num_pictures} {'picture' if num_pictures == 1 else 'pictures'}"
    size = written_bytes(len(encoded(body)) + len(style) + len(script))
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escaped(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{escaped(title)}</h1><p>{escaped(subtitle)}</p></header>
<nav aria-labelledby="contents"><h2 id="contents">Contents</h2><ol>{contents}</ol></nav>
<main>
{body}</main>
<footer><p>One file of {size} with {pictures}; it loads nothing else.</p></footer>
<dialog aria-label="Enlarged picture"><div></div><button type="button">Close</button></dialog>
<script>{script}</script>
</body>
</html>
"""
    return encoded(text)


# ------------------------------------------------------------------------------------------------------------- numbers


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: object) -> str:
    """As people write it: four significant digits, thousands apart."""
    if not is_number(value):
        return "–"
    if value != value:
        return "not a number"
    if abs(value) >= BEYOND:
        return "over 1e100" if value > 0 else "under -1e100"
    if isinstance(value, float) and (abs(value) < 1000 or abs(value) >= 1e6):
        return short(f"{value:.3e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}")
    whole_number = round(value)
    return f"{whole_number:,}".replace(",", NARROW_SPACE) if abs(whole_number) >= 10_000 else str(whole_number)


def short(written: str) -> str:
    """1.50e-04 as 1.5e-4."""
    mantissa, e, exponent = written.partition("e")
    if "." in mantissa and e:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if e else written


def written_bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"


# ---------------------------------------------------------------------------------------------------------------- text

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escaped(text: str) -> str:
    """For the text of an element and for an attribute in double quotes; control characters are made visible."""
    return html.escape(CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text), quote=True)


def encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # half a character, as names of files may hold


def sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# ------------------------------------------------------------------------------------------------------------ pictures


def data_uri(image: Image.Image) -> str:
    kind, content = packed(image)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def packed(image: Image.Image) -> tuple[str, bytes]:
    """("PNG", "WEBP" or "JPEG", the file): the smallest; JPEG only where nobody would see it."""
    pixels = bare(image)
    side = max(pixels.size)
    fitting = {kind: options for kind, options in LOSSLESS.items() if side <= LARGEST.get(kind, side)}
    candidates = {kind: saved(pixels, kind, options) for kind, options in fitting.items()}
    if pixels.mode != "RGBA" and side <= LARGEST["JPEG"]:
        lossy = saved(pixels, "JPEG", JPEG)
        if rms_difference(Image.open(io.BytesIO(lossy)), pixels) <= MOST_ERROR:
            candidates["JPEG"] = lossy
    kind = min(candidates, key=lambda name: len(candidates[name]))
    return kind, candidates[kind]


def bare(image: Image.Image) -> Image.Image:
    """The pixels as L, RGB or RGBA, without what a camera or a program has written beside them."""
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    return Image.fromarray(np.asarray(image.convert(mode)))


def saved(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rms_difference(one: Image.Image, other: Image.Image) -> float:
    """In grey levels of 255."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return float(np.sqrt((difference**2).mean()))
