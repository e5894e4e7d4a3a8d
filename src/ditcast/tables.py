"""Tables for people, on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ditcast.progress import say
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
    roof = found.rates.get(found.weight_bits)
    rows = [["layer", "kernel", "precision", "ms", "share", "Gop/s", "of roof"]]
    for layer in found.layers:
        precision = "integer" if layer.integer else "FLOAT"
        of_roof = f"{layer.giga_ops / roof:.0%}" if roof else "-"
        figures = [f"{layer.latency_ms:.2f}", f"{layer.share:.1%}"]
        rows.append(
            [layer.layer, layer.kernel, precision, *figures, f"{layer.giga_ops:.0f}", of_roof]
        )
    total = sum(found.other.values()) + sum(layer.latency_ms for layer in found.layers)
    kernels = list(found.other.items())
    rest = sum(ms for _, ms in kernels[SHOWN_KERNELS:])
    for kernel, ms in [*kernels[:SHOWN_KERNELS], ("(others)", rest)]:
        rows.append(["", kernel, "", f"{ms:.2f}", f"{ms / total:.1%}", "", ""])
    rows.append(["all kernels", "", "", f"{total:.2f}", "100%", "", ""])
    return rows


def audit_lines(found: Audit) -> list[str]:
    """The verdict, and what this machine's integers are worth."""
    counted = f"{len(found.layers) - len(found.lost)} of {len(found.layers)}"
    lines = [f"FLOAT {layer.layer}: {layer.kernel}" for layer in found.lost]
    lines.append(f"audit: {counted} quantized layers of {found.graph}.onnx run in integer kernels")
    lines.append(f"audit: the golden step comes out at {found.golden_db:.1f} dB")
    if 0 in found.rates and found.weight_bits in found.rates:
        roof = found.rates[found.weight_bits]
        ratio = roof / found.rates[0]
        lines.append(
            f"audit: a large MatMul runs at {roof:.0f} Gop/s with {found.weight_bits}-bit weights "
            f"here, at {found.rates[0]:.0f} in float: {ratio:.2f} times"
        )
    return lines


def warn_of_slow_integers(found: Audit) -> None:
    """Say it where integers gain little: on CPUs without VNNI their kernels are hardly faster."""
    if not found.layers or 0 not in found.rates:
        return
    ratio = found.rates[found.weight_bits] / found.rates[0]
    if ratio >= PAYS:
        return
    seven = found.rates[7] / found.rates[0]
    hint = f"; with --scheme w7a8 it is {seven:.2f}" if found.weight_bits > 7 else ""
    say(
        f"warning: int8 may not pay on this CPU (flags: {', '.join(cpu_flags()) or 'none'}): "
        f"a large MatMul with {found.weight_bits}-bit weights is {ratio:.2f} times as fast as in "
        f"float{hint}"
    )
