"""The page in a real browser: drawn, reachable by keyboard, readable wide and narrow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ditcast.runtime import kept
from ditcast.runtime.compare import read, render
from ditcast.runtime.report import PAGE, write_report
from tests import bundles, reports
from tests.reports import MAX_BYTES, NAMES, audited, blurred, make_report, pictures, with_distances

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZES = [(1400, 900), (400, 800)]
PLOTS = ("speed", "closeness", "cosine", "plan", "forecast", "inputs", "ranges", "selection")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it."""
    bundle = reports.exported(bundles.make(tmp_path_factory.mktemp("page") / "a.bundle"))
    report = with_distances(make_report(bundle, *NAMES, shape=(16, 3, 32, 32)))
    report["steps"]["selection"] = ["mmmccc", "mccccc", "cccccc"]
    good = pictures(16)
    report["shown"] = dict.fromkeys(NAMES, good) | {NAMES[3]: blurred(good)}
    kept.keep_audit(bundle, "onnxruntime", audited())
    write_report(bundle, report)
    return bundle.file(PAGE)


class Visit:
    """A page that was opened, and what the browser said of it."""

    def __init__(self, browser: Browser, path: Path, size: tuple[int, int], **how: Any) -> None:
        """Open it and wait for its scripts."""
        width, height = size
        self.page = browser.new_page(viewport={"width": width, "height": height}, **how)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(".viewer:not([hidden])")
        for plot in self.page.locator("[data-figure]").all():
            plot.locator(".main-svg").first.wait_for(state="attached")


@pytest.fixture(scope="module", params=SIZES, ids=["wide", "narrow"])
def visit(request: pytest.FixtureRequest, browser: Browser, written: Path) -> Iterator[Visit]:
    """The page at one size."""
    found = Visit(browser, written, request.param)
    yield found
    found.page.close()


def evaluate(page: Page, script: str) -> Any:
    """The value of a script in the page."""
    return page.evaluate(script)


def test_it_opens_without_a_complaint(visit: Visit, written: Path) -> None:
    """From one file, and nothing is fetched."""
    assert visit.complaints == []
    assert written.stat().st_size < MAX_BYTES
    outside = [url for url in visit.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert outside == []


def test_plots_are_drawn(visit: Visit) -> None:
    """With a mark for every point, and heat maps that are as wide as the page allows."""
    for name in PLOTS:
        box = visit.page.locator(f"#plot-{name} .main-svg").first.bounding_box()
        assert box is not None
        assert box["width"] > 250
        assert box["height"] > 150
    assert visit.page.locator("#plot-speed .point").count() == len(NAMES) - 1
    assert visit.page.locator("#plot-closeness .scatterlayer .js-line").count() == 3
    assert visit.page.locator("#plot-plan .heatmaplayer image").count() == 1


WHEN_OPEN = """addEventListener("load", () => {
  window.plotlyWhenOpen = "Plotly" in window;
  dispatchEvent(new Event("beforeprint"));
  const charts = [...document.querySelectorAll("[data-figure]")];
  window.drawnForPrinting = charts.filter((chart) => chart.querySelector(".main-svg")).length;
});"""


def test_plots_come_last(browser: Browser, written: Path) -> None:
    """The page is open before plotly.js has run; one that is printed right then has its plots."""
    page = browser.new_page()
    page.add_init_script(WHEN_OPEN)
    page.goto(written.as_uri())
    assert evaluate(page, "plotlyWhenOpen") is False
    assert evaluate(page, "drawnForPrinting") == len(PLOTS)
    page.close()


def test_grids_are_seen(visit: Visit) -> None:
    """Every picture has been decoded, and the closer look is not blank."""
    sizes = "[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    for complete, natural, shown in evaluate(visit.page, sizes):
        assert complete
        assert shown >= natural > 0
    assert len(evaluate(visit.page, sizes)) == len(NAMES)
    assert look(visit.page)["reds"] > 50


def test_nothing_is_wider_than_the_page(visit: Visit) -> None:
    """Tables scroll inside of themselves."""
    width = evaluate(visit.page, "document.documentElement.scrollWidth")
    assert width <= evaluate(visit.page, "innerWidth")


def look(page: Page) -> dict[str, int]:
    """Of the closer look: how many reds there are, the largest one, and a sum over all pixels."""
    script = """() => {
      const c = document.querySelector(".viewer canvas");
      const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      const reds = new Set();
      let sum = 0;
      for (let i = 0; i < data.length; i += 4) {
        reds.add(data[i]);
        sum = (31 * sum + data[i]) % 1000003;
      }
      return {reds: reds.size, largest: Math.max(...reds), sum};
    }"""
    found: dict[str, int] = evaluate(page, f"({script})()")
    return found


def test_a_cut_and_a_difference(visit: Visit) -> None:
    """The slider moves the cut by key; equal pictures differ nowhere, blurred ones somewhere."""
    page = visit.page
    page.locator(".viewer [type=range]").focus()
    before = look(page)
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert "Left 40 % of each picture: full precision; right: w8a8 + cache." in said(page)
    assert look(page) != before
    page.locator("[name=show][value='4']").check()
    assert "Difference of w8a8 + cache from full precision, 4 times" in said(page)
    assert look(page)["largest"] > 50
    page.locator("[name=variant][data-name=w8a8]").check()
    assert look(page)["largest"] == 0
    page.locator("[name=show][value='0']").check()
    page.locator("[name=variant][data-name='w8a8 + cache']").check()


def said(page: Page) -> str:
    """What is under the closer look."""
    return page.locator(".viewer output").inner_text()


def test_a_pointer_moves_the_cut(visit: Visit) -> None:
    canvas = visit.page.locator(".viewer canvas")
    canvas.scroll_into_view_if_needed()
    canvas.hover(position={"x": 3, "y": 8})
    assert 0 <= int(visit.page.locator(".viewer [type=range]").input_value()) < 15


@pytest.mark.parametrize("size", SIZES, ids=["wide", "narrow"])
def test_everything_is_reached_by_keyboard(
    browser: Browser, written: Path, size: tuple[int, int]
) -> None:
    """Links, choices, the slider, tables that scroll, details and the button."""
    page, seen = Visit(browser, written, size).page, []
    describe = """() => { const e = document.activeElement;
      return e.getAttribute("href") || e.name || e.type || e.getAttribute("aria-label")
        || e.getAttribute("aria-labelledby") || e.tagName; }"""
    for _ in range(100):
        page.keyboard.press("Tab")
        seen.append(evaluate(page, f"({describe})()"))
        if seen[-1] == "BODY":
            break
    assert seen[:2] == ["#figures", "#pictures"]
    wanted = {"#provenance", "pictures", "variant", "show", "range", "figures", "factors"}
    assert wanted | {"SUMMARY", "PRE", "button"} <= set(seen)
    assert {page.locator(f"#plot-{name}").get_attribute("aria-label") for name in PLOTS} <= {*seen}
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.get_by_text("blocks.0.mlp.fc1").last.is_visible()
    page.close()


def test_commands_can_be_copied(visit: Visit) -> None:
    page = visit.page
    for name, wanted in (
        ("command", "ditcast bench a.bundle --images 160 --seed 7 --steps 6 --real real.npz"),
        ("recompile", "ditcast compile somewhere -o a.bundle"),
    ):
        button = page.locator(f"[data-copies={name}]")
        button.click()
        button.get_by_text("Copied").wait_for()
        assert evaluate(page, "getSelection().toString()") == wanted


def serious(page: Page) -> list[Any]:
    """The findings of axe-core that are serious or critical."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    return [
        (finding["id"], [node["html"][:200] for node in finding["nodes"]])
        for finding in axe.Axe().run(page).response["violations"]
        if finding["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("size", SIZES, ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(browser: Browser, written: Path, scheme: str, size: tuple[int, int]) -> None:
    """In both colour schemes, with everything folded out."""
    visit = Visit(browser, written, size, color_scheme=scheme)
    visit.page.locator("summary").click()
    assert serious(visit.page) == []
    visit.page.close()


@pytest.mark.parametrize("size", SIZES, ids=["wide", "narrow"])
def test_a_comparison(
    browser: Browser, written: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Its plot is drawn, its pictures are seen, nothing is too wide, and it is accessible."""
    paths = [written.parent.parent, tmp_path / "b.bundle"]
    shutil.copytree(paths[0], paths[1])
    path = tmp_path / "page.html"
    path.write_text(render(read(paths), paths))
    visit = Visit(browser, path, size)
    assert visit.complaints == []
    assert visit.page.locator("#plot-speed .point").count() == 2 * (len(NAMES) - 1)
    assert look(visit.page)["reds"] > 50
    assert "right: a.bundle." in said(visit.page)
    test_nothing_is_wider_than_the_page(visit)
    assert serious(visit.page) == []
    visit.page.close()


def test_without_scripts(browser: Browser, written: Path) -> None:
    """Figures and pictures are there, and what needs scripts is hidden."""
    page = browser.new_page(java_script_enabled=False)
    page.goto(written.as_uri())
    assert page.locator("table.figures").first.is_visible()
    assert page.locator(".strips img").first.is_visible()
    assert not page.locator(".viewer").is_visible()
    page.close()
