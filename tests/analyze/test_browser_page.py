"""The feature browser's page in a real Chromium, from the disk and served, with hostile text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from residual_saes.analyze.pages.browser.script import script
from residual_saes.analyze.pages.browser.study import PAGE
from tests.analyze.accessibility import audit
from tests.analyze.browser_site import Built, build, read, say, served
from tests.analyze.chromium import NEEDS_CHROMIUM, Chromium
from tests.analyze.conftest import F

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("browser"))


@pytest.fixture(params=["file", "http"])
def url(request: pytest.FixtureRequest, built: Built) -> Iterator[str]:
    if request.param == "file":
        yield (built.folder / PAGE).as_uri()
        return
    with served(built.folder) as address:
        yield address


def texts(chrome: Chromium, selector: str) -> list[str]:
    elements = f"[...document.querySelectorAll({selector!r})]"
    contents: list[str] = chrome.js(f"{elements}.map((element) => element.textContent)")
    return contents


def quiet(chrome: Chromium, url: str) -> None:
    """Nothing was complained of, asked for from elsewhere, or run that came as text."""
    assert chrome.troubles == []
    base = url.rsplit("/", 1)[0]
    assert chrome.requests and all(url.startswith((base, "data:,")) for url in chrome.requests)
    assert "caught" not in chrome.js("document.title")
    assert (
        chrome.js("document.querySelectorAll('main script, main img, main b, main i').length") == 0
    )


def test_a_visit(chrome: Chromium, url: str, built: Built) -> None:
    """List, sort, search, feature, next, back: by keys and clicks."""
    table, page = read(built.folder, "table"), read(built.folder, "features/000")
    density = table["columns"]["density"]
    chrome.open(url)
    assert texts(chrome, "#features tbody td:first-child") == [str(at) for at in range(F)]
    # Chunks come when they are asked for.
    assert not any("features/" in url for url in chrome.requests)
    expected = [table["words"][number] for row in table["strongest"] for number in row]
    assert [
        text.encode("utf-16", "surrogatepass") for text in texts(chrome, "td:nth-child(2) .word")
    ] == [text.encode("utf-16", "surrogatepass") for text in expected]
    chrome.js("document.querySelector('th:nth-child(3) button').focus()")
    chrome.press("Enter")
    sorted_column = "document.querySelector('[aria-sort=descending]')"
    chrome.until(f"location.hash.includes('sort=-density') && {sorted_column}")
    by_density = sorted(range(F), key=lambda at: -density[at])
    assert texts(chrome, "#features tbody td:first-child") == list(map(str, by_density))
    assert chrome.js(f"{sorted_column}.textContent") == "density ↓"
    assert (
        chrome.js("document.activeElement.textContent") == "density ↓"
    )  # the focus stays on what was pressed
    chrome.press("/")
    chrome.until("document.activeElement.id === 'q'")
    for key in "zalg":
        chrome.press(key)
    chrome.press("Escape")
    chrome.js("document.getElementById('q').value = ' 7 '")
    chrome.js("document.getElementById('q').dispatchEvent(new Event('input'))")
    first = "document.querySelector('#features tbody a')"
    chrome.until(f"location.hash.includes('q=') && {first}?.textContent === '7'")
    chrome.js("document.querySelector('#features tbody a').click()")
    chrome.until("document.documentElement.dataset.view === 'f'")
    assert chrome.js("document.activeElement.textContent") == "Feature 7"
    assert (
        chrome.js("document.querySelectorAll('.side h3').length") == 4
    )  # logits, neighbours and the other run
    if url.startswith("file:"):
        there = built.made.run.parent / "ot'her <b>&/studies/browser" / PAGE
        led = chrome.js("document.querySelector('.side > :last-child a').href")
        assert unquote(led) == f"file://{there}#feature={page['features'][7]['others'][0][0][0]}"
    else:
        assert chrome.js("document.querySelectorAll('.side > :last-child a').length") == 0
    own = page["features"][7]
    lines = texts(chrome, ".context")
    for context, line in zip(own["top"], lines, strict=False):
        whole = "".join(page["words"][at] for at in context[3])
        assert line.encode("utf-16", "surrogatepass") == whole.encode("utf-16", "surrogatepass")
    shaded = chrome.js("""
        [...document.querySelector('.context').querySelectorAll('span')]
            .map((token) => [token.title, token.className])
    """)
    assert (
        len(shaded) == len(own["top"][0][4]) // 2 and sum(kind == "peak" for _, kind in shaded) == 1
    )
    assert chrome.js("document.querySelectorAll('svg rect').length") == len(own["histogram"]) - 1
    chrome.press("Escape")
    chrome.until("document.documentElement.dataset.view === 'list' && location.hash.includes('q=')")
    assert (
        chrome.js("document.activeElement.textContent") == "7"
    )  # on the row of the feature that was shown
    quiet(chrome, url)


def test_latents_of_another_layer_that_predict_it(chrome: Chromium, url: str, built: Built) -> None:
    """Both tables of feature 7: what it predicts, and what predicts it; each leads to the other."""
    chrome.open(f"{url}#feature=7")
    assert texts(chrome, ".layers h3") == [
        "Predicts features of ot'her <b>&, <i>layer</i> of ot'her <b>&",
        "Predicted (same direction) by those of ot'her <b>&, layer 3",
    ]
    cells = texts(chrome, ".layers td")
    assert cells[:5] == ["5", "0.950", "0.237", "0.475", "-0.950"]
    assert cells[5:10] == ["3", "0.900", "0.225", "0.450", "-0.900"]
    assert cells[10:] == ["3", "0.800", "0.400", "0.200", "-0.800"]
    links = chrome.js("[...document.querySelectorAll('.layers a')].map((link) => link.href)")
    there = built.made.run.parent / "ot'her <b>&/studies/browser" / PAGE
    expected = [f"file://{there}#feature={number}" for number in (5, 3, 3)]
    assert list(map(unquote, links)) == (expected if url.startswith("file:") else [])
    chrome.open(f"{url}#feature=5")
    assert texts(chrome, ".layers h3")[1].startswith("New: predicted by none of")
    quiet(chrome, url)


def test_keys_and_tokens(chrome: Chromium, built: Built) -> None:
    every, url = read(built.folder, "tokens"), (built.folder / PAGE).as_uri()
    chrome.open(f"{url}#sort=-density")
    order = texts(chrome, "#features tbody td:first-child")
    chrome.press("j")
    chrome.press("j")
    assert chrome.js("document.activeElement.textContent") == order[1]
    chrome.press("Enter")
    chrome.until(f"document.getElementById('feature-title')?.textContent === 'Feature {order[1]}'")
    for key, at in (("j", 2), ("k", 1), ("ArrowLeft", 0), ("k", 0)):
        chrome.press(key)
        chrome.until(
            f"document.getElementById('feature-title').textContent === 'Feature {order[at]}'"
        )
    chrome.press("t")
    chrome.until("document.activeElement.id === 'token-q'")
    wanted = say(every["ids"][5])
    chrome.js(f"document.getElementById('token-q').value = {json.dumps(wanted)}")
    chrome.js("document.getElementById('token-q').dispatchEvent(new Event('input'))")
    chrome.until("document.querySelector('#token tbody tr')")
    feature, mean, *_ = read(built.folder, "tokens/000")[5]
    assert texts(chrome, "#token tbody tr:first-child td")[:1] == [str(feature)]
    assert float(texts(chrome, "#token tbody tr:first-child td")[1]) == pytest.approx(
        mean, rel=1e-2
    )
    assert texts(chrome, "#token .word")[0] == wanted
    quiet(chrome, url)


def test_a_feature_needs_its_own_file_alone(chrome: Chromium, built: Built) -> None:
    url = (built.folder / PAGE).as_uri()
    chrome.open(f"{url}#feature=7")
    assert sorted(url.split("data/")[1] for url in chrome.requests if "/data/" in url) == [
        "features/000.js",
        "meta.js",
    ]
    known = [
        figure
        for figure in read(built.folder, "features/000")["features"][7]["figures"]
        if figure is not None
    ]
    assert len(known) > 2 and float(texts(chrome, "dd")[1]) == pytest.approx(known[1], rel=1e-2)
    chrome.press("j")
    chrome.until("document.getElementById('feature-title').textContent === 'Feature 8'")
    chrome.press("Escape")
    chrome.until("document.querySelectorAll('#features tbody tr').length > 0")
    quiet(chrome, url)


def test_a_file_that_is_missing_is_said(chrome: Chromium, built: Built) -> None:
    page = built.folder / "data/features/000.js"
    kept = page.read_bytes()
    page.unlink()
    try:
        chrome.open((built.folder / PAGE).as_uri() + "#feature=1")
        assert texts(chrome, "#error") == ["data/features/000.js cannot be read"]
    finally:
        page.write_bytes(kept)
    for wrong in ("#feature=40", "#feature=-1", "#feature=x"):
        chrome.open((built.folder / PAGE).as_uri() + wrong)
        assert (
            texts(chrome, "#error")[0].startswith("there is no feature") and chrome.troubles == []
        )


def test_pages_of_a_long_list_and_features_without_a_figure(
    chrome: Chromium, built: Built, tmp_path: Path
) -> None:
    for asset in built.folder.glob("*.*"):
        (tmp_path / asset.name).write_bytes(asset.read_bytes())
    (tmp_path / "data").mkdir()
    known = [None if at % 5 == 0 else at % 7 for at in range(250)]
    density = [0 if at < 20 else 0.5 for at in range(250)]
    table = {
        "words": ["Ab"],
        "strongest": [[0] if at == 240 else [] for at in range(250)],
        "raised": [[]] * 250,
    }
    meta = read(built.folder, "meta") | {
        "features": 250,
        "columns": [{"key": key, "label": key, "about": ""} for key in "xy"],
    }
    meta["columns"][1]["key"] = "density"
    (tmp_path / "data/meta.js").write_bytes(script("meta", meta))
    (tmp_path / "data/table.js").write_bytes(
        script("table", table | {"columns": {"x": known, "density": density}})
    )
    page = (tmp_path / PAGE).as_uri()
    for sort, sign in (("x", 1), ("-x", -1)):
        expected = sorted(
            range(250), key=lambda at: (known[at] is None, sign * (known[at] or 0), at)
        )
        found = []
        for number in (1, 2, 3):
            chrome.open(f"{page}#sort={sort}&page={number}")
            found += texts(chrome, "#features tbody td:first-child")
        assert found == list(map(str, expected))
    assert chrome.js(
        "document.getElementById('after').disabled && !document.getElementById('before').disabled"
    )
    for state, count in (
        ("alive=1", 230),
        ("q=AB", 1),
        ("q=240", 1),
        ("q=nothing", 0),
        ("sort=__proto__&page=99", 50),
    ):
        chrome.open(f"{page}#{state}")
        shown = len(texts(chrome, "#features tbody tr"))
        assert shown == min(count, 100) and chrome.troubles == []
        if count not in (50,):
            assert texts(chrome, "#found") == [f"{count} of 250 features"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "view", ["", "#feature=7", "#tokens=", "#tokens=script&id=0", "#q=nothing%20at%20all"]
)
def test_everybody_can_read_it(chrome: Chromium, built: Built, view: str, scheme: str) -> None:
    chrome.open((built.folder / PAGE).as_uri() + view)
    assert audit(chrome, scheme) == []
