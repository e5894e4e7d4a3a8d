"""`ditcast verify` and `ditcast inspect`: whether a bundle is whole, and what it holds."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditcast.bundle import Bundle
from ditcast.options import BUNDLE, JSON, write_json
from ditcast.tables import bundle_rows


@click.command()
@BUNDLE
def verify(bundle: Path) -> None:
    """Hash every file of a bundle."""
    count = Bundle.open(bundle).verify()
    click.echo(f"{bundle}: {count} files verified")


@click.command()
@BUNDLE
@JSON
def inspect(bundle: Path, json_file: Path | None) -> None:
    """Show what a bundle holds."""
    manifest = Bundle.open(bundle).manifest
    write_json(json_file, manifest.model_dump(mode="json"))
    table = Table(show_header=False, box=None)
    for key, value in bundle_rows(manifest).items():
        if value:
            table.add_row(key, escape(value))
    Console(soft_wrap=True).print(table)
