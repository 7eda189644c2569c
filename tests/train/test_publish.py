"""A published run: true figures, code that runs, foreign text inert, no upload unasked."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from hydra import compose, initialize_config_module
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

from residual_saes.analyze import results
from residual_saes.analyze.peers.imported import READERS
from residual_saes.analyze.studies.quality import DEFINITION, DEFINITIONS, quality
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.conf.command import run_command
from residual_saes.data import digests, durable
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.markdown import escaped
from residual_saes.data.site import HookPoint
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest.model import ModelConfig
from residual_saes.harvest.model import load as harvested
from residual_saes.harvest.site import tap
from residual_saes.train.export import saelens, safetensors
from residual_saes.train.ports import recorded_ports
from residual_saes.train.publish import release
from residual_saes.train.publish.card import ABSENT
from residual_saes.train.publish.command import command
from residual_saes.train.run import CONFIG, METRICS
from residual_saes.train.sae import SAE
from residual_saes.train.sae_file import FILE, load
from tests.analyze.conftest import make_run, random_rows
from tests.train.test_formats import a_run, made
from tests.train.test_libraries import PYTHON, require

REPO, TOKEN = "somebody/an-sae", "hf_SecretSecretSecretSecret"
HOSTILE = (
    "</summary><script>alert(1)</script> | [x](http://evil.example) "
    "`a` **b** $$c$$ \\(d\\) <!-- \n# big\n| row |"
)


def publishes(run: Path, *overrides: str) -> Path:
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        settings = OmegaConf.to_container(
            compose("publish", [f"run={run}", f"repo={REPO}", *overrides]), resolve=True
        )
    command(settings)
    return run / "publish"


def finished(folder: Path, sae: SAE, /, **settings: Any) -> Path:
    """The least that is a finished run."""
    run = a_run(folder, sae)
    config = yaml.safe_load((run / CONFIG).read_text())
    (run / CONFIG).write_text(
        yaml.safe_dump({**config, "settings": {**config["settings"], **settings}})
    )
    record = {"split": "held_out", "step": 3, "tokens": 30, "variance_explained": 0.8123, "dead": 2}
    (run / METRICS).write_text(json.dumps(record) + "\n")
    return sealed(run)


def sealed(run: Path) -> Path:
    """A run whose record vouches for its files as they are."""
    digests.write(run, [CONFIG, FILE, METRICS])
    return run


def with_study(
    run: Path,
    summary: str,
    cell: str = "1",
    sae: str | None = None,
    name: str = "splice",
    finds: bool = True,
) -> None:
    folder = run / "studies" / name
    folder.mkdir(parents=True, exist_ok=True)
    digest = sae or durable.digest_file(run / FILE).xxh3_128
    record = {"finds": finds, "settings": {"sae": digest}, "summary": [summary]}
    record["tables"] = [["caption " + cell, ["head", "value"], [[cell, "2"]]]]
    (folder / f"{name}.json").write_text(json.dumps(record))
    (folder / "means.npz").write_bytes(b"big")
    results.seal(folder, record)


def card(run: Path) -> str:
    return (run / "publish" / "README.md").read_text()


# -- the card --------------------------------------------------------------------------------------


def test_a_bare_run_says_what_is_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "run", made("topk"))
    folder = publishes(run)
    printed = capsys.readouterr().out
    assert "upload=true" in printed and REPO in printed
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "config.json",
        "config.yaml",
        "digests.json",
        "metrics.jsonl",
        "golden.safetensors",
        "sae.safetensors",
        "sae_final.pt",
        "saelens/cfg.json",
        "saelens/golden.safetensors",
        "saelens/sae_weights.safetensors",
        "training.png",
    }
    for file in files:
        line = rf"[kM]?B +{re.escape(str(folder / file))}$"
        assert re.search(line, printed, re.MULTILINE), file
    text = card(run)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "google/gemma-4-E4B" and head["license"] == "apache-2.0"
    assert {"sparse-autoencoder", "interpretability"} <= set(head["tags"])
    assert "datasets" not in head
    # As the Hub's own client reads it; example code and citation name the repository.
    own = ModelCard(text)
    assert own.data.to_dict() == head and own.content == text
    assert f'SAE.load("hub:{REPO}")' in text and "OWNER/NAME" not in text
    assert rf"\url{{https://huggingface.co/{REPO}}}" in text and "@misc{an-sae," in text
    assert "](training.png)" in text and (folder / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert "0.8123" in text and f"| batch | {ABSENT} tokens |" in text
    assert "quality.json" in text and "| variance explained | definition |" not in text
    assert "<details>" not in text
    assert durable.digest_file(run / FILE).xxh3_128 in text
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    for again in (
        load(folder / FILE),
        saelens.read(folder / "saelens"),
        safetensors.read(folder),
    ):
        torch.testing.assert_close(again(x), load(run / FILE)(x), rtol=1e-5, atol=1e-5)


def test_every_figure_of_quality_is_there_with_its_definition(tmp_path: Path) -> None:
    run = make_run(tmp_path, random_rows()).run
    figures = quality(subject := Subject.open(run, None, torch.device("cpu")), 10_000)
    study = Study("quality", subject, {"rows": 10_000}, ModelConfig("nobody/none"))
    study.perform(DEFINITION)
    config = yaml.safe_load((run / CONFIG).read_text())
    source = {
        "model": "google/gemma-4-E4B",
        "context": 32,
        "revision": "main",
        "weights": "w123",
        "text": "HuggingFaceFW/fineweb",
    }
    (run / CONFIG).write_text(
        yaml.safe_dump({**config, "source": source, "store_path": "/home/me/secret/s.zarr"})
    )
    publishes(run)
    text = card(run)
    assert "| digest of its weights | w123 |" in text
    for name, subset in figures["variance_explained"].items():
        low, high = subset["centred_95"]
        row = f"| centred, {name} | 1 - sum \\|e\\|² / sum \\|x - μ\\|², the figure to quote | "
        interval = f"{subset['centred']:.4f} [{low:.4f}, {high:.4f}] ({subset['rows']:,} rows; "
        assert row + interval in text
        for key in DEFINITIONS:
            label = f"{key.replace('_', ' ')}, {name}"
            assert re.search(rf"\| {label} \| .* \| {subset[key]:.4f} \|", text), key
        for share in subset["left_out"].values():
            said = f"({share['count']:,} rows: {share['rows']:.3%} of rows, "
            assert (said if share["rows"] else "(none)") in text
    assert f"| latents silent on all these rows | {figures['silent']:,} |" in text
    assert yaml.safe_load(text.split("---\n")[1])["datasets"] == ["HuggingFaceFW/fineweb"]
    kept = yaml.safe_load((run / "publish" / CONFIG).read_text())
    assert kept["store_path"] == "s.zarr" and kept["settings"] == config["settings"]
    assert "secret" not in text


def test_studies_are_told_in_their_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run", made("topk"))
    with_study(run, "Loss rises by 0.31 [0.30, 0.32], p < 0.05.")
    with_study(run, "Of another SAE.", sae="0" * 32, name="steering")
    folder = publishes(run)
    text = card(run)
    assert "- Loss rises by 0.31 [0.30, 0.32], p &lt; 0.05.\n" in text
    assert "Of another SAE" not in text
    assert "study=steering" in capsys.readouterr().err
    published = [path.name for path in (folder / "studies").rglob("*") if path.is_file()]
    assert published == ["splice.json"]


def test_no_local_path_is_published_and_what_is_no_longer_found_goes(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", made("topk"))
    with_study(run, f"files are in {tmp_path}", name="delphi", finds=False)
    with_study(run, "a finding", name="contrast")
    (run / "studies/contrast/contrastive_features_L5.json").write_text('{"helpful": [3]}')
    results.seal(run / "studies/contrast", {"settings": {}})
    folder = publishes(run)
    text = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert str(tmp_path).encode() not in text and b"a finding" in text
    assert (folder / "studies/contrast/contrastive_features_L5.json").is_file()
    (run / "studies/contrast/contrast.json").unlink()
    publishes(run)
    assert not list(folder.glob("studies/*/*")) and "a finding" not in card(run)


def test_a_catalogue_pack_names_the_repository(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", made("topk"))
    with_study(run, "it failed", name="stage_gate")
    pack = {"release": "run", "features": [{"release": "run"}], "validation": {"verdict": "FAIL"}}
    (run / "studies/stage_gate/reasoning_pack.json").write_text(json.dumps(pack))
    results.seal(run / "studies/stage_gate", {"settings": {}})
    published = json.loads((publishes(run) / "studies/stage_gate/reasoning_pack.json").read_bytes())
    assert "/" in published["release"] and published["features"] == [
        {"release": published["release"]}
    ]
    assert published["validation"] == {"verdict": "FAIL"}


def test_foreign_text_cannot_break_the_page(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", made("topk"))
    config = yaml.safe_load((run / CONFIG).read_text())
    config["source"] |= {"model": f"a/b\n---\n{HOSTILE}", "text": HOSTILE}
    (run / CONFIG).write_text(yaml.safe_dump(config))
    sealed(run)
    plain = finished(tmp_path / "plain", made("topk"))
    with_study(run, HOSTILE, HOSTILE)
    with_study(plain, "summary", "cell")
    publishes(run), publishes(plain)
    (mine, words), (theirs, _) = parsed(card(run)), parsed(card(plain))
    assert mine == theirs and len(mine) > 300
    assert (
        " ".join(HOSTILE.split()) in words
    )  # the study's summary and its cell, as they were written
    assert not re.search(r"<script|\]\(http|://evil|\$\$", card(run))
    assert set(yaml.safe_load(card(run).split("---\n")[1])) == {"license", "library_name", "tags"}


def parsed(text: str) -> tuple[list[str], list[str]]:
    """The elements that Markdown makes of a card, without their words; and those words."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    elements, words = [], []
    for token in reader.parse(text.split("---\n", 2)[2]):
        elements.append(token.type)
        if token.type == "html_block":
            elements += re.findall(r"<[^>]*>?", token.content)
        whole = ""
        for child in token.children or []:
            if child.type in ("text", "text_special"):
                whole += child.content
            else:
                elements.append(child.type)
        words.append(whole)
    return elements, words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("- a", "\\- a"),
        ("-5", "-5"),
        ("---", "\\---"),
        ("1. a", "1\\. a"),
        ("0.5 [0.4, 0.6]", "0.5 [0.4, 0.6]"),
        ("# a", "\\# a"),
        ("[ ] a", "\\[ ] a"),
        ("[a]: b", "\\[a]: b"),
        ("_a_ b_c", "\\_a\\_ b_c"),
        ("a\u202eb\x00\r\n c", r"a&#92;u202eb&#92;x00 c"),
        ("WWW.a.b c@d", "WWW&#46;a.b c&#64;d"),
    ],
)
def test_escaping(text: str, shown: str) -> None:
    assert escaped(text) == shown


# -- its code --------------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[str]:
    yield from re.findall(r"```python\n(.*?)```", text, re.DOTALL)


D_TINY = 64
CATALOGUED = 41
OF_KIND: dict[str, dict[str, Any]] = {
    "topk": {},
    "thresholds": {},
    "sae of mlp_out": {"site": "mlp_out"},
    "transcoder topk skip": {"site": "mlp_in", "sae": {"kind": "transcoder", "skip": True}},
    "transcoder thresholds": {"site": "mlp_in", "sae": {"kind": "transcoder"}},
    "crosscoder topk": {"layer": [3, 5], "sae": {"kind": "crosscoder"}},
}


def of_tiny(kind: str) -> SAE:
    draw = torch.Generator().manual_seed(0)
    d = 2 * D_TINY if "crosscoder" in kind else D_TINY
    W_dec = torch.nn.functional.normalize(torch.randn(96, d, generator=draw), dim=1)
    threshold = None if "topk" in kind else torch.rand(96, generator=draw)
    b_dec = torch.randn(d, generator=draw)
    b_in = b_dec + 1 if "transcoder" in kind else None
    W_skip = torch.randn(d, d, generator=draw) if "skip" in kind else None
    return SAE.of(W_dec.T.contiguous(), W_dec, torch.zeros(96), b_dec, 8, threshold, b_in, W_skip)


def of_the_model(ids: torch.Tensor, points: Sequence[HookPoint]) -> torch.Tensor:
    """The rows of hook points side by side, as a harvest takes them."""
    lm = harvested(ModelConfig(str(MODEL_DIR), dtype="float32"))
    with tap(lm, points) as taken, torch.inference_mode():
        lm.decoder(input_ids=ids, use_cache=False)
    return torch.cat([taken[point][0, 1:].float() for point in points], dim=1)


@pytest.mark.parametrize("kind", OF_KIND)
def test_the_cards_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On the embedded model and the folder, in the place of the Hub's."""
    sae = of_tiny(kind)
    settings = {"layer": 5, "policy": {"drop_bos": True}, **OF_KIND[kind]}
    run = finished(tmp_path / "run", sae, **settings)
    config = yaml.safe_load((run / CONFIG).read_text())
    config["source"] |= {"architecture": "Gemma4ForCausalLM", "model": "tiny", "context": 256}
    (run / CONFIG).write_text(yaml.safe_dump(config))
    with_study(sealed(run), "found", name="catalogue")
    record = json.loads((run / "studies/catalogue/catalogue.json").read_text())
    shown = [[str(CATALOGUED), "3%", "2.5", "`7`"]]
    record["tables"] = [["latents", ["latent", "density", "mean", "strongest at"], shown]]
    (run / "studies/catalogue/catalogue.json").write_text(json.dumps(record))
    results.seal(run / "studies/catalogue", record)
    folder = publishes(run)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        of_the_auto = auto.from_pretrained
        monkeypatch.setattr(
            auto,
            "from_pretrained",
            lambda name, of=of_the_auto, **options: of(MODEL_DIR, **options),
        )
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repo, file: folder / {REPO: file}[repo]
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(folder))
    is_sae = kind in ("topk", "thresholds")
    code = [*blocks(card(run))]
    # Ours, in plain torch, and for two kinds SAELens'.
    assert len(code) == 2 + is_sae + (kind not in ("transcoder topk skip", "crosscoder topk"))
    found: dict[str, Any] = {}
    exec(code[0].replace("FOLDER/OF/THE/MODEL", str(MODEL_DIR)), found)
    assert found["sae"].d_sae == 96 and found["found"].ids
    if is_sae:
        assert f"with sae.steer({CATALOGUED}, 2, activation=2.5):" in code[1]
        exec(code[1], found)
    exec(code[1 + is_sae], found)
    ports = recorded_ports(settings)
    x = of_the_model(found["ids"], [port.point for port in ports.reads])
    torch.testing.assert_close(found["x"], x)
    assert len(x) > 3
    out = found["y_hat" if "transcoder" in kind else "x_hat"]
    torch.testing.assert_close(out, sae(x), rtol=1e-5, atol=1e-4)
    if "transcoder" in kind:
        written = of_the_model(found["ids"], [port.point for port in ports.writes])
        torch.testing.assert_close(found["y"], written)
    if "crosscoder" in kind:
        torch.testing.assert_close(found["parts"]["5"], out[:, D_TINY:])


def test_a_card_without_the_models_family_names_no_module(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", of_tiny("transcoder topk"), **OF_KIND["transcoder thresholds"])
    publishes(run)
    assert "put in their paths" in card(run) and '"PATH.OF.THE.MODULE", "output"' in card(run)


def test_the_last_layers_rows_are_not_in_hidden_states(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", made("topk"), layer=11)
    for layers, is_last in ((12, True), (13, False), (None, False)):
        config = yaml.safe_load((run / CONFIG).read_text())
        config["source"]["n_layers"] = layers
        (run / CONFIG).write_text(yaml.safe_dump(config))
        sealed(run)
        publishes(run)
        assert ("final norm" in card(run)) == is_last


def test_every_copy_of_the_weights_has_golden_rows(tmp_path: Path) -> None:
    folder = publishes(finished(tmp_path / "run", made("topk")))
    for library, file in (
        ("reference", "sae_final.pt"),
        ("safetensors", "sae.safetensors"),
        ("saelens", "saelens/sae_weights.safetensors"),
    ):
        weights = folder / file
        where = weights if library == "reference" else weights.parent
        READERS[library](where)
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
        with pytest.raises(StoreError, match=re.escape(weights.name)):
            READERS[library](where)
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)


@pytest.mark.parametrize(
    "kind", ["topk", "thresholds", "transcoder topk", "transcoder thresholds skip"]
)
def test_saelens_loads_it_by_its_name(tmp_path: Path, kind: str) -> None:
    require("saelens")
    settings = OF_KIND["transcoder thresholds"] if "transcoder" in kind else {}
    run = finished(tmp_path / "run", made(kind), **settings)
    folder = publishes(run)
    *_, code = blocks(card(run))
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    out = "y_hat" if "transcoder" in kind else "x_hat"
    torch.save({"x": x, out: load(run / FILE)(x)}, tmp_path / "rows.pt")
    hub = f"""
import torch, sae_lens.loading.pretrained_sae_loaders as loaders
from pathlib import Path
def local(repo_id, filename, **_):
    assert repo_id == {REPO!r}
    if not (path := Path({str(folder)!r}, filename)).exists():
        raise loaders.EntryNotFoundError(filename)
    return str(path)
loaders.hf_hub_download = local
rows = torch.load("rows.pt", weights_only=True); x = rows["x"]
"""
    check = f'torch.testing.assert_close({out}, rows["{out}"], rtol=1e-4, atol=1e-4)'
    subprocess.run([PYTHON, "-c", f"{hub}\n{code}\n{check}"], check=True, cwd=tmp_path)


# -- the upload ------------------------------------------------------------------------------------


class Hub(NamedTuple):
    """What was asked of it."""

    calls: list[tuple[str, dict[str, Any]]]
    public: list[bool]  # whether the repository is: the last
    fails: list[Exception]  # with what it fails: the first


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub([], [False], [])

    class FakeApi:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            found.calls.append(("create_repo", {"repo_id": repo_id, **options}))

        def model_info(self, repo_id: str) -> Any:
            return type("Info", (), {"private": not found.public[-1]})

        def upload_folder(self, **options: Any) -> None:
            if found.fails:
                raise found.fails[0]
            found.calls.append(("upload_folder", options))

    monkeypatch.setattr(release, "HfApi", FakeApi)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return found


def test_upload_is_asked_for(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "run", made("topk"))
    publishes(run)
    assert hub.calls == []
    folder = publishes(run, "upload=true")
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    (_, made_with), (_, sent) = hub.calls
    assert made_with == {"repo_id": REPO, "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == (REPO, folder)
    assert sent["commit_message"] == "Publish run"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(sent["allow_patterns"]) == files
    hub.public[0] = True
    with pytest.raises(SettingError, match="private=false"):
        publishes(run, "upload=true")
    assert len(hub.calls) == 3  # nothing more was sent
    publishes(run, "upload=true", "private=false")
    assert hub.calls[3][1]["private"] is False and hub.calls[-1][0] == "upload_folder"
    assert TOKEN not in "".join(capsys.readouterr()) + json.dumps(hub.calls, default=str)


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [(None, "ConnectionError", 75), (403, "HTTP 403", 2), (500, "HTTP 500", 75)],
)
def test_no_token_in_what_is_printed(
    tmp_path: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    status: int | None,
    reason: str,
    code: int,
) -> None:
    error = ConnectionError(f"Authorization: Bearer {TOKEN}")
    if status:
        error.response = type("Answer", (), {"status_code": status, "headers": {}})()
    hub.fails.append(error)
    run = finished(tmp_path / "run", made("topk"))
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: publishes(run, "upload=true") and None)
    printed = capsys.readouterr()
    assert stopped.value.code == code and reason in printed.err and printed.err.count("\n") == 1
    assert TOKEN not in printed.out + printed.err
    assert not any(TOKEN.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_refusals(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path / "run", made("topk"))
    for repo in (
        "null",
        "alone",
        "a/b/c",
        "a/b--c",
        "a/../b",
        "'a b/c'",
        "a/b.git",
        "-a/b",
        "a/" + "b" * 99,
        "'ä/b'",
    ):
        with pytest.raises(SettingError, match="repo="):
            publishes(run, f"repo={repo}", "upload=true")
    for override, error, name in [
        ("run=null", SettingError, "run="),
        ("upload=maybe", SettingError, "upload=maybe"),
        (f"run={tmp_path / 'none'}", StoreError, str(tmp_path / "none")),
    ]:
        with pytest.raises(error, match=re.escape(name)):
            publishes(run, override)
    monkeypatch.setattr(release, "get_token", lambda: None)
    with pytest.raises(SettingError, match="HF_TOKEN"):
        publishes(run, "upload=true")
    assert not (run / "publish").exists() and hub.calls == []
    publishes(run)
    (run / "publish" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        publishes(run)
    (run / FILE).unlink()
    with pytest.raises(StoreError, match=FILE):
        publishes(run)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", made("topk"))
    (run / METRICS).write_text(json.dumps({"split": "train", "step": 1}) + "\n")
    sealed(run)
    with pytest.raises(StoreError, match=METRICS):
        publishes(run)


@pytest.mark.parametrize("damaged", ["splice.json", "means.npz", "digests.json"])
def test_a_study_that_is_not_whole_is_left_out(
    tmp_path: Path, damaged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run", made("topk"))
    with_study(run, "a finding")
    publishes(run)
    assert "a finding" in card(run)
    path = run / "studies" / "splice" / damaged
    path.write_bytes(path.read_bytes()[:-2] + b"x")
    publishes(run)
    assert "a finding" not in card(run)
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if f"splice/{damaged}" in line]
    assert lines and all("study=splice" in line for line in lines), said
