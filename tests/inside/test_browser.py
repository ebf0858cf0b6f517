"""The page in a real browser; `make test-browser` asks for it, the plain suite leaves it out."""

from __future__ import annotations

import argparse
import base64
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from conftest import CHOSEN, load_twin

from coconut.batches.dataset import read_items
from coconut.inside.inspect import Asked, look
from coconut.inside.page import serve
from coconut.inside.page.page import EXAMPLE, page

if not os.environ.get("BROWSER_TESTS"):
    pytest.skip("needs a browser: make test-browser", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parents[2]
EVIL = "<img src=x onerror=window.hurt=1>"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update"
    " --disable-background-networking --disable-sync"
).split()


CHROME_APP = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
"""Where a Mac has it; `brew install chromedriver` brings what drives it."""


def program(variable: str, name: str) -> str:
    found = os.environ.get(variable) or shutil.which(name)
    if not found and name == "chromium" and os.path.exists(CHROME_APP):
        return CHROME_APP
    if not found:
        pytest.fail(f"no {name}: apt install chromium chromium-driver, or set {variable}")
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = program("COCONUT_CHROMIUM", "chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(program("COCONUT_CHROMEDRIVER", "chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server():
    options = argparse.Namespace(
        model=str(ROOT / "data/checkpoints/prosqa"), base=None,
        data=str(ROOT / "data/prosqa_small_test.json"),
        idx=[39, 0], question=None, latents=None, max_new_tokens=32, top=5, port=0,
    )  # fmt: skip
    twin = load_twin(CHOSEN[0])
    with serve.open_server(twin.__name__, twin.run.make_backend, options) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.fixture
def live(browser, server):
    """The live page, opened anew; it must end without a message in the console."""
    size(browser, 1100, "light")
    browser.get_log("browser")
    browser.get(f"http://127.0.0.1:{server.server_port}/")
    return browser


def size(browser, width: int, scheme: str) -> None:
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def marks(browser) -> dict[str, tuple[float, float, bool]]:
    """Node -> its probability, the radius it is drawn with, whether it is marked as frontier."""
    nodes = browser.find_elements(By.CSS_SELECTOR, "#graph .node")
    return {
        n.get_attribute("data-node"): (
            float(n.get_attribute("data-p")),
            float(n.find_element(By.CSS_SELECTOR, ".disc").get_attribute("r")),
            "frontier" in n.get_attribute("class"),
        )
        for n in nodes
    }


def text_of(browser, name: str) -> str:
    return browser.find_element(By.ID, name).text


def send(browser, question: str) -> None:
    box = browser.find_element(By.ID, "typed")
    box.clear()
    box.send_keys(question)
    browser.find_element(By.ID, "send").click()
    WebDriverWait(browser, 120).until(lambda b: text_of(b, "send") == "Think")


def test_the_file_opens_from_disk_without_a_message(browser, server, tmp_path):
    lens = server.lens
    found = [look(lens, Asked(f"{EVIL} Who?", EVIL), server.options)]
    found.append(lens.inspect(EXAMPLE, max_new_tokens=8))
    (tmp_path / "page.html").write_text(page(lens, EVIL, found))
    browser.get_log("browser")
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hurt") is None
    assert EVIL in text_of(browser, "question") and EVIL in text_of(browser, "model")
    assert browser.find_elements(By.CSS_SELECTOR, "main img") == []
    assert not browser.find_element(By.ID, "ask").is_displayed()


def test_keyboard_and_mouse_move_the_probability_through_the_graph(live, server):
    slider = live.find_element(By.ID, "k")
    seen = {}
    for key in (Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT):
        slider.send_keys(key)
        k = int(slider.get_attribute("value"))
        seen[k] = marks(live)
        assert f"After {k} thought" in text_of(live, "now")
    lens = server.lens
    question = live.find_element(By.ID, "question").text
    found = lens.inspect(question, max_new_tokens=32)
    values = next(r.values for r in found.readings if r.kind == lens.own_reading)
    for k in (0, 1, 2):
        for node, word in enumerate(found.graph.nodes):
            p, radius, is_frontier = seen[k][word]
            assert p == pytest.approx(values[k][node], abs=1e-4)
            assert radius == pytest.approx(7 + 15 * p**0.5)
            assert is_frontier == (found.graph.distances[node] == k)
    live.find_element(By.ID, "more").click()
    assert slider.get_attribute("value") == "3" and marks(live) != seen[2]
    webdriver.ActionChains(live).move_to_element(slider).click().perform()
    webdriver.ActionChains(live).drag_and_drop_by_offset(slider, 400, 0).perform()
    assert slider.get_attribute("value") in ("5", "6") and marks(live) != seen[2]
    assert live.get_log("browser") == []


def test_the_arrows_move_thoughts_wherever_nothing_else_needs_them(live):
    now = live.find_element(By.ID, "k")
    last = int(now.get_attribute("value"))
    live.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert int(now.get_attribute("value")) == last - 2
    live.find_element(By.ID, "typed").send_keys(Keys.ARROW_LEFT)
    assert int(now.get_attribute("value")) == last - 2
    ticks = live.find_elements(By.CSS_SELECTOR, "#ticks span")
    assert [tick.text for tick in ticks] == [str(k) for k in range(last + 1)]
    assert live.find_element(By.CSS_SELECTOR, "#ticks .here").text == str(last - 2)


def test_what_is_asked_the_way_to_it_and_what_is_attended_most_are_marked(live, server):
    question = text_of(live, "question")
    assert question.endswith(". " + text_of(live, "asks")) and text_of(live, "asks")
    found = server.lens.inspect(question, max_new_tokens=8)
    graph, path = found.graph, found.graph.path()
    for kind, node in (("asked", graph.asked), ("right", graph.right)):
        marked = live.find_elements(By.CSS_SELECTOR, f"#graph .node.{kind}")
        assert [n.get_attribute("data-node") for n in marked] == [graph.nodes[node]]
    assert len(live.find_elements(By.CSS_SELECTOR, "#graph .edge.way")) == len(path) - 1 > 0
    shades = live.execute_script(
        "return [...document.querySelectorAll('#question span')].map((s) => s.style.background)"
    )
    shares = [float(shade.rsplit("%", 1)[0].split()[-1]) for shade in shades]
    taken = found.thoughts[-1].attention[: found.n_sentences]
    assert max(shares) == 100 and shares.index(100) == taken.index(max(taken))


def test_columns_are_hops_from_the_asked_name(live, server):
    nodes = live.find_elements(By.CSS_SELECTOR, "#graph .node:not(.away)")
    columns = {}
    for node in nodes:
        label, place = node.get_attribute("aria-label"), node.get_attribute("transform")
        hops = int(label.split(" hop")[0].split(", ")[-1])
        columns.setdefault(hops, set()).add(place.removeprefix("translate(").split()[0])
    assert len(columns) > 2 and all(len(xs) == 1 for xs in columns.values())
    xs = [float(*columns[hops]) for hops in sorted(columns)]
    assert xs == sorted(xs)


def test_another_item_and_another_reading_can_be_chosen(live):
    before = text_of(live, "question"), marks(live)
    live.find_element(By.CSS_SELECTOR, "#kind option[value=answer]").click()
    assert "### " in text_of(live, "lead") and marks(live) != before[1]
    live.find_element(By.CSS_SELECTOR, "#picker option[value='1']").click()
    assert text_of(live, "question") != before[0]


def test_a_typed_question_is_answered_and_a_wrong_one_gets_a_message(live):
    send(
        live,
        "Every lempus is a jompus. Tom is a lempus. Sam is a rempus. Is Tom a jompus or rempus?",
    )
    assert "Is Tom a jompus or rempus?" in text_of(live, "question") and not text_of(
        live, "message"
    )
    assert text_of(live, "warning") == ""
    send(live, "   ")
    assert "is empty" in text_of(live, "message")
    send(live, "why? " * 200)
    assert "positions; shorten it" in text_of(live, "message")
    assert "Traceback" not in live.page_source
    # The browser itself notes the two refused requests; nothing else may be there.
    assert all("/ask" in entry["message"] for entry in live.get_log("browser"))


def test_a_question_without_a_graph_shows_what_each_thought_says_first(live, server):
    send(live, "How many apples has Tom?")
    assert not live.find_element(By.ID, "tree").is_displayed()
    assert "this model knows no others" in text_of(live, "warning")
    found = server.ask("How many apples has Tom?")["thoughts"]
    said = live.find_elements(By.CSS_SELECTOR, "#chains ol code")
    texts = [re.sub("^ | $", "␣", thought["top"][0][0]) for thought in found]
    assert [code.get_attribute("textContent") for code in said] == texts and len(texts) == 6


def test_what_is_attended_most_comes_first_and_the_rest_is_folded(live):
    def shares(selector: str) -> list[float]:
        cells = live.find_elements(By.CSS_SELECTOR, f"#attention {selector} td:nth-child(2)")
        texts = [cell.get_attribute("textContent") for cell in cells]
        return [0.0 if text.startswith("<") else float(text.split()[0]) for text in texts]

    shown, folded = shares("> table"), shares("details")
    assert len(shown) == 12 and folded
    assert shown + folded == sorted(shown + folded, reverse=True)
    summary = live.find_element(By.CSS_SELECTOR, "#attention summary")
    assert summary.text == f"{len(folded)} more"
    summary.send_keys(Keys.ENTER)
    live.find_element(By.ID, "k").send_keys(Keys.ARROW_LEFT)
    # What a reader has opened stays open while the slider moves.
    assert live.find_element(By.CSS_SELECTOR, "#attention details").get_attribute("open")


def test_where_thoughts_are_read_nothing_stands_before_the_first(live):
    for kind, first in (("thought", "after 1"), ("answer", "after 0")):
        live.find_element(By.CSS_SELECTOR, f"#kind option[value={kind}]").click()
        heads = live.find_elements(By.CSS_SELECTOR, "#values th")
        assert heads[2].get_attribute("textContent") == first
        start = live.find_element(By.CSS_SELECTOR, "#chains ol").get_attribute("start")
        assert start == first[-1]


def test_the_picture_shows_a_search_under_way(browser, server, tmp_path):
    """The tour's picture of the page: `PICTURE=docs/inspect.png make test-browser`."""
    lens = server.lens
    item = read_items(ROOT / "data/prosqa_made_test.json")[4]
    found = lens.inspect(item["question"], item["answer"], 4, max_new_tokens=64)
    # Whatever folder the suite was started in.
    text = page(lens, "mlx_coconut", [found]).replace(
        f"{lens.directory}", "data/checkpoints/prosqa"
    )
    (tmp_path / "page.html").write_text(text)
    size(browser, 1180, "light")
    browser.get((tmp_path / "page.html").as_uri())
    browser.find_element(By.TAG_NAME, "body").send_keys(*[Keys.ARROW_LEFT] * (lens.n_thoughts - 3))
    shown = {node: is_frontier for node, (_, _, is_frontier) in marks(browser).items()}
    assert any(shown.values()) and "After 3 thoughts" in text_of(browser, "now")
    end = browser.find_element(By.ID, "tree").rect
    clip = {"x": 0, "y": 0, "width": 1180, "height": end["y"] + end["height"] + 12, "scale": 1}
    shot = {"captureBeyondViewport": True, "clip": clip}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", shot)["data"]
    Path(os.environ.get("PICTURE", tmp_path / "page.png")).write_bytes(base64.b64decode(taken))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1100])
def test_every_text_is_readable_and_nothing_scrolls_sideways(live, scheme, width):
    size(live, width, scheme)
    live.refresh()
    page_width, window = live.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert page_width <= window == width
    contrast = live.execute_script(
        """
        const parse = (c) => c.match(/[0-9.]+/g).map(Number);
        const light = (c) => parse(c).slice(0, 3).map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const card = light(getComputedStyle(document.querySelector("section")).backgroundColor);
        return ["#question", ".quiet", ".good", "#now", "#tree h2"].map((name) => {
          const ink = light(getComputedStyle(document.querySelector(name)).color);
          return (Math.max(card, ink) + 0.05) / (Math.min(card, ink) + 0.05);
        });
        """
    )
    assert min(contrast) > 4.5
    sizes = live.execute_script(
        "return [...document.querySelectorAll('svg .name')]"
        ".map((t) => t.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 11
    # No verdict is broken, and no name of a column of the graph lies on its neighbour's.
    verdicts = live.execute_script(
        "return [...document.querySelectorAll('#stops .good, #stops .bad')]"
        ".map((e) => e.getClientRects().length)"
    )
    assert verdicts and set(verdicts) == {1}
    boxes = live.execute_script(
        "return [...document.querySelectorAll('svg .name')].map((e) => e.getBoundingClientRect())"
        ".map((b) => [b.left, b.right, b.top, b.bottom])"
    )
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
    # Nothing of the graph is cut off at its edges, lines that bend out included.
    outside = live.execute_script(
        "const w = document.querySelector('#graph svg').getBBox(), v ="
        " document.querySelector('#graph svg').viewBox.baseVal;"
        "return [w.x, v.width - w.x - w.width]"
    )
    assert min(outside) >= 0
    background = live.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 300) == (scheme == "dark")
