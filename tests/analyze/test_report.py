"""The report: figures of the run's files, contexts where latents really fire, no text as markup."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from residual_saes.analyze.command import command
from residual_saes.analyze.latents import contexts
from residual_saes.analyze.latents.contexts import Context as ContextOf
from residual_saes.analyze.latents.contexts import choose, firing_counts, top_contexts, visible
from residual_saes.analyze.outcome import Outcome, Picture, Table
from residual_saes.analyze.pages import facts
from residual_saes.analyze.pages.examples import Context, Example, context_of, readable
from residual_saes.analyze.pages.findings import Measured, warnings
from residual_saes.analyze.pages.report import _figures, _sweep, report
from residual_saes.analyze.reconstruction import TRAINED
from residual_saes.analyze.results import current
from residual_saes.analyze.stats import number, percent
from residual_saes.analyze.studies import quality
from residual_saes.analyze.studies.sweep import page as sweep_page
from residual_saes.analyze.studies.sweep.arms import read_all
from residual_saes.analyze.studies.sweep.comparison import sweep
from residual_saes.analyze.study import Definition, Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import MismatchError, SettingError, StoreError
from residual_saes.data.rows.split import held_out_units
from residual_saes.harvest.model import ModelConfig
from residual_saes.train.optim import OptimConfig, resolved
from tests.analyze.conftest import F, Made, make_run, random_rows
from tests.analyze.test_quality import dense
from tests.analyze.test_sweep import make_arm, planted_sae, planted_store
from tests.conftest import BOS
from tests.forked import run_forked

pytestmark = pytest.mark.usefixtures("drawn_once")


def test_latents_are_chosen_evenly_and_alive() -> None:
    fired = np.array([0, 5, 9, 1, 0, 7, 3])
    assert choose(fired, 3) == [2, 1, 3]  # most, middle, least frequent
    assert choose(fired, 99) == [2, 5, 1, 6, 3]
    assert choose(np.zeros(3, np.int64), 5) == []


def test_contexts_hold_the_activations_of_their_tokens(subject: Subject, made: Made) -> None:
    fired, rows = firing_counts(subject, 10**6)
    latents = choose(fired, 6)
    found = top_contexts(subject, latents, each=3, limit=10**6)
    held = held_out_units(made.store)
    tokens = np.concatenate([made.store.tokens(unit).ravel() for unit in held])
    document = np.concatenate([made.store.document(unit).ravel() for unit in held])
    _, f = dense(made, np.concatenate([made.rows[unit * 128 : (unit + 1) * 128] for unit in held]))
    f[tokens == BOS] = 0
    np.testing.assert_array_equal(fired, (f > 0).sum(0))
    assert rows == (tokens != BOS).sum()
    for latent in latents:
        by_document = {d: f[document == d, latent].max() for d in np.unique(document)}
        best = sorted((peak for peak in by_document.values() if peak > 0), reverse=True)[:3]
        assert [context.peak for context in found[latent]] == pytest.approx(best, rel=1e-5)
        for context in found[latent]:
            assert max(context.activations) == context.peak
            at = int(
                np.flatnonzero(
                    (document == context.document)
                    & np.isclose(f[:, latent], context.peak, rtol=1e-5)
                )[0]
            )
            inside = context.activations.index(context.peak)
            span = slice(at - inside, at - inside + len(context.tokens))
            assert context.tokens == tokens[span].tolist()
            assert context.activations == pytest.approx(
                f[span, latent].tolist(), rel=1e-4, abs=1e-6
            )
            assert BOS not in context.tokens
            assert set(document[span]) == {context.document}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attributes if name == "id"]
        self.links += [
            value or "" for name, value in attributes if name in ("src", "href", "xlink:href")
        ]


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="x',
    "\u202egnp",
    "{{ 7*7 }}",
    "\x00",
]


def hostile_name(token: int) -> str:
    return visible(HOSTILE[token % len(HOSTILE)])


def test_token_text_stays_text(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "token_names", lambda *_, **__: hostile_name)
    text = report(subject, 10**6, None).read_text()
    page = _Page()
    page.feed(text)
    assert page.tags.count("script") == 2  # our own, and the list of studies
    assert page.tags.count("img") == len(pictures(text))
    assert not re.search(r"<[^>]*onmouseover", text)
    assert "&lt;/script&gt;" in text
    assert "{{ 7*7 }}" in text
    assert "\u202e" not in text
    assert "\x00" not in text
    links = {link for link in page.links if not link.startswith("data:image/svg+xml;")}
    files = {"quality.json", "metrics.jsonl", "studies/index.js"}
    assert links <= {f"#{name}" for name in page.ids} | files
    assert len(page.ids) == len(set(page.ids)) > 3
    assert "http://" not in text


def test_the_report_says_what_the_files_say(subject: Subject, made: Made) -> None:
    text = report(subject, 10**6, None).read_text()
    figures = json.loads((made.run / "quality.json").read_bytes())
    centred = figures["variance_explained"]["as trained"]["centred"]
    assert f"<b>{number(centred)}</b>" in text
    assert "1 of 40" in text  # the last held-out line of metrics.jsonl
    assert figures["density"]["log10"] and figures["activations"]
    assert len(pictures(text)) == 9  # four of the training, five of the quality
    even = text.partition('<h2 id="latents">')[2]
    assert even.count("<section>") == min(20, F - figures["silent"])
    assert str(made.run.parent) not in text  # names, and no folders of this machine
    assert "model.path=" in text  # ids are shown: this store's model has no tokenizer anywhere
    assert "reference SAE</th>" not in text


def test_the_reference_stands_beside_its_own_model_alone(subject: Subject, made: Made) -> None:
    assert facts.is_of_reference("google/gemma-4-E4B-it", 21)
    assert not facts.is_of_reference("google/gemma-4-E4B", 27)
    assert not facts.is_of_reference("google/gemma-4-E4B", "mlp_out_21")
    assert not facts.is_of_reference("google/gemma-4-E2B", 21)
    # The row of coverage is there only where as many rows are held out as the reference counts in.
    figures = _figures(subject, 10**6, current(subject.run, subject.digest))
    coverage = ("25.0%", "62.0%")
    for rows, is_there in ((facts.COVERAGE_ROWS - 1, False), (facts.COVERAGE_ROWS, True)):
        figures["coverage"] = [{"rows": rows, "share": 0.25}]
        shown = facts.of_quality(figures, 1)
        assert (coverage in [row[1:] for row in shown]) == is_there


def opened(run: Path) -> Subject:
    return Subject.open(run, None, torch.device("cpu"))


def text_of(run: Path) -> str:
    return report(opened(run), 10**6, None).read_text()


def test_the_sweep_of_an_arm_is_shown(tmp_path: Path) -> None:
    section = '<h2 id="sweep">'
    planted = planted_store(tmp_path / "s.zarr")
    settings = [{"optim.lr": lr, "optim.lr_floor": lr / 10} for lr in (1e-3, 1e-2)]
    for name, changes, noise in zip("ab", settings, (0.0, 0.1), strict=True):
        make_arm(tmp_path / "sweep", name, planted, planted_sae(planted, noise=noise), **changes)
    run = tmp_path / "sweep/b"
    assert _sweep(opened(run)) is None
    read, damaged = read_all([run.parent / name for name in "ab"])
    figures = sweep(read, damaged, None, 10**6, torch.device("cpu"))
    sweep_page.write(run.parent, figures, read)
    text = text_of(run)
    assert section in text and "Best: a" in text
    assert 'href="../sweep.json"' in text and 'href="../sweep.html"' in text
    layer = figures["layers"][0]["layer"]
    assert (run.parent / f"sweep_layer_{layer}.svg").read_text() in pictures(text)
    kept = (run / "sae_final.pt").read_bytes()
    final = torch.load(run / "sae_final.pt", weights_only=True)
    other = {**final, "b_dec": final["b_dec"] + 1}
    torch.save(other, run / "sae_final.pt")  # another SAE than was compared
    assert _sweep(opened(run)) is None
    (run / "sae_final.pt").write_bytes(kept)
    assert _sweep(opened(run))
    run.rename(tmp_path / "sweep/c")  # not one of the arms that were compared
    assert section not in text_of(tmp_path / "sweep/c")


def test_control_characters_are_shown_as_marks() -> None:
    assert visible("a\nb\t\x1b\u202e\u200b") == r"a⏎b⇥\x1b\u202e\u200b"
    assert visible("é 😀 ي") == "é 😀 ي"


def test_figures_have_significant_digits() -> None:
    values = [0.00001234, 0.97771, -126.1234, 16.0, 999.99, 1234567, 12345.6, 0, None, float("nan")]
    shown = ["1.234e-05", "0.9777", "-126.1", "16.00", "1000", "1,234,567", "12,346", "0", "-", "-"]
    assert [number(value) for value in values] == shown
    shares = [0.9704, 1.0, 0.00032, 0.0, None]
    assert [percent(share) for share in shares] == ["97.0%", "100.0%", "0.032%", "0.0%", "-"]


def test_a_run_that_went_wrong_begins_with_warnings(subject: Subject) -> None:
    figures = {"variance_explained": {TRAINED: {"centred": -3.5}}, "d_sae": F, "silent": 2}
    rule = float(resolved(OptimConfig(lr="auto"), F, 16).lr)
    records = [
        {"split": split, "step": step, "variance_explained": explained, "dead": 20}
        for split, step, explained in (
            ("held_out", 4, 0.5),
            ("train", 8, 0.5),
            ("held_out", 8, 0.4),
        )
    ]

    def words(centred: float, dead: int, last: int, lr: float) -> str:
        figures["variance_explained"][TRAINED]["centred"] = centred
        records[1]["step"], records[-1]["dead"] = last, dead
        asked = replace(subject, config={**subject.config, "lr": lr})
        return " ".join(warnings(asked, Measured(figures, records)))

    wrong = words(-3.5, 20, 8, 6 * rule)
    for sign in ("-3.500", "50.0%", "step 8 of 16", "optim.lr", "0.5000 to 0.4000"):
        assert sign in wrong
    records[0]["variance_explained"] = 0.4
    assert words(0.4, 0, 16, 4 * rule) == words(0.4, 4, 16, rule / 4) == ""
    assert "optim.lr" in words(0.4, 0, 16, rule / 6)
    assert warnings(subject, Measured({**figures, "silent": 0}, [])) == []  # of another library


def test_readable_latents_agree_each_on_its_own_word() -> None:
    def example(latent: int, rows: int, words: list[str]) -> Example:
        lines = [Context(0, 1.0, [(word, 1.0)]) for word in words]
        return Example(latent, rows, 0.01, lines, [], [])

    same = [example(latent, 100 - latent, [f" w{latent}"] * 5) for latent in range(20)]
    others = [
        example(30, 500, ["."] * 5),  # a sign says little
        example(31, 500, list("abcde")),
        example(32, 200, ["W0", " w0", "w0", "w0", "w0"]),  # the word of 0, and more often
        example(33, 90, ["x", "x", "x", "y", "z"]),
    ]
    chosen = [one.latent for one in readable([*same, *others])]
    assert chosen == [32, 4, 8, 11, 15, 19]  # evenly over those that agree as one
    assert [one.latent for one in readable([others[3], others[1], same[0]])] == [0, 33]
    assert readable([]) == []


def test_bytes_become_characters_where_they_can() -> None:
    parts = [" é", (0xE6,), (0x97, 0xA5), "x" * 99, (0xE6,), (0x97,), "z"]
    found = ContextOf(7, 3.0, list(range(7)), [0.0, 3.0, 1.0, 0.0, 0.0, 2.0, 0.0])
    shown = context_of(found, parts.__getitem__)
    assert shown.tokens == [
        (" é", 0.0),
        ("日", 3.0),
        (f"{'x' * 60}… (99 characters)", 0.0),
        ("<0xE6>", 0.0),
        ("<0x97>", 2.0),
        ("z", 0.0),
    ]


DRAWN = "<svg><script>document.title='caught'</script></svg>"


def pictures(text: str) -> list[str]:
    """What the images of a page hold."""
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="[^"]+">', text)
    assert len(found) == text.count("<img")
    return [base64.b64decode(data).decode() for data in found]


def outcome_of(text: str) -> Outcome:
    table = Table(text, ("a", text), [("1", text)])
    picture = Picture(text, DRAWN)
    return Outcome({"d": float("nan")}, [text], [table], {"drawn": picture})


def perform(subject: Subject, name: str, text: str, **options: object) -> None:
    study = Study(name, subject, options, ModelConfig("nobody/none"))
    study.perform(Definition(lambda _: outcome_of(text)))


def test_studies_are_on_the_page_as_text(subject: Subject) -> None:
    for name in ("stability", "contrast"):
        perform(subject, name, "<b>found</b> | it")
    text = report(subject, 10**6, None).read_text()
    assert text.index('<h2 id="contrast">') < text.index('<h2 id="stability">')
    # Verdict at the top, summary, picture's name, caption and link, table's name, summary, header
    # and cell.
    assert text.count("&lt;b&gt;found&lt;/b&gt; | it") == 2 * 9
    assert "<b>found" not in text
    assert pictures(text).count(DRAWN) == 2 and "<svg" not in text
    assert 'href="studies/contrast/contrast.json"' in text
    folder = subject.run / "studies" / "contrast"
    assert "| 1 | &lt;b&gt;found&lt;/b&gt; \\| it |" in (folder / "contrast.md").read_text()
    assert json.loads((folder / "contrast.json").read_bytes())["figures"] == {"d": None}


def test_every_variant_is_listed(tmp_path: Path) -> None:
    subject = Subject.open(make_run(tmp_path, random_rows()[:1024]).run, None, torch.device("cpu"))
    for top in (3, 5, 7):
        perform(subject, "contrast", f"found <{top}>", top=top, same="x" * 99)
    for rows in (1e2, 1e3):
        study = Study("quality", subject, {"rows": rows}, ModelConfig("nobody/none"))
        study.perform(quality.DEFINITION)
    text = report(subject, 10**6, None).read_text()
    of_quality = text.partition('<h2 id="quality">')[2].partition("<h2")[0]
    assert "<code>study.rows=100</code> <small>(above: 1000)</small>" in of_quality
    section = text.partition('<h2 id="contrast">')[2]
    variants = section.partition('<ul class="variants">')[2].partition("</ul>")[0]
    assert "<p>3 variants" in section and variants.count("<li>") == 2
    for top in (3, 5):
        assert f"<code>study.top={top}</code>" in variants and f"found &lt;{top}&gt;" in variants
    assert variants.count("7)") == 2  # the value of the result that is shown
    assert "study.same" not in variants  # which is the same in all
    files = re.findall('href="([^"]*)"', variants)
    tops = [json.loads((subject.run / file).read_bytes())["settings"]["options"] for file in files]
    assert sorted(options["top"] for options in tops) == [3, 5]


def test_quality_of_another_sae_is_measured_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, random_rows()[:1024]).run

    def headline() -> float:
        subject = opened(run)
        figures = _figures(subject, 10**6, current(subject.run, subject.digest))
        return float(figures["variance_explained"][TRAINED]["centred"])

    first = headline()
    assert headline() == first
    final = torch.load(run / "sae_final.pt", weights_only=True)
    torch.save({**final, "b_dec": final["b_dec"] + 1}, run / "sae_final.pt")
    assert headline() != first


def test_studies_of_another_sae_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, random_rows()[:1024]).run
    subject = Subject.open(run, None, torch.device("cpu"))
    perform(subject, "contrast", "old")
    assert list(current(subject.run, subject.digest)) == ["contrast"]
    final = torch.load(run / "sae_final.pt", weights_only=True)
    torch.save({**final, "b_dec": final["b_dec"] + 1}, run / "sae_final.pt")
    subject = Subject.open(run, None, torch.device("cpu"))
    assert current(subject.run, subject.digest) == {}
    assert "study=contrast" in capsys.readouterr().err
    perform(subject, "contrast", "new")
    assert current(subject.run, subject.digest)["contrast"].outcome.summary == ["new"]
    assert "variants" not in text_of(run).partition('<h2 id="contrast">')[2]


def test_the_command(made: Made) -> None:
    done = run_forked("-m", "analyze", "study=quality", f"run={made.run}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# quality")
    failed = run_forked("-m", "analyze", "study=quality", f"run={made.run}", "study.rows=0")
    assert failed.returncode == 2
    *_, last = failed.stderr.splitlines()  # behind what is told of a run without digests
    assert last.startswith("error: study.rows=0") and failed.stderr.count("error:") == 1


def test_what_cannot_be_studied_is_named(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no run is that could be meant
    run = f"run={made.run}"
    gsm8k = ("study=gsm8k", run)
    cases = [
        ((), SettingError, "run="),
        ((f"run={tmp_path}",), StoreError, str(tmp_path)),
        ((run, f"store={tmp_path / 'none'}"), StoreError, str(tmp_path / "none")),
        ((run, "port=-1"), SettingError, "port=-1"),
        ((run, "action=serve"), SettingError, "action=serve"),
        ((run, "layer=3"), SettingError, "layer=3"),
        (gsm8k, SettingError, "problems="),
        ((*gsm8k, "problems=tiny"), SettingError, "model.path=nobody/none"),
        ((*gsm8k, "problems=tiny", "model.path=nowhere"), SettingError, "model.path=nowhere"),
        ((*gsm8k, "model.dtype=int4"), SettingError, "model.dtype=int4"),
        (("study=gsm8k", f"runs={made.run}"), SettingError, "runs="),
    ]
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        for arguments, error, name in cases:
            settings = OmegaConf.to_container(compose("analyze", list(arguments)), resolve=True)
            with pytest.raises(error, match=re.escape(name)):
                command(settings)


def test_other_stores_and_broken_runs_are_refused(made: Made, tmp_path: Path) -> None:
    device = torch.device("cpu")
    other = make_run(tmp_path, random_rows()[:1024])
    with pytest.raises(MismatchError, match="store"):
        Subject.open(made.run, other.store.name, device)
    final = other.run / "sae_final.pt"
    final.write_bytes(final.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"sae_final\.pt"):
        Subject.open(other.run, None, device)
    final.unlink()
    with pytest.raises(StoreError, match=r"sae_final\.pt"):
        Subject.open(other.run, None, device)
