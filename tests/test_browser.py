"""The report in a real browser: it draws, answers the pointer, fits a phone, and logs no error."""

import json
import shutil

import pytest

from resnetv2_cli.report.page import write

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
SIZES = {"desktop": (1280, 900), "phone": (360, 780)}

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def file(lab, tmp_path_factory):
    to = tmp_path_factory.mktemp("report") / "report.html"
    write([lab], to, 0.5)
    return to


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, file):
    """Open the report in a window of a size and a color scheme; no error may be logged."""
    errors, contexts = [], []

    def call(size="desktop", scheme="light"):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: errors.append(said.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector(".plot .curve")
        return page

    yield call
    for context in contexts:
        context.close()
    assert errors == []


def background(page) -> int:
    """How bright the page is, 0 to 255."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return max(int(part) for part in color.strip("rgb()").split(","))


def remembered(page, button, holds) -> bool:
    """Whether the effect of a click on the button, which ``holds`` tests, survives a reload. The
    browser stores it asynchronously: on a busy machine a reload may come first, and the click is
    lost; it is then repeated."""
    for tries in range(5):
        page.wait_for_timeout(300 * (tries + 1))
        page.reload()
        page.wait_for_selector(".plot .curve")
        if holds():
            return True
        button.click()
    return False


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_and_follows_the_system_by_day_and_night(opened, size, scheme):
    page = opened(size, scheme)
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]
    assert (background(page) > 128) == (scheme == "light")
    page.click("#theme")
    assert (background(page) > 128) == (scheme == "dark")
    theme = page.locator("#theme")
    assert remembered(page, theme, lambda: (background(page) > 128) == (scheme == "dark"))


@pytest.mark.parametrize("size", SIZES)
def test_a_curve_under_the_pointer_says_its_name_iteration_and_value(opened, size):
    page = opened(size)
    chart = page.locator("figure.chart").first
    chart.get_by_role("button", name="conv1x1").dblclick()  # shown alone: no other is near
    data = json.loads(page.locator("#data").text_content())
    [curve] = [
        c for c in data["charts"][0]["curves"] if c["name"] == "conv1x1" and c["kind"] == "loss"
    ]
    chart.locator(".plot").scroll_into_view_if_needed()
    places = page.evaluate(
        """() => {
            const path = document.querySelector(".chart .curve.loss");
            const box = path.ownerSVGElement.getBoundingClientRect();
            const pairs = path.getAttribute("d").slice(1).split("L");
            return pairs.map(p => p.split(" ").map(Number)).map(([x, y]) => [box.x + x, box.y + y]);
        }"""
    )
    assert len(places) == len(curve["steps"]) == 3
    for (x, y), step, value in zip(places, curve["steps"], curve["values"], strict=True):
        page.mouse.move(x + 3, y - 3)
        said = page.locator("#tip").inner_text()
        assert said.splitlines()[0] == "conv1x1, seed 0"
        assert said.splitlines()[1] == f"training loss {value:.5g} at iteration {step}"
    page.mouse.move(1, 1)
    assert page.locator("#tip").is_hidden()


def test_a_click_in_the_legend_hides_a_curve_and_the_page_remembers(opened):
    page = opened()
    chart = page.locator("figure.chart").first
    both = chart.locator(".curve").count()
    button = chart.get_by_role("button", name="identity")
    button.click()
    assert chart.locator(".curve").count() == both / 2
    assert remembered(page, button, lambda: chart.locator(".curve").count() == both / 2)
    button.click()
    assert chart.locator(".curve").count() == both


def test_the_scales_of_the_axes_can_be_chosen(opened):
    page = opened()
    chart = page.locator("figure.chart").first
    seen = set()
    for y in ("paper", "log", "linear"):
        chart.get_by_role("button", name=y, exact=True).click()
        seen.add(tuple(chart.locator(".plot text").all_text_contents()))
    assert len(seen) == 3


def test_on_a_logarithmic_axis_nothing_is_drawn_of_what_is_0(opened):
    page = opened()
    page.evaluate("data.charts[0].curves.forEach(c => c.values.fill(0))")
    chart = page.locator("figure.chart").first
    for y, drawn in (("log", 0), ("linear", 4)):
        chart.get_by_role("button", name=y, exact=True).click()
        assert chart.locator(".curve").count() == drawn


@pytest.mark.parametrize("scale, ends", [("log", [0.5 / 1.08, 1.08]), ("linear", [0, 1.05])])
def test_curves_that_are_0_are_no_measure_of_the_others(opened, scale, ends):
    """Checked by the ends of the axis: a logarithmic one that began at 0 would be infinite."""
    page = opened()
    page.evaluate("() => { logarithmic = linear = (low, high) => [low, high]; }")
    curves = [{"values": [0, 0]}, {"values": [None, 0]}, {"values": [1, 0.5]}]
    assert page.evaluate("([curves, scale]) => axis(curves, scale)", [curves, scale]) == ends
