"""`ditcast tune`: the fastest recipe that loses no more than is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ditcast.errors import ConfigError
from ditcast.options import BACKEND, MODEL, OUTPUT, QUIET, recipe_options, runtime_options
from ditcast.settings import Settings

SEARCHED = ("scheme", "method", "cache", "interval", "order")


def _share(context: click.Context, option: click.Parameter, value: float) -> float:
    """Refuse what is no loss."""
    del context
    if not 0 < value < 1:
        raise ConfigError(f"{option.name}: got {value}, expected a share between 0 and 1")
    return value


@click.command()
@MODEL
@OUTPUT
@click.option(
    "--max-loss",
    type=float,
    required=True,
    callback=_share,
    help="root mean square error of pixels over their range: 0.02 is 34 dB",
)
@click.option(
    "--trials", type=click.IntRange(1), default=40, show_default=True, help="how many to make"
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="stop after so long, all runs of the command together",
)
@click.option(
    "--images", type=click.IntRange(1), default=32, show_default=True, help="to measure a trial on"
)
@recipe_options
@BACKEND
@runtime_options
@QUIET
def tune(
    model: str,
    output: Path,
    max_loss: float,
    trials: int,
    minutes: float | None,
    images: int,
    recipe_file: Path | None,
    backend: str,
    settings: Settings,
    **flags: Any,
) -> None:
    """Search scheme, method, cache, interval and order by measuring; keys that are given stay.

    Writes recipe.yaml and tune.json into the output folder; the same command resumes.
    """
    from ditcast import tuning
    from ditcast.commands.compiled import compiler, load_model
    from ditcast.recipe import load as load_recipe
    from ditcast.runtime.choice import check_backend
    from ditcast.tables import show

    check_backend(backend, settings)
    given = {key: value for key, value in flags.items() if value is not None and key != "labels"}
    base = load_recipe(recipe_file, given)
    fixed = {key: value for key, value in given.items() if key in SEARCHED}
    tuning.check(base, fixed)
    loaded = load_model(model)
    output.mkdir(parents=True, exist_ok=True)
    goal = tuning.Goal(
        max_loss=max_loss, count=images, seed=base.seed + 1, fixed=fixed, caches=tuning.caches(base)
    )
    bench = tuning.Bench(compiler(loaded, base, output, backend), base, backend, settings, goal)
    seconds = float("inf") if minutes is None else 60 * minutes
    found = tuning.search(
        output,
        goal,
        bench,
        first=tuning.start(base),
        steps=base.steps,
        trials=trials,
        seconds=seconds,
    )
    chosen = tuning.write(output, base, goal, found)
    rows = [["point of the Pareto set", "speed-up", "PSNR dB", "samples", ""]]
    for entry in tuning.pareto(found):
        point = tuning.Point(**entry["point"])
        figures = [f"{entry['speedup']:.2f}x", f"{entry['psnr_db']:.1f}", str(entry["samples"])]
        rows.append([tuning.describe(point), *figures, "chosen" if entry == chosen else ""])
    show(rows, right=1)
    limit = f"a loss of at most {max_loss} ({goal.min_psnr:.1f} dB)"
    if chosen is None:
        click.echo(f"keep full precision: none of {len(found)} trials is faster with {limit}")
    recipe = output / tuning.RECIPE
    click.echo(f"next: ditcast compile {model} -o NEW.bundle --recipe {recipe}")
