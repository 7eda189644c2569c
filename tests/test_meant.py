"""A mistyped command line is answered with what was meant, before torch is loaded."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from residual_saes.analyze.questions.answering import GRADINGS
from residual_saes.conf import meant, schema
from residual_saes.conf.console import COMMANDS
from residual_saes.conf.early import CHOICES
from residual_saes.data.errors import SettingError
from residual_saes.data.settings import require_like
from residual_saes.harvest.config import Faults
from residual_saes.sae import Dtype
from residual_saes.train.blocks import Matmul
from tests.conftest import Call

MEANT = {
    "harvest": {
        "layer=21": [
            *("--layer 21", "--layer=21", "-l 21", "layer 21", "layer: 21", "layer:21"),
            *("layer = 21", "layer =21", "layer= 21", "lyer=21", "Layer=21", "hook_layer=21"),
        ],
        "model.path=gpt2": ["model=gpt2", "model_path=gpt2", "--model gpt2", "model_name=gpt2"],
        "model.path=a/b": ["model=a/b"],
        "text.path=foo.txt": ["text=foo.txt", "foo.txt", "dataset=foo.txt", "--text foo.txt"],
        "text=fineweb_edu": ["text=fineweb-edu", "text=FineWebEdu"],
        "force=true": ["--force"],
        "layer=4": [
            *("hook_name=blocks.4.hook_resid_post", "layer=blocks.4.hook_resid_post"),
            *("--hookpoint model.layers.4", "site=transformer.h.4"),
        ],
        "layer=4 site=mlp_out": ["hook_point=blocks.4.hook_mlp_out", "--layer layers.4.mlp"],
        "python -m harvest layer=4 site=attn_out tokens=9": [
            "hook_name=blocks.4.hook_attn_out n_tokens=9"
        ],
        "python -m harvest layer=21 store=x": ["--layer 21 --store x", "-l 21 store x"],
    },
    "train": {
        "sae.k=64": ["k=64", "-k 64", "optim.k=64", "l0=64", "K=64"],
        "optim.lr=1e-3": ["lr=1e-3", "--lr 1e-3", "learning_rate=1e-3", "optim.learning_rate=1e-3"],
        "sae=topk_32k": ["sae=topk32k", "sae=TopK-32k", "topk_32k"],
        "sae=topk_32k,tiny": ["-m sae=topk32k,tiny"],
        "sae.d_sae=9": ["d_sae=9", "sae.d_sea=9", "n_latents=9"],
        "store=activations/x.zarr": ["activations/x.zarr"],
        "tokens=...": ["epochs=3"],
        "sae.k=...": ["l1_coefficient=5", "--l1 5"],
        "sae.d_sae=...": ["expansion_factor=16"],
        "run=runs/x": ["--run runs/x", "-r runs/x"],
    },
    "analyze": {
        "study=quality": ["study quality", "quality", "study=qualty", "--study quality"],
        "run=runs/x": ["runs/x", "--run=runs/x"],
        "study.contexts=3": ["study=browser contexts=3", "study=browser study.contxts=3"],
        "study.contexts=3 with study=browser": ["contexts=3"],
    },
    "export": {"to=saelens": ["format=saelens"]},
    "publish": {"repo=a/b": ["repo_id=a/b"]},
}
CASES = [
    (command, line, wanted)
    for command, meanings in MEANT.items()
    for wanted, lines in meanings.items()
    for line in lines
]


@pytest.mark.parametrize(("command", "line", "wanted"), CASES)
def test_what_was_meant_is_named(command: str, line: str, wanted: str) -> None:
    said = meant.advice(command, shlex.split(line))
    assert said and said.count("\n") == 0
    _, _, named = said.partition("did you mean ")
    # A group may offer its own options beside a path.
    assert wanted in offered(named), said


def offered(named: str) -> list[str]:
    return named.removesuffix("?").replace("`", "").split(" or ")


@pytest.mark.parametrize(
    ("command", "line", "named"),
    [
        ("analyze", "tokens=1e6", "`python -m harvest` and `python -m train`"),
        ("train", "model.path=gpt2", "`python -m harvest`"),
        ("analyze", "study=quality study.contexts=3", "study=browser"),
        ("train", "model_name=gpt2", "model.path= of `python -m harvest`"),
        ("harvest", "expansion_factor=16", "sae.d_sae= of `python -m train`"),
        ("train", "xyzzy=3", "--help"),
        ("train", "--verbose", "--help"),
        ("export", "xyzzy", "python -m train.export --help"),
    ],
)
def test_where_nothing_is_near_the_way_on_is_named(command: str, line: str, named: str) -> None:
    said = meant.advice(command, shlex.split(line))
    assert said and named in said and "did you mean" not in said


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("harvest", "layer=21 text.sources.mine.path=x +text.sources.mine.kind=file model.path=a"),
        ("harvest", "hydra/launcher=slurm hydra.launcher.partition=x --cfg job -m layer=1,2"),
        ("train", "sae=choice(topk_32k,tiny) store= run='a b' ~optim.lr optim=null"),
        ("analyze", "study=all ~study.gsm8k study.contrast.permutations=9 text=--layer"),
        ("analyze", "study=browser study.contexts=3 model.path=x model=null"),
    ],
)
def test_what_hydra_knows_is_left_to_it(command: str, line: str) -> None:
    assert meant.advice(command, shlex.split(line)) is None


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_is_right(command: str) -> None:
    """Each with its default, and with the option that has it."""
    for name, options in schema.everywhere(command).items():
        assert meant.advice(command, [*options[-1:], f"{name}=1"]) is None


def test_values_are_of_their_defaults_types() -> None:
    for default, right in (
        (1, [2, 1e5, [1]]),
        (1.0, [2, 0.5, [1], "auto"]),
        (True, [False]),
        ("a", [1]),
    ):
        for value in (*right,):
            require_like("batch", value, default)
    for default, wrong in ((1, ["x", 0.5, True]), (1.0, ["x", True]), (True, [1, "yes", []])):
        for value in wrong:
            with pytest.raises(SettingError, match="batch="):
                require_like("batch", value, default)


def test_paths_with_spaces_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given without a name, or without quotes, they are named as the shell takes them."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my texts", "my model", "store"):
        (tmp_path / folder).mkdir()
    (tmp_path / "my model" / "config.json").touch()
    whole = "python -m harvest 'text.path=my texts' 'model.path=my model'"
    for words, wanted in (
        (["my texts"], "'text.path=my texts'"),
        (["--text", "my texts"], "'text.path=my texts'"),
        (["my texts", "my model"], whole),
        (["text.path=my", "texts", "model.path=my", "model"], whole),
        (["text.path=no", "texts"], "texts="),
    ):
        said = meant.advice("harvest", words)
        assert said and (wanted in said) == (wanted != "texts="), said
    assert "store=store?" in str(meant.advice("train", ["store"]))


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        ("train", ["sae=topk32k"], "sae=topk_32k"),
        ("harvest", ["tokens=1,000,000"], "tokens=1000000"),
        ("harvest", ["tokens=1.5M"], "tokens=1.5e6"),
        ("harvest", ["layer=middle"], "layer="),
        ("harvest", ["layer=-1"], "layer=-1"),
        ("train", ["device=gpu"], "device=cuda"),
        ("harvest", ["oom=hlave"], "oom=halve"),
        ("harvest", ["action=statu"], "action=status"),
        ("harvest", ["model.path=nix"], "model.path=nix"),
        ("harvest", [f"model.path={__file__}"], f"model.path={Path(__file__).parent}"),
        ("harvest", ["model.path=a/b", "text.path=nix"], "text.path=nix"),
        ("train", ["batch=0"], "batch=0"),
        ("harvest", ["batch=x"], "batch=x"),
        ("analyze", ["study=browser", "study.contexts=x"], "study.contexts=x"),
        ("harvest", ["--layer", "21"], "layer=21"),
        ("train", ["optim.lr=1,2"], "`python -m train -m optim.lr=1,2`"),
        ("train", ["sae.k=[1,2]", "store=x"], "sae.k=[1, 2]"),
    ],
)
def test_a_command_says_so(command: str, words: list[str], named: str, call: Call) -> None:
    code, err = call(command, f"residual_saes.{command}.command", *words)
    assert (code, err.count("\n")) == (2, 1) and named in err


def test_words_are_those_that_the_code_takes() -> None:
    """What is refused early is what the command would refuse."""
    for name in ("oom", "bad"):
        of = "text.bad" if name == "bad" else name
        for word in CHOICES["harvest"][of]:
            Faults(**{name: word})
    assert CHOICES["harvest"]["model.dtype"] == get_args(Dtype)
    assert CHOICES["train"]["train.matmul"] == get_args(Matmul)
    assert CHOICES["analyze"]["answers.grading"] == GRADINGS


def test_torch_is_not_loaded_for_that(tmp_path: Path) -> None:
    """One process of a multirun: what its sweeper composes is refused in the same way."""
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    code = "import sys; sys.path.insert(0, '.'); from residual_saes.conf import console\n"
    words = ["residual-saes", "train", "-m", "sae.k=4,8", "sae=topk32k"]
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}sys.argv = {words}; console.main()"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
