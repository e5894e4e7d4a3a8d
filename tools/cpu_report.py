"""What `tools/bench_cpu.py` measured, for people: tables, ratios and a chart."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from ditcast.errors import ConfigError, optional
from ditcast.progress import say

FULL, NNCF = "ort-fp32", "openvino-nncf"
COLOURS = {"torch": "#e0702f", "ort": "#8a8f98", "openvino": "#4f83e0", "ditcast": "#2a9d8f"}
LABELS = {"images": "{}", "step": "{} (step)", "reuse step": "{} (reuse step)", "none": "-"}
Row = dict[str, Any]


def spread(values: Any) -> dict[str, float]:
    """10th percentile, median, 90th percentile."""
    found = np.percentile(np.asarray(values, np.float64), (10, 50, 90))
    return dict(zip(("p10", "p50", "p90"), (float(f"{v:.5g}") for v in found), strict=True))


def fidelity(row: Row) -> str:
    """The PSNR of a row and what it is of."""
    if row["name"] == FULL:
        return "(reference)"
    found = row["fidelity"]
    return LABELS[found["of"]].format(f"{found['psnr_db']['p50']:.1f}" if found["psnr_db"] else "")


def ratios(rows: list[Row], loops: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios that are promised for DiT-XL/2 on a machine with AMX, with their targets.

    `fidelity` is that of the numerator. A ratio whose rows were not measured is left out.
    """
    named = {row["name"]: row for row in rows}
    cast = [row for row in rows if row["name"].startswith("ditcast-")]
    integer = [row for row in cast if row["facts"]["target"] != "reference"]
    whole = [row for row in integer if row["facts"]["cache"] == "none"]
    cached = [row for row in integer if row["facts"]["cache"] != "none"]
    plain = [row for row in whole if row["facts"]["backend"] == "onnxruntime"]
    float_plain = [named[n] for n in ("ditcast-onnxruntime-fp32",) if n in named]
    full, peer = [named[FULL]], [named[NNCF]] if NNCF in named else []
    found: list[dict[str, Any]] = []

    def add(what: str, target: str, above: list[Row], below: list[Row], value: Figure) -> None:
        """Of each list, the row with the smallest figure."""
        if above and below:
            top, bottom = min(above, key=value), min(below, key=value)
            found.append(_ratio(what, target, top, value(top) / value(bottom)))

    add("full step, best ditcast / OpenVINO + NNCF", "<= 0.90", whole, peer, _full_ms)
    add("full step, ditcast on the CPU EP / ORT fp32", "<= 0.20", plain, full, _full_ms)
    if cached:
        best = min(cached, key=_image_ms)
        value = best["step_ms"]["reuse"]["p50"] / _full_ms(best)
        found.append(_ratio("reuse step / full step, best ditcast", "<= 0.08 (hold)", best, value))
    add("image, ditcast with cache / ORT fp32, all steps", "<= 0.05", cached, full, _image_ms)
    add("image, ditcast with cache / NNCF, all steps", "<= 0.33", cached, peer, _image_ms)
    if "name" in loops:
        value = loops["graph"]["p50"] / loops["host"]["p50"]
        found.append(_ratio("graph loop / host loop", "<= 1.03", named[loops["name"]], value))
    add("low-memory peak, ditcast / ORT fp32's peak", "<= 0.40", plain, full, _least_mib)
    add("the same / ditcast fp32, low memory too", "<= 0.40", plain, float_plain, _least_mib)
    if whole:
        best = min(whole, key=_full_ms)
        found.append(_ratio("load to first step, best ditcast, s", "<= 5", best, best["load_s"]))
    return found


Figure = Callable[[Row], float]


def _ratio(what: str, target: str, row: Row, value: float) -> dict[str, Any]:
    found = {"what": what, "value": float(f"{value:.4g}"), "target": target}
    return found | {"of": row["name"], "fidelity": fidelity(row)}


def _full_ms(row: Row) -> float:
    return float(row["step_ms"]["full"]["p50"])


def _image_ms(row: Row) -> float:
    return float(row["image_ms"]["p50"])


def _least_mib(row: Row) -> float:
    key = "low_memory_peak_mib" if "low_memory_peak_mib" in row else "peak_memory_mib"
    return float(row[key])


def show(report: dict[str, Any]) -> None:
    """Print all tables."""
    request, machine = report["request"], report["machine"]
    flags = machine["cpu_flags"]
    kept = "all loaded at once" if request["kept_loaded"] else "each loaded for its turns"
    say(
        f"{report['bundle']['model']}, batches of {request['batch']}, {request['recipe']['steps']} "
        f"steps, guidance {request['recipe']['guidance']}; {request['threads']} threads, "
        f"{machine['cpu']} ({', '.join(flags)}); {request['rounds']} rounds, {kept}; medians, "
        f"in brackets 10th to 90th percentile; {machine['date']}"
    )
    if not {"avx512_vnni", "avx_vnni", "amx_int8"} & {*flags}:
        say("this CPU has neither VNNI nor AMX: int8 may not pay, and u8 x s8 kernels saturate")
    console = Console(width=None if Console().is_terminal else 170)
    for table in (_rows(report), _fewer(report), _ratios(report)):
        if table.row_count:
            console.print(table)
    for name, reason in report["missing"].items():
        print(f"not run: {name}: {reason}")
    if "reason" in report["loops"]:
        print(f"not run: graph loop: {report['loops']['reason']}")


def _rows(report: dict[str, Any]) -> Table:
    """One row per rival."""
    rows = report["rows"]
    computed = all(row["image_ms_from"] == "steps" for row in rows)
    note = "computed\nfrom steps" if computed else "* computed\nfrom steps"
    table = Table(
        Column("rival", no_wrap=True),
        "full step ms",
        "reuse step ms",
        "full",
        f"s / image\n({note})",
    )
    for header in ("vs ORT fp32", "PSNR dB", "peak MiB", "load s", "disk MiB"):
        table.add_column(header, justify="right")
    reference = next(_image_ms(row) for row in rows if row["name"] == FULL)
    for row in rows:
        mark = "*" * (row["image_ms_from"] == "steps" and not computed)
        table.add_row(
            _title(row) + " (slow: one step timed)" * row["slow"],
            _spread(row["step_ms"]["full"]),
            _spread(row["step_ms"].get("reuse")),
            f"{row['full_steps']} of {row['steps']}",
            f"{_image_ms(row) / 1000:.3f}{mark}",
            f"{reference / _image_ms(row):.2f}x",
            fidelity(row),
            f"{row['peak_memory_mib']:.0f}",
            f"{row['load_s']:.1f}",
            f"{row['size_bytes'] / 2**20:.0f}",
        )
    return table


def _fewer(report: dict[str, Any]) -> Table:
    """The honest rivals: fewer steps in the time of the best cached ditcast row."""
    table = Table("fewer steps in equal time", "steps", "spacing", "PSNR dB")
    for row in report["fewer_steps"]:
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']['p50']:.1f}"
        table.add_row(row["name"], str(row["steps"]), row["spacing"] or "-", psnr)
    return table


def _ratios(report: dict[str, Any]) -> Table:
    """The ratios beside their targets."""
    table = Table("ratio", "value", "target (XL/2, AMX)", "of", "its PSNR dB")
    for row in report["ratios"]:
        table.add_row(row["what"], f"{row['value']:.3f}", row["target"], row["of"], row["fidelity"])
    return table


def _title(row: Row) -> str:
    """The name for people; OpenVINO chooses its precision by the processor."""
    chosen = f" ({row['facts']['precision']})" if row["name"].startswith("openvino") else ""
    return f"{row['title']}{chosen}"


def _spread(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    digits = 0 if found["p50"] >= 100 else 1
    low, middle, high = (f"{found[q]:.{digits}f}" for q in ("p10", "p50", "p90"))
    return f"{middle} ({low}–{high})"


def check_plot(path: Path | None) -> None:
    """Refuse a chart that could not be written, before the long work.

    Raises:
        ConfigError: another file type, or a picture without what draws it.
        MissingDependencyError: no plotly.
    """
    if path is None:
        return
    if path.suffix not in (".html", ".png"):
        raise ConfigError(f"plot: got {path}, expected a name that ends in .html or .png")
    optional("plotly.graph_objects", "report")
    if path.suffix == ".png" and importlib.util.find_spec("kaleido") is None:
        raise ConfigError(
            f"plot: {path} needs the package kaleido; install it with: pip install kaleido, "
            f"or write {path.with_suffix('.html')}"
        )


def plot(report: dict[str, Any], path: Path) -> None:
    """Time per image against fidelity, one dot per rival; full precision is a line."""
    plotly = optional("plotly.graph_objects", "report")
    figure = plotly.Figure()
    symbols = {family: itertools.count() for family in COLOURS}
    for row in report["rows"]:
        seconds, family = _image_ms(row) / 1000, row["name"].partition("-")[0]
        if row["name"] == FULL:
            figure.add_vline(x=seconds, line_dash="dash", annotation_text=row["title"])
        if row["name"] == FULL or row["fidelity"]["psnr_db"] is None:
            continue
        dot = plotly.Scatter(
            x=[seconds],
            y=[row["fidelity"]["psnr_db"]["p50"]],
            name=_title(row),
            mode="markers",
            marker={
                "size": 12,
                "color": COLOURS[family],
                "symbol": next(symbols[family]),
            },
            hovertemplate=f"{_title(row)}<br>%{{x:.3f}} s, {fidelity(row)} dB<extra></extra>",
        )
        figure.add_trace(dot)
    of = {row["fidelity"]["of"] for row in report["rows"]} - {"none"}
    figure.update_layout(
        title=f"{report['bundle']['model']}, {report['machine']['cpu']}",
        xaxis={"title": "seconds per image", "type": "log"},
        yaxis={"title": f"PSNR dB against full precision, of {', '.join(sorted(of))}"},
        template="plotly_white",
    )
    if path.suffix == ".html":
        figure.write_html(path, include_plotlyjs=True)
    else:
        figure.write_image(path, width=1100, height=650)
