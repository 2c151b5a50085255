"""Progress: a bar on a terminal, now and then a line elsewhere, nothing where it is not wanted."""

import io

import pytest
from rich.console import Console

from ssl_global.data import progress
from ssl_global.data.progress import report


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("visible", [True, False])
def test_progress(terminal: bool, visible: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(
        progress,
        "Console",
        lambda *, stderr, quiet: Console(file=written, force_terminal=terminal, quiet=quiet, width=100),
    )
    with report("packed", 12, visible=visible) as done:
        done(7)
    if not visible:
        assert written.getvalue() == ""
    else:
        assert "7/12" in written.getvalue() if terminal else written.getvalue() == "packed 7 of 12 images\n"
