"""The report of a measurement: figures, pictures and one self-contained page in the bundle.

The page is for people who did not run the benchmark, so it says next to every gain what it cost,
on how many samples, and where the gain is none. It is made of what the bundle keeps, so that
`ditcast report` writes the same page again.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from ditcast.bundle import Bundle
from ditcast.errors import BundleError, MissingDependencyError
from ditcast.progress import tell
from ditcast.runtime import images, kept, page
from ditcast.runtime.images import Pixels
from ditcast.runtime.kept import AUDIT, FIGURES

PAGE = "reports/report.html"

Values = dict[str, Any]


def write_report(bundle: Bundle, report: Values) -> Path | None:
    """Put figures, pictures and, with the `report` extra, the page into the bundle.

    `report` is what `ditcast.runtime.bench.bench` returns. Returns the page's path, None where
    it could not be made.
    """
    figures = {key: value for key, value in report.items() if key != "shown"}
    names = [FIGURES]
    bundle.staged(FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    audit, reason = None, ""
    try:
        audit, reason = _audit(bundle, figures)
    except BundleError as err:  # what was measured just now is not to be lost for it
        reason = str(err)
        tell(reason)
    else:
        if AUDIT in bundle.manifest.reports:
            names.append(AUDIT)
            shutil.copyfile(bundle.file(AUDIT), bundle.staged(AUDIT))
    pictures = {
        name: images.to_pixels(samples)
        for name, samples in report["shown"].items()
        if samples.shape[1] == 3
    }
    for variant, shown in pictures.items():
        names.append(picture_name(variant))
        images.grid(shown).save(bundle.staged(names[-1]))
    try:
        text = page.render(bundle, figures, pictures, audit, reason)
    except MissingDependencyError as err:
        tell(f"{PAGE} is left out. {err}")
    else:
        names.append(PAGE)
        bundle.staged(PAGE).write_text(text, encoding="utf-8")
    bundle.commit({"reports": tuple(sorted(names))}, replaces="reports/")
    return bundle.file(PAGE) if PAGE in names else None


def rewrite(bundle: Bundle, output: Path | None = None) -> Path:
    """Write the page again from what the bundle keeps: into the bundle, or to another file.

    Raises:
        BundleError: nothing was measured, or something else than what the bundle holds now.
        MissingDependencyError: the `report` extra is not installed.
    """
    figures = kept.current(bundle)
    text = page.render(bundle, figures, read_pictures(bundle, figures), *_audit(bundle, figures))
    if output is not None:
        output.write_text(text, encoding="utf-8")
        return output
    bundle.staged(PAGE).write_text(text, encoding="utf-8")
    bundle.commit({"reports": tuple(sorted({*bundle.manifest.reports, PAGE}))})
    return bundle.file(PAGE)


def picture_name(variant: str) -> str:
    """The file in the bundle that holds the picture grid of a variant."""
    return f"reports/{re.sub(r'[^a-z0-9]+', '-', variant.lower()).strip('-')}.png"


def read_pictures(bundle: Bundle, figures: Values) -> dict[str, Pixels]:
    """The pictures of each variant that the bundle keeps, (n, H, W, 3).

    Raises:
        BundleError: a file that was changed, or holds no such pictures.
    """
    if figures["pictures"] is None:
        return {}
    found = {}
    for row in figures["variants"]:
        name = picture_name(row["name"])
        if name not in bundle.manifest.reports:
            continue
        bundle.check(name, f"{kept.CHANGED}; measure again with: ditcast bench {bundle.path}")
        try:
            with Image.open(bundle.file(name)) as sheet:
                pictures = images.cut(sheet, **figures["pictures"])
        except (OSError, SyntaxError) as err:  # the latter is what Pillow raises of a broken PNG
            pictures, reason = None, str(err)
        else:
            reason = "another size"
        if pictures is None:
            raise BundleError(
                f"report: {name} in {bundle.path} does not hold the pictures that were measured "
                f"({reason}); measure again with: ditcast bench {bundle.path}"
            )
        found[row["name"]] = pictures
    return found


def _audit(bundle: Bundle, figures: Values) -> tuple[Values | None, str]:
    """The audit that belongs to the figures, or why there is none."""
    if bundle.manifest.quantization is None:
        return None, "Nothing is quantized, so there was nothing to audit."
    backend = figures["backend"]["backend"]
    command = f"ditcast audit {bundle.path.resolve().name} --backend {backend}"
    audit = kept.audit(bundle)
    if audit is None:
        return None, f"No audit was kept; make one with: {command}"
    if audit["backend"] != backend:
        return None, f"The audit is of backend {audit['backend']}; make one with: {command}"
    if kept.is_stale_audit(bundle, audit):
        return None, f"The graphs have changed since the audit; make one with: {command}"
    return audit, ""
