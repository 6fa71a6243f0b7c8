"""The HTML report in a real browser: at two widths, in light and in dark.

It needs a Chromium, which launch/test.sh installs where it may; HDET_BROWSER names another one. With
HDET_SCREENSHOTS=FOLDER in the environment the pictures are kept there, to be looked at.
"""

import os
import shutil
from pathlib import Path

import pytest
from test_html_report import write
from test_monitor import make_report

from hdet import report
from hdet.monitor.report import HyperparameterReport

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("HDET_BROWSER") or next((found for name in NAMES if (found := shutil.which(name))), None)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install hdet[dev]")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH, and HDET_BROWSER names none"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        # Chromium's sandbox does not start for root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = running.chromium.launch(executable_path=BROWSER, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """By name, files of reports: of one run with all that can happen, of three, of one that has just begun."""
    folder = tmp_path_factory.mktemp("reports")
    long = "a_setting_with_a_name_that_is_longer_than_a_telephone_is_wide_and_has_no_place_to_break"

    def decay(k):
        return HyperparameterReport(
            name="weight_decay", centre=0.1 + k / 100, values=(0.1, 0.2, 0.3), effect=0.0, error=0.1, next_centre=0.11
        )

    reports = [make_report(10 * k, groups=("body", long), hyperparameters=(decay(k),)) for k in range(1, 60)]
    cause = "the mean loss 9.87 is above all earlier rounds' by 12.3 times their spread, 1.2 to 1.3"
    reports[20] = make_report(210, groups=("body", long), rolled_back=True, complete=False, cause=cause)
    reports[30] = make_report(310, groups=("body", long), excluded=(1, 2), hyperparameters=(decay(31),))
    one = write(folder / "one", *reports)
    several = [write(folder / f"{name}_{long}", *(make_report(10 * k) for k in range(1, 9))) for name in "abc"]
    begun = write(folder / "begun")
    made = {"one": [one], "several": [one, *several], "begun": [begun]}
    return {
        name: report.write([report.read(path) for path in paths], folder / f"{name}.html")
        for name, paths in made.items()
    }


@pytest.mark.parametrize("name", ["one", "several", "begun"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_it_is_shown_whole(browser, pages, name, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1] == width

    charts = page.locator("svg.plot")
    assert charts.count() == {"one": 2 + 10, "several": 3 + 10 + 3 * 6, "begun": 0}[name]
    for box in charts.evaluate_all("all => all.map(one => one.getBoundingClientRect().toJSON())"):
        assert box["height"] > 150
        assert 0.6 * min(width, 700) - 100 < box["width"] < width
    # No label is cut off, and each is as large at any width.
    labels = page.locator("svg.plot text").evaluate_all(
        "all => all.map(one => [one.getBoundingClientRect().left, one.getBoundingClientRect().right, "
        "one.closest('figure').getBoundingClientRect().left, one.closest('figure').getBoundingClientRect().right, "
        "getComputedStyle(one).fontSize])"
    )
    for left, right, edge, end, size in labels:
        assert edge <= left < right <= end
        assert size == "12px"
    assert (page.locator(".undone").count() > 0) == (name != "begun")

    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    assert page.locator("li, td, th, p, figcaption span").evaluate_all(CONTRAST) >= 4.5
    if folder := os.environ.get("HDET_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}_{width}_{scheme}.png", full_page=True)
    page.close()


CONTRAST = """all => {
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(
            x => x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const under = one => {
        const colour = getComputedStyle(one).backgroundColor;
        return colour.endsWith(', 0)') ? under(one.parentElement) : colour;
    };
    return Math.min(...all.map(one => {
        const pair = [light(getComputedStyle(one).color), light(under(one))].sort((a, b) => b - a);
        return (pair[0] + 0.05) / (pair[1] + 0.05);
    }));
}"""
"""The least contrast between a text and what is below it, as WCAG defines it."""
