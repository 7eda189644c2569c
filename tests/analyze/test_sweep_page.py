"""Which runs are meant, what is refused, and that names of directories stay text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.analyze.command import command
from residual_saes.analyze.studies.sweep import page as sweep_page
from residual_saes.analyze.studies.sweep import plot as sweep_pictures
from residual_saes.analyze.studies.sweep import words
from residual_saes.analyze.studies.sweep.arms import Arm, find, labels, read_all, short, varying
from residual_saes.analyze.study import ASKED
from residual_saes.data.errors import MismatchError, PipelineError, SettingError, StoreError
from residual_saes.train import sae_file
from residual_saes.train.run import CONFIG
from tests.analyze.test_report import pictures
from tests.analyze.test_sweep import (
    Planted,
    by_name,
    make_arm,
    planted_sae,
    planted_store,
    run_sweep,
)
from tests.forked import run_forked


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_store(tmp_path_factory.mktemp("planted") / "s.zarr")


@pytest.fixture
def folder(planted: Planted, tmp_path: Path) -> Path:
    """A sweep as training names it, one arm of it unfinished."""
    for lr in (1e-3, 1e-2):
        for aux in (0.0, 0.25):
            made = planted_sae(planted, noise=lr + aux / 100) if (lr, aux) != (1e-2, 0.25) else None
            settings = {"optim.lr": lr, "sae.aux_coef": aux, "optim.lr_floor": lr / 10}
            make_arm(
                tmp_path / "sweep",
                f"optim.lr={lr},sae.aux_coef={aux},sae=tiny",
                planted,
                made,
                **settings,
            )
    return tmp_path / "sweep"


def asked(runs: Any, **changes: Any) -> dict[str, Any]:
    """Settings of the command."""
    study = {"name": "sweep", "rows": 1e6}
    return {
        "study": study,
        "run": None,
        "runs": runs,
        "out": None,
        "action": "run",
        "port": 0,
        "store": None,
        "device": "cpu",
        **dict.fromkeys(ASKED),
        **changes,
    }


# -- which runs ------------------------------------------------------------------------------------


def test_runs_are_named_in_many_ways(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = sorted(path for path in folder.iterdir())
    assert [
        find(str(text)) for text in (folder, f"{folder}/", f"{folder}/*", f"{folder.parent}/*")
    ] == [every] * 4
    first, second = every[:2]
    assert find(str(first)) == [first]
    assert find(f"{first},{second}") == find([str(first), str(second)]) == [first, second]
    assert find(f"{first}, {folder}/*aux_coef=0.0*") == [
        first,
        next(path for path in every[1:] if "=0.0," in str(path)),
    ]
    assert find([str(first), f"{folder}/*"]) == every  # none twice
    both = [shutil.copytree(first, folder.parent / "more" / name) for name in ("a", "a,b")]
    assert find(str(both[1])) == [both[1]]  # not a, and then a b that is not there
    assert find(f"{both[0]},{both[1]}") == both
    shutil.rmtree(folder.parent / "more")
    monkeypatch.chdir(folder.parent)
    assert find("sweep/*") == [path.relative_to(folder.parent) for path in every]
    (folder / "sweep.html").write_text("")  # our own outputs and logs are no runs
    (folder / "jobs").mkdir()
    assert find(f"{folder}/*") == find(str(folder)) == every
    for text in (f"{folder}/none*", f"{first},{folder}/none", f"{folder}/jobs", "", ","):
        with pytest.raises(SettingError, match="runs="):
            find(text)
    with pytest.raises(SettingError, match="runs="):
        find([])
    with pytest.raises(SettingError, match="runs="):
        find("x" * 5000)


def test_the_command_line(folder: Path) -> None:
    arms = sorted(folder.iterdir())
    runs = f"runs={arms[0]},{folder}/*=0.25,*"
    done = run_forked("-m", "analyze", "study=sweep", runs, "device=cpu")
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "sweep.json").read_bytes())
    (layer,) = figures["layers"]
    explained = by_name(figures)[layer["best"]]["variance_explained"]
    assert layer["best"].startswith("optim.lr=0.001,sae.aux_coef=0.0,")
    assert explained == pytest.approx(0.9969, abs=1e-4) and f"{explained:.4f}" in done.stdout
    assert done.stdout.count("| yes |") == 2 and done.stdout.count("| step 8 of 16 |") == 1
    assert str(folder / "sweep.html") in done.stderr
    following = f"python -m train.export run={folder / layer['choice']} to=saelens"
    assert f"    {following}\n" in done.stdout
    assert f"\n{following}\n" in (folder / "sweep.html").read_text()


# -- refusals --------------------------------------------------------------------------------------


def test_refusals(folder: Path, planted: Planted, tmp_path: Path) -> None:
    for settings, named in (
        (asked(None), "runs="),
        (asked(str(folder), run="x"), "runs="),
        (asked("x", study={"name": "quality", "rows": 1}), "runs="),
        (asked(str(folder), study={"name": "sweep", "rows": 0}), "study.rows=0"),
        (asked(str(tmp_path / "none")), "runs="),
        (asked(str(folder), store=str(tmp_path / "none")), str(tmp_path / "none")),
    ):
        with pytest.raises(PipelineError, match=re.escape(named)):
            command(settings)
    other = planted_store(tmp_path / "other.zarr", seed=1)._replace(store=planted.store)
    with pytest.raises(StoreError):
        command(asked([str(make_arm(tmp_path / "alone", "u", other, None))]))
    assert (tmp_path / "alone" / "sweep.html").exists()


def test_another_store_is_refused_with_both_names(
    folder: Path, planted: Planted, tmp_path: Path
) -> None:
    other = planted_store(tmp_path / "other.zarr", layers=(3, 4), seed=1)
    foreign = make_arm(folder, "zz_foreign", other, None)
    with pytest.raises(StoreError) as refused:
        command(asked(f"{folder}/*"))
    for part in (
        planted.store.name,
        other.store.name,
        planted.store.identity,
        other.store.identity,
        str(foreign),
    ):
        assert part in str(refused.value)
    shutil.rmtree(foreign)
    with pytest.raises(MismatchError, match=other.store.identity):
        command(asked(f"{folder}/*", store=other.store.name))


def damage_config(run: Path) -> None:
    (run / CONFIG).write_text("settings: {layer: 3}\nenvironment: {}\n")


def damage_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text("[1]\n")


def lose_config(run: Path) -> None:
    (run / CONFIG).unlink()


def cut_sae(run: Path) -> None:
    (run / sae_file.FILE).write_bytes((run / sae_file.FILE).read_bytes()[:100])


def other_shape(run: Path) -> None:
    content = torch.load(run / sae_file.FILE, weights_only=True)
    narrow = {
        "W_enc": content["W_enc"][:, :8],
        "W_dec": content["W_dec"][:8],
        "b_enc": content["b_enc"][:8],
    }
    torch.save({**content, **narrow}, run / sae_file.FILE)


def not_finite(run: Path) -> None:
    content = torch.load(run / sae_file.FILE, weights_only=True)
    content["b_dec"][0] = torch.nan
    torch.save(content, run / sae_file.FILE)


BROKEN = "optim.lr=0.001,sae.aux_coef=0.0,sae=tiny"


@pytest.mark.parametrize(
    "damage", [damage_config, damage_metrics, lose_config, cut_sae, other_shape]
)
def test_a_damaged_arm_is_left_out(damage: Any, folder: Path) -> None:
    damage(folder / BROKEN)
    figures = run_sweep(f"{folder}/*")
    assert figures["layers"][0]["best"] == "optim.lr=0.001,sae.aux_coef=0.25,sae=tiny"
    assert list(figures["damaged"]) == [BROKEN]


def test_a_damaged_arm_is_one_line_and_the_others_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder / BROKEN
    not_finite(broken)
    with pytest.raises(StoreError, match=re.escape(broken.name)):
        command(asked(f"{folder}/*"))
    figures = json.loads((folder / "sweep.json").read_bytes())
    assert figures["layers"][0]["best"] == "optim.lr=0.001,sae.aux_coef=0.25,sae=tiny"
    assert list(figures["damaged"]) == [broken.name]
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if broken.name in line and line[0] != "|"]
    assert len(lines) == 1 and broken.name in (folder / "sweep.html").read_text()


def test_unfinished_arms_are_listed_and_left_out(
    folder: Path, planted: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    name, not_begun = (f"optim.lr={lr},sae.aux_coef=0.25,sae=tiny" for lr in (0.01, 0.1))
    settings = {"optim.lr": 0.1, "optim.lr_floor": 0.01, "sae.aux_coef": 0.25}
    run = make_arm(folder, not_begun, planted, None, **settings)
    for file in ("metrics.jsonl", "timings.jsonl"):
        (run / file).unlink()
    command(asked(f"{folder}/*"))
    printed = capsys.readouterr().out
    assert f"{name} (step 8 of 16)" in printed and f"{not_begun} (step 0 of 16)" in printed
    (row,) = re.findall(r"^\| optim.lr=0.01,sae.aux_coef=0.25 \|.*", printed, re.MULTILINE)
    assert "| 0.5000 | - | - |" in row and row.endswith("| 512 | 12,345 | step 8 of 16 |")


# -- output ----------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)<',
    "$x_{^$",
    "a|b\\|c",
    "_x\u202egnp\n| y |",
    "{{ 7*7 }} 学",
]


def test_names_stay_text(planted: Planted, tmp_path: Path) -> None:
    for number, name in enumerate(HOSTILE):
        made = planted_sae(planted, noise=number / 100) if number else None
        make_arm(tmp_path / "<b>runs", name, planted, made, **{"sae.activation": f"<i>{number}$_"})
    command(asked(str(tmp_path / "<b>runs")))
    text = (tmp_path / "<b>runs" / "sweep.html").read_text()
    page = _Page()
    page.feed(text)
    assert not {"script", "svg", "b", "i"} & set(page.tags)
    assert page.tags.count("img") == len(pictures(text)) > 0
    assert not {name for name in page.attributes if name.startswith("on")}
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "{{ 7*7 }}" in text and "\u202e" not in text
    lines = (tmp_path / "<b>runs" / "sweep.md").read_text().splitlines()
    columns = {
        len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines if line.startswith("|")
    }
    assert len(columns) == 1
    assert not re.search(r"(?<!\\)<", "\n".join(lines))
    # Without a setting that differs, the curves are named by the arms themselves.
    read = [Arm.read(run, run.name) for run in find(str(tmp_path / "<b>runs"))]
    svg = sweep_pictures.over_tokens([(arm.name.replace("\n", ""), arm) for arm in read], 0, 1)
    assert "<img" not in svg and "<script" not in svg and "$x_{^$" in svg


def test_the_page_says_what_the_figures_say(folder: Path) -> None:
    command(asked(f"{folder}/*"))
    figures = json.loads((folder / "sweep.json").read_bytes())
    text = (folder / "sweep.html").read_text()
    for name, arm in by_name(figures).items():
        assert f"{arm['variance_explained']:.4f}" in text
        assert f'title="{folder / name}"' in text
    assert len(pictures(text)) == 3 + 2  # against lr, and a picture of curves for each aux_coef
    assert figures["settings"] == ["optim.lr", "optim.lr_floor", "sae.aux_coef"]
    assert figures["same_in_all"]["sae.k"] == 3
    (layer,) = figures["layers"]
    for documents, has_share in ((layer["documents"], True), (1, False)):
        said = " ".join(words.verdict({**layer, "documents": documents}, str))
        assert ("first in" in said) == has_share and ("1 document," in said) != has_share
    assert "http://" not in re.sub(r"http://www\.w3\.org/\S+", "", text)


def test_the_second_call_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    names = (sweep_page.PAGE, sweep_page.JSON, sweep_page.MARKDOWN)
    (folder / sweep_page.PAGE).write_text("old")
    command(asked(f"{folder}/*"))
    first = [(folder / name).read_bytes() for name in names]
    command(asked(f"{folder}/*", out=str(tmp_path / "elsewhere")))
    assert [(tmp_path / "elsewhere" / name).read_bytes() for name in names] == first
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_the_setting_along_the_axis(planted: Planted, tmp_path: Path) -> None:
    def laid_out(name: str, *settings: dict[str, Any]) -> sweep_pictures.Layout:
        for number, changes in enumerate(settings):
            make_arm(tmp_path / name, f"{number}", planted, None, **changes)
        read, _ = read_all(find(str(tmp_path / name)))
        return sweep_pictures.layout(read, varying(read))

    lr, aux, seed, kind = "optim.lr", "sae.aux_coef", "seed", "sae.activation"
    many = [
        {lr: a, "optim.lr_floor": a / 10, aux: b, seed: s}
        for a in (1, 2)
        for b in (0, 1, 2)
        for s in (0, 1, 2, 3)
    ]
    assert laid_out("lr first", *many) == (
        lr,
        [aux],
    )  # though it has fewer values; what goes with it makes no line
    assert laid_out("most values", *({aux: b, "sae.k": k} for b in (0, 1) for k in (1, 2, 4))) == (
        "sae.k",
        [aux],
    )
    assert laid_out("text", *({kind: t, aux: b} for t in "abc" for b in (0, 1))) == (aux, [kind])
    assert laid_out("only text", {kind: "a"}, {kind: "b"}) == (kind, [])
    assert laid_out("only seeds", {seed: 0}, {seed: 1}) == (seed, [])
    assert laid_out("copies", {}, {}) == (None, [])


def test_axes_are_logarithmic_where_they_can_be() -> None:
    scale = sweep_pictures.Scale.of([1e-3, 1e-2, 1e-3])
    assert scale.logarithmic and scale.position(1e-2) == 1e-2
    assert scale.ticks == [(1e-3, "0.001"), (1e-2, "0.01")]
    scale = sweep_pictures.Scale.of([0.25, 0, None, "x"])
    assert not scale.logarithmic and scale.position(0.0) == 0.0
    assert [label for _, label in sorted(scale.ticks)] == ["0", "0.25", "x", "-"]


def test_names_without_what_all_share() -> None:
    assert labels(["a=1,s=x", "a=2,s=x", "by hand"]) == {
        "a=1,s=x": "a=1",
        "a=2,s=x": "a=2",
        "by hand": "by hand",
    }
    assert labels(["L5/a=1,s=x", "L5/a=2,s=x"]) == {"L5/a=1,s=x": "a=1", "L5/a=2,s=x": "a=2"}
    for kept in (["L5/a=1", "L8/a=1"], ["a,b", "b,a"], ["one,two"]):
        assert labels(kept) == dict(zip(kept, kept, strict=True))
    assert short(["optim.lr", "a.x", "b.x"]) == {"optim.lr": "lr", "a.x": "a.x", "b.x": "b.x"}


def test_arms_of_several_folders_are_told_apart(folder: Path, planted: Planted) -> None:
    make_arm(folder.parent / "more", "only", planted, planted_sae(planted))
    found = run_sweep([f"{folder}/*", str(folder.parent / "more")])
    assert set(by_name(found)) == {
        "more/only",
        *(f"sweep/{path.name}" for path in folder.iterdir()),
    }
    assert found["folder"] == str(folder.parent)
