"""The plots of the page, as plotly.js figures; the page colours their text and grid itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ditcast.errors import optional
from ditcast.runtime.steps import FORECAST, FULL, HELD, MODULE, REUSED, STORED
from ditcast.runtime.verdict import Row, count, gains

# Readable on white and on near-black.
COLOURS = ("#8a8f98", "#2a9d8f", "#4f83e0", "#e0702f", "#b060c8", "#c9a227", "#d1495b", "#6a994e")
Kinds = dict[str, tuple[str, str]]
SLOTS: Kinds = {  # what a slot does at a step: what that is called and its colour
    FULL: ("computed", "#2a5f9e"),
    FORECAST: ("forecast", "#7fb8e8"),
    REUSED: ("reused", "#c9ced6"),
    HELD: ("held back by the noise guard", "#e0702f"),
}
SOURCES: Kinds = {  # where a vector of temporal features comes from
    MODULE: ("computed by the quantized module", "#2a5f9e"),
    STORED: ("stored", "#c9ced6"),
}
HEIGHT = 420  # CSS pixels
CLIPPED = 1.01  # times what can be represented: more than rounding
Chart = dict[str, Any]
Magnitudes = dict[str, list[float]]


def html(figure: Chart, name: str, title: str) -> str:
    """A figure as an element that the page's script draws once the page is open.

    `title` is what it shows, for those who do not see it.

    Raises:
        MissingDependencyError: the `report` extra is not installed.
    """
    text = optional("plotly.io", "report").to_json(figure, validate=False)
    height = figure["layout"].get("height", HEIGHT)
    return (
        f'<div id="{name}" style="height: {height}px" data-figure="{escape(text)}" '
        f'tabindex="0" role="group" aria-label="{escape(title)}"></div>'
    )


def library(charts: Iterable[str]) -> str:
    """The source of plotly.js if there are charts to draw, which every page holds once.

    Raises:
        MissingDependencyError: the `report` extra is not installed.
    """
    return str(optional("plotly.offline", "report").get_plotlyjs()) if any(charts) else ""


def speed_fidelity(groups: Sequence[tuple[str, Sequence[Row]]], colours: Sequence[str]) -> Chart:
    """Speed-up against PSNR: all operating points, the best of them joined, rivals as crosses.

    A group is a title and the rows of one report, full precision first; a single one has a
    colour per row, several have one each. No points where nothing was measured.
    """
    marks: list[Chart] = []
    labels: list[Chart] = []
    everything: list[Row] = []
    for g, (title, rows) in enumerate(groups):
        made = gains(list(rows))
        drawn = [row for row in rows[1:] if row["speedup"] and row["psnr_db"]]
        everything += drawn
        for row in drawn:
            colour = colours[g] if len(groups) > 1 else colours[rows.index(row)]
            marks.append(_mark(row, colour, title, rival=row not in made))
            labels.append(_label(row, drawn))
    if not everything:
        return {"data": [], "layout": {}}
    layout = _layout("speed-up, times", "PSNR, dB") | {
        "shapes": [
            {"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1}
            | {"line": {"dash": "dot", "width": 1, "color": COLOURS[0]}}
        ],
        "annotations": labels if len(groups) == 1 else [],
    }
    layout["xaxis"] |= {"range": _range(everything, "speedup", (1.0,))}
    layout["yaxis"] |= {"range": _range(everything, "psnr_db", ())}
    return {"data": [_front(everything), *marks], "layout": layout}


def _front(rows: Sequence[Row]) -> Chart:
    """A line through the points that no other point beats in both."""
    found: list[tuple[float, float]] = []
    points = [(row["speedup"]["p50"], row["psnr_db"]["p50"]) for row in rows]
    for x, y in sorted(points, reverse=True):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in found],
        "y": [y for _, y in found],
        "line": {"width": 1.5, "color": COLOURS[0]},
        "hoverinfo": "skip",
    }


def _mark(row: Row, colour: str, title: str, *, rival: bool) -> Chart:
    """One point with its error bars."""
    mark: Chart = {"type": "scatter", "mode": "markers"}
    for key, spread in (("x", row["speedup"]), ("y", row["psnr_db"])):
        mark[key] = [spread["p50"]]
        mark[f"error_{key}"] = {
            "array": [spread["p90"] - spread["p50"]],
            "arrayminus": [spread["p50"] - spread["p10"]],
            "thickness": 1.2,
            "width": 4,
        }
    name = f"<b>{_text(row['name'])}</b>" + (f" of {_text(title)}" if title else "")
    figures = f"%{{x:.2f}}x, %{{y:.1f}} dB<br>{count(row['samples'], 'sample')}"
    return mark | {
        "marker": {"size": 11, "color": colour, "symbol": "x" if rival else "circle"},
        "hovertemplate": f"{name}<br>{figures}<extra></extra>",
    }


def _label(row: Row, drawn: Sequence[Row]) -> Chart:
    """The name of a point above its error bar, or below where its nearest neighbour is higher."""
    x, y = row["speedup"]["p50"], row["psnr_db"]
    others = [other for other in drawn if other is not row]
    nearest = min(others, key=lambda other: abs(other["speedup"]["p50"] - x), default=row)
    above = y["p50"] >= nearest["psnr_db"]["p50"]
    return {
        "text": _text(row["name"]).replace(" + ", "<br>+ "),  # narrow, for phones
        "x": x,
        "y": y["p90"] if above else y["p10"],
        "yanchor": "bottom" if above else "top",
        "showarrow": False,
    }


def kind_map(rows: list[str], names: list[str], kinds: Kinds, timesteps: list[int]) -> Chart:
    """A letter for each step, one text per name, as a heat map in the colours of the kinds."""
    used = [kind for kind in kinds if kind in "".join(rows)]
    words = [kinds[kind][0] for kind in used]
    codes = [[used.index(kind) for kind in row] for row in rows]
    share = 1 / len(used)
    scale = [
        [edge, kinds[kind][1]]
        for i, kind in enumerate(used)
        for edge in (i * share, (i + 1) * share)
    ]
    data = {
        "type": "heatmap",
        "z": codes,
        "x": list(range(len(timesteps))),
        "y": list(map(_text, names)),
        "zmin": -0.5,
        "zmax": len(used) - 0.5,
        "colorscale": scale,
        "text": [[words[code] for code in row] for row in codes],
        "customdata": [timesteps] * len(rows),
        "hovertemplate": "%{y}<br>step %{x}, timestep %{customdata}: %{text}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "showscale": False,
    }
    return {"data": [data], "layout": _of_map(len(rows))}


def key_of(rows: list[str] | None, kinds: Kinds) -> list[tuple[str, str, int]]:
    """For the key of that heat map: what each kind is called, its colour, and how often it is."""
    cells = "".join(rows or [])
    found = [(*kinds[kind], cells.count(kind)) for kind in kinds]
    return [entry for entry in found if entry[2]]


def lines(values: dict[str, list[float]], colours: dict[str, str], *, title: str) -> Chart:
    """One line over the steps for each name."""
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": _text(name),
            "x": list(range(len(row))),
            "y": row,
            "line": {"color": colours[name], "width": 2},
            "hovertemplate": f"<b>{_text(name)}</b><br>step %{{x}}: %{{y:.4g}}<extra></extra>",
        }
        for name, row in values.items()
    ]
    layout = _layout("step", title) | {"height": 340, "showlegend": len(data) > 1}
    return {"data": data, "layout": layout}


def ratio_map(found: list[list[float]], reference: list[list[float]], names: list[str]) -> Chart:
    """An error over another one, of each name at each step, as a heat map around 1.

    Where the other one is 0 there is nothing to draw, as at full steps.
    """
    pairs = [list(zip(*both, strict=True)) for both in zip(found, reference, strict=True)]
    ratios = [[error / other if other else None for error, other in row] for row in pairs]
    hover = "%{customdata[0]:.4g} of %{customdata[1]:.4g}, %{z:.3g} times"
    data = _heat(ratios, pairs, names, hover) | {"zmax": 2}
    return {"data": [data | _shades(FORECAST, REUSED, HELD)], "layout": _of_map(len(names))}


def magnitude_map(largest: Magnitudes, representable: Magnitudes) -> Chart:
    """The largest input of each layer at each step, over that of all its steps, as a heat map.

    Where it is 0 there is nothing to draw. A mark is on what lies clearly above the largest number
    that the input's scale can represent there.
    """
    pairs = {
        name: list(zip(row, representable[name], strict=True)) for name, row in largest.items()
    }
    clipped = [
        (step, _text(name))
        for name, row in pairs.items()
        for step, (value, limit) in enumerate(row)
        if value > CLIPPED * limit
    ]
    shares = [
        [float(f"{value / max(row):.3g}") if value else None for value in row]
        for row in largest.values()
    ]
    hover = (
        "%{customdata[0]:.4g}, %{z:.3g} of the layer's largest"
        "<br>representable: %{customdata[1]:.4g}"
    )
    data = _heat(shares, list(pairs.values()), list(largest), hover) | {"zmax": 1}
    data |= _shades(REUSED, FORECAST, FULL)
    marks = {
        "type": "scatter",
        "mode": "markers",
        "x": [step for step, _ in clipped],
        "y": [name for _, name in clipped],
        "marker": {"size": 5, "color": SLOTS[HELD][1]},
        "hoverinfo": "skip",
    }
    return {"data": [data, marks], "layout": _of_map(len(largest))}


def _heat(
    cells: list[list[float | None]],
    pairs: list[list[tuple[float, float]]],
    names: list[str],
    hover: str,
) -> Chart:
    """A heat map from 0 of a number for each name at each step, and of the pair it is made of."""
    return {
        "type": "heatmap",
        "z": cells,
        "x": list(range(len(cells[0]))),
        "y": list(map(_text, names)),
        "zmin": 0,
        "customdata": pairs,
        "hovertemplate": f"%{{y}}<br>step %{{x}}: {hover}<extra></extra>",
        "colorbar": {"thickness": 12, "outlinewidth": 0},
    }


def _shades(*kinds: str) -> Chart:
    """The colours of a heat map: those of slots, at equal distances."""
    colours = [SLOTS[kind][1] for kind in kinds]
    return {"colorscale": [[i / (len(kinds) - 1), colour] for i, colour in enumerate(colours)]}


def _of_map(rows: int) -> Chart:
    """The layout of a heat map over the steps with so many rows, the first one on top."""
    layout = _layout("step", "") | {"height": max(220, min(900, 90 + 18 * rows))}
    layout["yaxis"] |= {"range": [rows - 0.5, -0.5], "type": "category"}
    return layout


def _layout(across: str, up: str) -> Chart:
    axis: Chart = {"zeroline": False, "automargin": True}
    return {
        "xaxis": axis | {"title": {"text": across}},
        "yaxis": axis | {"title": {"text": up}},
        "showlegend": False,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "dragmode": False,  # a finger on the chart still scrolls the page
        "hovermode": "closest",
        "margin": {"l": 50, "r": 16, "t": 36, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": COLOURS[0], "activecolor": COLOURS[1]},
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }


def _text(text: str) -> str:
    """Text as it is: plotly.js reads some HTML in it."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _range(rows: Sequence[Row], key: str, also: tuple[float, ...]) -> list[float]:
    """An axis range around all error bars with room for labels."""
    ends = [*also, *(row[key][end] for row in rows for end in ("p10", "p90"))]
    room = 0.18 * (max(ends) - min(ends)) or 0.5
    return [min(ends) - room, max(ends) + room]
