"""How a runtime uses the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ditcast.errors import ConfigError


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`threads`, 0 for one per core, and whether waiting threads `spin` on their cores.

    With `trust_engines`, plans that others have built are run too: they are code.
    """

    threads: int = 0
    spin: bool = True
    trust_engines: bool = False

    def thread_count(self) -> int:
        """The number of threads.

        Raises:
            ConfigError: more threads than cores, or fewer than none.
        """
        if not 0 <= self.threads <= cores():
            raise ConfigError(
                f"threads: got {self.threads}, expected 1 to {cores()}, or 0 for one per core"
            )
        return self.threads or cores()
