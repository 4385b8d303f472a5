"""The report in a real browser: console, width, themes, keyboard, names for screen readers, print."""

import base64
from dataclasses import replace

import pytest

from csm.search.importance import Importance
from flows.report_sweep import lay_out
from flows.reporting import render
from tests.flows.chromium import Page
from tests.flows.reported import annotator, finished, repeated, with_everything
from tests.flows.test_report_sweep import FRAME, METRICS, PARAMETERS

pytestmark = pytest.mark.slow

# Foreground against the nearest painted background, of every text that is seen; WCAG 2.2, 1.4.3.
LOW_CONTRAST = """(() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255]; };
  const found = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    if (!walker.currentNode.textContent.trim() || !e.getClientRects().length || e.closest('.unseen')) continue;
    const own = e.closest('svg') ? style.fill : style.color;
    const [low, high] = [light(channels(own)), light(behind(e))].sort((a, b) => a - b);
    if ((high + .05) / (low + .05) < 4.5)
      found.add(e.tagName + '.' + e.getAttribute('class') + ' ' + own + ': ' + e.textContent.slice(0, 30));
  }
  return [...found];
})()"""


class Browser(Page):
    """A page of which the accessibility tree and the print can be asked for."""

    def named(self) -> list[tuple[str, str]]:
        """(role, name) of everything that assistive technology is told."""
        nodes = self._call("Accessibility.getFullAXTree")["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]

    def press_tab(self) -> str:
        """Go to the next element with the keyboard, and say which it is."""
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        return str(self.evaluate("document.activeElement.outerHTML.slice(0, 200)"))

    def point_at(self, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        self._call("Emulation.setTouchEmulationEnabled", enabled=True)
        self._call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self._call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def print_colours(self) -> str:
        self._call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        return str(self.evaluate("getComputedStyle(document.body).backgroundColor"))

    def pdf(self) -> bytes:
        return base64.b64decode(self._call("Page.printToPDF", printBackground=True)["data"])


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    whole = replace(
        with_everything(),
        annotators=[annotator()],
        sweep=lay_out(FRAME, PARAMETERS, METRICS, [Importance("train.optimizer.learning_rate", "", 0.6, 12)]),
        model=finished(),
        repeat=repeated(),
        config_yaml="a_rather_long_key: " + "word " * 60,
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(whole))
    return path.as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_is_quiet_and_is_read_easily(address, tmp_path, width, dark):
    with Browser(tmp_path, width, 900, dark) as page:
        page.open(address)
        page.wait("document.readyState == 'complete' && document.querySelector('footer')")
        assert page.errors == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
        assert page.evaluate(LOW_CONTRAST) == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(16, 23, 30)" if dark else "rgb(255, 255, 255)")


def test_everything_has_a_name_and_the_keyboard_reaches_it(address, tmp_path):
    with Browser(tmp_path, 1280, 900) as page:
        page.open(address)
        page.wait("document.readyState == 'complete' && document.querySelector('footer')")
        told = page.named()
        for role in ("image", "link", "region", "table", "heading", "figure", "DisclosureTriangle"):
            names = [name for found, name in told if found == role]
            assert names, role
            assert all(names) or role == "figure", (role, told)
        mixed = [name for role, name in told if role == "image" and name.startswith("Mix of dog and cat, ratio of cat 0.50")]
        assert mixed == [
            "Mix of dog and cat, ratio of cat 0.50; projection: raw 0.40, calibrated 0.50; "
            "posterior: calibrated 0.25, 25 % outside the pair, most likely <script>alert(1)</script>"
        ]
        first = page.press_tab()
        assert "skip" in first
        assert page.evaluate("document.activeElement.getBoundingClientRect().width") > 50  # seen when it has the focus
        stops = [page.press_tab() for _ in range(60)]
        picks = [stop for stop in stops if 'class="pick"' in stop]
        assert len(set(picks)) == 3  # the focus comes round again
        page.evaluate("document.querySelectorAll('.pick')[1].focus()")
        shown = "getComputedStyle(document.querySelectorAll('.tip')[1]).display"
        assert page.evaluate(shown) == "block"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.evaluate("document.activeElement.blur()")
        assert page.evaluate(shown) == "none"


def test_hover_and_tap_show_what_an_image_is(address, tmp_path):
    shown = "getComputedStyle(document.querySelectorAll('.tip')[1]).display"
    middle = """(() => { const e = document.querySelectorAll('.pick')[1]; e.scrollIntoView({block: 'center'});
      const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"""
    with Browser(tmp_path / "hover", 1280, 900) as page:
        page.open(address)
        page.wait("document.querySelector('footer')")
        x, y = page.evaluate(middle)
        page.point_at(x, y)
        assert page.evaluate(shown) == "block"
    with Browser(tmp_path / "tap", 390, 844) as page:
        page.open(address)
        page.wait("document.querySelector('footer')")
        x, y = page.evaluate(middle)
        page.tap(x, y)
        page.wait(f"{shown} == 'block'", 10)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_print_is_on_white_paper(address, tmp_path):
    with Browser(tmp_path, 1280, 900, True) as page:
        page.open(address)
        page.wait("document.querySelector('footer')")
        assert page.print_colours() == "rgb(255, 255, 255)"
        assert page.evaluate(LOW_CONTRAST) == []
        assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert page.pdf().startswith(b"%PDF")
