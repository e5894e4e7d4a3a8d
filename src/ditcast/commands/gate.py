"""`ditcast gate`: exit 1, with a line for each figure that fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import click

from ditcast.errors import ConfigError
from ditcast.options import BUNDLE, JSON, F, writable, write_json
from ditcast.progress import tell
from ditcast.runtime.gate import FAULTS


def _finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Refuse NaN, to which nothing compares, and infinity."""
    del context
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{option.name}: got {value}, expected a number from 0")
    return value


def _limit(name: str, text: str, default: float | None = None) -> Callable[[F], F]:
    return click.option(
        name,
        type=float,
        default=default,
        show_default=default is not None,
        callback=_finite,
        help=text,
    )


def _file(name: str, text: str) -> Callable[[F], F]:
    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option(name, name.strip("-") + "_file", type=kind, callback=writable, help=text)


@click.command()
@BUNDLE
@_limit("--min-psnr", "dB, median over the samples")
@_limit("--min-ssim", "median over the samples (extra report)")
@_limit("--max-fd-to-fp", "Fréchet distance to full precision (of bench --real)")
@_limit("--min-speedup", "times the speed of full precision")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="baseline: a bundle, or what bench --json wrote",
)
@_limit("--psnr-drop", "dB that it may be below the baseline", 1.0)
@_limit("--worse", "share by which speed-up and size may be worse than the baseline's", 0.05)
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(FAULTS),
    help="a fault that may be there, several times",
)
@_file("--junit", "write JUnit XML")
@_file("--summary", "append Markdown, such as to $GITHUB_STEP_SUMMARY")
@JSON
def gate(
    bundle: Path,
    min_psnr: float | None,
    min_ssim: float | None,
    max_fd_to_fp: float | None,
    min_speedup: float | None,
    against: Path | None,
    psnr_drop: float,
    worse: float,
    allow: tuple[str, ...],
    junit_file: Path | None,
    summary_file: Path | None,
    json_file: Path | None,
) -> None:
    """Hold a bundle's own figures to limits; exit 1 with a line for each that fails.

    Without any limit these fail: a report or an audit that is stale, a quantized layer in float, a
    cache that never triggers or always does, a result slower than full precision, and pictures that
    are flat, blurred, noise, or of something else. Nothing is measured: run bench and audit before.
    """
    from ditcast.bundle import Bundle
    from ditcast.commands.ci import junit, markdown
    from ditcast.runtime import kept
    from ditcast.runtime.gate import Limits, judge
    from ditcast.runtime.verdict import ENOUGH_SAMPLES, count

    limits = Limits(
        min_psnr=min_psnr,
        min_ssim=min_ssim,
        max_fd_to_fp=max_fd_to_fp,
        min_speedup=min_speedup,
        allow=allow,
        psnr_drop=psnr_drop,
        worse=worse,
    )
    opened = Bundle.open(bundle)
    figures = kept.figures(opened)
    checks = judge(opened, figures, limits, None if against is None else kept.load(against))
    if junit_file is not None:
        junit_file.write_bytes(junit(bundle.name, checks))
    if summary_file is not None:
        with summary_file.open("a") as file:
            file.write(markdown(bundle.name, checks, figures))
    passed = all(check.passed for check in checks)
    write_json(json_file, {"passed": passed, "checks": [check._asdict() for check in checks]})
    samples = figures["variants"][0]["samples"]
    if samples < ENOUGH_SAMPLES:
        measured = f"medians over {count(samples, 'sample')}"
        tell(f"warning: {measured}; under {ENOUGH_SAMPLES} they can move by 5 dB with the seeds")
    failed = [check for check in checks if not check.passed]
    for check in failed:
        click.echo(f"FAIL {check.name}: {check.line}")
    if failed:
        raise click.exceptions.Exit(1)
    click.echo(f"{bundle}: {count(len(checks), 'check')} passed")
