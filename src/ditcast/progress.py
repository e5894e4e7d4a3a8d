"""Progress of long work: a bar on a terminal, plain lines otherwise, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")
LINE_EVERY_S = 10.0


def say(text: str) -> None:
    """One line of what is going on."""
    print(f"ditcast: {text}", file=sys.stderr, flush=True)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Pass `items` on, showing how many of `total` are done and how long the rest takes."""
    if sys.stderr.isatty():
        yield from rich_track(items, what, total, console=Console(stderr=True), transient=True)
        return
    started = shown = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - shown >= LINE_EVERY_S:
            left = (now - started) / (done + 1) * (total - done - 1)
            say(f"{what}: {done + 1}/{total}, {left:.0f} s left")
            shown = now
