"""An SAE's files may be anybody's: each is read as the SAE that it is, or refused in one line."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.data.errors import PipelineError, StoreError
from residual_saes.train import sae_file
from residual_saes.train.export import format, golden
from residual_saes.train.ports import ports_of
from residual_saes.train.run import read_config
from residual_saes.train.sae import SAE

D, F, K = 16, 64, 8


def about(library: str) -> format.About:
    kind = "transcoder" if library == "circuit_tracer" else "sae"
    ports = ports_of(kind, [5], ["mlp_in" if kind == "transcoder" else "resid_post"], None)
    return format.About("tiny", ports, 64, "tiny")


def good(library: str = "") -> SAE:
    draw = torch.Generator().manual_seed(0)
    sae = SAE(
        torch.randn(F, D, generator=draw),
        torch.randn(F, D, generator=draw),
        torch.randn(F, generator=draw),
        torch.randn(D, generator=draw),
        K,
    )
    sae.project_()
    if library != "circuit_tracer":
        return sae
    return replace(sae, b_in=torch.randn(D, generator=draw))


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def content() -> dict[str, Any]:
    return {**{name: tensor.contiguous() for name, tensor in good().tensors().items()}, "k": K}


def with_pickle(data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with another pickle in it."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(pickled(content()))) as parts,
        zipfile.ZipFile(buffer, "w", compression) as changed,
    ):
        for name in parts.namelist():
            changed.writestr(name, data if name.endswith(".pkl") else parts.read(name))
    return buffer.getvalue()


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("ran",)


LONG = torch.zeros(1).expand(10**9)
KEY = b"\x80\x02})%bK\x01s."  # a mapping whose key begins as an empty tuple
FILES: dict[str, Callable[[], bytes]] = {
    "a payload": lambda: pickled({**content(), "k": Payload()}),
    # A tuple that holds another one twice, sixty deep, as a key.
    "a key for ever": lambda: with_pickle(KEY % (b"q\x01" + b"h\x01h\x01\x86q\x01" * 60)),
    "a deep key": lambda: with_pickle(KEY % (b"\x85" * 500_000)),
    "a compressed bomb": lambda: with_pickle(b"\0" * (1 << 26), zipfile.ZIP_DEFLATED),
    "an older format": lambda: b"\x80\x02" + pickled(content()),
    "half": lambda: pickled(content())[:400],
    "nothing": lambda: b"",
    "expanded": lambda: pickled({**content(), "W_enc": LONG.expand(D, -1), "b_enc": LONG}),
    "sparse": lambda: pickled({**content(), "W_enc": content()["W_enc"].to_sparse()}),
    "without memory": lambda: pickled({**content(), "W_enc": torch.empty(D, F, device="meta")}),
    "zeros": lambda: pickled({**content(), "W_dec": torch.zeros(F, D)}),
    "too large": lambda: pickled({**content(), "W_dec": content()["W_dec"] * 1e30}),
    "NaN": lambda: pickled({**content(), "b_enc": torch.full((F,), torch.nan)}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / sae_file.FILE
    path.write_bytes(FILES[name]())
    with pytest.raises(StoreError) as caught:
        sae_file.load(path)
    assert len(str(caught.value).splitlines()) == 1
    assert os.listdir(tmp_path) == [sae_file.FILE]


@pytest.mark.parametrize("library", format.names())
def test_a_pipe_or_a_device_is_no_file(tmp_path: Path, library: str) -> None:
    files = golden.files(library, good(library), about(library))
    for kind in ("pipe", "device", "loop", "folder"):
        for name in files:
            folder = tmp_path / kind / name.replace("/", "-")
            for other, data in files.items():
                path = folder / other
                path.parent.mkdir(parents=True, exist_ok=True)
                if other != name:
                    path.write_bytes(data)
                elif kind == "pipe":
                    os.mkfifo(path)
                elif kind == "folder":
                    path.mkdir()
                else:
                    path.symlink_to("/dev/zero" if kind == "device" else path)
            with pytest.raises(StoreError):
                format.find(library).read(folder)


SETTINGS = {
    "aliases": "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)),
    "merged": "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60)),
    "itself": "settings: &a {b: *a}\nenvironment: *a",
    "deep": "settings: " + "[" * 5_000,
    "a tag": "settings: !!python/object/apply:os.mkdir [ran]",
    "digits": "settings: {layer: " + "9" * 5_000 + "}\nenvironment: {}",
    "a list": "[1]",
    "large": "#" * (1 << 20),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_hostile_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = "" if name in ("itself", "a list") else "a0: &a0 {b: 1}\n"
    (tmp_path / "config.yaml").write_text(begun + SETTINGS[name])
    with pytest.raises(StoreError, match=r"config\.yaml"):
        read_config(tmp_path)
    assert os.listdir(tmp_path) == ["config.yaml"]


# -- random changes --------------------------------------------------------------------------------

VALUES: list[Any] = [None, True, -1, 0, 1.5, 1e400, "x", [], [[1]], {}, {"a": {"b": 1}}, 10**30]


def changed_json(data: bytes, draw: random.Random) -> bytes:
    """A configuration with one value, at any depth, changed or taken out or doubled."""
    config = json.loads(data)
    part = config
    while True:
        name = draw.choice(sorted(part))
        if not isinstance(part[name], dict) or not part[name] or draw.random() < 0.3:
            break
        part = part[name]
    if draw.random() < 0.2:
        del part[name]
    else:
        part[name] = draw.choice(VALUES)
    text = json.dumps(config).encode()
    return text.replace(b"{", b'{"k": 3, "k": 2, ', 1) if draw.random() < 0.05 else text


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """A file cut, longer, or with some bytes changed."""
    kind = draw.randrange(3)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind == 1:
        return data + draw.randbytes(draw.randrange(1, 50))
    flipped = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        flipped[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(flipped)


@pytest.mark.parametrize(
    "changes", [pytest.param(50, id="short"), pytest.param(3000, id="long", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("library", format.names())
def test_a_changed_file_gives_an_sae_that_works_or_is_refused(
    tmp_path: Path, library: str, changes: int
) -> None:
    """Other settings never make another function of the same weights: golden rows say so."""
    draw = random.Random(library)
    sae = good(library)
    rows = torch.randn(16, D, generator=torch.Generator().manual_seed(1))
    expected = sae(rows)
    files = golden.files(library, sae, about(library))
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    reader = format.find(library)
    assert torch.allclose(reader.read(tmp_path)(rows), expected, atol=1e-4)
    refused = 0
    for _ in range(changes):
        name = draw.choice(sorted(files))
        is_json = name.endswith(".json")
        change = changed_json if is_json and draw.random() < 0.8 else changed_bytes
        (tmp_path / name).write_bytes(change(files[name], draw))
        try:
            read = reader.read(tmp_path)
            reader.origin(tmp_path)
        except PipelineError:
            refused += 1
        else:
            assert bool(torch.isfinite(read(rows)).all())
            assert not is_json or torch.allclose(read(rows), expected, atol=1e-4)
        (tmp_path / name).write_bytes(files[name])
    assert 0 < refused < changes
