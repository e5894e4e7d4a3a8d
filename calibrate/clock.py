"""How long each part of calibration took, over all the runs that one calibration was made in."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ditcast.bundle import Bundle
from ditcast.progress import say

STAGE = "cost"  # of the bundle's scratch, beside that of the calibration, which ends earlier


class Clock:
    """Seconds of each part, kept at every lap, so that a resumed run adds to them.

    Laps end where work is kept too; what an interrupted run spent after its last one is not
    known. The seconds are no part of the bundle, so that equal recipes give equal bytes.
    """

    def __init__(self, bundle: Bundle) -> None:
        """The first lap starts now."""
        self.seconds: dict[str, float] = {}
        self._bundle, self._started = bundle, time.perf_counter()

    def lap(self, part: str) -> None:
        """All since the last lap was spent on this part."""
        file = self._bundle.scratch(STAGE) / "seconds.json"
        fingerprint = self._bundle.manifest.fingerprint()
        if not self.seconds:  # this is the first lap
            self.seconds = _known(file, fingerprint)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._started
        self._started = now
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps({fingerprint: self.seconds}))
        partial.replace(file)

    def clear(self) -> None:
        """Forget what is kept: the calibration is done."""
        self._bundle.clear(STAGE)


def _known(file: Path, fingerprint: str) -> dict[str, float]:
    """What an interrupted run of the same model and recipe has spent."""
    if not file.is_file():
        return {}
    try:
        kept = json.loads(file.read_bytes())
    except ValueError as err:
        say(f"calibrating: what an interrupted run has cost is unreadable ({err})")
        return {}
    found: dict[str, float] = kept.get(fingerprint, {})
    return found
