"""docs/attention.md says what is true: its table of modules is made again and compared."""

import re
from pathlib import Path

import pytest

from benchmarks.attention import FORMULA, Row, between, markdown, module_rows
from ssl_global import attention

FILE = Path(__file__).parents[2] / "docs" / "attention.md"
TEXT = FILE.read_text()
ERROR = Row.HEAD.index("error")
MADE = "python -m benchmarks attention --write docs/attention.md"


def lines_between(name):
    (found,) = re.findall(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- /{name} -->", TEXT, re.DOTALL)
    return found.splitlines()


def cells(line):
    return line.strip("| ").split(" | ")


def test_the_table_of_modules_is_true():
    rows = module_rows()
    head, rule, *written = lines_between("modules")
    assert [head, rule] == markdown(Row.HEAD, [])
    assert [row.name for row in rows] == attention.names()
    assert len(written) == len(rows) >= 29
    for line, row in zip(written, rows, strict=True):
        said, found = cells(line), list(row.cells)
        assert row.error <= float(said[ERROR].removeprefix("< ")) < FORMULA  # machines round differently
        found[ERROR] = said[ERROR]
        assert said == found, f"{FILE.name} is behind: {MADE}"
        assert row.identical
        assert row.any_size


def test_every_module_is_measured():
    measured = {cells(line)[0] for line in lines_between("measured") if line.startswith("|")}
    assert measured >= set(attention.names())
    assert MADE in TEXT


def test_only_what_is_between_the_markers_is_written_anew():
    text = "before\n<!-- here -->\n\nold\n\n<!-- /here -->\nafter\n"
    once = between(text, "here", ["new", "lines"])
    assert once == "before\n<!-- here -->\n\nnew\nlines\n\n<!-- /here -->\nafter\n"
    assert between(once, "here", ["old"]) == text
    with pytest.raises(SystemExit, match="no place to write to: <!-- there -->"):
        between(text, "there", [])
