"""Progress of long work: a bar on a terminal, plain lines otherwise, always on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

LINE_EVERY_S = 10.0
_quiet = False  # no context variable: builders report from threads of their own


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While active, neither lines of what is going on nor a bar are shown."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def say(text: str) -> None:
    """One line of what is going on."""
    if not _quiet:
        tell(text)


def tell(text: str) -> None:
    """One line that nobody wants to miss: a warning, or what a result stands on."""
    print(f"ditcast: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `total` pieces of work; shows how long is left."""
    if _quiet:
        yield lambda: None
        return
    if sys.stderr.isatty():
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)
        return
    started = shown = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, shown
        done += 1
        now = time.monotonic()
        if now - shown >= LINE_EVERY_S:
            left = (now - started) / done * (total - done)
            say(f"{what}: {done} of {total} done, {left:.0f} s left")
            shown = now

    yield advance
