"""Pages in a real browser, from disk: nothing fails, nothing is fetched, choices change what is drawn.

Needs selenium, and Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instances import noisy_trace
from pages import approximates

from placer import Placement, Topology, html
from placer.comparison import compare

NEEDED = ("selenium", "jinja2", "plotly")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
MISSING += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}")

SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>\u2028"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section, one with hostile names, and a comparison."""
    where = tmp_path_factory.mktemp("pages")
    trace = noisy_trace(layers=3)
    machine = Topology.load("dgx-h100").with_shape("1x4x2")
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(16) for _ in range(3)])
    placement = Placement(physical_to_logical=rows, num_experts=16, shape=(1, 4, 2))
    runs = compare(trace, machine, ["random", "greedy"], jobs=1)
    event = {"seconds": 1.0, "done": 1, "layers": 1, "objective": 2.0, "linear": 4.0, "bound": 1.0}
    fit, unseen = trace.split(0.5)
    page = html.page(placement, unseen, machine, fitted=fit, events=[event, event], comparison=runs.to_dict())
    page.save(where / "report.html")
    html.comparison_page(runs).save(where / "comparison.html")
    named = Placement(
        physical_to_logical=rows, num_experts=16, shape=(1, 4, 2), provenance={"method": HOSTILE}
    )
    object.__setattr__(trace, "model", HOSTILE)
    html.page(named, trace, machine, name=HOSTILE, command=HOSTILE).save(where / "hostile.html")
    return where


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


def opened(browser: Any, path: Path, *, width: int = 1280, dark: bool = False) -> None:
    """Open a page from disk and wait until its figures are drawn."""
    from selenium.webdriver.support.wait import WebDriverWait

    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what came before
    browser.get(path.as_uri())
    drawn = "return document.documentElement.dataset.drawn === 'yes'"
    WebDriverWait(browser, 120).until(lambda driver: driver.execute_script(drawn))


def requested(browser: Any) -> list[str]:
    """Addresses that the page asked for, other than itself."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return [each["request"]["url"] for each in sent if not each["request"]["url"].startswith("data:")][1:]


def drawn(browser: Any, name: str) -> Any:
    """The first trace of a figure, as plotly has it."""
    script = f"return JSON.stringify(document.querySelector('[data-figure={name}]').data)"
    return json.loads(browser.execute_script(script))


def choose(browser: Any, select: str, text: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    Select(browser.find_element(By.ID, select)).select_by_visible_text(text)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["report", "comparison", "hostile"])
def test_a_page_opens_from_disk_without_an_error_and_asks_for_nothing(
    browser: Any, folder: Path, name: str, dark: bool, width: int
) -> None:
    opened(browser, folder / f"{name}.html", width=width, dark=dark)
    assert browser.get_log("browser") == []
    assert requested(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    figures = browser.execute_script(
        "return [...document.querySelectorAll('[data-figure]')].map((e) => e.querySelectorAll('.main-svg').length)"
    )
    assert figures
    assert all(figures)


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_texts_are_the_numbers_of_the_json(browser: Any, folder: Path, name: str) -> None:
    opened(browser, folder / f"{name}.html")
    document = json.loads(browser.execute_script("return document.getElementById('data').textContent"))
    values = browser.execute_script(
        "return [...document.querySelectorAll('[data-path]')].map((e) => "
        "[e.textContent, {'data-path': e.dataset.path, 'data-kind': e.dataset.kind, 'data-from': e.dataset.from}])"
    )
    assert len(values) > 20
    for text, attributes in values:
        assert approximates(text, attributes, document), (attributes, text)


def test_choosing_a_layer_changes_what_is_drawn(browser: Any, folder: Path) -> None:
    opened(browser, folder / "report.html")
    document = json.loads(browser.execute_script("return document.getElementById('data').textContent"))
    first = drawn(browser, "coactivation_report")[0]["z"]
    choose(browser, "layer-coactivation", "2")
    second = drawn(browser, "coactivation_report")[0]["z"]
    assert len(second) == len(second[0]) == 16
    assert first != second
    assert second == [list(column) for column in zip(*second, strict=True)]
    for layer, peak in enumerate(document["report"]["per_layer"]["load"]["gpu"]):
        choose(browser, "layer-load", str(layer))
        assert max(drawn(browser, "load_gpu")[1]["y"]) == pytest.approx(100 * (peak - 1), abs=0.06)
        server = document["report"]["per_layer"]["load"]["server"][layer]
        assert max(drawn(browser, "load_server")[1]["y"]) == pytest.approx(100 * (server - 1), abs=0.06)
    assert browser.get_log("browser") == []


def test_selectors_and_sections_can_be_reached_by_keyboard(browser: Any, folder: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, folder / "report.html")
    reached = set()
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(browser.execute_script("const e = document.activeElement; return e.id || e.tagName"))
    assert {"theme", "layer-coactivation", "layer-load", "SUMMARY", "A"} <= reached
    before = drawn(browser, "coactivation_report")
    browser.find_element(By.ID, "layer-coactivation").send_keys(Keys.ARROW_DOWN)
    assert drawn(browser, "coactivation_report") != before


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_the_scheme_and_the_switch_turns_it_over(
    browser: Any, folder: Path, dark: bool
) -> None:
    from selenium.webdriver.common.by import By

    def shades() -> tuple[str, str]:
        ink = "document.querySelector('[data-figure=load_gpu]').layout.font.color"
        paper = "getComputedStyle(document.body).backgroundColor"
        return tuple(browser.execute_script(f"return [{paper}, {ink}]"))

    opened(browser, folder / "report.html", dark=dark)
    ways = {False: ("rgb(255, 255, 255)", "#1b1e23"), True: ("rgb(20, 23, 28)", "#e6e9ee")}
    assert shades() == ways[dark]
    browser.find_element(By.ID, "theme").click()
    assert shades() == ways[not dark]
    assert browser.get_log("browser") == []


def test_hostile_names_run_nothing_and_are_read_as_text(browser: Any, folder: Path) -> None:
    opened(browser, folder / "hostile.html")
    assert browser.execute_script("return window.broken") is None
    assert HOSTILE in browser.execute_script("return document.querySelector('h1').textContent")
    assert HOSTILE in browser.execute_script("return document.getElementById('origin').textContent")
