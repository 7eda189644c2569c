"""The report says what the run's files say, shows where latents really fire, and lets no text
become markup.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from analyze import contexts
from analyze.command import command
from analyze.contexts import choose, firing_counts, top_contexts, visible
from analyze.outcome import Outcome, Picture, Table
from analyze.pages import report as report_module
from analyze.pages.report import report
from analyze.results import current
from analyze.studies.sweep import words as sweep_page
from analyze.studies.sweep.arms import read_all
from analyze.studies.sweep.comparison import sweep
from analyze.study import Definition, Study
from analyze.subject import Subject
from data.errors import PipelineError
from data.rows.split import held_out_units
from harvest.model import ModelConfig
from tests.analyze.conftest import F, Made, make_run, random_rows
from tests.analyze.test_quality import dense
from tests.analyze.test_sweep import make_arm, planted_sae, planted_store
from tests.conftest import BOS


def test_latents_are_chosen_evenly_and_alive() -> None:
    fired = np.array([0, 5, 9, 1, 0, 7, 3])
    assert choose(fired, 3) == [2, 1, 3]  # most, middle, least frequent
    assert choose(fired, 99) == [2, 5, 1, 6, 3]
    assert choose(np.zeros(3, np.int64), 5) == []


def test_contexts_hold_the_activations_of_their_tokens(subject: Subject, made: Made) -> None:
    fired = firing_counts(subject, 10**6)
    latents = choose(fired, 6)
    found = top_contexts(subject, latents, each=3, limit=10**6)
    held = held_out_units(made.store)
    tokens = np.concatenate([made.store.tokens(unit).ravel() for unit in held])
    document = np.concatenate([made.store.document(unit).ravel() for unit in held])
    _, f = dense(made, np.concatenate([made.rows[unit * 128 : (unit + 1) * 128] for unit in held]))
    f[tokens == BOS] = 0
    np.testing.assert_array_equal(fired, (f > 0).sum(0))
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
    monkeypatch.setattr(contexts, "token_names", lambda *_: hostile_name)
    text = report(subject, 10**6, None).read_text()
    page = _Page()
    page.feed(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not re.search(r"<[^>]*onmouseover", text)
    assert "&lt;/script&gt;" in text
    assert "{{ 7*7 }}" in text
    assert "\u202e" not in text
    assert "\x00" not in text
    assert set(page.links) <= {f"#{name}" for name in page.ids} | {"quality.json", "metrics.jsonl"}
    assert len(page.ids) == len(set(page.ids)) > 10  # also those of pictures
    assert "http://" not in re.sub(r"http://www\.w3\.org/\S+", "", text)


def test_the_report_says_what_the_files_say(subject: Subject, made: Made) -> None:
    text = report(subject, 10**6, None).read_text()
    figures = json.loads((made.run / "quality.json").read_bytes())
    assert f"<b>{figures['variance_explained']['as trained']['centred']:.4f}</b>" in text
    assert "1 of 40 at the end of training" in text  # the last held-out line of metrics.jsonl
    assert text.count("<svg") == len(
        report_module._pictures(figures, report_module.read_metrics(made.run / "metrics.jsonl"))
    )
    assert text.count("<section>") == min(20, F - figures["silent"])
    assert "shown as ids" in text  # this store's model has no tokenizer anywhere


def test_the_reference_stands_beside_the_run(subject: Subject, made: Made) -> None:
    text = report(subject, 10**6, None).read_text()
    figures = json.loads((made.run / "quality.json").read_bytes())
    rows = dict(
        re.findall(
            r"<tr><td>([^<]*)</td><td class=\"number\">([^<]*)</td><td class=\"number\">0.939", text
        )
    )
    assert rows == {
        "variance explained, scalar (the reference SAE&#39;s definition)": f"{figures['scalar']:.4f}"
    }
    assert '<td>dead latents at the end of training</td><td class="number">1 of 40</td>' in text
    assert "within 4,096 tokens" not in text  # fewer are held out here
    figures["coverage"].append({"rows": 4096, "share": 0.25})
    shown = report_module._quality(figures, {"dead": 1})
    assert ("latents that fire within 4,096 tokens", "25.0 %", "62.0 %") in shown


def test_the_sweep_of_an_arm_is_shown(tmp_path: Path) -> None:
    planted = planted_store(tmp_path / "s.zarr")
    settings = [{"optim.lr": lr, "optim.lr_floor": lr / 10} for lr in (1e-3, 1e-2)]
    for name, changes, noise in zip("ab", settings, (0.0, 0.1), strict=True):
        make_arm(tmp_path / "sweep", name, planted, planted_sae(planted, noise=noise), **changes)
    run = tmp_path / "sweep/b"
    subject = Subject.open(run, None, torch.device("cpu"))
    assert report_module._sweep(subject) is None
    read, damaged = read_all([run.parent / name for name in "ab"])
    figures = sweep(read, damaged, None, 10**6, torch.device("cpu"))
    sweep_page.write(run.parent, figures, read)
    text = report(subject, 10**6, None).read_text()
    assert (
        "Best: a, variance explained" in text
        and 'href="../sweep.json"' in text
        and 'href="../sweep.html"' in text
    )
    assert (run.parent / f"sweep_layer_{subject.layer}.svg").read_text() in text
    assert "Variance explained on held-out rows, with its interval" in text
    final = torch.load(run / "sae_final.pt", weights_only=True)
    torch.save(
        {**final, "b_dec": final["b_dec"] + 1}, run / "sae_final.pt"
    )  # another one than was compared
    assert report_module._sweep(Subject.open(run, None, torch.device("cpu"))) is None
    run.rename(tmp_path / "sweep/c")  # not one of the arms that were compared
    assert (
        report_module._sweep(Subject.open(tmp_path / "sweep/c", None, torch.device("cpu"))) is None
    )


def test_control_characters_are_shown_as_marks() -> None:
    assert visible("a\nb\t\x1b\u202e\u200b") == "a⏎b⇥���"
    assert visible("é 😀 ي") == "é 😀 ي"


def outcome_of(said: str) -> Outcome:
    table = Table(said, ("a", said), [("1", said)])
    return Outcome(
        {"d": float("nan")}, [said], [table], {"drawn": Picture(said, "<svg id='drawn'></svg>")}
    )


def test_studies_are_on_the_page_as_text(subject: Subject) -> None:
    model = ModelConfig("nobody/none")
    for name in ("stability", "contrast"):
        Study(name, subject, {}, model).perform(
            Definition(lambda _: outcome_of("<b>found</b> | it"))
        )
    text = report(subject, 10**6, None).read_text()
    assert text.index("Study: contrast") < text.index("Study: stability")
    # Verdict at the top, summary, picture's name, caption and link, table's name, summary, header
    # and cell.
    assert text.count("&lt;b&gt;found&lt;/b&gt; | it") == 2 * 9
    assert "<b>found" not in text
    assert text.count("<svg id='drawn'></svg>") == 2
    assert 'href="studies/contrast/contrast.json"' in text
    markdown = (subject.run / "studies" / "contrast" / "contrast.md").read_text()
    assert "| 1 | <b>found</b> \\| it |" in markdown
    assert json.loads((subject.run / "studies" / "contrast" / "contrast.json").read_bytes())[
        "figures"
    ] == {"d": None}


def test_quality_of_another_sae_is_measured_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, random_rows()[:1024]).run
    first = report(Subject.open(run, None, torch.device("cpu")), 10**6, None).read_text()
    final = torch.load(run / "sae_final.pt", weights_only=True)
    torch.save({**final, "b_dec": final["b_dec"] + 1}, run / "sae_final.pt")
    second = report(Subject.open(run, None, torch.device("cpu")), 10**6, None).read_text()
    headlines = [re.findall(r"<b>([\d.-]+)</b>", text)[0] for text in (first, second)]
    assert headlines[0] != headlines[1]


def test_studies_of_another_sae_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, random_rows()[:1024]).run
    subject = Subject.open(run, None, torch.device("cpu"))
    Study("contrast", subject, {}, ModelConfig("nobody/none")).perform(
        Definition(lambda _: outcome_of("old"))
    )
    assert list(current(subject.run, subject.digest)) == ["contrast"]
    final = torch.load(run / "sae_final.pt", weights_only=True)
    torch.save({**final, "b_dec": final["b_dec"] + 1}, run / "sae_final.pt")
    subject = Subject.open(run, None, torch.device("cpu"))
    assert current(subject.run, subject.digest) == {}
    assert "contrast.json is of another SAE" in capsys.readouterr().err
    Study("contrast", subject, {}, ModelConfig("nobody/none")).perform(
        Definition(lambda _: outcome_of("new"))
    )
    assert current(subject.run, subject.digest)["contrast"].outcome.summary == ["new"]


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "analyze", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command(made: Made) -> None:
    done = analyze("study=quality", f"run={made.run}")
    assert done.returncode == 0, done.stderr
    assert "variance explained, centred" in done.stdout
    failed = analyze("study=quality", f"run={made.run}", "study.rows=0")
    assert failed.returncode == 2
    assert failed.stderr == "error: study.rows=0 must be at least 1\n"


def test_what_cannot_be_studied_is_said(made: Made, tmp_path: Path) -> None:
    cases = {
        (): "run= is missing",
        (f"run={tmp_path}",): f"no run at {tmp_path}",
        (f"run={made.run}", f"store={tmp_path / 'none'}"): "no activation store",
        ("study=gsm8k", f"run={made.run}"): "problems= is missing; give a .jsonl",
        ("study=gsm8k", f"run={made.run}", "problems=tiny"): "model.path=nobody/none cannot be had",
        (
            "study=gsm8k",
            f"run={made.run}",
            "problems=tiny",
            "model.path=nowhere",
        ): "model.path=nowhere is no folder",
        (
            "study=gsm8k",
            f"run={made.run}",
            "model.dtype=int4",
        ): "model.dtype=int4 must be bfloat16 or float32",
        ("study=gsm8k", f"runs={made.run}"): "runs= is for study=sweep",
    }
    with initialize_config_module("conf", version_base="1.3"):
        for arguments, message in cases.items():
            settings = OmegaConf.to_container(compose("analyze", list(arguments)), resolve=True)
            with pytest.raises(PipelineError, match=re.escape(message)):
                command(settings)


def test_other_stores_and_broken_runs_are_refused(made: Made, tmp_path: Path) -> None:
    other = make_run(tmp_path, random_rows()[:1024])
    with pytest.raises(PipelineError, match="was made with other settings: store is"):
        Subject.open(made.run, other.store.name, torch.device("cpu"))
    final = other.run / "sae_final.pt"
    final.write_bytes(final.read_bytes()[:100])
    with pytest.raises(PipelineError, match=r"sae_final\.pt cannot be read"):
        Subject.open(other.run, None, torch.device("cpu"))
    final.unlink()
    with pytest.raises(PipelineError, match="is not finished"):
        Subject.open(other.run, None, torch.device("cpu"))
