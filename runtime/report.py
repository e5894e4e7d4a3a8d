"""The report of a measurement: figures, pictures and one self-contained page in the bundle.

The page is for people who did not run the benchmark, so it says next to every gain what it cost,
on how many samples, and where the gain is none.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from ditcast.bundle import Bundle
from ditcast.errors import MissingDependencyError, optional
from ditcast.progress import say
from ditcast.runtime import images
from ditcast.runtime.kept import AUDIT, FIGURES
from ditcast.runtime.verdict import Row, compared, count, gains, notes, pictured, verdict

PAGE = "reports/report.html"
TEMPLATES = Path(__file__).parent / "templates"
# Readable on white and on near-black; the page colours text itself.
COLOURS = ("#8a8f98", "#2a9d8f", "#4f83e0", "#e0702f", "#b060c8")
PICTURE_BYTES = 2_200_000  # before base64; with plotly.js the page stays below 8 MB
STRIP_WIDTH = 200  # CSS pixels, about


def write_report(bundle: Bundle, report: dict[str, Any]) -> Path | None:
    """Put figures, pictures and, with the `report` extra, the page into the bundle.

    `report` is what `ditcast.runtime.bench.bench` returns. Returns the page's path, None where
    it could not be made.
    """
    figures = {key: value for key, value in report.items() if key != "shown"}
    names = [FIGURES]
    if AUDIT in bundle.manifest.reports:
        names.append(AUDIT)
        shutil.copyfile(bundle.file(AUDIT), bundle.staged(AUDIT))
    bundle.staged(FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    for variant, samples in pictured(report).items():
        names.append(picture_name(variant))
        images.grid(samples).save(bundle.staged(names[-1]))
    page = _page(bundle, report)
    if page is not None:
        names.append(PAGE)
        bundle.staged(PAGE).write_text(page, encoding="utf-8")
    bundle.commit({"reports": tuple(names)}, replaces="reports/")
    return None if page is None else bundle.file(PAGE)


def picture_name(variant: str) -> str:
    """The file in the bundle that holds the picture grid of a variant."""
    return f"reports/{re.sub(r'[^a-z0-9]+', '-', variant.lower()).strip('-')}.png"


def _page(bundle: Bundle, report: dict[str, Any]) -> str | None:
    """The whole page as text; None, and a line that says why, without the `report` extra."""
    try:
        jinja2, plotly = optional("jinja2", "report"), optional("plotly.io", "report")
    except MissingDependencyError as err:
        say(f"{PAGE} is left out. {err}")
        return None
    rows = report["variants"]
    colours = {row["name"]: COLOURS[i % len(COLOURS)] for i, row in enumerate(rows)}
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = gains(rows)
    text = environment.get_template("report.html.j2").render(
        report=report,
        rows=rows,
        headline=made[-1] if made else None,
        verdict=verdict(report),
        compared=compared(report),
        notes=notes(report),
        strips=_strips(report),
        colours=colours,
        rounds=math.ceil(report["request"]["images"] / report["request"]["batch"]),
        chart=_chart(rows[1:], colours, plotly),
        facts=_facts(bundle, report),
        command=_command(bundle, report),
    )
    return str(text)


def _strips(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The pictures of each variant as PNG data, small enough for the page, two in a row."""
    found = pictured(report)
    total = sum(len(samples) for samples in found.values())
    strips = []
    for row in report["variants"]:
        if row["name"] not in found:
            continue
        samples = found[row["name"]]
        sheet = images.grid(samples, min(2, len(samples)))
        longest = math.isqrt(PICTURE_BYTES // (3 * total))
        scale = min(1.0, longest / max(samples.shape[2:]))
        if scale < 1:
            size = (round(sheet.width * scale), round(sheet.height * scale))
            sheet = sheet.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        sheet.save(file, "PNG", optimize=True)
        strips.append(
            {
                "row": row,
                "png": base64.b64encode(file.getvalue()).decode(),
                "count": len(samples),
                "reduced": scale < 1,
                "width": sheet.width,
                "zoom": max(1, STRIP_WIDTH // sheet.width),
            }
        )
    return strips


def _chart(rows: list[Row], colours: dict[str, str], plotly: ModuleType) -> str | None:
    """Speed-up against PSNR with plotly.js in it; None where there is nothing to draw."""
    drawn = [row for row in rows if row["speedup"] is not None and row["psnr_db"] is not None]
    if not drawn:
        return None
    axis = {"zeroline": False, "automargin": True}
    across, up = _range(drawn, "speedup", (1.0,)), _range(drawn, "psnr_db", ())
    layout = {
        "xaxis": axis | {"title": {"text": "speed-up, times"}, "range": across},
        "yaxis": axis | {"title": {"text": "PSNR, dB"}, "range": up},
        "shapes": [
            {"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1}
            | {"line": {"dash": "dot", "width": 1, "color": COLOURS[0]}}
        ],
        "annotations": [_label(row, drawn) for row in drawn],
        "showlegend": False,
        "dragmode": False,  # a finger on the chart still scrolls the page
        "hovermode": "closest",
        "margin": {"l": 50, "r": 16, "t": 36, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": COLOURS[0], "activecolor": COLOURS[1]},
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }
    found = plotly.to_html(
        {"data": [_mark(row, colours[row["name"]]) for row in drawn], "layout": layout},
        config={"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]},
        full_html=False,
        include_plotlyjs=True,
        default_height="420px",
        div_id="speed-fidelity",
        validate=False,
    )
    return str(found)


def _mark(row: Row, colour: str) -> dict[str, Any]:
    """One point with its error bars."""
    mark: dict[str, Any] = {"type": "scatter", "mode": "markers"}
    for key, spread in (("x", row["speedup"]), ("y", row["psnr_db"])):
        mark[key] = [spread["p50"]]
        mark[f"error_{key}"] = {
            "array": [spread["p90"] - spread["p50"]],
            "arrayminus": [spread["p50"] - spread["p10"]],
            "thickness": 1.2,
            "width": 4,
        }
    hover = f"<b>{_plotly_text(row['name'])}</b><br>%{{x:.2f}}x, %{{y:.1f}} dB"
    return mark | {
        "marker": {"size": 11, "color": colour},
        "hovertemplate": f"{hover}<br>{count(row['samples'], 'sample')}<extra></extra>",
    }


def _label(row: Row, drawn: list[Row]) -> dict[str, Any]:
    """The name of a point above its error bar, or below where its nearest neighbour is higher."""
    x, y = row["speedup"]["p50"], row["psnr_db"]
    others = [other for other in drawn if other is not row]
    nearest = min(others, key=lambda other: abs(other["speedup"]["p50"] - x), default=row)
    above = y["p50"] >= nearest["psnr_db"]["p50"]
    return {
        "text": _plotly_text(row["name"]).replace(" + ", "<br>+ "),  # narrow, for phones
        "x": x,
        "y": y["p90"] if above else y["p10"],
        "yanchor": "bottom" if above else "top",
        "showarrow": False,
    }


def _plotly_text(text: str) -> str:
    """Text as it is: plotly.js reads some HTML in it."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _range(rows: list[Row], key: str, also: tuple[float, ...]) -> list[float]:
    """An axis range around all error bars with room for labels."""
    ends = [*also, *(row[key][end] for row in rows for end in ("p10", "p90"))]
    room = 0.18 * (max(ends) - min(ends)) or 0.5
    return [min(ends) - room, max(ends) + room]


def _facts(bundle: Bundle, report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Everything the figures stand on: section -> key -> value."""
    model, described = bundle.manifest.model, report["bundle"]
    machine = {key: value for key, value in report["machine"].items() if key != "versions"}
    made = {
        "model": described["model"],
        "architecture": model.architecture,
        "parameters": f"{model.parameters:,}",
        "sample shape": " x ".join(map(str, model.sample_shape)),
        "classes": model.num_classes,
        "model fingerprint": model.fingerprint,
        "graphs made from": bundle.graphs_made_from(),
        # The page is part of the bundle, so it cannot hold the digest that vouches for itself.
        "bundle digest, before this report": described["digest"],
    }
    sections = {
        "Recipe": described["recipe"],
        "Request": report["request"],
        "Machine": machine,
        "Versions": report["machine"]["versions"],
        "Backend": report["backend"],
        "Bundle": made,
    }
    return {
        title: {key.replace("_", " "): _plain(value) for key, value in values.items()}
        for title, values in sections.items()
    }


def _plain(value: Any) -> str:
    """A value of JSON as words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)


def _command(bundle: Bundle, report: dict[str, Any]) -> str:
    """The command that measures the same again, next to the bundle."""
    request, backend = report["request"], report["backend"]
    parts = ["ditcast", "bench", bundle.path.resolve().name]
    parts += ["--images", str(request["images"]), "--seed", str(request["seed"])]
    if request["steps"] != report["bundle"]["recipe"]["steps"]:
        parts += ["--steps", str(request["steps"])]
    if backend["backend"] != "onnxruntime":
        parts += ["--backend", backend["backend"]]
    if backend.get("threads", report["machine"]["cores"]) != report["machine"]["cores"]:
        parts += ["--threads", str(backend["threads"])]
    return shlex.join(parts)
