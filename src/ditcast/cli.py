"""The command line: one sub-command per stage, which imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ditcast import __version__
from ditcast.bundle import Bundle
from ditcast.cache.fitted import recipe_plan
from ditcast.commands import engines
from ditcast.commands.compiled import load_model
from ditcast.commands.table import COMMANDS
from ditcast.errors import ConfigError, DitcastError, ParityError
from ditcast.options import (
    BACKEND,
    BUNDLE,
    ENGINE_BACKENDS,
    IMAGES,
    JSON,
    LOOP,
    MODEL,
    OUTPUT,
    QUIET,
    STRICT,
    TARGETS,
    join_labels,
    parse_labels,
    recipe_options,
    runtime_options,
    write_json,
)
from ditcast.recipe import load as load_recipe
from ditcast.settings import Settings
from ditcast.tables import (
    audit_lines,
    audit_rows,
    show,
    warn_of_idle_cache,
    warn_of_slow_integers,
)

if TYPE_CHECKING:
    from ditcast.models import LoadedModel
    from ditcast.runtime.audit import Audit
    from ditcast.runtime.fidelity import Distances


@click.group()
@click.version_option(__version__, prog_name="ditcast")
def app() -> None:
    """Calibrate, export and run diffusion transformers and U-Nets, quantized and cached."""


@app.command("compile")
@MODEL
@OUTPUT
@recipe_options
@IMAGES
@TARGETS
@BACKEND
@runtime_options
@STRICT
@QUIET
@JSON
def compile_command(
    model: str,
    output: Path,
    strict: bool,
    recipe_file: Path | None,
    images: int | None,
    backend: str,
    targets: tuple[str, ...],
    settings: Settings,
    json_file: Path | None,
    **flags: Any,
) -> None:
    """All of it: calibrate, export, audit, bench. Resumes where an earlier run stopped."""
    from ditcast.commands.cost import Cost
    from ditcast.runtime.choice import check_backend, targets_of
    from ditcast.runtime.engines import TARGET

    check_backend(backend, settings)  # what is wrong should be said before the long work
    wanted = targets or targets_of(backend)
    bundle, loaded = _start(model, output, recipe_file, flags, strict, targets=wanted)
    check_backend(backend, settings, bundle.manifest.recipe.cache)
    cost = Cost(bundle)
    cost.stage("calibrate", _calibrate(bundle, loaded))
    _export(bundle, loaded, wanted)
    cost.stage("export")
    if TARGET in wanted and not {*wanted} & {*targets_of(backend)}:  # engines are yet to be built
        click.echo(f"{output}: exported; next: ditcast build {output} --backend tensorrt")
        return
    del loaded  # a large model and its graphs do not fit in memory together
    passed = _audit(bundle, backend, settings, "host").passed
    _bench(
        bundle,
        backend=backend,
        settings=settings,
        count=images,
        steps=None,
        seed=None,
        json_file=json_file,
        cost=cost.found,
    )
    if not passed:
        raise click.exceptions.Exit(1)


@app.command()
@MODEL
@OUTPUT
@recipe_options
@STRICT
@QUIET
def calibrate(
    model: str, output: Path, recipe_file: Path | None, strict: bool, **flags: Any
) -> None:
    """Find the scales of a model and start a bundle with them."""
    bundle, loaded = _start(model, output, recipe_file, flags, strict)
    _calibrate(bundle, loaded)
    click.echo(f"{output}: calibrated; next: ditcast export {output}")


@app.command()
@BUNDLE
@TARGETS
@QUIET
def export(bundle: Path, targets: tuple[str, ...]) -> None:
    """Export the graphs of a calibrated bundle: those of a target that are missing or stale."""
    opened = Bundle.open(bundle)
    source = opened.manifest.model.source
    loaded = load_model(source)
    from ditcast.models.base import describe

    found = describe(loaded, opened.manifest.recipe)
    if found.fingerprint() != opened.manifest.fingerprint():
        raise ConfigError(
            f"export: {source} has changed since {bundle} was calibrated; "
            "compile a new bundle with another -o"
        )
    from ditcast.export.stage import DEFAULT_TARGETS

    _export(opened, loaded, targets or DEFAULT_TARGETS)
    click.echo(f"{bundle}: exported; next: ditcast bench {bundle}")


@app.command()
@BUNDLE
@BACKEND
@runtime_options
@IMAGES
@click.option("--steps", type=int, help="instead of the recipe's")
@click.option("--seed", type=click.IntRange(0), help="[default: the recipe's and one]")
@click.option(
    "--real",
    type=click.Path(path_type=Path),
    help=".npz of held-out real pictures: adds distances between sets (extra distances)",
)
@QUIET
@JSON
def bench(
    bundle: Path,
    backend: str,
    settings: Settings,
    images: int | None,
    steps: int | None,
    seed: int | None,
    real: Path | None,
    json_file: Path | None,
) -> None:
    """Measure speed, memory and fidelity against full precision, in one run."""
    _bench(
        Bundle.open(bundle),
        backend=backend,
        settings=settings,
        count=images,
        steps=steps,
        seed=seed,
        real=real,
        json_file=json_file,
    )


@app.command()
@BUNDLE
@BACKEND
@runtime_options
@LOOP
@QUIET
@JSON
def audit(
    bundle: Path, backend: str, settings: Settings, loop: str, json_file: Path | None
) -> None:
    """Say which kernel every quantized layer really runs in, and how long; exit 1 if one is float.

    It also checks that the golden step of the export comes out on this machine. Engines of
    TensorRT are judged by what their builder said, which needs no GPU.
    """
    if backend in ENGINE_BACKENDS:
        return engines.audit_built(bundle, backend, loop, json_file)
    found = _audit(Bundle.open(bundle), backend, settings, loop, json_file)
    show(audit_rows(found), right=3)
    if not found.passed:
        raise click.exceptions.Exit(1)


for command in COMMANDS:
    app.add_command(command)


def _start(
    model: str,
    output: Path,
    recipe_file: Path | None,
    flags: dict[str, Any],
    strict: bool,
    *,
    targets: tuple[str, ...] = (),
) -> tuple[Bundle, LoadedModel]:
    """The recipe, the model, and the bundle to be filled; these targets have to run it."""
    given = {key: value for key, value in flags.items() if value is not None}
    names = given.pop("labels", None)
    recipe = load_recipe(recipe_file, given)
    loaded = load_model(model)
    if names is not None:  # names of classes are the model's
        labels = tuple(parse_labels(names, loaded.classes))
        recipe = load_recipe(recipe_file, given | {"labels": labels})
    from ditcast.calibrate.stage import check
    from ditcast.export.targets import check_targets
    from ditcast.models.base import describe

    check_targets(targets, loaded, recipe)
    check(loaded, recipe)
    manifest = describe(loaded, recipe)
    warn_of_idle_cache(recipe.cache, recipe_plan(manifest), strict)
    return Bundle.create(output, manifest), loaded


def _calibrate(bundle: Bundle, loaded: LoadedModel) -> dict[str, float]:
    from ditcast.calibrate import calibrate

    return calibrate(bundle, loaded)


def _export(bundle: Bundle, loaded: LoadedModel, targets: tuple[str, ...]) -> None:
    from ditcast.export import to_onnx

    to_onnx(bundle, loaded, targets)


def _audit(
    bundle: Bundle, backend: str, settings: Settings, loop: str, json_file: Path | None = None
) -> Audit:
    """Audit, say the verdict, and warn where integers may not pay."""
    from ditcast.runtime.audit import audit
    from ditcast.runtime.choice import open_backend
    from ditcast.runtime.kept import keep_audit

    runtime = open_backend(backend, bundle, settings)
    found = audit(bundle, runtime, loop)
    write_json(json_file, found.as_json())
    if loop == "host":  # what the pipeline runs, which `gate` and `report` are about
        keep_audit(bundle, runtime.target, found.as_json())
    warn_of_slow_integers(found)
    for line in audit_lines(found):
        click.echo(line)
    return found


def _bench(
    bundle: Bundle,
    *,
    backend: str,
    settings: Settings,
    count: int | None,
    steps: int | None,
    seed: int | None,
    json_file: Path | None,
    real: Path | None = None,
    cost: dict[str, Any] | None = None,
) -> None:
    """Measure, print the table, and put JSON, pictures and page into the bundle."""
    from ditcast.runtime.bench import announce, bench, distance_summary, summary
    from ditcast.runtime.kept import known_cost
    from ditcast.runtime.report import write_report
    from ditcast.runtime.verdict import interaction, notes, verdict

    bundle.check_writable()
    manifest = bundle.manifest
    count = count or (1 if manifest.model.source.startswith("random:") else 128)
    if seed is None:  # not the noise that the scales were found on
        seed = manifest.recipe.seed + 1
    report = bench(
        bundle,
        backend=backend,
        settings=settings,
        count=count,
        steps=steps,
        seed=seed,
        distances=None if real is None else _distances(bundle, real, count),
    )
    report["cost"] = cost or known_cost(bundle)
    announce(report)
    for table in filter(None, (summary(report), distance_summary(report))):
        show(table, right=1)
    for line in filter(None, (verdict(report), interaction(report), *notes(report))):
        click.echo(line)
    write_json(json_file, {key: value for key, value in report.items() if key != "shown"})
    page = write_report(bundle, report)
    if page is not None:
        click.echo(f"report: {page}")


def _distances(bundle: Bundle, real: Path, images: int) -> Distances:
    """What compares whole sets of a bundle's images, if it makes any to compare."""
    from ditcast.held_out import open_distances
    from ditcast.runtime.bench import has_random_weights

    if has_random_weights(bundle):
        raise ConfigError("real: the weights are random, so distances mean nothing; leave it out")
    model = bundle.manifest.model
    return open_distances(real, images, model.sample_shape, model.num_classes)


def main() -> None:
    """Run a command: exit 0 done, 1 a check failed, 2 wrong usage or input, in one line."""
    arguments = join_labels(sys.argv[1:] or ["--help"])
    try:
        code = app.main(arguments, prog_name="ditcast", standalone_mode=False)
    except ParityError as err:
        sys.exit(_fail(str(err), code=1))
    except DitcastError as err:
        sys.exit(_fail(str(err)))
    except click.ClickException as err:
        sys.exit(_fail(err.format_message()))
    except OSError as err:
        sys.exit(_fail(f"{err.filename or 'file'}: {err.strerror or err}"))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_fail("interrupted; run the same command again to resume"))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> int:
    print("ditcast: error: " + " ".join(message.split()), file=sys.stderr)
    return code
