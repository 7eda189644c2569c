"""The report in a real Chromium: inert, readable by keyboard, in the dark and on paper."""

from __future__ import annotations

import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from residual_saes.analyze.latents import contexts
from residual_saes.analyze.outcome import Outcome, Picture, Table
from residual_saes.analyze.pages.report import report
from residual_saes.analyze.results import tell_report
from residual_saes.analyze.study import Definition, Study
from residual_saes.analyze.subject import Subject
from residual_saes.harvest.model import ModelConfig
from tests.analyze.accessibility import audit
from tests.analyze.browser_site import HOSTILE, say
from tests.analyze.chromium import NEEDS_CHROMIUM, Chromium
from tests.analyze.conftest import make_run, random_rows

pytestmark = [NEEDS_CHROMIUM, pytest.mark.usefixtures("drawn_once")]
READY = "document.readyState === 'complete'"
# Pictures of a stranger.
WIDE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="3000" height="9" onload="alert(1)">'
    "<script>document.title='caught'</script><style>* { display: none }</style>"
    '<image href="http://evil.example/a.png" width="9" height="9"/><text y="9">wide</text></svg>'
)
DAMAGED = "<svg><script>document.title='caught'</script></div><style>* { display: none }</style>"
WORD = "onpaper"  # of a table that is folded on the screen


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a run whose tokens, and a study's every text, are hostile; with a variant."""
    run = make_run(tmp_path_factory.mktemp("report"), random_rows()).run
    subject = Subject.open(run, None, torch.device("cpu"))
    lines = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    long = Table(" ".join(lines), tuple(lines), [(WORD, *lines[1:])] * 20)
    drawn = {"drawn": Picture(lines[0], WIDE), "damaged": Picture(lines[1], DAMAGED)}
    outcome = Outcome({}, lines, [long], drawn)
    for options in ({}, {"top": "x" * 99}):
        study = Study("contrast", subject, options, ModelConfig("nobody/none"))
        study.perform(Definition(lambda _: outcome))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            contexts, "token_names", lambda *_, **__: lambda token: contexts.visible(say(token))
        )
        return report(subject, 10**6, None).as_uri()


def test_it_is_inert_and_alone(chrome: Chromium, page: str) -> None:
    chrome.open(page, READY)
    assert chrome.troubles == []
    index = page.replace("report.html", "studies/index.js")
    assert [one for one in chrome.requests if not one.startswith("data:")] == [page, index]
    assert chrome.js("document.title") == "run: SAE report"
    foreign = "main script, svg, style ~ style, main b b, iframe, object, img:not([src^='data:'])"
    assert chrome.js(f'document.querySelectorAll("{foreign}").length') == 0
    widths = chrome.js("[...document.images].map((image) => image.naturalWidth)")
    assert widths.count(0) == 1 and 3000 in widths  # the damaged one shows its caption alone
    assert "<script>document.title='caught'</script>" in chrome.js(
        "document.querySelector('.verdict').textContent"
    )


def test_its_links_lead_somewhere(chrome: Chromium, page: str) -> None:
    chrome.open(page, READY)
    links = chrome.js("[...document.querySelectorAll('a')].map((one) => one.href)")
    assert len(links) > 15
    for link in links:
        path, _, name = link.removeprefix("file://").partition("#")
        assert Path(path).exists()
        assert not name or chrome.js(f"document.getElementById({name!r}) !== null")
    sources = chrome.js(
        "[...document.querySelectorAll('figure')].map((one) => one.querySelector('a')?.href)"
    )
    assert sources and all(
        re.search(r"\.jsonl?$", source) for source in sources
    )  # every picture has its figures


def test_alone_it_has_no_links_that_lead_nowhere(
    chrome: Chromium, page: str, tmp_path: Path
) -> None:
    mailed = shutil.copy(page.removeprefix("file://"), tmp_path / "mailed.html")
    chrome.open(page, READY)
    assert chrome.js("document.getElementById('alone').hidden")
    chrome.open(Path(mailed).as_uri(), READY)
    assert not chrome.js("document.getElementById('alone').hidden")
    links = chrome.js("[...document.links].map((one) => one.getAttribute('href'))")
    assert len(links) > 10 and all(link.startswith("#") for link in links)
    assert chrome.js("document.querySelector('.file')") is None
    assert audit(chrome) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(chrome: Chromium, page: str, scheme: str) -> None:
    chrome.open(page, READY)
    assert audit(chrome, scheme) == []


def test_it_says_what_was_done_after_it(
    chrome: Chromium, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notice = "document.getElementById('newer')"
    run = make_run(tmp_path, random_rows()[:1024]).run
    subject = Subject.open(run, None, torch.device("cpu"))

    def perform(top: int) -> None:
        study = Study("contrast", subject, {"top": top}, ModelConfig("nobody/none"))
        study.perform(Definition(lambda _: Outcome({}, ["found"])))
        tell_report(run)

    perform(1)
    assert "report.html" not in capsys.readouterr().err  # there is none yet
    page = report(subject, 10**6, None).as_uri()
    perform(1)
    assert "report.html" not in capsys.readouterr().err
    chrome.open(page, READY)
    assert chrome.js(f"{notice}.hidden")
    perform(2)
    assert "study=report" in capsys.readouterr().err
    chrome.open(page, READY)
    assert "study=contrast" in chrome.js(f"{notice}.innerText")
    assert audit(chrome) == [] and chrome.troubles == []
    # The name of a folder is anybody's, and stays text.
    hostile = run / "studies" / "<img src=x onerror=alert(1)>"
    shutil.copytree(run / "studies" / "contrast", hostile)
    perform(1)  # as the page shows it
    chrome.open(page, READY)
    assert "study=<img src=x onerror=alert(1)>" in chrome.js(f"{notice}.textContent")
    assert "contrast" not in chrome.js(f"{notice}.textContent")
    shutil.rmtree(run / "studies")  # the page alone
    chrome.open(page, READY)
    assert chrome.js(f"{notice}.hidden")


def test_values_show_when_one_points_at_a_token(chrome: Chromium, page: str) -> None:
    chrome.open(page, READY)
    by_line = chrome.js("""
        [...document.querySelectorAll('.context')].map((line) =>
            [...line.querySelectorAll('span')].map((token) =>
                [Number(token.title), Number(token.style.getPropertyValue('--shade'))]))
    """)
    values = [value for line in by_line for value, _ in line]
    assert len(values) > 20 and min(values) > 0
    assert len({shade for line in by_line for _, shade in line}) > 3
    assert all(
        [shade for _, shade in sorted(line)] == sorted(shade for _, shade in line)
        for line in by_line
    )


def test_it_fits_a_narrow_window(chrome: Chromium, page: str) -> None:
    chrome.resize(390, 800)
    try:
        chrome.open(page, READY)
        assert chrome.js("document.documentElement.scrollWidth <= innerWidth")
        widths = chrome.js(
            "[...document.querySelectorAll('.fits th[scope=row]')].map((cell) => cell.offsetWidth)"
        )
        assert len(widths) > 10 and min(widths) > 100  # words are not broken letter by letter
        # What is wider than the window scrolls in itself, and a shadow says so.
        scrolls = "(one) => one.scrollWidth > one.clientWidth"
        wide = f"[...document.querySelectorAll('.scroll')].filter({scrolls})"
        assert chrome.js(f"{wide}.length") > 0
        assert chrome.js(
            f"{wide}.every((one) => getComputedStyle(one).backgroundImage.includes('radial'))"
        )
    finally:
        chrome.resize(1280, 720)


def test_paper_shows_what_the_screen_folds(chrome: Chromium, page: str) -> None:
    chrome.open(page, READY)
    assert not chrome.js("document.querySelector('details').open")
    shown = "document.querySelector('details table').checkVisibility()"
    assert not chrome.js(shown)
    chrome.media("print")
    try:
        assert chrome.js(shown)
        assert chrome.js("getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        chrome.media()
    printed = chrome.pdf()
    pages = len(re.findall(rb"/Type\s*/Page\b", printed)) or len(
        re.findall(rb"/Type\s*/Page\b", _unpacked(printed))
    )
    assert pages >= 3


def _unpacked(pdf: bytes) -> bytes:
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            found.append(zlib.decompress(stream))
        except zlib.error:
            continue
    return b"".join(found)
