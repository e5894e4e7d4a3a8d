"""The one writer of pages: figures in, a single HTML file out that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.errors import optional
from ditcast.runtime import charts, sections
from ditcast.runtime.charts import COLOURS
from ditcast.runtime.images import Pixels
from ditcast.runtime.steps import FORECAST
from ditcast.runtime.verdict import Row, compared, gains, interaction, notes, verdict

TEMPLATES = Path(__file__).parent / "templates"
PLOTS = {  # what each shows
    "speed": "Plot of speed-up against fidelity",
    "closeness": "Plot of the closeness to full precision after each step",
    "cosine": "Plot of the cosine of temporal features at each step",
    "plan": "Map of what every slot does at every step",
    "forecast": "Map of what the noise guard compares",
    "inputs": "Map of the largest input of every quantized layer at each step",
    "ranges": "Plot of input scales at each step",
    "selection": "Map of where temporal features come from",
}
MAPPED_LAYERS = 8  # lines in the plot of input scales: more cannot be told apart

Values = dict[str, Any]


def render(
    bundle: Bundle,
    figures: Values,
    pictures: dict[str, Pixels],
    audit: Values | None,
    audit_note: str,
) -> str:
    """The page of one bundle as text.

    `pictures` are (n, H, W, 3) per variant; `audit_note` says why there is no audit.

    Raises:
        MissingDependencyError: the `report` extra is not installed.
    """
    jinja2 = optional("jinja2", "report")
    rows = figures["variants"]
    colours = {row["name"]: COLOURS[i % len(COLOURS)] for i, row in enumerate(rows)}
    made, recipe = gains(rows), recipes.make(figures["bundle"]["recipe"])
    plots = _plots(figures, colours)
    text = _template(jinja2, "report.html.j2").render(
        report=figures,
        recipe=recipe,
        rows=rows,
        headline=made[-1] if made else None,
        verdict=verdict(figures),
        compared=compared(figures),
        notes=notes(figures),
        strips=sections.strips(figures, pictures),
        colours=colours,
        rounds=math.ceil(figures["request"]["images"] / figures["request"]["batch"]),
        factors=sections.factors(figures),
        interaction=interaction(figures),
        plots=plots,
        plotly=charts.library(plots.values()),
        slot_key=charts.key_of(figures["steps"]["plan"], charts.SLOTS),
        # Of slots: there is no guard for forecasts of outputs.
        forecasts=recipe.cache == "taylor" and FORECAST in "".join(figures["steps"]["plan"] or []),
        inputs=sections.inputs(figures["steps"].get("inputs")),
        source=sections.SOURCES[recipe.temporal],
        source_key=charts.key_of(figures["steps"]["selection"], charts.SOURCES),
        audit=None if audit is None else sections.audited(audit),
        audit_note=audit_note,
        facts=sections.facts(bundle, figures),
        command=sections.command(bundle, figures),
        recompile=sections.recompile(bundle, recipe, figures["backend"]["backend"]),
    )
    return str(text)


def render_comparison(
    *,
    entries: Sequence[Any],
    best: list[Row],
    pictured: list[tuple[Row, Pixels]],
    colours: dict[str, str],
    **words: Any,
) -> str:
    """The page of several reports as text.

    `entries` have a title and figures. `best` are the rows of what each bundle runs, called as
    the entries are, and `pictured` those with pictures, full precision's first; it may be empty.

    Raises:
        MissingDependencyError: the `report` extra is not installed.
    """
    jinja2 = optional("jinja2", "report")
    groups = [(entry.title, entry.figures["variants"]) for entry in entries]
    own = [colours[entry.title] for entry in entries]
    found = charts.speed_fidelity(groups, own)
    chart = charts.html(found, "plot-speed", PLOTS["speed"]) if found["data"] else ""
    shown = {"variants": [row for row, _ in pictured]}
    text = _template(jinja2, "compare.html.j2").render(
        entries=[
            {
                "title": entry.title,
                "figures": entry.figures,
                "colour": colours[entry.title],
                "colours": {
                    row["name"]: COLOURS[i % len(COLOURS)]
                    for i, row in enumerate(entry.figures["variants"])
                },
            }
            for entry in entries
        ],
        best=best,
        colours=colours,
        strips=sections.strips(shown, {row["name"]: pictures for row, pictures in pictured}),
        chart=chart,
        plotly=charts.library([chart]),
        **words,
    )
    return str(text)


def _template(jinja2: ModuleType, name: str) -> Any:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _plots(figures: Values, colours: dict[str, str]) -> dict[str, str]:
    """The plots as HTML, empty where there is nothing to draw."""
    rows, steps = figures["variants"], figures["steps"]
    found = {"speed": charts.speed_fidelity([("", rows)], list(colours.values()))}
    close = {name: row for name, row in steps["closeness_db"].items() if name in colours}
    if not figures["bundle"]["random_weights"]:
        found["closeness"] = charts.lines(close, colours, title="dB")
    if cosine := steps.get("feature_cosine"):  # earlier versions have measured none
        found["cosine"] = charts.lines({"cosine": cosine}, {"cosine": COLOURS[1]}, title="cosine")
    if steps["plan"]:
        found["plan"] = charts.kind_map(
            steps["plan"], steps["slots"], charts.SLOTS, steps["timesteps"]
        )
    if steps["forecast_error"] and steps["reuse_error"]:
        found["forecast"] = charts.ratio_map(
            steps["forecast_error"], steps["reuse_error"], steps["slots"]
        )
    if inputs := (steps.get("inputs") or {}).get("largest"):
        found["inputs"] = charts.magnitude_map(inputs, steps["inputs"]["representable"])
    if steps["ranges"]:
        ranges = _widest(steps["ranges"])
        own = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(ranges)}
        found["ranges"] = charts.lines(ranges, own, title="scale, relative to its largest")
    if steps["selection"]:
        parts = [f"part {i}" for i in range(len(steps["selection"]))]
        found["selection"] = charts.kind_map(
            steps["selection"], parts, charts.SOURCES, steps["timesteps"]
        )
    html = dict.fromkeys(PLOTS, "")
    for name, figure in found.items():
        if figure["data"]:
            html[name] = charts.html(figure, f"plot-{name}", PLOTS[name])
    return html


def _widest(ranges: dict[str, list[float]]) -> dict[str, list[float]]:
    """The layers whose input scale varies the most over the steps, relative to its largest."""

    def variation(name: str) -> float:
        return min(ranges[name]) / max(ranges[name])

    chosen = sorted(ranges, key=variation)[:MAPPED_LAYERS]
    return {name: [value / max(ranges[name]) for value in ranges[name]] for name in chosen}
