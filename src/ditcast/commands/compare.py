"""`ditcast compare`: several bundles or report files in one page."""

from __future__ import annotations

from pathlib import Path

import click

from ditcast.options import writable


@click.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=writable,
    default="compare.html",
    show_default=True,
    help="the page",
)
def compare(reports: tuple[Path, ...], output: Path) -> None:
    """Put several bundles, or files that bench --json wrote, into one page."""
    from ditcast.runtime.compare import read, render

    output.write_text(render(read(reports), reports), encoding="utf-8")
    click.echo(f"comparison: {output}")
