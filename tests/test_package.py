"""The package as pip installs it: wheel and sdist are whole, and the commands run from them alone.

`make test-package` builds and installs it, which takes a minute or two and asks an index for
setuptools. What the product imports is compared with what the package declares in any case.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

from tests.bench import house_signs
from tests.test_house import MODULES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROOMS = ("analyze", "conf", "data", "harvest", "train")
# Import names of distributions that may not be installed here.
OTHER_NAMES = {"sklearn": "scikit-learn"}
OF_A_STUDY = {"trl"}  # which alone imports it, at once
BROUGHT = {"triton", "threadpoolctl", "peft"}  # by torch, scikit-learn and trl


# -- what is imported is declared ------------------------------------------------------------------


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(requirements: list[str]) -> set[str]:
    return {plain(Requirement(each).name) for each in requirements}


def third_party(path: Path) -> tuple[set[str], set[str]]:
    """Packages of others that a file imports, as (at once, inside functions)."""
    at_once: set[str] = set()
    lazily: set[str] = set()
    for node, is_inside in house_signs.statements(house_signs.parsed(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        known = {*sys.stdlib_module_names, "residual_saes", "hydra_plugins"}
        packages = {name.partition(".")[0] for name in names} - known
        (lazily if is_inside else at_once).update(packages)
    return at_once, lazily


def test_what_is_imported_is_declared() -> None:
    needed = distributions(PROJECT["dependencies"])
    optional: set[str] = set()
    for requirements in PROJECT["optional-dependencies"].values():
        optional |= distributions(requirements)
    of_package = metadata.packages_distributions()
    assert len(MODULES) > 200
    for module, path in MODULES.items():
        at_once, lazily = third_party(path)
        for package in (at_once | lazily) - BROUGHT:
            named = of_package.get(package, [OTHER_NAMES.get(package, package)])
            declared = needed if package in at_once - OF_A_STUDY else needed | optional
            assert {*map(plain, named)} & declared, f"{module} imports {package}: declare it"


# -- built and installed ---------------------------------------------------------------------------


def run(folder: Path, *command: str | Path) -> str:
    """What a command prints; it must end with 0, and sees nothing of this environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout + done.stderr


def tracked() -> list[Path]:
    """The files of a clean clone."""
    listed = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return [Path(name) for name in listed.split("\0") if name]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of the sdist, the sdist, and in `direct` the wheel of the clone."""
    clone = tmp_path_factory.mktemp("clone")
    for name in tracked():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    out = tmp_path_factory.mktemp("built")
    run(out, sys.executable, "-m", "build", "-o", out, clone)
    run(out, sys.executable, "-m", "build", "--wheel", "-o", out / "direct", clone)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


@pytest.mark.long
def test_a_wheel_has_every_file_and_no_other(built: Path) -> None:
    files = contents(built)
    product = {name for name in files if ".dist-info/" not in name}
    wanted = {}
    for path in tracked():
        first = path.parts[0]
        if first in ROOMS or (first in ("residual_saes", "hydra_plugins") and path.suffix):
            under = "residual_saes/" if first in ROOMS else ""
            wanted[f"{under}{path}"] = (ROOT / path).read_bytes()
    assert product == wanted.keys()
    assert all(files[name] == content for name, content in wanted.items())
    assert {"residual_saes/py.typed", "residual_saes/conf/slurm.sbatch"} <= product


@pytest.mark.long
def test_the_sdist_makes_the_same_wheel(built: Path) -> None:
    from_sdist, direct = contents(built), contents(built / "direct")
    differing = [name for name in from_sdist if from_sdist[name] != direct.get(name)]
    assert differing == [] and from_sdist.keys() == direct.keys()
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        assert not any(member.issym() for member in opened.getmembers())


@pytest.mark.long
def test_its_metadata_is_what_an_index_takes(built: Path) -> None:
    files = contents(built)
    (name,) = (name for name in files if name.endswith(".dist-info/METADATA"))
    told = Metadata.from_email(files[name], validate=True)
    assert told.name == "residual-saes" and told.description_content_type == "text/markdown"
    assert told.license_expression and told.description and told.summary


@pytest.mark.long
def test_its_commands_run_where_nothing_else_is(built: Path, tmp_path: Path) -> None:
    """With the packages that it needs, and no file of ours on the path."""
    run(tmp_path, sys.executable, "-m", "venv", "env")
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    beside = [path for path in sys.path if path.endswith("site-packages")]
    # Installations of ours there that follow a .pth file are not found by this.
    (packages / "others.pth").write_text("\n".join(beside))
    (wheel,) = built.glob("*.whl")
    run(tmp_path, "env/bin/python", "-m", "pip", "install", "-q", "--no-deps", wheel)
    (empty := tmp_path / "empty").mkdir()
    where = "import residual_saes; print(residual_saes.__file__)"
    assert run(empty, "../env/bin/python", "-c", where).startswith(str(packages))
    command = "../env/bin/residual-saes"
    assert run(empty, command, "--version").strip() == f"residual-saes {PROJECT['version']}"
    tiny = ("model=tiny", "text=tiny", "layer=5", "tokens=1e4", "context=64")
    run(empty, command, "harvest", *tiny)
    said = run(empty, command, "train", "sae=tiny", "run=runs/one")
    assert "store=activations/tiny_tiny.zarr: " in said
    run(empty, command, "analyze", "study.rows=64")
    run(empty, command, "analyze", "study=report")
    assert (empty / "runs/one/report.html").is_file()
    assert sorted(path.name for path in empty.iterdir()) == ["activations", "runs"]
