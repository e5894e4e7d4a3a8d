"""`ditcast report`: the page of a bundle, written again from what the bundle keeps."""

from __future__ import annotations

from pathlib import Path

import click

from ditcast.options import BUNDLE, writable


@click.command()
@BUNDLE
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=writable,
    help="where to write it  [default: into the bundle]",
)
def report(bundle: Path, output: Path | None) -> None:
    """Write the page again from the figures, pictures and audit in a bundle."""
    from ditcast.bundle import Bundle
    from ditcast.runtime.report import rewrite

    click.echo(f"report: {rewrite(Bundle.open(bundle), output)}")
