"""Compiled graphs on disk, so that the second start of a server does not compile again.

An entry is a folder with what a runtime wrote and a `facts.json` that says of what and for
which machine. It lies in `$DITCAST_CACHE`, else in `$XDG_CACHE_HOME/ditcast`, else in
`~/.cache/ditcast`; it can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ditcast.progress import say, tell
from ditcast.runtime import machine

FACTS = "facts.json"


def folder() -> Path:
    """Where entries are kept."""
    if chosen := os.environ.get("DITCAST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditcast"


def machine_facts(**more: str) -> dict[str, str]:
    """What a compiled graph depends on beside the graph: processor, and `more`."""
    return {"cpu": machine.cpu_name(), "flags": " ".join(machine.cpu_flags())} | more


class LoadCache:
    """The entries of one runtime on this machine; `facts` are its version and settings."""

    def __init__(self, backend: str, facts: dict[str, str]) -> None:
        """Nothing is read or written yet."""
        self._folder = folder() / backend
        self._facts = facts

    def find(self, identity: str, label: str) -> Path | None:
        """The entry of a graph, or None where there is none that fits.

        One of another machine or version, or one that lacks a byte, is said and dropped.
        """
        place = self._place(identity)
        if not place.is_dir():
            return None
        try:
            found = json.loads((place / FACTS).read_text())
            sizes = {name: (place / name).stat().st_size for name in found["sizes"]}
            problem = self._difference(found["facts"]) if sizes == found["sizes"] else "is damaged"
        except (OSError, ValueError, KeyError, TypeError):
            problem = "is damaged"
        if problem:
            say(f"{label}: the compiled graph in {place} {problem}; compiling it again")
            shutil.rmtree(place, ignore_errors=True)
            return None
        return place

    def _difference(self, facts: dict[str, str]) -> str:
        """How an entry's facts differ from this machine's, or nothing."""
        for key, value in self._facts.items():
            if facts.get(key) != value:
                return f"is for {key} {facts.get(key)!r}, expected {value!r}"
        return ""

    def store(self, identity: str, label: str, write: Callable[[Path], None]) -> None:
        """Let `write` fill a new entry; it is there as a whole or not at all."""
        place = self._place(identity)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".new-") as temporary:
                new = Path(temporary) / "entry"
                new.mkdir()
                write(new)
                sizes = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
                facts = {"facts": self._facts, "sizes": sizes}
                (new / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
                shutil.rmtree(place, ignore_errors=True)
                new.rename(place)
        except OSError as err:  # a full or read-only disk, or another process was faster
            tell(f"{label}: the compiled graph was not kept in {place} ({err.strerror or err})")

    def _place(self, identity: str) -> Path:
        return self._folder / hashlib.sha256(identity.encode()).hexdigest()[:24]
