"""What `tools/quality_table.py` measured, for people: a table, a line on sanity and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from ditcast.errors import optional

Row = dict[str, Any]
DISTANCES = ("fd_to_fp", "kd_to_fp", "fd_to_real", "kd_to_real")
FEATURES = ("cosine_mean", "cosine_min", "nearest_share")
CURVE = "cosine_per_step"  # runs of older reports have none
COSTS = ("seconds", "peak_memory_mib")
WIDTH = 170
FULL = "full precision"


def summarise(runs: Iterable[Row], order: list[str]) -> list[Row]:
    """One row per (steps, scheme, method, labels): mean and spread over calibration seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for run in runs:
        key = (run["steps"], run["scheme"], run["method"], run["reference"])
        groups.setdefault(key, []).append(run)
    rows = []
    ranked = sorted(groups, key=lambda key: (key[0], key[1], order.index(key[2]), key[3]))
    for steps, scheme, method, reference in ranked:
        of = groups[steps, scheme, method, reference]
        row: Row = {"steps": steps, "scheme": scheme, "method": method, "reference": reference}
        row |= {"labels": of[0]["labels"], "seeds": sorted(run["seed"] for run in of)}
        row["psnr_db"] = {q: _over([run["psnr_db"][q] for run in of]) for q in of[0]["psnr_db"]}
        for name in DISTANCES:
            if name in of[0]:
                row[name] = _over([run[name]["value"] for run in of]) | {
                    bound: _over([run[name][bound] for run in of])["mean"]
                    for bound in ("low", "high")
                }
        if of[0]["features"] is not None:
            row["features"] = {k: _over([run["features"][k] for run in of]) for k in FEATURES}
            curves = [run["features"][CURVE] for run in of if CURVE in run["features"]]
            row[CURVE] = np.mean(curves, axis=0).tolist() if curves else None
        row["calibration"] = {k: _over([run["calibration"][k] for run in of]) for k in COSTS}
        rows.append(row)
    return rows


def _over(values: list[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation over seeds; None for the spread of a single one."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "mean": float(f"{np.mean(values):.6g}"),
        "std": None if spread is None else float(f"{spread:.3g}"),
    }


def show(report: dict[str, Any]) -> None:
    """Print all there is."""
    request, machine = report["request"], report["machine"]
    print(
        f"{request['model']}: {request['images']} images per run, {request['iterations']} "
        f"iterations, {request['samples']} trajectories, {request['rows']} rows; mean ± standard "
        f"deviation over calibration seeds; {machine['cpu']}, {machine['date']}"
    )
    show_table(report, _table(report))
    for line in _sanity(report):
        print(line)
    for name, reason in report["missing"].items():
        print(f"not run: {name}: {reason}")


def show_table(report: dict[str, Any], table: Table) -> None:
    """Print a table, wide where nobody looks, under what its distances are."""
    if report["distances"] is not None:
        print("fd, kd (no FID): " + "; ".join(f"{k} {v}" for k, v in report["distances"].items()))
    Console(width=None if Console().is_terminal else WIDTH).print(table)


def _table(report: dict[str, Any]) -> Table:
    """One row per summary, under a row of each full precision that they are compared with."""
    plain = ("steps", "scheme", "method", "labels")
    table = Table(*(Column(name, no_wrap=True) for name in plain))
    for name in ("PSNR dB p50 (p10–p90)", "fd_to_fp (95 %)", "kd_to_fp", "fd_to_real"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("cos mean", "min", "nearest", "calib. s", "peak MiB"):
        table.add_column(name, justify="right")
    shown: set[str] = set()
    for row in sorted(report["summary"], key=lambda row: row["steps"]):
        if row["reference"] not in shown:
            shown.add(row["reference"])
            real = report["references"][row["reference"]].get("fd_to_real", {}).get("value")
            cells = [str(row["steps"]), "-", FULL, str(row["labels"]), *["-"] * 3]
            table.add_row(*cells, "-" if real is None else f"{real:.3g}", *["-"] * 5)
        features, psnr = row.get("features", {}), row["psnr_db"]
        table.add_row(
            *(str(row[name]) for name in plain),
            f"{_mean(psnr['p50'], '.1f')} ({psnr['p10']['mean']:.1f}–{psnr['p90']['mean']:.1f})",
            _interval(row.get("fd_to_fp")),
            *(_mean(row.get(name), ".3g") for name in ("kd_to_fp", "fd_to_real")),
            _mean(features.get("cosine_mean"), ".5f", spread=False),
            _mean(features.get("cosine_min"), ".4f", spread=False),
            _mean(features.get("nearest_share"), ".0%", spread=False),
            _mean(row["calibration"]["seconds"], ".1f", spread=False),
            _mean(row["calibration"]["peak_memory_mib"], ".0f", spread=False),
        )
    return table


def _mean(found: dict[str, Any] | None, form: str, spread: bool = True) -> str:
    if found is None:
        return "-"
    mean = f"{found['mean']:{form}}"
    return mean if found["std"] is None or not spread else f"{mean} ± {found['std']:.2g}"


def _interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{_mean(found, '.3g')} ({found['low']:.2g}–{found['high']:.2g})"


def _sanity(report: dict[str, Any]) -> list[str]:
    """Of each reference, what the measures say of damaged images beside what they say of runs."""
    lines = []
    for key, reference in report["references"].items():
        rows = [row for row in report["summary"] if row["reference"] == key]
        if not rows or not reference["sanity"]:
            continue
        bad = reference["sanity"]
        parts = [f"PSNR {_pairs(bad, lambda b: b['psnr_db']['p50'])}"]
        if "fd_to_fp" in rows[0]:
            parts.append(f"fd_to_fp {_pairs(bad, lambda b: b['fd_to_fp']['value'])}")
            lowest = min(b["fd_to_fp"]["value"] for b in bad.values())
            worse = [row for row in rows if row["fd_to_fp"]["mean"] >= lowest]
            parts.append(f"{len(worse)} of {len(rows)} rows are as far as the nearest of them")
        head = f"sanity, {reference['steps']} steps, {reference['labels']} labels: "
        lines.append(head + "; ".join(parts))
    return lines


def _pairs(found: dict[str, Any], value: Callable[[Row], float]) -> str:
    return ", ".join(f"{name} {value(of):.3g}" for name, of in found.items())


def _turned(row: Row) -> Row | None:
    if "features" not in row:
        return None
    found = row["features"]["cosine_mean"]
    return {"mean": 1 - found["mean"], "std": found["std"]}


# Of each panel: what it shows of a row, if the row has it, and its axis.
PANELS: dict[str, tuple[Callable[[Row], Row | None], str]] = {
    "PSNR dB, median": (lambda row: row["psnr_db"]["p50"], "linear"),
    "fd_to_fp": (lambda row: row.get("fd_to_fp"), "log"),
    "1 - mean feature cosine": (_turned, "log"),
    "calibration, s": (lambda row: row["calibration"]["seconds"], "log"),
}
TURNED = "1 - feature cosine at each step"


def plot(report: dict[str, Any], path: Path) -> None:
    """A page: methods side by side, one panel per measure and step count, one colour per scheme."""
    graph = optional("plotly.graph_objects", "report")
    rows, steps = report["summary"], sorted({row["steps"] for row in report["summary"]})
    titles = [f"{title}, {count} steps" for title in (*PANELS, TURNED) for count in steps]
    figure = optional("plotly.subplots", "report").make_subplots(
        rows=len(PANELS) + 1, cols=len(steps), subplot_titles=titles, vertical_spacing=0.08
    )
    colours = optional("plotly.colors", "report").qualitative.D3
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    for line, (value, kind) in enumerate(PANELS.values(), start=1):
        for column, count in enumerate(steps, start=1):
            for scheme, colour in zip(schemes, colours, strict=False):
                of = [row for row in rows if (row["steps"], row["scheme"]) == (count, scheme)]
                shown = [(row, point) for row in of if (point := value(row)) is not None]
                trace = graph.Scatter(
                    x=[row["method"] for row, _ in shown],
                    y=[point["mean"] for _, point in shown],
                    error_y={"array": [point["std"] or 0 for _, point in shown]},
                    text=[f"{row['labels']} labels, seeds {row['seeds']}" for row, _ in shown],
                    name=scheme,
                    legendgroup=scheme,
                    showlegend=(line, column) == (1, 1),
                    mode="markers",
                    marker={"size": 10, "color": colour},
                )
                figure.add_trace(trace, row=line, col=column)
            figure.update_yaxes(type=kind, row=line, col=column)
    for column, count in enumerate(steps, start=1):
        for row in (row for row in rows if row["steps"] == count and row.get(CURVE)):
            colour = dict(zip(schemes, colours, strict=False))[row["scheme"]]
            trace = _curve(row, colour)
            figure.add_trace(trace, row=len(PANELS) + 1, col=column)
        figure.update_yaxes(type="log", row=len(PANELS) + 1, col=column)
    request, machine = report["request"], report["machine"]
    figure.update_layout(
        title=f"{request['model']}, {request['images']} images per run, {machine['cpu']}, "
        f"{machine['date']}; bars: standard deviation over calibration seeds",
        template="plotly_white",
        height=380 * (len(PANELS) + 1),
    )
    figure.write_html(path, include_plotlyjs=True)


def _curve(row: Row, colour: str) -> Any:
    """How far the temporal features of each step turn, the noisiest step first."""
    return optional("plotly.graph_objects", "report").Scatter(
        y=[1 - cosine for cosine in row[CURVE]],
        name=f"{row['method']}, {row['scheme']}",
        legendgroup=row["scheme"],
        showlegend=False,
        mode="lines",
        line={"color": colour},
    )
