"""The feature browser's page in a real Chromium, from the disk and served, with hostile text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from residual_saes.analyze.pages.browser.spread import BINS
from residual_saes.analyze.pages.browser.study import PAGE
from residual_saes.analyze.pages.script import script
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
    density, interest = (table["columns"][key] for key in ("density", "interest"))
    chrome.open(url)
    by_interest = sorted(range(F), key=lambda at: (interest[at] is None, -(interest[at] or 0), at))
    assert texts(chrome, "#features tbody td:first-child") == list(map(str, by_interest))
    assert texts(chrome, "#legend dt") == [
        head.removesuffix(" ↓") for head in texts(chrome, "#features th")
    ]
    assert chrome.js("document.querySelector('#legend dd').checkVisibility()")
    # Chunks come when they are asked for.
    assert not any("features/" in url for url in chrome.requests)
    expected = [table["words"][number] for at in by_interest for number in table["strongest"][at]]
    assert [
        text.encode("utf-16", "surrogatepass") for text in texts(chrome, "td:nth-child(3) .word")
    ] == [text.encode("utf-16", "surrogatepass") for text in expected]
    chrome.js("document.querySelector('th:nth-child(4) button').focus()")
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
        chrome.js("document.querySelectorAll('.side h3').length") == 5
    )  # logits, neighbours, what fires together and the other run
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
            .map((token) => [token.dataset.value, token.className])
    """)
    assert (
        len(shaded) == len(own["top"][0][4]) // 2 and sum(kind == "peak" for _, kind in shaded) == 1
    )
    bars = "document.querySelectorAll('.charts > :nth-child(%d) rect').length"
    assert chrome.js(bars % 1) == len(own["histogram"]) - 1
    assert chrome.js(bars % 2) == BINS
    assert chrome.js("document.querySelectorAll('.charts .mark').length") == 8  # raised, lowered
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


def test_lengths_of_contexts_and_searches_in_them(chrome: Chromium, built: Built) -> None:
    url = (built.folder / PAGE).as_uri()
    page = read(built.folder, "features/000")
    own, words = page["features"][7], page["words"]
    chrome.open(f"{url}#f=7")
    value = own["top"][0][4][own["top"][0][4].index(own["top"][0][2]) + 1]
    assert float(texts(chrome, ".places .value strong")[0]) == pytest.approx(value, rel=1e-2)
    where = "document {}, token {}".format(*own["top"][0][:2])
    assert texts(chrome, ".places .value span")[0] == where
    # The number of a token is shown once its line has the focus.
    shown = "getComputedStyle(document.querySelector('.context .peak'), '::after').content"
    assert chrome.js(shown) == "none"
    chrome.js("document.querySelector('.context').focus()")
    assert float(chrome.js(shown).strip('"')) == pytest.approx(value, rel=1e-2)

    def choose(length: str) -> str:
        chrome.js(f"document.querySelector('[data-length]').value = '{length}'")
        chrome.js("document.querySelector('[data-length]').dispatchEvent(new Event('change'))")
        return texts(chrome, ".context")[0]

    _, _, peak, tokens, _ = own["top"][0]
    pieces = [words[number] for number in tokens]
    same = "utf-16", "surrogatepass"
    short = "".join(pieces[max(0, peak - 5) : peak + 4])
    assert choose("short").encode(*same) == short.encode(*same)
    assert choose("whole").encode(*same) == "".join(pieces).encode(*same)
    # A feature's contexts, then those of all.
    wanted = next(text for text in pieces if text.startswith("javascript"))
    search = "document.querySelector('#f input[type=search]')"
    chrome.js(f"{search}.value = {json.dumps(wanted)}")
    chrome.js(f"{search}.dispatchEvent(new Event('input'))")
    every = [shown for shown in (*own["top"], *(c for _, part in own["quantiles"] for c in part))]
    hits = sum(any(words[number] == wanted for number in shown[3]) for shown in every)
    chrome.until(f"document.querySelectorAll('.context').length === {hits}")
    assert 0 < hits < len(every)
    chrome.press("Escape")
    chrome.press("c")
    chrome.until("document.activeElement.id === 'contexts-q'")
    for key in "JAVASCRIPT":
        chrome.press(key)
    chrome.until("document.getElementById('contexts-found').textContent.includes('all of 40')")
    expected = []
    for number, feature in enumerate(page["features"]):
        parts = (*feature["top"], *(c for _, part in feature["quantiles"] for c in part))
        if any("javascript" in words[at] for shown in parts for at in shown[3]):
            expected.append(str(number))
    assert texts(chrome, "#contexts-hits a") == expected and len(expected) > 1
    quiet(chrome, url)


def test_stars_and_notes(chrome: Chromium, built: Built) -> None:
    url = (built.folder / PAGE).as_uri()
    starred = "[...document.querySelectorAll('#features tbody a')].map((link) => link.textContent)"
    chrome.open(f"{url}#f=7")
    chrome.press("s")
    chrome.js("document.querySelector('#f textarea').value = '<b>seven</b>'")
    chrome.js("document.querySelector('#f textarea').dispatchEvent(new Event('change'))")
    chrome.open(f"{url}#starred=1")
    assert chrome.js(starred) == ["7"] and texts(chrome, "#found") == [f"1 of {F} features"]
    chrome.open(f"{url}#f=7")
    assert chrome.js("document.querySelector('#f textarea').value") == "<b>seven</b>"
    assert chrome.js("document.querySelector('#f .star').getAttribute('aria-pressed')") == "true"
    # Out and in again; a file of another SAE, and one that is none, change nothing.
    chrome.js("URL.createObjectURL = (blob) => { window.blob = blob; return '#f=7'; }")
    chrome.js("HTMLAnchorElement.prototype.click = () => {}")
    chrome.js("document.getElementById('export').click()")
    made = json.loads(chrome.js("window.blob.text()"))
    assert made["features"] == {"7": {"star": True, "note": "<b>seven</b>"}}
    given = {"5": {"star": True}, "x": {"star": True}, "999": {"star": True}, "6": None, "8": 1}
    for content, said in (
        (json.dumps(made | {"features": given}), "1 features read from n.json"),
        (json.dumps(made | {"sae": "another"}), "n.json is not of this SAE"),
        ("null", "n.json is not of this SAE"),
        ("{", "n.json is not a JSON file"),
    ):
        assert chrome.js(f"importNotes(new File([{json.dumps(content)}], 'n.json'))") == said
    assert chrome.js("Object.keys(kept.features)") == ["5", "7"]
    # A browser that stores nothing says so, and keeps them as long as the page is open.
    chrome.js("Object.defineProperty(window, 'localStorage', { get() { throw Error('no'); } })")
    chrome.press("j")
    chrome.until("document.getElementById('feature-title').textContent === 'Feature 8'")
    chrome.press("s")
    chrome.press("k")
    chrome.until("document.getElementById('feature-title').textContent === 'Feature 7'")
    assert "export" in texts(chrome, ".note p")[0]
    assert chrome.js("noteOf(8).star && noteOf(7).star")
    quiet(chrome, url)


def test_bytes_are_shown_as_text_where_they_are_whole(chrome: Chromium, built: Built) -> None:
    chrome.open((built.folder / PAGE).as_uri())
    texts_of = json.dumps(["a", [0x20, 0xE2, 0x82], [0xAC], [0xE2], [0xE2, 0x80], [0xAE]])

    def shown(*tokens: int) -> list[list[object]]:
        cells: list[list[object]] = chrome.js(
            f"cells({list(tokens)}, {texts_of}, 0, {len(tokens)})"
        )
        return cells

    assert shown(0, 1, 2, 0) == [["a", 0, 1, False], [" €", 1, 3, False], ["a", 3, 4, False]]
    assert shown(3, 0, 2) == [
        ["<0xE2>", 0, 1, True],
        ["a", 1, 2, False],
        ["<0xAC>", 2, 3, True],
    ]
    # A mark of writing direction stays bytes.
    assert [text for text, *_ in shown(4, 5)] == ["<0xE2><0x80>", "<0xAE>"]
    assert chrome.js("word([226]).className") == "word byte"
    assert chrome.js("[...word('  a ').querySelectorAll('.space')].map((s) => s.textContent)") == [
        "  ",
        " ",
    ]


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
    assert len(known) > 2 and float(texts(chrome, ".facts dd")[1]) == pytest.approx(
        known[1], rel=1e-2
    )
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
    "view",
    [
        "",
        "#feature=7",
        "#tokens=",
        "#tokens=script&id=0",
        "#q=nothing%20at%20all",
        "#contexts=script",
    ],
)
def test_everybody_can_read_it(chrome: Chromium, built: Built, view: str, scheme: str) -> None:
    chrome.open((built.folder / PAGE).as_uri() + view)
    assert audit(chrome, scheme) == []
    if scheme == "light":
        return
    chrome.resize(390, 844)  # a phone scrolls down alone
    try:
        assert chrome.js("document.documentElement.scrollWidth") <= 390
    finally:
        chrome.resize(1280, 720)
