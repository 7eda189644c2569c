"""The rules of the house, and the promises of its front door."""

from __future__ import annotations

import ast
import dataclasses
import gc
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from residual_saes.analyze import study
from residual_saes.analyze.questions.answering import Asking
from residual_saes.conf.help import described
from residual_saes.data.rows.split import Policy
from residual_saes.harvest.config import Faults, HarvestConfig
from residual_saes.train.objective import find
from residual_saes.train.optim import OptimConfig
from residual_saes.train.sae import SAEConfig
from residual_saes.train.trainer import TrainConfig
from tests.bench import house_signs
from tests.bench.outcome import absolute_paths
from tests.forked import run_forked

ROOT = Path(__file__).parent.parent
MODULES = house_signs.product(ROOT)
PRODUCT = list(MODULES.values())
OURS = [*PRODUCT, *sorted((ROOT / "tests").rglob("*.py"))]
# The files of conf/ that Hydra reads. The others are for engines: tests/engines/test_files.py.
OF_ENGINES = ("kubernetes.yaml", "skypilot.yaml")
SETTINGS = sorted(path for path in (ROOT / "conf").rglob("*.yaml") if path.name not in OF_ENGINES)


@pytest.fixture(scope="module", autouse=True)
def _trees() -> Iterator[None]:
    """Syntax trees are kept for this file alone: collections would look at their million nodes."""
    gc.disable()
    yield
    house_signs.parsed.cache_clear()
    gc.enable()


# -- walls -----------------------------------------------------------------------------------------

# What each package may import of the others: data is the bottom, analyze the top. Hydra loads its
# plugin at each start, so the plugin imports our code only when it launches.
BELOW = {
    "data": set(),
    "conf": {"data"},
    "harvest": {"conf", "data"},
    "train": {"conf", "data"},
    "analyze": {"conf", "data", "harvest", "train"},
    "hydra_plugins": {"conf", "data", "train"},
    "residual_saes": {"analyze", "conf", "data", "harvest", "train"},
}
# These are imported as parts of residual_saes, which links to them: a user's folder may have a
# data/ or a train.py of its own.
ROOMS = {*BELOW} - {"hydra_plugins", "residual_saes"}
# The core is the way from text to the report: text, store, SAE, quality, report. All else is an
# annex. The core works without an annex, and loads it only by the annex's one door: a function of
# the module that stands beside it here. None: the core never loads it.
ANNEXES = {
    "residual_saes.data.store.bucket": "residual_saes.data.store.place",
    "residual_saes.data.store.scales": "residual_saes.data.store.codec",
    "residual_saes.data.store.int8": None,
    "residual_saes.data.rows.groups": "residual_saes.data.rows.rounds",
    "residual_saes.train.triton_kernels": "residual_saes.train.gpu",
    "residual_saes.train.sweep": "hydra_plugins.one_pass",
    # Objectives are found by name, in train/objective.py.
    "residual_saes.train.objectives": None,
    "residual_saes.train.export": "residual_saes.train.warm",
    "residual_saes.train.publish": None,
    # Studies are found by name, in analyze/study.py; quality, which every run has, is of the core.
    "residual_saes.analyze.studies": None,
    "residual_saes.analyze.studies.sweep": "residual_saes.analyze.pages.report",
    "residual_saes.analyze.peers": "residual_saes.analyze.command",
    "residual_saes.analyze.pages.browser": "residual_saes.analyze.command",
    "residual_saes.sae": None,
    "residual_saes.store": None,
}
CORE = {
    *("residual_saes.analyze.studies", "residual_saes.analyze.studies.quality"),
    *(
        "residual_saes.train.objectives",
        "residual_saes.train.objectives.topk",
        "residual_saes.train.objectives.auxk",
    ),
}
LAZY = "residual_saes"  # its __init__.py: every command imports it, and torch only what needs it
PLUGINS = {"hydra_plugins.one_pass", "hydra_plugins.all_jobs"}


def annex(module: str) -> str | None:
    """The annex that a module belongs to; None: the core."""
    if module in CORE:
        return None
    parents = [name for name in ANNEXES if module == name or module.startswith(f"{name}.")]
    return max(parents, key=len, default=None)


def room(module: str) -> str:
    """The package of the source tree that a module stands in."""
    first, _, rest = module.partition(".")
    inner = rest.split(".")[0]
    return inner if first == "residual_saes" and inner in BELOW else first


def top_level_imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    names = set()
    for node, _ in house_signs.statements(house_signs.parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


def test_imports_point_down() -> None:
    assert len(PRODUCT) > 20
    for module, path in MODULES.items():
        package = room(module)
        at_once, lazily = house_signs.imported(path, MODULES)
        others = {*map(room, at_once | lazily)} - {package}
        assert others <= BELOW[package], f"{path} imports {others}"
        assert not top_level_imports(path) & ROOMS, f"{path}: import it as a part of residual_saes"


def test_no_import_goes_round_in_a_circle() -> None:
    """Imports under TYPE_CHECKING count. Those inside functions do too, unless they load an annex
    by its door.
    """
    edges = {}
    for module, path in MODULES.items():
        at_once, lazily = house_signs.imported(path, MODULES)
        by_the_door = {name for name in lazily if ANNEXES.get(annex(name) or "") == module}
        edges[module] = at_once | lazily - by_the_door
    assert house_signs.circles(edges) == []


def test_the_core_loads_an_annex_by_its_door_alone() -> None:
    assert {name for name in map(annex, MODULES) if name} == set(ANNEXES)
    for module, path in MODULES.items():
        at_once, lazily = house_signs.imported(path, MODULES)
        for name in lazily:
            is_door = ANNEXES.get(annex(name) or "") == module
            assert is_door or module in (*PLUGINS, LAZY), (
                f"{module} imports {name} inside a function"
            )
        if annex(module) is None and module != LAZY:
            annexes = {name for name in at_once if annex(name)}
            assert not annexes, f"{module} is of the core and imports {annexes}"
    for name, door in ANNEXES.items():
        if door:
            lazily = house_signs.imported(MODULES[door], MODULES)[1]
            assert name in map(annex, lazily), f"{door} is no door of {name}"


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}}
    assert house_signs.circles(edges) == [["a", "b", "c"], ["e"]]


def test_one_file_knows_hydra() -> None:
    """Beside Hydra's plugins, which are such by definition."""
    knowing = {
        module
        for module, path in MODULES.items()
        if top_level_imports(path) & {"hydra", "omegaconf"}
    }
    assert knowing - PLUGINS == {"residual_saes.conf.command"}


# -- sizes -----------------------------------------------------------------------------------------


def test_files_and_functions_fit() -> None:
    """One noun a file, at most 600 lines; at most 80 lines a function."""
    too_long = [path for path in OURS if len(path.read_text().splitlines()) > 600]
    for path in OURS:
        for function in house_signs.functions(house_signs.parsed(path)):
            if function.lines > 80:
                too_long.append(path / function.name)
    assert too_long == []


def test_packages_have_no_code() -> None:
    """But the benchmarks' package: it sets the commands' environment before torch is loaded. That
    of residual_saes loads what users import.
    """
    front_door = ROOT / "residual_saes"
    for path in OURS:
        if path.name == "__init__.py" and path.parent not in (ROOT / "tests/bench", front_door):
            assert not house_signs.has_code(path), path
    (loaded,) = house_signs.functions(house_signs.parsed(front_door / "__init__.py"))
    assert loaded.name == "__getattr__"


def test_the_product_is_not_dense() -> None:
    """Limits of what `python -m tests.bench.house_signs` prints.

    Peers have 7 to 24 comprehensions, 0 to 8 assignments of tuples, lines of 72 to 88 columns.
    """
    signs = house_signs.signs(ROOT)
    assert signs["comprehensions per 1,000 code lines"] <= 30
    assert signs["tuple-to-tuple assignments per 1,000 code lines"] <= 6
    assert signs["90th percentile line, columns"] <= 92
    page = (ROOT / "CONTRIBUTING.md").read_text()
    lines, core = re.findall(r"([\d,]+) lines", page[page.index("## Read it") :])[:2]
    assert abs(int(lines.replace(",", "")) - signs["lines"]) < 1000
    of_core = [path for module, path in MODULES.items() if annex(module) is None]
    counted = sum(len(path.read_text().splitlines()) for path in of_core)
    assert abs(int(core.replace(",", "")) - counted) < 1000


# -- safety ----------------------------------------------------------------------------------------


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    for path in PRODUCT:
        for node in ast.walk(house_signs.parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            name = ast.unparse(node.func)
            if name.endswith("torch.load"):
                assert ast.unparse(options["weights_only"]) == "True", path
            if name.endswith("from_pretrained"):
                assert ast.unparse(options["trust_remote_code"]) == "False", path
        assert not top_level_imports(path) & {"pickle", "dill", "cloudpickle", "joblib"}, path


# -- settings --------------------------------------------------------------------------------------


# The groups that each command composes.
COMMANDS = {
    "harvest": ("model", "text", "codec", "hydra/launcher"),
    "train": ("sae", "optim", "hydra/launcher"),
    "analyze": ("study", "model"),
}


def options(group: str) -> list[str]:
    """The options of a group, by name."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def composed() -> list[tuple[dict[str, str], DictConfig]]:
    """Every option of every group of every command, one of each group at a time."""
    found = []
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        for command, groups in COMMANDS.items():
            named = {group: options(group) for group in groups}
            for turn in range(max(map(len, named.values()))):
                chosen = {group: names[turn % len(names)] for group, names in named.items()}
                words = [f"{group}={name}" for group, name in chosen.items()]
                found.append((chosen, compose(command, words)))
    return found


def test_every_configuration_composes(composed: list[tuple[dict[str, str], DictConfig]]) -> None:
    groups = {group.split("/")[0] for chosen, _ in composed for group in chosen}
    folders = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert groups == folders - {"__pycache__"}


def test_every_setting_can_be_set(composed: list[tuple[dict[str, str], DictConfig]]) -> None:
    """What a configuration object has, its group has: else `sae.NAME=...` would be refused."""
    compared = {"sae": set[str](), "optim": set[str]()}
    for chosen, settings in composed:
        for group in compared.keys() & chosen.keys():
            sae = group == "sae"
            kind = find(settings.sae.activation).settings if sae else OptimConfig
            assert set(settings[group]) - {"name"} == set(defaults(kind)), chosen[group]
            compared[group].add(chosen[group])
    assert compared == {group: set(options(group)) for group in compared}


def defaults(kind: type) -> dict[str, Any]:
    """The fields of a configuration object, each with its default. Those without one: MISSING."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


# null in the YAML: the command asks the launcher's environment first, the kind of dictionary, or
# the study.
DECIDED_BY_OTHERS = {"rank", "world", "site", "samples", "temperature", "batch", "context"}


@pytest.mark.parametrize(
    ("file", "group", "kind"),
    [
        ("sae/scaled_32k", "", SAEConfig),
        ("optim/scaled", "", OptimConfig),
        ("train", "", TrainConfig),
        ("train", "", Policy),
        ("harvest", "", HarvestConfig),
        ("harvest", "", Faults),
        ("analyze", "answers", Asking),
    ],
)
def test_defaults_are_the_same_everywhere(file: str, group: str, kind: type) -> None:
    """A default stands in the YAML, which --help shows, and in the dataclass, for those who call it
    from Python.
    """
    settings = OmegaConf.load(ROOT / f"conf/{file}.yaml")
    assert require_the_same(settings[group] if group else settings, kind) > 0


def require_the_same(settings: Mapping[str, Any], kind: type) -> int:
    """Compare the settings with the dataclass's defaults; how many are in both."""
    compared = 0
    for field in dataclasses.fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or field.name not in settings:
            continue
        if field.name in DECIDED_BY_OTHERS and settings[field.name] is None:
            continue
        if isinstance(default, tuple):
            default = list(default)
        assert settings[field.name] == default, field.name
        compared += 1
    return compared


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/study").glob("*.yaml")))
def test_a_studys_settings_are_its_options(name: str) -> None:
    settings = OmegaConf.load(ROOT / f"conf/study/{name}.yaml")
    settings.pop("defaults", None)  # of study=all, which has other studies' settings
    assert settings.pop("name") == name
    options = study.find(name).options
    if options is None:
        assert not settings
        return
    assert set(settings) == set(defaults(options))
    assert require_the_same(settings, options) == len(settings)


@pytest.mark.parametrize("command", ["harvest", "train", "analyze", "export", "publish"])
def test_help_has_every_setting_with_what_it_is(command: str) -> None:
    chosen = {"analyze": ["study=steering"], "train": ["sae=rows_32k"]}.get(command, [])
    shown = described(command, chosen)
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        config = compose(command, chosen)
    for name, value in config.items():
        for key in [name, *(value if isinstance(value, Mapping) else ())]:
            assert key == "name" or re.search(rf"^ *(text\.)?{key}[:.=]", shown, re.MULTILINE), key
    assert "hydra" not in shown and "defaults" not in shown
    for option in chosen:
        assert f"{option} " in shown and f"{option.replace('=', ':  # ')}\n" in shown


def test_results_name_no_path_of_a_machine() -> None:
    results = sorted((ROOT / "tests/bench/results").glob("*.json"))
    assert len(results) > 10
    for path in results:
        assert absolute_paths(json.loads(path.read_text())) == [], path


def test_packages_import_from_anywhere(tmp_path: Path) -> None:
    code = "from residual_saes.data.tiny.embedded import MODEL_DIR\nprint(MODEL_DIR.is_dir())"
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


@pytest.mark.long
def test_readme_first_commands_learn(tmp_path: Path) -> None:
    """Its harvest and training, nearly as they stand; test_docs_run.py has all."""
    ran = 0
    for command in readme_commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
                command
            )
        elif command[2] in ("harvest", "train") and any("tiny" in word for word in command):
            done = run_forked(*shorter(command[1:]), cwd=tmp_path)
            assert done.returncode == 0, (command, done.stderr)
            ran += 1
    assert ran == 2
    metrics = (tmp_path / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()
    final = json.loads(metrics[-1])
    assert final["split"] == "held_out"
    assert final["variance_explained"] >= 0.85
    assert final["dead_share"] < 0.1
    *_, example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    check = "\nprint(float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()))"
    shown = run_forked("-c", example + check, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert float(shown.stdout) > 0.9
