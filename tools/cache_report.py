"""What `tools/cache_table.py` measured, for people: a table, stacking losses and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quality_report import show_table
from rich.table import Column, Table

from ditcast.errors import optional

Row = dict[str, Any]


def show(report: Row) -> None:
    """Print all there is."""
    request, machine = report["request"], report["machine"]
    print(
        f"{request['model']}: {request['images']} images in batches of {request['batch']}, "
        f"{request['steps']} steps, guidance {request['guidance']}; medians; {machine['cpu']}, "
        f"{machine['threads']} threads, {machine['date']}"
    )
    show_table(report, _table(report["rows"]))
    for entry in report["stacking"]:
        share = "-" if entry["won_back"] is None else f"{entry['won_back']:.0%}"
        print(
            f"stacking, {entry['precision']}, {entry['full_steps']:g} full steps: fd_to_fp "
            f"quantized {entry['quantized']:.3g}, cached {entry['cached']:.3g}, both "
            f"{entry['both']:.3g}: loss {entry['loss']:.3g}; {entry['fitted']}: "
            f"{entry['left']:.3g} left, {share} won back"
        )


def _table(rows: list[Row]) -> Table:
    """One row per point, in the order of the run."""
    table = Table(*(Column(name, no_wrap=True) for name in ("precision", "policy", "full")))
    titles = (
        "reused",
        "ms / image",
        "speed-up",
        "PSNR dB p50 (p10–p90)",
        "SSIM",
        "fd_to_fp (95 %)",
    )
    for name in (*titles, "fd_to_real"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        psnr, ssim, fd = row["psnr_db"], row["ssim"], row.get("fd_to_fp")
        real = row.get("fd_to_real")
        spacing = f", {row['spacing']}" if row["spacing"] else ""
        table.add_row(
            row["precision"],
            row["policy"] + spacing,
            f"{row['full_steps']:g} of {row['steps']}",
            f"{row['reused']:.0%}",
            f"{row['image_ms']['p50']:.1f}",
            f"{row['speedup']['p50']:.2f}x",
            f"{psnr['p50']:.1f} ({psnr['p10']:.1f}–{psnr['p90']:.1f})",
            "-" if ssim is None else f"{ssim['p50']:.4f}",
            "-" if fd is None else f"{fd['value']:.3g} ({fd['low']:.2g}–{fd['high']:.2g})",
            "-" if real is None else f"{real['value']:.3g}",
        )
    return table


def plot(report: Row, path: Path) -> None:
    """A page: time per image against fidelity, one line per precision and policy."""
    graph = optional("plotly.graph_objects", "report")
    panels = ["psnr_db", *(["fd_to_fp"] if report["distances"] is not None else [])]
    figure = optional("plotly.subplots", "report").make_subplots(rows=len(panels), cols=1)
    groups: dict[str, list[Row]] = {}
    for row in report["rows"][1:]:
        groups.setdefault(f"{row['precision']}, {row['policy']}", []).append(row)
    colours = optional("plotly.colors", "report").qualitative.Light24
    for line, panel in enumerate(panels, start=1):
        for i, (name, rows) in enumerate(groups.items()):
            key = "p50" if panel == "psnr_db" else "value"
            trace = graph.Scatter(
                x=[row["image_ms"]["p50"] for row in rows],
                y=[row[panel][key] for row in rows],
                text=[f"{row['full_steps']:g} of {row['steps']} steps" for row in rows],
                name=name,
                legendgroup=name,
                showlegend=line == 1,
                mode="lines+markers",
                marker={"color": colours[i % len(colours)], "size": 9},
            )
            figure.add_trace(trace, row=line, col=1)
        title = "PSNR dB, median" if panel == "psnr_db" else panel
        kind = "linear" if panel == "psnr_db" else "log"
        figure.update_yaxes(title=title, type=kind, row=line, col=1)
        figure.update_xaxes(title="ms per image", type="log", row=line, col=1)
    request, machine = report["request"], report["machine"]
    figure.update_layout(
        title=f"{request['model']}, {request['images']} images, {machine['cpu']}, "
        f"{machine['date']}; full precision {report['rows'][0]['image_ms']['p50']:.0f} ms",
        template="plotly_white",
        height=460 * len(panels),
    )
    figure.write_html(path, include_plotlyjs=True)
