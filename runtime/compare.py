"""Several reports in one page: what each bundle runs beside the others, and how they differ."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ditcast.bundle import Bundle
from ditcast.errors import ConfigError
from ditcast.runtime import kept, page
from ditcast.runtime.charts import COLOURS
from ditcast.runtime.fidelity import BASIS
from ditcast.runtime.images import Pixels
from ditcast.runtime.report import read_pictures
from ditcast.runtime.sections import plain
from ditcast.runtime.verdict import Row, count, gains

SECTIONS = ("request", "distances", "backend", "machine")
CONDITIONS = {  # keys of the request that decide which images fidelity is over
    "steps": "numbers of steps",
    "guidance": "guidance scales",
    "seed": "seeds",
    "images": "numbers of images",
}
UNIQUE = ("digest", "content")  # differ between any two bundles


class Entry(NamedTuple):
    """One report: what it is called, its figures, and pictures where a bundle was given."""

    title: str
    figures: dict[str, Any]
    pictures: dict[str, Pixels]

    @property
    def best(self) -> Row:
        """The row of what the bundle runs."""
        found: Row = (gains(self.figures["variants"]) or self.figures["variants"])[-1]
        return found


def read(paths: Sequence[Path]) -> list[Entry]:
    """The reports of bundles, and of files that `bench --json` wrote.

    Raises:
        ConfigError: one report alone, or the same one twice.
        BundleError: a bundle without figures of its own graphs, or a file that is no report.
    """
    if len(paths) < 2:
        raise ConfigError("compare: got one report, expected at least two; see ditcast report")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("compare: got the same report twice; name each once")
    short = len({path.name for path in paths}) == len(paths)
    entries = []
    for path in paths:
        found = kept.load(path)
        pictures = read_pictures(Bundle.open(path), found) if path.is_dir() else {}
        entries.append(Entry(path.name if short else str(path), found, pictures))
    return entries


def render(entries: Sequence[Entry], paths: Sequence[Path]) -> str:
    """The page as text.

    Raises:
        MissingDependencyError: the `report` extra is not installed.
    """
    command = shlex.join(["ditcast", "compare", *(path.name for path in paths)])
    colours = {entry.title: COLOURS[(i + 1) % len(COLOURS)] for i, entry in enumerate(entries)}
    return page.render_comparison(
        entries=entries,
        best=[entry.best | {"name": entry.title} for entry in entries],
        pictured=same_seeds(entries),
        colours=colours | {"full precision": COLOURS[0]},
        headline=headline(entries),
        notes=notes(entries),
        differences=differences(entries),
        command=command,
    )


def same_seeds(entries: Sequence[Entry]) -> list[tuple[Row, Pixels]]:
    """Full precision's pictures and those of what each bundle runs, if they are of the same."""
    if not _same(entries, "request", "seed") or not _same(entries, "bundle", "fingerprint"):
        return []
    if not _same(entries, "request", "guidance") or not _same(entries, "pictures"):
        return []
    reference = entries[0].figures["variants"][0]
    found = [(reference, entries[0].pictures.get(reference["name"]))]
    for entry in entries:
        row = entry.best
        found.append((row | {"name": entry.title}, entry.pictures.get(row["name"])))
    shown = [(row, pictures) for row, pictures in found if pictures is not None]
    return shown if len(shown) == len(found) else []


def headline(entries: Sequence[Entry]) -> str:
    """Which is the fastest and which the closest; speed never without fidelity."""
    rated = [e for e in entries if e.best["speedup"] and e.best["psnr_db"]]
    if len(rated) < 2 or notes_of_fidelity(entries):
        return f"{', '.join(entry.title for entry in entries)} side by side"
    fast = max(rated, key=lambda entry: entry.best["speedup"]["p50"])
    close = max(rated, key=lambda entry: entry.best["psnr_db"]["p50"])
    if fast is close:
        return f"{fast.title} is both the fastest and the closest: {_figures(fast)}."
    return (
        f"{fast.title} is the fastest, {_figures(fast)}; "
        f"{close.title} the closest, {_figures(close)}."
    )


def _figures(entry: Entry) -> str:
    row = entry.best
    return (
        f"{row['speedup']['p50']:.2f} times full precision at {row['psnr_db']['p50']:.1f} dB "
        f"({count(row['samples'], 'sample')})"
    )


def notes(entries: Sequence[Entry]) -> list[str]:
    """What makes these reports hard to compare."""
    found = notes_of_fidelity(entries)
    bases = [entry.figures["distances"] for entry in entries if entry.figures["distances"]]
    if any(basis[key] != bases[0][key] for basis in bases for key in BASIS):
        found.append(
            "The distances stand on other real pictures, dimensions or another extractor in each "
            "report: they do not compare."
        )
    if not _same(entries, "machine", "cpu") or not _same(entries, "backend"):
        found.append(
            "Processors or backends differ: compare speed-ups, each of which is against full "
            "precision in the same run, rather than times."
        )
    found.append(
        "Each report was measured in a run of its own, so that a machine that was busy in one of "
        "them shows in the times; speed-ups are paired within a run."
    )
    return found


def notes_of_fidelity(entries: Sequence[Entry]) -> list[str]:
    """Why PSNR and SSIM of one report do not compare with those of another."""
    if not _same(entries, "bundle", "fingerprint"):
        return ["The models differ: fidelity is to another full precision in each report."]
    if any(entry.figures["bundle"]["random_weights"] for entry in entries):
        return ["The weights are random: fidelity means nothing here."]
    for key, words in CONDITIONS.items():
        if not _same(entries, "request", key):
            return [f"The {words} differ: fidelity is over other images in each report."]
    return []


def differences(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Everything that was recorded and is not the same: key -> a value per report."""
    tables = []
    for entry in entries:
        figures = entry.figures
        table = {f"recipe: {key}": value for key, value in figures["bundle"]["recipe"].items()}
        for section in SECTIONS:
            table |= {f"{section}: {key}": value for key, value in (figures[section] or {}).items()}
        made = {k: v for k, v in figures["bundle"].items() if k not in ("recipe", *UNIQUE)}
        table |= {f"bundle: {key}": value for key, value in made.items()}
        tables.append({key.replace("_", " "): plain(value) for key, value in table.items()})
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key, "–") for table in tables] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _same(entries: Sequence[Entry], section: str, key: str | None = None) -> bool:
    """Whether all reports have the same value there."""
    values = [entry.figures[section] for entry in entries]
    if key is not None:
        values = [value[key] for value in values]
    return all(value == values[0] for value in values)
