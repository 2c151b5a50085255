"""The page in a real browser: phone and desk, light and dark. Skipped where there is no Chromium."""

import asyncio
import re
from pathlib import Path

import chromium
import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from ssl_global.explain.curves import Chart
from ssl_global.explain.page import HERE, Code, Columns, Listing, Picture, Row, Section, Table, write

aiohttp = pytest.importorskip("aiohttp", reason="the browser is driven over aiohttp's WebSocket")
pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no Chromium here (Debian: apt-get install chromium)")

LONG = "runs/" + "a_very_long_name_without_a_space" * 8
EVIL = "<img src=https://example.com/x onerror=console.error(1)><script>console.error(2)</script>"
LAYOUT = """(() => {
  const root = document.documentElement;
  const outside = [...document.querySelectorAll("main *, header *, nav *, footer *")].filter(
    (e) => !e.closest(".scroll, pre") && e.getBoundingClientRect().right > root.clientWidth + 0.5);
  return {
    page: root.scrollWidth, window: root.clientWidth, ground: getComputedStyle(document.body).backgroundColor,
    pictures: [...document.images].map((image) => [image.naturalWidth, image.clientWidth, image.alt]),
    outside: outside.map((e) => e.outerHTML.slice(0, 80)),
    letters: Math.min(...[...document.querySelectorAll("svg text")].map((e) => e.getBoundingClientRect().height)),
  };
})()"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    photograph = Image.fromarray(photographs.astronaut())
    maps = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (14, 14), dtype=np.uint8)) for n in range(7)]
    steps = range(0, 100_000, 50)
    lines = {"k-NN": [(step, step**0.1) for step in steps], EVIL: [(step, 2 - step / 1e5) for step in steps]}
    sections = [
        Section(
            f"Pictures {EVIL}",
            f"{LONG}\n\n{EVIL}",
            [
                Picture(image=photograph, caption=LONG, alt="an astronaut"),
                Row([Picture(image=one, caption=f"head {n}", alt=f"head {n}") for n, one in enumerate(maps)], EVIL),
                Row([Picture(image=photograph.resize((224, 224)), caption=EVIL, alt=EVIL)] * 3),
            ],
        ),
        Section(
            "Curves", "", [Columns([Chart("Accuracy", lines, {"untrained": 0.5}), Chart(LONG, {"x": [(1, 1.0)]})])]
        ),
        Section("Tables", "", [Table([LONG[:60]] * 9, [[Code(LONG), *range(8)]], EVIL), Listing(f"python {LONG}")]),
        Section("Fields", "", [Columns([Table((), [(Code(LONG), Code(LONG))], caption="part")] * 4)]),
    ]
    file = tmp_path_factory.mktemp("report") / "index.html"
    write(file, title=LONG, subtitle=EVIL, sections=sections)
    return file


def test_a_browser_shows_the_page_asks_for_nothing_and_complains_of_nothing(file: Path, tmp_path: Path) -> None:
    asyncio.run(seen(file, tmp_path))


async def seen(file: Path, profile: Path) -> None:
    style = (HERE / "page.css").read_text()
    light, dark, _ = (re.search(r"--ground: #(\w+)", block)[1] for block in style.split(":root {")[1:])
    async with chromium.browser(profile) as devtools:
        for width in (320, 360, 1280):
            for scheme, ground in (("light", light), ("dark", dark)):
                async with chromium.tab(devtools) as tab:
                    await tab.open(file.as_uri(), width=width, scheme=scheme)
                    layout = await tab.ask(LAYOUT)
                    assert layout["page"] <= layout["window"] <= width
                    assert layout["outside"] == []
                    assert len(layout["pictures"]) == 11
                    assert all(natural > 0 and shown >= 90 and alt for natural, shown, alt in layout["pictures"])
                    assert layout["letters"] >= 9
                    assert re.findall(r"\d+", layout["ground"]) == [str(channel) for channel in bytes.fromhex(ground)]
                    await enlarged(tab)
                    assert tab.complaints == []
                    assert tab.asked_for[0] == file.as_uri()
                    assert all(address.startswith("data:") for address in tab.asked_for[1:]), tab.asked_for
        await strangers_script(devtools, file)


async def enlarged(tab: chromium.Tab) -> None:
    """A small map opens with the Enter key, fills the window, and closes with Escape; the keyboard is where it was."""
    await tab.ask("document.querySelectorAll('button.enlarge')[1].focus()")
    await tab.send(
        "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
    )
    await tab.send("Input.dispatchKeyEvent", type="keyUp", key="Enter", code="Enter", windowsVirtualKeyCode=13)
    shown = "document.querySelector('dialog').open"
    assert await tab.ask(shown)
    assert await tab.ask("document.querySelector('dialog img').alt") == "head 0"
    assert await tab.ask("document.querySelector('dialog img').clientWidth >= 0.85 * innerWidth")
    await tab.press("Escape", 27)
    assert not await tab.ask(shown)
    assert await tab.ask("document.activeElement === document.querySelectorAll('button.enlarge')[1]")


async def strangers_script(devtools: str, file: Path) -> None:
    """The asserts above can fail: what a page without escapes would do is seen, and its policy stops even that."""
    evil = file.with_name("evil.html")
    content = file.read_text().replace("<main>", f"<main>{EVIL}")
    evil.write_text(content)
    async with chromium.tab(devtools) as tab:
        await tab.open(evil.as_uri(), width=360, scheme="light")
        assert sum("Content Security Policy" in said for said in tab.complaints) >= 2
        assert not any("consoleAPICalled" in happened for happened in tab.happened)
    evil.write_text(re.sub(r"<meta http-equiv[^>]*>", "", content))
    async with chromium.tab(devtools) as tab:
        await tab.open(evil.as_uri(), width=360, scheme="light")
        assert "https://example.com/x" in tab.asked_for
        assert "Runtime.consoleAPICalled" in tab.happened
