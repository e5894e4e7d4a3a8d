"""Tables for people, on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ditcast.cache import StepPlan, idle, idle_run
from ditcast.errors import ConfigError
from ditcast.manifest import Manifest
from ditcast.progress import tell
from ditcast.recipe import ORDERED, TEMPORAL
from ditcast.runtime.machine import cpu_flags

if TYPE_CHECKING:
    from ditcast.runtime.audit import Audit

WIDTH = 120  # columns, where the output is no terminal
PAYS = 2.0  # integers that are not this much faster than float gain little in a whole step
SHOWN_KERNELS = 8  # of everything that is no quantized layer; the rest is summed up


def show(rows: list[list[str]], right: int) -> None:
    """Print a header and its rows; all columns from number `right` on are figures."""
    header, *body = rows
    table = Table()
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i >= right else "left")
    for row in body:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def audit_rows(found: Audit) -> list[list[str]]:
    """Every quantized layer, then the kernels of everything else, then the whole step."""
    roof = found.roof
    rows = [["layer", "kernel", "precision", "ms", "share", "Gop/s", "of roof"]]
    for layer in found.layers:
        runs = "integer" if layer.integer else "FLOAT" if layer.wanted else "float"
        figures = [f"{layer.latency_ms:.2f}", f"{layer.share:.1%}"]
        rates = ["-", "-"]
        if layer.giga_ops and roof:
            rates = [f"{layer.giga_ops:.0f}", f"{layer.giga_ops / roof:.0%}"]
        name = f"{layer.layer} ({layer.precision})"
        rows.append([name, layer.kernel, runs, *figures, *rates])
    steps = [layer for layer in found.layers if not layer.layer.startswith(TEMPORAL)]
    total = sum(found.other.values()) + sum(layer.latency_ms for layer in steps)
    kernels = list(found.other.items())
    rest = sum(ms for _, ms in kernels[SHOWN_KERNELS:])
    for kernel, ms in [*kernels[:SHOWN_KERNELS], ("(others)", rest)]:
        rows.append(["", kernel, "", f"{ms:.2f}", f"{ms / total:.1%}", "", ""])
    rows.append(["all kernels", "", "", f"{total:.2f}", "100%", "", ""])
    return rows


def audit_lines(found: Audit) -> list[str]:
    """The verdict, and what this machine's integers are worth."""
    lost, wanted = found.lost, [layer for layer in found.layers if layer.wanted]
    lines = [f"FLOAT {layer.layer}: {layer.kernel}" for layer in lost]
    if wanted or not found.layers:
        counted = f"{sum(layer.integer for layer in wanted)} of {len(wanted)}"
        lines.append(
            f"audit: {counted} quantized layers of {found.graph}.onnx run in integer kernels"
        )
    if len(found.layers) > len(wanted):
        lines.append(
            f"audit: {len(found.layers) - len(wanted)} layers have quantized weights only: "
            "they are smaller, and run in float"
        )
    lines.append(f"audit: the golden step comes out at {found.golden_db:.1f} dB")
    if 0 in found.rates and found.roof is not None:
        roof, ratio = found.roof, found.roof / found.rates[0]
        lines.append(
            f"audit: a large MatMul runs at {roof:.0f} Gop/s with {found.weight_bits}-bit weights "
            f"here, at {found.rates[0]:.0f} in float: {ratio:.2f} times"
        )
    return lines


def bundle_rows(manifest: Manifest) -> dict[str, str]:
    """What a bundle holds, for `inspect`; rows may be empty."""
    model, recipe, fit = manifest.model, manifest.recipe, manifest.cache
    layers = manifest.quantization.layers if manifest.quantization is not None else ()
    return {
        "model": f"{model.source} ({model.architecture}, "
        f"{model.parameters / 1e6:.1f} M parameters, "
        f"{model.temporal_parameters / 1e6:.1f} M of them temporal)",
        "samples": f"{'x'.join(map(str, model.sample_shape))}, {model.num_classes} classes",
        "schedule": f"{recipe.sampler}, {recipe.steps} steps, guidance {recipe.guidance}",
        "quantization": f"{recipe.scheme} by {recipe.method}, {len(layers)} layers, "
        f"balance {recipe.balance}",
        "temporal features": f"{recipe.temporal}, ranges per step: {recipe.fsc}",
        "cache": f"{recipe.cache}, interval {recipe.interval}, {len(model.slots)} slots"
        + (f", order {recipe.order}" if recipe.cache in ORDERED else ""),
        "full steps": " ".join(map(str, fit.places)) if fit is not None and fit.places else "",
        "threshold": f"{fit.threshold:.5g}, {fit.full_steps:.1f} full steps on average"
        if fit is not None and fit.threshold is not None
        else "",
        "router": f"{fit.reused:.1%} of all slots are reused"
        if fit is not None and fit.reused is not None
        else "",
        "noise guard": f"{fit.held_back} of {fit.forecasts} forecasts are plain reuse"
        if fit is not None and fit.forecasts
        else "",
        "correction": recipe.correction if recipe.correction != "none" else "",
        "graphs": ", ".join(f"{graph.target}/{graph.name}" for graph in manifest.graphs) or "none",
        "engines": ", ".join(f"{e.backend}/{e.graph} ({e.device})" for e in manifest.engines),
        "reports": ", ".join(manifest.reports) or "none",
        "size": f"{sum(e.size for e in manifest.files.values()) / 2**20:.1f} MiB",
        "classes": ", ".join(f"{i} {name}" for i, name in enumerate(model.classes)),
    }


def warn_of_idle_cache(policy: str, plan: StepPlan, strict: bool) -> None:
    """Say where a cache never triggers, or always does.

    Raises:
        ConfigError: the same, where it is asked to be strict.
    """
    _warn(idle(policy, plan), strict)


def warn_of_idle_run(policy: str, plan: StepPlan, full: list[int], strict: bool) -> None:
    """Say where a policy that decides on the way never triggered in any batch, or always did.

    `full` are the full steps of each batch.

    Raises:
        ConfigError: the same, where it is asked to be strict.
    """
    _warn(idle_run(policy, plan, full), strict)


def _warn(reason: str | None, strict: bool) -> None:
    """Say a reason, if there is one, or raise it where that is asked for."""
    if reason is not None and strict:
        raise ConfigError(reason)
    if reason is not None:
        tell(f"warning: {reason}")


def warn_of_slow_integers(found: Audit) -> None:
    """Say it where integers gain little: on CPUs without VNNI their kernels are hardly faster."""
    if found.roof is None or 0 not in found.rates:
        return
    ratio = found.roof / found.rates[0]
    if ratio >= PAYS:
        return
    seven = found.rates[7] / found.rates[0]
    hint = f"; with --scheme w7a8 it is {seven:.2f}" if found.weight_bits > 7 else ""
    tell(
        f"warning: int8 may not pay on this CPU (flags: {', '.join(cpu_flags()) or 'none'}): "
        f"a large MatMul with {found.weight_bits}-bit weights is {ratio:.2f} times as fast as in "
        f"float{hint}"
    )
