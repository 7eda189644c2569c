"""The map, the sentence box and the steering box in a real Chromium, with and without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from residual_saes.analyze.pages.browser.live import Live
from residual_saes.analyze.pages.browser.pages import CHUNK
from residual_saes.analyze.study import Study
from tests.analyze.accessibility import audit
from tests.analyze.browser_site import read, served
from tests.analyze.chromium import NEEDS_CHROMIUM, Chromium

pytestmark = NEEDS_CHROMIUM
HOSTILE = "<img src=x onerror=\"document.title='caught'\"> 7 apples"
DRAWN = "mapCanvas()?.width > 300 && atlas.image"
# Pixels of the canvas that are painted, and those in colour.
PAINTED = """(() => {
    const { width, height } = mapCanvas();
    const { data } = mapCanvas().getContext("2d").getImageData(0, 0, width, height);
    const pixels = new Uint32Array(data.buffer);
    const count = (test) => pixels.reduce((total, pixel) => total + (test(pixel) ? 1 : 0), 0);
    return [count((pixel) => pixel), count((pixel) => atlas.colours.includes(pixel))];
})()"""


@pytest.fixture(scope="module")
def url(tiny_browser: Study) -> Iterator[str]:
    with served(tiny_browser.place, Live(tiny_browser)) as address:
        yield address


def status(selector: str, text: str) -> str:
    return (
        f"document.querySelector({f'{selector} [role=status]'!r})?.textContent.includes({text!r})"
    )


def fill(chrome: Chromium, selector: str, value: str) -> None:
    chrome.js(f"document.querySelector({selector!r}).value = {value!r}")
    chrome.js(f"document.querySelector({selector!r}).dispatchEvent(new Event('input'))")


def test_a_sentence_and_steering(chrome: Chromium, url: str, tiny_browser: Study) -> None:
    chrome.open(f"{url}#sentence=")
    chrome.js("document.querySelector('#sentence button').click()")
    chrome.until(status("#sentence", "type a text"))
    fill(chrome, "#sentence textarea", HOSTILE)
    chrome.js("document.querySelector('#sentence textarea').focus()")
    for key in ("t", "j", "Backspace", "Backspace"):
        chrome.press(key)  # keys in a box are letters
    assert chrome.js("document.documentElement.dataset.view") == "sentence"
    chrome.press("Enter")
    chrome.until(status("#sentence", "features fire on"))
    tokens = "[...document.querySelectorAll('#sentence .context span')]"
    text = chrome.js(f"{tokens}.slice(1).map((token) => token.textContent).join('')")
    assert text == HOSTILE
    # Coloured by the strongest feature where it fires, then by another that is chosen.
    shaded = f"{tokens}.map((token) => token.title)"
    first = chrome.js(shaded)
    maximum = chrome.js("document.querySelector('#sentence tbody td.number').textContent")
    assert maximum in first
    chrome.js("document.querySelectorAll('#sentence tbody button')[1].click()")
    assert chrome.js(shaded) != first
    feature = chrome.js("document.querySelectorAll('#sentence tbody a')[0].textContent")
    assert audit(chrome) == audit(chrome, "dark") == []
    chrome.js("document.querySelector('#sentence tbody a').click()")
    chrome.until(f"document.getElementById('feature-title')?.textContent === 'Feature {feature}'")
    # The steering box of its page has its number; the untouched text stands first.
    chrome.until("document.querySelector('#f .box')")
    assert chrome.js("document.querySelector('#f .box [type=number]').value") == feature
    fill(chrome, "#f .box textarea", "Tom has")
    fill(chrome, "#f .box [type=range]", "4")
    assert chrome.js("document.querySelector('#f .box [type=text]').value") == "-4, 2, 4"
    chrome.js("document.querySelectorAll('#f .box [type=number]')[1].value = 5")
    chrome.js("document.querySelector('#f .box button').click()")
    chrome.until(status("#f .box", "done"))
    rows = "[...document.querySelectorAll('.written')].map((cell) => cell.parentElement)"
    scales = chrome.js(f"{rows}.map((row) => row.firstChild.textContent)")
    assert scales == ["none", "-4", "-4", "2", "2", "4", "4"]
    chrome.resize(390, 844)
    assert chrome.js("document.documentElement.scrollWidth") <= 390
    assert audit(chrome) == audit(chrome, "dark") == []
    # What cannot be meant is a line; what is cancelled ends.
    fill(chrome, "#f .box [type=text]", "much")
    chrome.js("document.querySelector('#f .box button').click()")
    chrome.until(status("#f .box", "must be numbers"))
    fill(chrome, "#f .box [type=text]", "1 2 3 4 5 6 7")
    chrome.js("document.querySelectorAll('#f .box [type=number]')[1].value = 100")
    chrome.js("document.querySelector('#f .box button').click()")
    chrome.until("document.querySelector('.written')")
    chrome.js("document.querySelectorAll('#f .box button')[1].click()")
    chrome.until(status("#f .box", "cancelled"))
    assert chrome.troubles == [] and "caught" not in chrome.js("document.title")
    # What fires together with it is what the data say.
    page = read(tiny_browser.place, f"features/{int(feature) // CHUNK:03d}")
    together = page["features"][int(feature) % CHUNK]["together"]
    sections = "[...document.querySelectorAll('#f h3')].map((heading) => heading.parentElement)"
    own = f"{sections}.find((section) => section.textContent.startsWith('Fires together'))"
    links = f"[...{own}.querySelectorAll('a')]"
    shown = chrome.js(f"{links}.map((link) => link.textContent)")
    assert shown == [str(pair[0]) for pair in together]


def test_the_map(chrome: Chromium, url: str, tiny_browser: Study) -> None:
    chrome.resize(1200, 900)
    chrome.open(f"{url}#map=")
    chrome.until(DRAWN)
    painted, coloured = chrome.js(PAINTED)
    assert painted == coloured > 256
    chrome.js("document.querySelector('#map canvas').focus()")
    for key in ("+", "ArrowRight"):
        before = chrome.js("[atlas.scale, atlas.left]")
        chrome.press(key)
        assert chrome.js("[atlas.scale, atlas.left]") != before
    chrome.press("0")
    # A search leaves the others faint.
    chrome.open(f"{url}#map=7&colour=run")
    chrome.until(DRAWN)
    chrome.js("drawMap()")
    painted, coloured = chrome.js(PAINTED)
    assert 0 < coloured < painted
    chrome.js("document.getElementById('map-list').click()")
    chrome.until("location.hash === '#q=7' && document.documentElement.dataset.view === 'list'")
    # The pointer names, a click opens.
    chrome.open(f"{url}#map=")
    chrome.until(DRAWN)
    chrome.js("window.scrollTo(0, 0)")
    x, y = chrome.js("""(() => {
        const box = mapCanvas().getBoundingClientRect();
        const ratio = mapCanvas().width / box.width;
        const place = (column, start, edge) => edge + (atlas.scale * column[9] + start) / ratio;
        return [place(atlas.x, atlas.left, box.x), place(atlas.y, atlas.top, box.y)];
    })()""")
    chrome.point(x, y)
    chrome.until("atlas.over >= 0")
    named = chrome.js("document.querySelector('#map-name a').textContent")
    assert audit(chrome) == audit(chrome, "dark") == []
    chrome.point(x, y, click=True)
    chrome.until(f"document.getElementById('feature-title')?.textContent === {named!r}")
    chrome.resize(390, 844)
    chrome.open(f"{url}#map=")
    chrome.until(DRAWN)
    assert chrome.js("document.documentElement.scrollWidth") <= 390
    assert chrome.troubles == []


def test_without_a_model_the_store_is_searched(chrome: Chromium, tiny_browser: Study) -> None:
    chrome.open((tiny_browser.place / "index.html").as_uri() + "#sentence=")
    chrome.until("document.querySelector('#sentence textarea')")
    code = chrome.js("document.querySelector('#sentence code').textContent")
    assert str(tiny_browser.subject.run) in code and code.endswith("action=serve")
    fill(chrome, "#sentence textarea", f"has {HOSTILE}")
    chrome.js("document.querySelector('#sentence button').click()")
    chrome.until(status("#sentence", "words"))
    every, shard = read(tiny_browser.place, "tokens"), read(tiny_browser.place, "tokens/000")
    place = next(at for at, text in enumerate(every["texts"]) if str(text).strip() == "has")
    link = "document.querySelector('#sentence tbody a').textContent"
    assert chrome.js(link) == str(shard[place][0])
    assert chrome.troubles == [] and "caught" not in chrome.js("document.title")
    assert audit(chrome) == []
