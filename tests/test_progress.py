"""Progress: plain lines where nobody watches a terminal, a bar where someone does."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from ditcast import progress
from ditcast.bundle import Bundle
from ditcast.cli import app
from tests.conftest import Cli


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


def test_quiet_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither lines nor a bar, but what nobody wants to miss; afterwards all is as before."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.quiet():
        progress.say("exporting")
        progress.tell("warning: slow")
        with progress.counting("sampling", 3) as advance:
            advance()
    progress.say("done")
    assert capsys.readouterr() == ("", "ditcast: warning: slow\nditcast: done\n")


def options(name: str) -> set[str]:
    """All options of a command."""
    return {option for parameter in app.commands[name].params for option in parameter.opts}


def test_what_takes_long_can_be_quiet() -> None:
    """Every command that shows progress."""
    found = {name for name in app.commands if "--quiet" in options(name)}
    assert found >= {"compile", "calibrate", "export", "build", "audit", "bench", "sample", "tune"}
    assert "deploy" in found
    assert not found & {"report", "gate", "compare", "verify", "inspect"}


def test_a_quiet_command(
    cli: Cli, shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results, warnings and errors are still there; the next command talks again."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    command = ("sample", shared_bundle.path, "-o", tmp_path / "out.npy", "--labels", 1)
    idle = ("--cache", "taylor", "--steps", 2)
    done = cli(*command, *idle, "--quiet")
    assert done.out.startswith(f"{tmp_path / 'out.npy'}: 1 images in ")
    (line,) = done.err.splitlines()
    assert line.startswith("ditcast: warning: cache taylor never reuses")
    done = cli(*command, "--labels", 9, "--quiet")
    assert (done.code, done.out) == (2, "")
    assert done.err == "ditcast: error: labels: got 9, expected 0 to 4\n"
    assert "ditcast: sampling: 2 of 2 done" in cli(*command, *idle).err
