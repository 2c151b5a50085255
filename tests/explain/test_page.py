"""What stands in the file, read back with html.parser and PIL. What a browser makes of it is in test_browser.py."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from ssl_global.errors import UserError
from ssl_global.explain.page import (
    HERE,
    Code,
    Columns,
    Listing,
    Picture,
    Row,
    Section,
    Table,
    bare,
    number,
    packed,
    page,
    write,
)

EVIL = [
    '<script>alert("1")</script>',
    "\"' onload='alert(1)",
    "&lt;b&gt; & <!-- ]]>",
    "--></style></script><img src=x>",
]
VOID = {"meta", "link", "img"}


class Read(HTMLParser):
    """The page's elements and texts. Every element that was opened must be closed in its turn."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(content.decode())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes)
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def within(self, tag):
        return [text for name, text in self.texts if name == tag]


def read(*sections: Section, title: str = "dino", subtitle: str = "a run") -> Read:
    return Read(page(title, subtitle, sections))


def picture(image: Image.Image, caption: str = "a caption", alt: str = "a description") -> Picture:
    return Picture(image=image, caption=caption, alt=alt)


def opened(uri: str) -> Image.Image:
    kind, _, content = uri.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert kind == f"data:image/{image.format.lower()}"
    return image


def photograph(pixels: int = 128) -> Image.Image:
    return Image.fromarray(photographs.astronaut()).resize((pixels, pixels))


def noise(mode: str, *, seed: int = 0, pixels: int = 21) -> Image.Image:
    shape = (pixels, pixels + 13, *([len(mode)] if len(mode) > 1 else []))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("image", "mode"),
    [
        (noise("L"), "L"), (noise("RGB"), "RGB"), (noise("RGBA"), "RGBA"), (noise("LA"), "RGBA"),
        (noise("RGB").convert("P"), "RGB"), (noise("L").convert("1"), "L"), (noise("RGBA").convert("CMYK"), "RGB"),
        (noise("RGB", pixels=150), "RGB"), (Image.new("RGB", (1, 1), "red"), "RGB"),
        (Image.new("RGB", (400, 3), "blue"), "RGB"),
    ],
)  # fmt: skip
def test_a_data_uri_is_the_picture(image, mode):
    (found,) = read(Section("s", parts=[picture(image)])).all("img")
    shown = opened(found["src"])
    assert (int(found["width"]), int(found["height"])) == shown.size == image.size
    np.testing.assert_array_equal(np.asarray(shown.convert(mode)), np.asarray(image.convert(mode)))


def test_a_photograph_is_a_jpeg_that_looks_the_same_and_is_smaller():
    image = photograph()
    (found,) = read(Section("s", parts=[picture(image)])).all("img")
    shown = opened(found["src"])
    assert shown.format == "JPEG"
    assert shown.size == image.size
    difference = np.asarray(shown, dtype=float) - np.asarray(image, dtype=float)
    assert np.sqrt((difference**2).mean()) < 4.0
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    assert len(found["src"]) < 0.5 * len(base64.b64encode(file.getvalue()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_only_pixels_are_taken_not_what_a_camera_wrote_beside_them(kind):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = "where I live"
    beside = {"icc_profile": b"whose camera"} | ({"comment": b"a secret"} if kind == "JPEG" else {})
    photograph().save(file, kind, exif=exif, **beside)
    image = Image.open(file)
    assert beside.keys() <= image.info.keys()
    for kept in (image, image.convert("L"), image.resize((8, 8))):
        (found,) = read(Section("s", parts=[picture(kept)])).all("img")
        shown = opened(found["src"])
        assert not shown.getexif()
        assert not {"comment", "exif", "icc_profile"} & shown.info.keys()
        assert bare(kept).info == {}  # whichever way it is packed


def test_every_picture_has_words_and_can_be_reached_by_keys():
    row = Row([picture(noise("L", seed=n), f"head {n}", f"attention of head {n}") for n in range(3)], "of block 3")
    found = read(Section("s", parts=[row, picture(noise("RGB"), "alone", "a picture alone")]))
    expected = ["attention of head 0", "attention of head 1", "attention of head 2", "a picture alone"]
    assert [image["alt"] for image in found.all("img")] == expected
    assert found.within("figcaption") == ["head 0", "head 1", "head 2", "of block 3", "alone"]
    assert [button.get("class") for button in found.all("button")] == ["enlarge"] * 4 + [None]


@pytest.mark.parametrize(("caption", "alt"), [("", "a"), ("a", ""), (" ", "a"), ("a", "\n")])
def test_a_picture_without_words_is_refused(caption, alt):
    with pytest.raises(ValueError, match="needs a caption and a description"):
        picture(noise("L"), caption, alt)


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("evil", EVIL)
def test_texts_stay_texts_wherever_they_stand(evil):
    table = Table([evil, "b"], [[evil, Code(evil)]], caption=evil)
    parts = [picture(noise("L"), evil, evil), Row([picture(noise("L"), evil, evil)], evil), table, Listing(evil)]
    harmless = read(Section("t", "t", [picture(noise("L")), Row([picture(noise("L"))], "r"),
                                       Table(["a", "b"], [["c", Code("d")]], caption="e"), Listing("f")]))  # fmt: skip
    found = read(Section(evil, evil, [*parts]), title=evil, subtitle=evil)
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in harmless.elements]
    assert [sorted(a) for _, a in found.elements] == [sorted(a) for _, a in harmless.elements]
    assert [image["alt"] for image in found.all("img")] == [evil, evil]
    for tag in ("title", "h1", "h2", "p", "a", "th", "td", "code", "caption", "figcaption"):
        assert evil in found.within(tag), tag


def test_characters_that_are_no_text_are_made_visible():
    content = page("a\0b\x1b[31m", "half \ud800 a character", [])
    assert Read(content).within("h1") == [r"a\x00b\x1b[31m"]
    assert rb"half \ud800 a character" in content


def test_empty_lines_part_paragraphs():
    assert read(Section("s", "one\nline\n\n  two \n\n\n")).within("p")[1:-1] == ["one\nline", "two"]


# -------------------------------------------------------------------------------------------------------------- tables


def test_numbers_stand_right_names_in_letters_of_one_width():
    rows = [("a word", Code("layer.1"), 3, 0.5), ("another", Code("layer.2"), 12345, None)]
    found = read(Section("s", parts=[Table(("what", "where", "count", "share"), rows, "figures")]))
    cells = [attributes.get("class") for attributes in found.all("td")]
    assert cells == [None, None, "number", "number"] * 2
    assert [attributes.get("class") for attributes in found.all("th")] == [None, None, "number", "number"]
    assert found.within("code") == ["layer.1", "layer.2"]
    assert found.within("td") == ["a word", "3", "0.5", "another", "12\u202f345", "–"]
    assert found.all("div")[0]["aria-label"] == "figures"


def test_a_column_with_a_word_among_its_numbers_stands_left():
    found = read(Section("s", parts=[Table((), [(1,), ("two",), (True,)])]))
    assert [attributes.get("class") for attributes in found.all("td")] == [None] * 3
    assert found.within("td") == ["1", "two", "yes"]
    assert found.all("thead") == []


def test_a_table_may_say_how_many_decimals():
    found = read(Section("s", parts=[Table((), [(0.51, 7), (0.6478, 8)], decimals=3)]))
    assert found.within("td") == ["0.510", "7", "0.648", "8"]


@pytest.mark.parametrize(("head", "rows"), [((), [(1,), (1, 2)]), (("a",), [(1, 2)])])
def test_rows_of_other_lengths_are_refused(head, rows):
    with pytest.raises(ValueError, match="do not make a table"):
        Table(head, rows)


def test_a_table_without_rows_has_its_head():
    assert read(Section("s", parts=[Columns([Table(("a", "b"), [])])])).within("th") == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (0.0, "0"), (375, "375"), (9999, "9999"), (24000, "24 000"), (-1234567, "-1 234 567"),
        (0.65444, "0.6544"), (0.05, "0.05"), (2.5e-4, "2.5e-4"), (-1e-9, "-1e-9"), (1234.6, "1235"),
        (56789.0, "56 789"), (1e12, "1e12"),
        (float("nan"), "not a number"), (float("inf"), "over 1e100"), (-(10**400), "under -1e100"),
        (None, "–"), ("x", "–"), (True, "–"),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(value, said):
    assert number(value).replace("\u202f", " ") == said


# ------------------------------------------------------------------------------------------------------------ the file


def test_contents_lead_to_the_sections():
    found = read(Section("What it sees"), Section("Cost"))
    assert [a["href"] for a in found.all("a")] == [f"#{section['id']}" for section in found.all("section")]
    assert found.within("a") == ["What it sees", "Cost"]
    for section in found.all("section"):
        assert section["aria-labelledby"] in [h2.get("id") for h2 in found.all("h2")]


def test_nothing_but_what_stands_in_the_page_may_be_loaded_or_run():
    content = page("t", "s", [Section("s", parts=[picture(noise("L"))])])
    found = Read(content)
    (policy,) = [meta["content"] for meta in found.all("meta") if meta.get("http-equiv")]
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == "'none'"
    assert allowed["img-src"] == "data:"
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content.decode(), re.DOTALL)
        assert allowed[kind] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    links = [value for _, a in found.elements for name, value in a.items() if name in ("src", "href")]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in (HERE / "page.css").read_text()


def test_the_page_says_how_large_it_is():
    for sections in ([], [Section("s", parts=[picture(photograph(400))])]):
        content = page("t", "s", sections)
        size, unit, pictures = re.search(r"One file of ([\d.]+) (\w+) with (\d+) picture", content.decode()).groups()
        assert float(size) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(len(content), rel=0.15)
        assert int(pictures) == len(sections)


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path):
    class Broken:
        def html(self) -> str:
            raise RuntimeError("broken")

    file = tmp_path / "index.html"
    write(file, title="first", subtitle="", sections=[])
    before = file.read_bytes()
    with pytest.raises(RuntimeError, match="broken"):
        write(file, title="second", subtitle="", sections=[Section("s", parts=[Broken()])])
    assert file.read_bytes() == before
    write(file, title="third", subtitle="", sections=[])
    assert Read(file.read_bytes()).within("h1") == ["third"]
    assert [found.name for found in tmp_path.iterdir()] == ["index.html"]
    with pytest.raises(UserError, match=r"nowhere/index\.html: cannot be written"):
        write(tmp_path / "nowhere" / "index.html", title="", subtitle="", sections=[])


# ------------------------------------------------------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    """WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_letters_and_lines_stand_out_from_their_ground():
    style = (HERE / "page.css").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{[^}]*\}", style)
    ]
    assert len(schemes) == 3  # light, dark, paper
    for scheme in schemes:
        assert scheme.keys() == schemes[0].keys()
        for name in scheme.keys() - {"ground", "raised", "rule"}:
            for ground in ("ground", "raised"):
                low, high = sorted((luminance(scheme[name]), luminance(scheme[ground])))
                least = 4.5 if name.startswith("line-") else 7
                assert (high + 0.05) / (low + 0.05) >= least, (name, ground, scheme)


@pytest.mark.parametrize("size", [(4, 17_000), (4, 66_000), (17_000, 4)])
def test_a_picture_too_tall_for_one_format_has_another(size):
    """Two hundred images in one sheet are more than WebP can hold, more still than JPEG."""
    image = Image.linear_gradient("L").convert("RGB").resize(size)
    kind, content = packed(image)
    with Image.open(io.BytesIO(content)) as found:
        assert found.size == size
        assert kind == "PNG" or max(size) < 65_500
