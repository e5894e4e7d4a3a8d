"""Make the README's results table and picture from the last measurement in a bundle.

Both come from the figures and the pictures that `ditcast bench` put into it.

    python tools/readme_results.py emoji.bundle -o docs/emoji.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ditcast.bundle import Bundle
from ditcast.runtime.bench import summary
from ditcast.runtime.report import picture_name

ENLARGED = 2
CAPTION = 46  # pixels above each grid
GAP = 24


def markdown(report: dict[str, Any]) -> str:
    """The table, and a line on what it stands on."""
    header, *rows = summary(report)
    lines = [header, ["---"] * len(header), *rows]
    request, machine, backend = report["request"], report["machine"], report["backend"]
    flags = ", ".join(machine["cpu_flags"])
    sampler = report["bundle"]["recipe"]["sampler"].upper()
    note = (
        f"{machine['cpu']} ({flags}), {backend['threads']} threads, ONNX Runtime "
        f"{backend['onnxruntime']}, integer kernels {backend['integer_mode']}; "
        f"{request['images']} images in batches of {request['batch']}, {request['steps']} "
        f"{sampler} steps, guidance {request['guidance']}; medians; {machine['date']}."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + note


def picture(bundle: Bundle, report: dict[str, Any]) -> Image.Image:
    """The grids of all variants side by side, each under its speed and its fidelity."""
    columns = []
    for row in report["variants"]:
        grid = Image.open(bundle.file(picture_name(row["name"]))).convert("RGB")
        size = (grid.width * ENLARGED, grid.height * ENLARGED)
        columns.append((row, grid.resize(size, Image.Resampling.NEAREST)))
    width = sum(grid.width + GAP for _, grid in columns) - GAP
    sheet = Image.new("RGB", (width, CAPTION + columns[0][1].height), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for i, (row, grid) in enumerate(columns):
        fidelity = "reference" if i == 0 else f"{row['psnr_db']['p50']:.1f} dB"
        text = f"{row['name']}\n{row['speedup']['p50']:.2f}x, {fidelity}"
        draw.multiline_text((left, 2), text, fill="black", font=ImageFont.load_default(15))
        sheet.paste(grid, (left, CAPTION))
        left += grid.width + GAP
    return sheet


def main() -> None:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    report = json.loads(bundle.file("reports/bench.json").read_text())
    picture(bundle, report).save(args.output, optimize=True)
    print(markdown(report))


if __name__ == "__main__":
    main()
