"""What the stages of `ditcast compile` cost, for the report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ditcast.bundle import Bundle
from ditcast.runtime.machine import peak_memory_mib


class Cost:
    """Seconds and peak memory of each stage that did anything.

    A stage that was taken up after a kill has the time of the last run only, unless it knows that
    of its parts.
    """

    def __init__(self, bundle: Bundle) -> None:
        """The first stage starts now."""
        self.found: dict[str, dict[str, Any]] = {}
        self._bundle = bundle
        self._mark()

    def _mark(self) -> None:
        self._started, self._digest = time.perf_counter(), self._bundle.manifest.digest

    def stage(self, name: str, parts: Mapping[str, float] | None = None) -> None:
        """The stage is over, and the next one starts; one that changed nothing had been done.

        `parts` are the seconds of all that it consists of, those of earlier runs included.
        """
        if self._bundle.manifest.digest != self._digest:
            parts = parts or {}
            seconds = sum(parts.values()) or time.perf_counter() - self._started
            self.found[name] = {
                "seconds": round(seconds, 2),
                "peak_memory_mib": round(peak_memory_mib(), 1),
                "parts": {part: round(spent, 2) for part, spent in parts.items()},
            }
        self._mark()
