"""The report in the bundle: files that the manifest vouches for, and a page that is honest."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from ditcast.bundle import Bundle
from ditcast.runtime.report import write_report
from tests.reports import NAMES, make_report, spread

MAX_BYTES = 8_000_000


class Page(HTMLParser):
    """A parsed page: what it shows outside of scripts and styles, and what it would load."""

    def __init__(self, text: str) -> None:
        """Parse the text of a page."""
        super().__init__()
        self.source = text
        self.tags: list[str] = []
        self.loads: list[str] = []
        self._shown: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self._shown).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag and the addresses in it."""
        self.tags.append(tag)
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        """Keep text that is shown."""
        if self.tags and self.cdata_elem is None:
            self._shown.append(data)


def render(bundle: Bundle, report: dict[str, Any]) -> Page:
    """Write a report into the bundle and read its page."""
    path = write_report(bundle, report)
    assert path == bundle.file("reports/report.html")
    assert path.stat().st_size <= MAX_BYTES
    return Page(path.read_text(encoding="utf-8"))


def test_the_bundle_vouches_for_every_report(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES)
    write_report(bundle, report)
    reopened = Bundle.open(bundle.path)
    slugs = ("full-precision", "w8a8", "cache", "w8a8-cache", "3-steps")
    names = ["bench.json", *(f"{slug}.png" for slug in slugs), "report.html"]
    assert reopened.manifest.reports == tuple(f"reports/{name}" for name in names)
    assert set(reopened.manifest.reports) <= set(reopened.manifest.files)
    reopened.verify()
    figures = json.loads(reopened.file("reports/bench.json").read_text())
    assert figures == {key: value for key, value in report.items() if key != "shown"}
    with Image.open(reopened.file("reports/w8a8-cache.png")) as picture:
        assert picture.size == (18, 18)  # 2 x 2 samples of 8 x 8 with a gap of 2


def test_another_report_replaces_the_first(bundle: Bundle) -> None:
    write_report(bundle, make_report(bundle, *NAMES))
    Bundle.open(bundle.path).staged("reports/left-by-a-killed-run.png").write_bytes(b"")
    write_report(bundle, make_report(bundle, "full precision"))
    reopened = Bundle.open(bundle.path)
    reopened.verify()
    found = sorted(path.name for path in reopened.file("reports").iterdir())
    assert found == ["bench.json", "full-precision.png", "report.html"]


def test_page_shows_every_figure_and_loads_nothing(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES)
    page = render(bundle, report)
    for variant in report["variants"]:
        assert variant["name"] in page.text
        assert f"{variant['image_ms']['p50']:.1f}" in page.text
    for variant in report["variants"][1:]:
        assert f"{variant['speedup']['p50']:.2f}" in page.text
        assert f"{variant['psnr_db']['p50']:.1f}" in page.text
    assert "2.04 \u2013 2.50" in page.text  # the spread of 2.27
    assert page.tags.count("img") == len(NAMES)
    local = [load for load in page.loads if load.startswith("#")]
    assert all(load.startswith("data:image/png;base64,") for load in set(page.loads) - {*local})
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    assert "Plotly.newPlot" in page.source


def test_verdict_has_speed_fidelity_size_and_hardware(bundle: Bundle) -> None:
    page = render(bundle, make_report(bundle, *NAMES))
    assert (
        "w8a8 + cache is 2.27 times as fast as full precision (18.4 instead of 41.7 ms per "
        "image), at a median PSNR of 26.1 dB to its images (160 samples), with 1.0 MiB of graphs "
        "instead of 3.0 MiB, measured on Test CPU with 2 threads on 2026-01-02."
    ) in page.text
    assert "w8a8 is slower than full precision, at 0.78 times its speed" in page.text
    assert "3 steps, trailing spacing, is 2.13 times as fast as full precision" in page.text
    assert "w8a8 + cache is faster and 4.8 dB closer." in page.text
    assert f"ditcast bench {bundle.path.name} --images 160 --seed 7" in page.text
    assert "they can move by 5 dB" not in page.text


@pytest.mark.parametrize(
    ("speedup", "psnr", "clause"),
    [
        (2.13, 30.1, "it is 4.0 dB closer, so fewer steps are the better choice by PSNR."),
        (1.10, 30.1, "it is 4.0 dB closer but takes 2.06 times as long as w8a8 + cache, so this"),
        (2.80, 25.1, "w8a8 + cache is 1.0 dB closer at 0.81 times its speed."),
    ],
    ids=["equal time", "slower", "faster"],
)
def test_page_weighs_fewer_steps(bundle: Bundle, speedup: float, psnr: float, clause: str) -> None:
    report = make_report(bundle, *NAMES)
    report["variants"][-1] |= {"speedup": spread(speedup), "psnr_db": spread(psnr)}
    assert clause in render(bundle, report).text


def test_page_says_when_one_gain_alone_is_better(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES)
    sentence = "cache alone is both faster and closer than w8a8 + cache: it is 2.40 times as fast"
    assert sentence not in render(bundle, report).text
    report["variants"][2]["speedup"] = spread(2.40)
    assert sentence in render(bundle, report).text


def test_page_says_when_fidelity_means_nothing(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES[:-1])
    report["bundle"]["random_weights"] = True
    for variant in report["variants"]:
        variant["samples"] = 1
    page = render(bundle, report)
    assert "The weights are random: fidelity means nothing here." in page.text
    assert "(1 sample, of random weights, so this figure means nothing)" in page.text
    assert "over fewer than 128 they can move by 5 dB" in page.text


def test_page_escapes_what_it_is_given(bundle: Bundle) -> None:
    hostile = """</script><script>alert('x')</script>"><img src=http://a.example/x onerror=x>&"""
    report = make_report(bundle, *NAMES)
    clean = render(bundle, report)
    for section, key in (("bundle", "model"), ("machine", "cpu"), ("backend", "integer_mode")):
        report[section][key] = hostile
    report["variants"][1]["name"] = hostile
    report["shown"][hostile] = report["shown"].pop("w8a8")
    page = render(bundle, report)
    assert page.tags == clean.tags
    assert not [load for load in page.loads if load.startswith("http")]
    assert hostile in page.text
    Bundle.open(bundle.path).verify()


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], (NAMES[0], NAMES[2]), NAMES[:4]])
def test_page_of_fewer_variants(bundle: Bundle, names: tuple[str, ...]) -> None:
    page = render(bundle, make_report(bundle, *names))
    assert ("Plotly.newPlot" in page.source) == (len(names) > 1)
    if len(names) == 1:
        assert "Full precision takes 41.7 ms per image" in page.text
    else:
        assert f"{names[-1]} is" in page.text


def test_page_of_latents_without_figures(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES, shape=(1, 4, 8, 8))
    for variant in report["variants"]:
        for key, value in variant.items():
            if isinstance(value, dict):
                variant[key] = None
        variant["peak_memory_mib"] = None
    page = render(bundle, report)
    assert "img" not in page.tags
    assert "Plotly.newPlot" not in page.source
    assert "The samples are latents" in page.text
    assert "w8a8 + cache was not timed, with unknown fidelity (160 samples)" in page.text
    assert bundle.manifest.reports == ("reports/bench.json", "reports/report.html")


def test_large_samples_do_not_make_a_large_page(bundle: Bundle) -> None:
    page = render(bundle, make_report(bundle, *NAMES, shape=(16, 3, 128, 128)))
    assert "Pictures are reduced" in page.text


def test_without_the_extra_there_is_no_page(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    assert write_report(bundle, make_report(bundle, *NAMES[:2])) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "plotly" in line
    assert "pip install 'ditcast[report]'" in line
    names = ("bench.json", "full-precision.png", "w8a8.png")
    assert bundle.manifest.reports == tuple(f"reports/{name}" for name in names)
    Bundle.open(bundle.path).verify()


def test_the_same_report_makes_the_same_page(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES)
    first = render(bundle, copy.deepcopy(report))
    assert render(bundle, report).source == first.source


def test_import_brings_no_optional_package() -> None:
    module = "ditcast.runtime.report"
    code = f"import sys, {module}; print({{'torch', 'jinja2', 'plotly'}} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
