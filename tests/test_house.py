"""The rules of the house, and the promises of its front door."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("conf", "data", "harvest", "train", "analyze")
# What each package may import of the others: data is the bottom, analyze the top.
BELOW = {
    "data": set(),
    "conf": {"data"},
    "harvest": {"conf", "data"},
    "train": {"conf", "data"},
    "analyze": {"conf", "data", "harvest", "train"},
}
PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OURS = [*PRODUCT, *sorted((ROOT / "tests").rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


def test_imports_point_down() -> None:
    assert len(PRODUCT) > 20
    for path in PRODUCT:
        package = path.relative_to(ROOT).parts[0]
        others = imports(path) & set(PACKAGES) - {package}
        assert others <= BELOW[package], f"{path} imports {others}"


def test_only_entry_points_know_hydra() -> None:
    knowing = [path for path in PRODUCT if imports(path) & {"hydra", "omegaconf"}]
    assert {path.relative_to(ROOT).as_posix() for path in knowing} == {"conf/command.py"}


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            name = ast.unparse(node.func)
            if name.endswith("torch.load"):
                assert ast.unparse(options["weights_only"]) == "True", path
            if name.endswith("from_pretrained"):
                assert ast.unparse(options["trust_remote_code"]) == "False", path
        assert not imports(path) & {"pickle", "dill", "cloudpickle", "joblib"}, path


def options() -> Iterator[tuple[str, str]]:
    """Every command with every option of every group it composes."""
    groups = {
        "harvest": ("model", "text", "codec", "hydra/launcher"),
        "train": ("sae", "optim", "hydra/launcher"),
        "analyze": ("study", "model"),
    }
    for command, names in groups.items():
        for group in names:
            for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
                if path.stem != "ray_gpus" or importlib.util.find_spec(
                    "hydra_plugins.hydra_ray_launcher"
                ):
                    yield command, f"{group}={path.stem}"


def test_every_configuration_composes() -> None:
    from hydra import compose, initialize_config_module

    with initialize_config_module("conf", version_base="1.3"):
        every = list(options())
        assert {override.split("=")[0].split("/")[0] for _, override in every} == {
            path.name
            for path in (ROOT / "conf").iterdir()
            if path.is_dir() and path.name != "__pycache__"
        }
        for command, override in every:
            assert compose(config_name=command, overrides=[override])


def test_every_setting_can_be_set() -> None:
    """What a configuration object has, its group has: else `sae.NAME=...` would be refused."""
    from hydra import compose, initialize_config_module

    from train.optim import OptimConfig
    from train.sae import SAEConfig

    with initialize_config_module("conf", version_base="1.3"):
        for group, kind in (("sae", SAEConfig), ("optim", OptimConfig)):
            for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
                found = compose(config_name="train", overrides=[f"{group}={path.stem}"])[group]
                assert set(found) - {"name"} == set(kind.__dataclass_fields__), path


@pytest.mark.parametrize("command", ["harvest", "train", "analyze", "export", "publish"])
def test_help_has_every_setting_with_what_it_is(command: str) -> None:
    from hydra import compose, initialize_config_module

    from conf.command import described

    chosen = {"analyze": ["study=steering"], "train": ["sae=rows_32k"]}.get(command, [])
    shown = described(command, chosen)
    with initialize_config_module("conf", version_base="1.3"):
        config = compose(command, chosen)
    for name, value in config.items():
        for key in [name, *(value if isinstance(value, Mapping) else ())]:
            assert key == "name" or re.search(rf"^ *(text\.)?{key}[:.=]", shown, re.MULTILINE), key
    assert "hydra" not in shown and "defaults" not in shown
    for option in chosen:
        assert f"{option} " in shown and f"{option.replace('=', ':  # ')}\n" in shown


def test_packages_import_from_anywhere(tmp_path: Path) -> None:
    code = "import harvest, train, analyze, data, conf, data.tiny.embedded as tiny; print(tiny.MODEL_DIR.is_dir())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


# -- README ----------------------------------------------------------------------------------------


def readme_commands() -> list[list[str]]:
    """The command lines of README's `sh` blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [
        line.split("  #")[0].strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def shorter(arguments: list[str]) -> list[str]:
    return [word.replace("tokens=4e5", "tokens=1e5") for word in arguments]


def test_readme_first_commands_learn(tmp_path: Path) -> None:
    """Its harvest and training, nearly as they stand, in processes of their own; test_docs_run.py
    has all.
    """
    ran = 0
    for command in readme_commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
                command
            )
        elif command[2] in ("harvest", "train") and any("tiny" in word for word in command):
            arguments, environment = shorter(command[1:]), {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (command, done.stderr)
            ran += 1
    assert ran == 2
    metrics = (tmp_path / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()
    final = json.loads(metrics[-1])
    assert final["split"] == "held_out"
    assert final["variance_explained"] >= 0.85
    assert final["dead_share"] < 0.1
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    check = "\nprint(float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()))"
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", example + check],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(shown.stdout) > 0.9


def test_readme_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:data|harvest|train|analyze|conf|tests)/[\w/.-]+)`", text)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
