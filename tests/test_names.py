"""What was typed is the name: settings that name a path, a run, a store, a revision, a column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from residual_saes.conf.command import plain
from residual_saes.conf.names import LISTS, LITERAL, NAMES, quoted, require_no_secret, typed
from residual_saes.data.errors import SettingError
from residual_saes.data.text.sources import source_of
from residual_saes.harvest.command import harvest_config, model_config
from tests.conftest import Call
from tests.test_house import SETTINGS
from tests.train.test_command import SMALL, make_store

CONF = Path(__file__).parents[1] / "conf"
ODD = [
    *("20240101", "2024_01_02", "1e5", "1e10", "0x10", "0b1", "1.50", "007", "-1", "+1", ".5"),
    *("true", "No", "on", "none", "None", "nan", "inf", "~", "*?", "@", "!", "=", "a=b", "a:b"),
    *("my run", " a", "a ", "it(s)", "it's", "'a", '"', 'a"b', "a'b'c", "[x]", "a[1,2]", "{a: 1}"),
    *("a, b", "#a", "a #b", "50%", "a\\b", "a\\", "a\\'", "a\\\\'b\\\\", "naïve é 数"),
]
OF_FUNCTIONS = ["choice(a,b)", "range(1,4)", "a,b"]  # that Hydra sweeps over in a multirun
# Settings with other text, by the last part of their name: they take a fixed set of words.
WORDS = {
    "objectives",
    "attention",
    *("action", "activation", "aux_norm", "decay", "dtype", "formula", "init", "kind", "lr"),
    *(
        "bad",
        "grading",
        "name",
        "oom",
        "part",
        "pooling",
        "positions",
        "prompt",
        "select",
        "side",
        "site",
        "target",
        "to",
    ),
}
# Settings without a default that name nothing.
NAMELESS = {
    *("layer", "tokens", "unit", "max_bytes", "rank", "world", "device", "train.matmul", "codec"),
    "train.ways",
    *("log", "context", "batch", "sae.d_sae", "sae.k", "sae.k_aux"),
    *("site", "sae.target", "study.most_ce_increase"),
    *("accept", "drop_bos", "drop_outliers", "feature", "scale"),
    *("answers.samples", "answers.temperature"),
    *(
        "text.max_tokens",
        "sae.dead_after",
        "optim.warmup_steps",
        "optim.clip_norm",
        "study.features",
        "study.splits",
        "study.layer",
        "study.layers",
        "study.bands",
        "study.lora",
        "study.together",
        "model.dtype",
    ),
}


def read(*arguments: str) -> dict[str, Any]:
    """What Hydra makes of a command line's overrides, by key."""
    parsed = OverridesParser.create().parse_overrides(quoted(arguments))
    return {override.key_or_group: override.value() for override in parsed}


@pytest.mark.parametrize(
    "key",
    [
        *("run", "+text.sources.mine.path", "model.revision"),
        *("study.other", "study.reason_score.corpus"),
    ],
)
def test_hydra_reads_what_was_typed(key: str) -> None:
    for name in [*ODD, *OF_FUNCTIONS]:
        assert read(f"{key}={name}") == {key.lstrip("+"): name}


def test_so_does_it_in_a_multirun() -> None:
    for name in {*ODD} - {"'a", "a, b"}:  # they end where the sweep says
        first, *overrides = quoted(["-m", f"run={name}", f"store=x,{name},'y,z'"])
        assert first == "-m"
        run, stores = OverridesParser.create().parse_overrides(overrides)
        assert run.value() == name and not run.is_sweep_override()
        swept = [f"store={text}" for text in stores.sweep_string_iterator()]
        again = OverridesParser.create().parse_overrides(swept)
        assert [override.value() for override in again] == ["x", name, "y,z"]


def test_sweeps_and_what_hydra_means_stay() -> None:
    for same in ("run=choice(a,b)", "run=range(1,4)", "run=null", "run=NULL", "run=", "run='a,b'"):
        assert quoted(["--multirun", same]) == ["--multirun", same]
    for same in (
        "run=null",
        "run=",
        "run='a b'",
        'run="a b"',
        "layer=2",
        "text=tiny",
        "-m",
        "~run",
    ):
        assert quoted([same]) == [same]
    assert read("+text.sources.mine.weight=2") == {"text.sources.mine.weight": 2}
    assert read("run='null'") == {"run": "null"}


def test_lists_of_names() -> None:
    for key in LISTS:
        assert read(f"{key}=[2024_01, a=b,'c,d', it's,f(x,y),null]") == {
            key: ["2024_01", "a=b", "c,d", "it's", "f(x,y)", None]
        }
        assert read(f"{key}=a/x=1,y=2") == {key: "a/x=1,y=2"}
        assert read(f"{key}=[]") == {key: []}
    assert quoted(["-m", "runs=a,b"])[1] == "runs='a,b'"


def test_a_store_or_several() -> None:
    """Two stores in brackets; one name in brackets is a name."""
    several = ["2024_01", "a=b", "c,d", "it's"]
    assert read("store=[2024_01, a=b,'c,d', it's]") == {"store": several}
    assert read("store=[2024_01]") == {"store": "[2024_01]"}
    (override,) = quoted(["-m", "store=2024_01,[2024_01,a b],[x]"])[1:]
    swept = OverridesParser.create().parse_override(override).sweep_string_iterator()
    again = OverridesParser.create().parse_overrides([f"store={text}" for text in swept])
    assert [each.value() for each in again] == ["2024_01", ["2024_01", "a b"], "[x]"]
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        settings = plain(compose("train", ["store=[1,2]"]))
        assert settings["store"] == ["1", "2"]


def test_a_name_may_refer_to_a_setting() -> None:
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        overrides = quoted(["sae=tiny", "run=${sae.name}_${sae.k}", "store=1"])
        assert plain(compose("train", overrides))["run"] == "tiny_16"
        settings = plain(compose("train", ["run=${seed}", "store=2"]))  # numbers, for Hydra
        assert (settings["run"], settings["store"], settings["seed"]) == ("0", "2", 0)
        settings = plain(compose("analyze", ["study=browser", "study.others=[1,null]", "runs=7"]))
        assert (settings["study"]["others"], settings["runs"]) == (["1", None], "7")
        added = ["+text.sources.a.path=1", "+text.sources.a.weight=2"]
        assert plain(compose("harvest", added))["text"]["sources"]["a"] == {
            "path": "1",
            "weight": 2,
        }


def read_yaml(file: Path) -> dict[str, Any]:
    """As Hydra reads it: 1e9 is a number, which YAML 1.1 takes for text."""
    settings = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def leaves(settings: Mapping[str, Any], under: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key in ("defaults", "hydra"):
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{under}{key}.")
        else:
            yield under + str(key), value


@pytest.mark.parametrize("file", SETTINGS, ids=lambda path: str(path.relative_to(CONF)))
def test_every_setting_of_text_is_a_name_or_a_word(file: Path) -> None:
    """A new setting of text must be declared: else a name of digits would be read as a number."""
    first, *_ = file.read_text().splitlines()
    group = "" if file.parent == CONF else f"{file.parent.name}."
    if first.startswith("# @package "):
        group = first.removeprefix("# @package ") + "."
    if group.startswith(("launcher", "sweeper")):
        return
    for key, value in leaves(read_yaml(file), group):
        if isinstance(value, str) and not value.startswith("$"):
            declared = any(fnmatchcase(key, pattern) for pattern in (*NAMES, *LISTS))
            assert declared or key.rpartition(".")[2] in WORDS, key


def test_paths_are_declared() -> None:
    """Settings that have no default name a path, or are listed above."""
    for file in SETTINGS:
        if file.parent.name in ("launcher", "sweeper", "text"):
            continue
        group = "" if file.parent == CONF else f"{file.parent.name}."
        for key, value in leaves(read_yaml(file), group):
            if value is None and key not in NAMELESS:
                known = (*NAMES, *LISTS, *LITERAL["analyze"])
                assert any(fnmatchcase(key, pattern) for pattern in known), key


# -- commands --------------------------------------------------------------------------------------


def train(call: Call, *arguments: str) -> tuple[int, str]:
    return call("train", "residual_saes.train.command", *arguments, *SMALL, "tokens=256")


def test_every_command_takes_odd_names(tmp_path: Path, call: Call) -> None:
    make_store(tmp_path / "2024_01_02")
    code, err = train(call, "-m", "store=2024_01_02", "run=20240101,a=b,it(s)")
    assert code == 0, err
    code, err = call(
        "analyze", "residual_saes.analyze.command", "run=20240101", "store=2024_01_02", "device=cpu"
    )
    assert code == 0, err
    sweep = ("study=sweep", "runs=[20240101,a=b,it(s)]", "out=1e5", "device=cpu")
    code, err = call("analyze", "residual_saes.analyze.command", *sweep)
    assert code == 0, err
    code, err = call(
        "export", "residual_saes.train.export.command", "run=a=b", "to=saelens", "out=0x10"
    )
    assert code == 0, err
    code, err = call(
        "publish", "residual_saes.train.publish.command", "run=it(s)", "repo=1/2", "out=2024"
    )
    assert code == 0, err
    expected = ["0x10", "1e5", "2024", "20240101", "2024_01_02", "a=b", "it(s)", "runs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert 'hf_hub_download("1/2"' in (tmp_path / "2024" / "README.md").read_text()


def test_a_harvest_takes_odd_names(tmp_path: Path) -> None:
    (tmp_path / "1e5").mkdir()
    (tmp_path / "1e5" / "0").with_suffix(".jsonl").write_text('{"2024": "words"}\n')
    overrides = ["model.path=123", "model.revision=1234567", "text.field=2024", "store=1_0"]
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        composed = compose("harvest", quoted([f"text.path={tmp_path}/1e5", *overrides]))
        settings: Any = OmegaConf.to_container(composed, resolve=True)
        composed = compose("harvest", quoted(["text.path=1.50", "model.path=2024_1"]))
        unnamed: Any = OmegaConf.to_container(composed, resolve=True)
    assert harvest_config(settings).store == "1_0"
    assert harvest_config(unnamed).store == "activations/2024_1_1.zarr"
    model = model_config(settings["model"], "cpu")
    assert (model.path, model.revision) == ("123", "1234567")
    document, *_ = source_of(settings["text"], 0).documents(None)
    assert document[0] == "words"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["store={store}", "run={long}"], "run={long}"),
        (["store={long}"], "{long}"),
        (["store={store}", "run=file/a"], "file/a"),
        (["store=file/a"], "file/a"),
        (["store={store}", "run=${nothing}"], "nothing"),
    ],
)
def test_a_name_that_cannot_be_is_one_line(
    arguments: list[str], named: str, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "file").write_text("")
    words = {"{store}": str(make_store(tmp_path / "s.zarr", units=2, layers=(3,)))}
    words["{long}"] = "x" * 300
    for short, full in words.items():
        arguments = [argument.replace(short, full) for argument in arguments]
        named = named.replace(short, full)
    code, err = train(call, *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert named.removeprefix("run=") in err


# -- settings that are any text --------------------------------------------------------------------

TEXTS = [
    *ODD,
    *OF_FUNCTIONS,
    *("What's 3+4, {really}?", 'He said "no", didn\'t he?', "a=b", "text=x", "=", "null", "NULL"),
    *(
        "two\nlines\r\n\ttab",
        "🙂 👩‍👩‍👧 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
        "مرحبا \u202e abc",
        "\x1b[31m",
        "a\u0301",
        "\\${x}",
        "\\\\",
    ),
    *("${run}", "$HOME", "${oc.env:HOME}", "'quoted'", '"quoted"', "'null'", "''", "~", "~text"),
    *("%20 100%", "%", "+1", "++x", "-m", "@file", "[a,b]", '["a","b"]', "{a: 1}", '{"token": 1}'),
    *(
        "choice(a,b)",
        "a,b,c",
        "a: b",
        "# no comment",
        " lead",
        "trail ",
        "\ud800",
        "tiny",
        "x" * 5000,
    ),
]


@pytest.mark.parametrize("multirun", [(), ("-m",)])
def test_any_text_is_that_text(multirun: tuple[str, ...]) -> None:
    """Hydra reads nothing into what was typed, and neither does a search for secrets."""
    for text in TEXTS:
        arguments = [f"text={text}", f"+prompt={text}"]
        require_no_secret(arguments, "analyze")
        overrides = [word for word in quoted([*multirun, *arguments], "analyze") if word != "-m"]
        parsed = OverridesParser.create().parse_overrides(overrides)
        assert not any(override.is_sweep_override() for override in parsed)
        hidden = {override.key_or_group.partition(".")[2]: override.value() for override in parsed}
        assert typed({"text": None, "typed": hidden}) == {"text": text, "prompt": text}


def test_a_text_chooses_no_group() -> None:
    """`text=` is a group of other commands, and their composition meets it here."""
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        for text in ("tiny", "${run}", "a,b", "null", "two\nlines", '"no", {x: 1}'):
            overrides = quoted([f"text={text}", "study=features", "scale=[0,-5]"], "analyze")
            settings = plain(compose("analyze", overrides))
            assert (settings["text"], settings["prompt"]) == (text, None)
            assert settings["study"]["name"] == "features" and settings["scale"] == [0, -5]
            assert "typed" not in settings


def test_the_last_text_counts_and_none_is_none() -> None:
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        settings = plain(compose("analyze", quoted(["text=a", "text=b"], "analyze")))
        assert settings["text"] == "b" and settings["prompt"] is None
        assert plain(compose("analyze", quoted(["text="], "analyze")))["text"] == ""


def test_a_secret_in_a_text_is_refused() -> None:
    with pytest.raises(SettingError, match="text="):
        require_no_secret(["text=see https://me:word@host/x"], "analyze")


def test_other_commands_choose_their_text() -> None:
    assert quoted(["text=tiny", "prompt=a"], "harvest") == ["text=tiny", "prompt=a"]
