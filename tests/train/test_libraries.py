"""Files of the libraries' own classes are read as what those compute of them, or refused; and they
compute of our files what ours computes.

tests/train/foreign/LIBRARY.zip holds files that they wrote, by tests/train/foreign/write.py: of
SAELens 6.54.12, sparsify 1.3.3, dictionary_learning 0.1.0 and circuit-tracer 0.5.0. Where
INTEROP_PYTHON names an interpreter that has the libraries, every kind is written anew, and their
versions are the ones that are there (CONTRIBUTING.md says how to make one).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from residual_saes.data.errors import StoreError
from residual_saes.train.export.format import find
from residual_saes.train.export.loading import lines
from tests.train.test_formats import CASES, D, about, made, rows
from tests.train.test_golden import exported

FOLDER = Path(__file__).parent / "foreign"
LIBRARIES = ("circuit_tracer", "dictionary_learning", "saelens", "sparsify")
PYTHON = os.environ.get("INTEROP_PYTHON", sys.executable)
# No SAE of single rows of one site, or not as our SAE computes it.
REFUSED = re.compile(
    r"abstopk|temporal|matching_pursuit|a transcoder|save_model (matryoshka_)?batchtopk|"
    r"normalize_activations|reshape_activations|groupmax|skip_connection=True|multi_topk=True|io=|"
    r"whitened|topk without ReLU"
)
# Keys of configurations that are of such kinds alone: with them a file is refused.
UNKNOWN = {
    "saelens": {
        *("activation_normalization_factor", "bottleneck_factor", "kval_topk"),
        *("matryoshka_widths", "topk_threshold_lr", "use_matryoshka_aux_loss"),
        *("max_iterations", "n_attn_layers", "n_heads", "residual_threshold", "sae_diff_type"),
        *("stop_on_duplicate_support", "tied_weights"),
    },
}


def kinds() -> Iterator[tuple[str, str]]:
    """The kept files' library and kind."""
    for library in LIBRARIES:
        with zipfile.ZipFile(FOLDER / f"{library}.zip") as archive:
            for name in archive.namelist():
                if name.endswith("/x_hat.safetensors"):
                    yield library, name.split("/")[0]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of the kept files."""
    root = tmp_path_factory.mktemp("kept")
    for library in LIBRARIES:
        with zipfile.ZipFile(FOLDER / f"{library}.zip") as archive:
            archive.extractall(root / library)
    return root


def run(script: str, *arguments: str) -> None:
    """Run a script of tests/train/foreign in the interpreter that has the libraries."""
    environment = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1"}  # it is there and finds no GPU
    environment.pop("PYTHONPATH", None)
    subprocess.run([PYTHON, str(FOLDER / script), *arguments], check=True, env=environment)


def require(library: str) -> None:
    package = {"saelens": "sae_lens"}.get(library, library)
    found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    if subprocess.run([PYTHON, "-c", found], check=False).returncode:
        pytest.skip(f"{package} is not installed: see INTEROP_PYTHON in CONTRIBUTING.md")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind, by the libraries that are installed."""
    root = tmp_path_factory.mktemp("every")
    run("write.py", str(root), "--every")
    return root


def check(library: str, folder: Path) -> None:
    """A file is read as what its library computes of it, or refused in one line."""
    tensors = load_file(folder / "x_hat.safetensors")
    if REFUSED.search(folder.name):
        with pytest.raises(StoreError) as caught:
            find(library).read(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        return
    x_hat = tensors["x_hat"]
    error = (find(library).read(folder)(tensors["x"]) - x_hat).norm() / x_hat.norm()
    assert float(error) < 1e-5, folder.name


@pytest.mark.parametrize(("library", "kind"), [*kinds()])
def test_a_librarys_own_file_is_read_as_what_it_computes_or_refused(
    kept: Path, library: str, kind: str
) -> None:
    check(library, kept / library / kind)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_kind_that_the_installed_library_writes(
    request: pytest.FixtureRequest, library: str
) -> None:
    require(library)
    folders = [path for path in (request.getfixturevalue("every") / library).iterdir()]
    kinds_of = [folder for folder in folders if folder.is_dir()]
    assert len(kinds_of) > 5
    for folder in kinds_of:
        check(library, folder)


# -- keys and tensors ------------------------------------------------------------------------------


def plain(library: str, root: Path) -> Path:
    """A file that is read."""
    kind = {
        "circuit_tracer": "relu",
        "dictionary_learning": "TopKTrainer",
        "saelens": "topk",
        "sparsify": "sae",
    }[library]
    return root / library / kind


def refusal(library: str, folder: Path) -> str | None:
    """The message that refuses a file; None: it is read."""
    try:
        find(library).read(folder)
        find(library).origin(folder)
    except StoreError as error:
        return str(error)
    return None


def is_unknown(library: str, folder: Path, section: str | None, key: str) -> bool:
    """Whether a file is refused for a key's sake. Other refusals are of its value."""
    path = next(path for path in folder.glob("c*") if path.suffix in (".json", ".yaml"))
    config = yaml.safe_load(path.read_text())  # JSON too
    part = config[section] if section else config
    if key in part:
        return False
    part[key] = "of no meaning"
    path.write_text(json.dumps(config))
    return f" {key}, which may change its function" in (refusal(library, folder) or "")


def unknown(library: str, root: Path, scratch: Path) -> set[str]:
    """The keys of the library's configurations that are not known to the reader."""
    keys: Any = json.loads((root / library / "about.json").read_text())["keys"]
    sections = keys if isinstance(keys, dict) else {None: keys}
    found = set()
    for section, names in sections.items():
        for name in names:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(plain(library, root), scratch)
            if is_unknown(library, scratch, section, name):
                found.add(name)
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_key_of_the_library_is_known_or_refused_on_purpose(
    kept: Path, tmp_path: Path, library: str
) -> None:
    assert unknown(library, kept, tmp_path / "sae") == UNKNOWN.get(library, set())


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_key_of_the_installed_library_is_known_or_refused_on_purpose(
    request: pytest.FixtureRequest, tmp_path: Path, library: str
) -> None:
    require(library)
    every = request.getfixturevalue("every")
    assert unknown(library, every, tmp_path / "sae") == UNKNOWN.get(library, set())


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_new_key_or_tensor_of_any_kind_is_refused_by_name(
    kept: Path, tmp_path: Path, library: str
) -> None:
    sections = {"dictionary_learning": (None, "trainer", "buffer")}.get(library, (None,))
    readable = [kind for of, kind in kinds() if of == library and not REFUSED.search(kind)]
    assert len(readable) >= 4
    for number, kind in enumerate(readable):
        for section in sections:
            folder = tmp_path / f"{number} {section}"
            shutil.copytree(kept / library / kind, folder)
            assert is_unknown(library, folder, section, "temperature"), kind
        folder = tmp_path / f"{number} tensor"
        shutil.copytree(kept / library / kind, folder)
        add_tensor(folder, "W_new")
        with pytest.raises(StoreError, match="W_new"):
            find(library).read(folder)


NO_VALUES = [float("nan"), float("inf"), -1, 10**30, 2.5, "4", [3], {"k": 3}]


def leaves(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every key, with the object that holds it."""
    for key, value in list(config.items()):
        yield config, key
        if isinstance(value, dict):
            yield from leaves(value)


@pytest.mark.parametrize(
    ("library", "kind"),
    [
        *(("saelens", "topk"), ("saelens", "jumprelu"), ("sparsify", "sae")),
        ("dictionary_learning", "BatchTopKTrainer"),
    ],
)
def test_a_value_that_cannot_be_is_refused_or_changes_nothing(
    kept: Path, tmp_path: Path, library: str, kind: str
) -> None:
    folder = tmp_path / "sae"
    shutil.copytree(kept / library / kind, folder)
    tensors = load_file(folder / "x_hat.safetensors")
    path = next(path for path in folder.glob("c*.json"))
    config = json.loads(path.read_text())
    refused = set()
    for part, key in leaves(config):
        right = part[key]
        for wrong in NO_VALUES:
            part[key] = wrong
            path.write_text(json.dumps(config))
            said = refusal(library, folder)
            if said is None:
                found = find(library).read(folder)(tensors["x"])
                torch.testing.assert_close(found, tensors["x_hat"], msg=f"{key}={wrong}")
                continue
            assert "\n" not in said
            refused.add(key)
        part[key] = right
    assert refused >= {"saelens": {"d_in"}, "sparsify": {"k"}}.get(library, {"k", "layer"})


def test_tensors_that_hold_no_numbers_are_refused(kept: Path, tmp_path: Path) -> None:
    """Of pickles, which may have such; safetensors have dense ones alone."""
    for kind in ("TopKTrainer", "MatryoshkaBatchTopKTrainer"):
        folder = tmp_path / kind
        shutil.copytree(kept / "dictionary_learning" / kind, folder)
        state = torch.load(folder / "ae.pt", weights_only=True)
        for name, tensor in state.items():
            for wrong in (
                *(None, "4", [3], tensor.reshape(-1)[:0], tensor.to(torch.complex64)),
                *(torch.empty_like(tensor, device="meta"), tensor.float() * torch.nan),
                *(tensor.float() / 0, torch.zeros(1).expand(10**9), tensor.to_sparse()),
            ):
                if wrong is None and name == "k":  # config.json has it too
                    continue
                if isinstance(wrong, torch.Tensor) and wrong.is_sparse and not wrong.sparse_dim():
                    continue
                torch.save({**state, name: wrong}, folder / "ae.pt")
                with pytest.raises(StoreError) as caught:
                    find("dictionary_learning").read(folder)
                assert "\n" not in str(caught.value), name


def add_tensor(folder: Path, name: str) -> None:
    if (folder / "ae.pt").exists():
        state = torch.load(folder / "ae.pt", weights_only=True)
        torch.save({**state, name: torch.eye(D)}, folder / "ae.pt")
        return
    path = next(path for path in folder.glob("*.safetensors") if path.name != "x_hat.safetensors")
    save_file({**load_file(path), name: torch.eye(D)}, path)


# -- ours, read by theirs --------------------------------------------------------------------------

HOOKS = {
    ("circuit_tracer", "transcoder"): "mlp.hook_in hook_mlp_out",
    ("dictionary_learning", "sae"): "resid_post_layer_21",
    ("dictionary_learning", "crosscoder"): "resid_post_layer_21,resid_post_layer_27",
    ("saelens", "sae"): "blocks.21.hook_resid_post",
    ("saelens", "transcoder"): "blocks.21.mlp.hook_in blocks.21.hook_mlp_out",
    ("sparsify", "sae"): "layers.21",
    ("sparsify", "transcoder"): "layers.21.mlp_out",
}


@pytest.fixture(scope="module")
def read_by_them(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our files, with what the installed libraries compute of them."""
    root = tmp_path_factory.mktemp("ours")
    for library, kind in CASES:
        folder = root / library / kind
        exported(folder, library, made(kind), kind)
        code = lines(library, folder, [path.name for path in folder.rglob("*")])
        (folder / "loads.py").write_text("\n".join(code))
    np.save(root / "x.npy", rows().numpy())
    run("load.py", str(root))
    return root


@pytest.mark.parametrize(("library", "kind"), [case for case in CASES if case[0] in LIBRARIES])
def test_the_library_computes_the_same_of_our_files(
    request: pytest.FixtureRequest, library: str, kind: str
) -> None:
    require(library)
    folder = request.getfixturevalue("read_by_them") / library / kind
    sae, x = made(kind), rows()
    if not (folder / "found.npz").exists():
        pytest.skip(f"the installed {library} has no class of it")
    with np.load(folder / "found.npz") as found:
        kept = sae.encode(x)
        dense = torch.zeros(len(x), found["f"].shape[1])  # with circuit-tracer's latents of zeros
        dense[kept.rows, kept.indices] = kept.values
        np.testing.assert_allclose(found["f"], dense.numpy(), atol=1e-5)
        np.testing.assert_allclose(found["x_hat"], sae(x).numpy(), atol=1e-5)
        assert str(found["hook"]) == HOOKS[library, about(kind).kind]
