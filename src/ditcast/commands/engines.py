"""`ditcast build`: engines of TensorRT, and the audit of them, which needs no GPU."""

from __future__ import annotations

from pathlib import Path

import click

from ditcast.bundle import Bundle
from ditcast.options import BUNDLE, ENGINE_BACKENDS, JSON, QUIET, write_json
from ditcast.tables import show


@click.command()
@BUNDLE
@click.option("--backend", required=True, type=click.Choice(ENGINE_BACKENDS), help="library")
@click.option(
    "--compute-capability",
    "capabilities",
    default="",
    help="GPUs to build for, without having one: 8.9 12.0 (tensorrt-rtx)  [default: this one]",
)
@click.option("--graph", "graphs", multiple=True, help="graphs to build, several times")
@QUIET
@JSON
def build(
    bundle: Path,
    backend: str,
    capabilities: str,
    graphs: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Build TensorRT engines of a bundle: those that are missing or stale."""
    from ditcast.runtime.backends.tensorrt import EngineBuilder
    from ditcast.runtime.engines import build_engines

    builder = EngineBuilder(backend, tuple(capabilities.split()))
    opened = Bundle.open(bundle)
    engines = build_engines(opened, builder, graphs)
    rows = [["graph", "plan", "device", "MiB", "weights MiB", "s"]]
    for engine in engines:
        size = opened.manifest.files[engine.path].size
        sizes = [f"{size / 2**20:.2f}", f"{engine.weights_bytes / 2**20:.2f}"]
        rows.append([engine.graph, engine.key[:16], engine.device, *sizes, f"{engine.build_s:.1f}"])
    show(rows, right=3)
    write_json(json_file, [engine.model_dump(mode="json") for engine in engines])
    click.echo(f"{bundle}: built; next: ditcast audit {bundle} --backend {backend}")


def audit_built(bundle: Path, backend: str, loop: str, json_file: Path | None) -> None:
    """Print what the engines of a loop became; exit 1 if a quantized layer became float."""
    from ditcast.runtime.engineaudit import HEADER, audit_engines

    found = audit_engines(Bundle.open(bundle), backend, loop)
    for engine in found:
        for line in engine.lines():
            click.echo(line)
    show([HEADER, *(row for engine in found for row in engine.rows())], right=3)
    write_json(json_file, [engine.as_json() for engine in found])
    if any(engine.lost for engine in found):
        raise click.exceptions.Exit(1)
