"""What the stages of `ditcast compile` cost, for the report."""

from __future__ import annotations

import time
from typing import Any

from ditcast.bundle import Bundle
from ditcast.runtime.machine import peak_memory_mib


class Cost:
    """Seconds and peak memory of each stage that did anything.

    A stage that was taken up after a kill has the time of the last run only.
    """

    def __init__(self, bundle: Bundle) -> None:
        """The first stage starts now."""
        self.found: dict[str, dict[str, Any]] = {}
        self._bundle = bundle
        self._mark()

    def _mark(self) -> None:
        self._started, self._digest = time.perf_counter(), self._bundle.manifest.digest

    def stage(self, name: str) -> None:
        """The stage is over, and the next one starts; one that changed nothing had been done."""
        if self._bundle.manifest.digest != self._digest:
            self.found[name] = {
                "seconds": round(time.perf_counter() - self._started, 1),
                "peak_memory_mib": round(peak_memory_mib(), 1),
            }
        self._mark()
