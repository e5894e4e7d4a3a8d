"""`ditcast deploy`: what a server needs of a bundle, in the form that the server loads."""

from __future__ import annotations

from pathlib import Path

import click

from ditcast.bundle import Bundle
from ditcast.options import BUNDLE, ENGINE_BACKENDS, QUIET
from ditcast.progress import say


@click.command()
@BUNDLE
@click.option("--to", "server", required=True, type=click.Choice(["triton"]), help="the server")
@click.argument("place", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", *ENGINE_BACKENDS]),
    default="onnxruntime",
    show_default=True,
    help="runtime on the server",
)
@click.option(
    "--trust-engines", is_flag=True, help="deploy TensorRT plans that this user has not built"
)
@QUIET
def deploy(bundle: Path, server: str, place: Path, backend: str, trust_engines: bool) -> None:
    """Write a server's model repository of a bundle into DIR, which is new or empty."""
    from ditcast.runtime import triton

    del server  # there is one so far
    opened = Bundle.open(bundle)
    names = triton.deploy(opened, place, backend=backend, trust=trust_engines)
    if reason := triton.by_python(opened, backend):
        say(f"deploy: the graph loop is served by the Python backend: {reason}")
    click.echo(f"{place}: models {' and '.join(names)}; how to serve them: {place}/README.md")
