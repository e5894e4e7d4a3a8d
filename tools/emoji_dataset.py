"""Build the 32x32 RGB emoji set that the embedded model is trained on.

The pictures come from two packages of the npm registry, fetched with `npm pack`:
Noto Emoji (Apache-2.0, in `emoji-datasource-google`) and Twemoji (CC-BY-4.0, in
`emoji-datasource-twitter`). Each picture is alpha-composited on white. A class is a
`subcategory` with at least 24 pictures. About a tenth of the emoji are held out; vendors,
skin tones and emoji with identical pictures always fall on the same side.

    python tools/emoji_dataset.py -o build/emoji.npz
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VERSION = "16.0.0"
VENDORS = ("google", "twitter")
CELL = 32
PITCH = CELL + 2  # the sheets put one pixel of margin around each cell
MIN_PICTURES = 24
HELD_OUT_TENTHS = 1


class Picture(NamedTuple):
    """One cell of a sheet: the emoji it belongs to, its class and its pixels."""

    emoji: str
    subcategory: str
    pixels: NDArray[np.uint8]  # (32, 32, 3)


def fetch(vendor: str, folder: Path) -> tuple[list[dict[str, Any]], Image.Image]:
    """The emoji table and the RGBA sheet of one vendor, from its npm package."""
    package = f"emoji-datasource-{vendor}"
    archive = folder / f"{package}-{VERSION}.tgz"
    if not archive.exists():
        command = ["npm", "pack", "--silent", f"{package}@{VERSION}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:
        table = tar.extractfile("package/emoji.json")
        sheet = tar.extractfile(f"package/img/{vendor}/sheets-clean/32.png")
        if table is None or sheet is None:
            raise SystemExit(f"{archive} does not hold the emoji table and its sheet")
        return json.load(table), Image.open(io.BytesIO(sheet.read())).convert("RGBA")


def cells(vendor: str, table: list[dict[str, Any]], sheet: Image.Image) -> Iterator[Picture]:
    """Every picture of a vendor's sheet, skin tones included, composited on white."""
    white = Image.new("RGBA", (CELL, CELL), "white")
    for emoji in table:
        for variant in (emoji, *emoji.get("skin_variations", {}).values()):
            if not variant[f"has_img_{vendor}"]:
                continue
            left, top = PITCH * variant["sheet_x"] + 1, PITCH * variant["sheet_y"] + 1
            cell = sheet.crop((left, top, left + CELL, top + CELL))
            pixels = np.asarray(Image.alpha_composite(white, cell))[..., :3]
            yield Picture(emoji["unified"], emoji["subcategory"], pixels)


def groups(pictures: list[Picture]) -> dict[str, str]:
    """Map each emoji to the first of its group; emoji that share a picture share a group."""
    parent = {picture.emoji: picture.emoji for picture in pictures}

    def root(emoji: str) -> str:
        while parent[emoji] != emoji:
            emoji = parent[emoji]
        return emoji

    first: dict[bytes, str] = {}
    for picture in pictures:
        twin = first.setdefault(picture.pixels.tobytes(), picture.emoji)
        a, b = sorted((root(twin), root(picture.emoji)))
        parent[b] = a
    return {emoji: root(emoji) for emoji in parent}


def held_out(group: str) -> bool:
    """Whether a group of emoji is held out: a fixed draw by the hash of its name."""
    return int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10 < HELD_OUT_TENTHS


def build(folder: Path) -> dict[str, NDArray[Any]]:
    """The data set as arrays: images (n,32,32,3) uint8, labels, emoji, held_out, classes."""
    pictures = [p for vendor in VENDORS for p in cells(vendor, *fetch(vendor, folder))]
    counts = collections.Counter(p.subcategory for p in pictures)
    classes = sorted(name for name, count in counts.items() if count >= MIN_PICTURES)
    group = groups(pictures)
    kept = [p for p in pictures if p.subcategory in classes]
    return {
        "images": np.stack([p.pixels for p in kept]),
        "labels": np.array([classes.index(p.subcategory) for p in kept], np.int64),
        "emoji": np.array([p.emoji for p in kept]),
        "held_out": np.array([held_out(group[p.emoji]) for p in kept]),
        "classes": np.array(classes),
    }


def main() -> None:
    """Build the set and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/emoji.npz"))
    parser.add_argument("--packages", type=Path, help="folder that keeps the npm packages")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.packages or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        data = build(folder)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, allow_pickle=False, **data)
    held = int(data["held_out"].sum())
    total, classes = len(data["images"]), len(data["classes"])
    print(f"{args.output}: {total - held} train + {held} held-out pictures in {classes} classes")


if __name__ == "__main__":
    main()
