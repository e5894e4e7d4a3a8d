"""Progress: plain lines where nobody watches a terminal, a bar where someone does."""

from __future__ import annotations

import io
import sys

import pytest

from ditcast import progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


def test_lines_say_how_much_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error, so that standard output stays clean."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    with progress.counting("sampling", 3) as advance:
        for _ in range(3):
            advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        f"ditcast: sampling: {done} of 3 done" for done in (1, 2, 3)
    ]
    assert lines[-1].endswith(" 0 s left")


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A line comes every ten seconds at most."""
    with progress.counting("sampling", 3) as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is gone when the work is done."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.counting("sampling", 3) as advance:
        for _ in range(3):
            advance()
    assert "sampling" in stream.getvalue()
    assert "ditcast:" not in stream.getvalue()
