"""Files that other libraries' own classes write, with what those compute of a few rows.

    python tests/train/foreign/write.py OUT             packed, some of them: what the tests keep
    python tests/train/foreign/write.py OUT --every

It runs in an interpreter that has the libraries (INTEROP_PYTHON, see CONTRIBUTING.md), and imports
nothing of this project. For each library it leaves a folder, or OUT/LIBRARY.zip of it:

    OUT/LIBRARY/about.json               the version, and the keys of the library's configurations
    OUT/LIBRARY/KIND/...                 the library's files
    OUT/LIBRARY/KIND/x_hat.safetensors   x (n, d), x_hat (n, d): the library's own, in float32;
                                         without x_hat: it computes none of rows of one site

A kind is an architecture with one setting changed. Settings and their values are read off the
library's own classes, so that a new version's are tried too.

Shapes: n rows, d = D, F latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
import shutil
import sys
import types
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

D, F, K, ROWS = 8, 16, 3, 8
LAYER, MODEL, CONTEXT = 1, "gpt2", 128
Kind = tuple[str, Callable[[Path], Callable[[Tensor], Tensor]]]  # name, save: gives the function


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = 2 * drawn(0, ROWS, D) + 1


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Draw every parameter: no bias is 0, no decoder row has norm 1, thresholds are above 0."""
    for number, (name, tensor) in enumerate(sorted(module.named_parameters())):
        values = drawn(number + 1, *tensor.shape) * (0.5 if tensor.ndim > 1 else 0.3)
        tensor.copy_(values.abs() if "threshold" in name else values)
    for name, tensor in module.named_buffers():
        if name.endswith("threshold"):
            tensor.fill_(0.4)


def others(kind: Any, value: Any) -> list[Any]:
    """Values that a field may have instead, by its type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return [other for other in arguments if other != value]
    if origin in (typing.Union, types.UnionType):
        found = [other for argument in arguments for other in others(argument, value)]
        return [other for other in found if other != value]
    if kind is bool:
        return [not value]
    if kind is int and value:
        return [value * 2]
    if kind is float:
        return [value * 2 + 0.5 if value else 0.5]
    return []


# -- SAELens ---------------------------------------------------------------------------------------

# Sizes, where it runs, and what is none of the configuration's business.
_FIXED = {"d_in", "d_sae", "d_out", "device", "metadata", "matryoshka_widths"}
_DTYPES = ["float64", "float16", "bfloat16"]


def saelens(every: bool) -> Iterator[Kind]:
    from sae_lens import registry

    for architecture, (cls, config) in sorted(registry.SAE_CLASS_REGISTRY.items()):
        for name, change in _saelens_changes(config, every):
            yield f"{architecture}{name}", _saelens_saved(cls, config, change, "save_model")
    for architecture, (cls, config) in sorted(registry.SAE_TRAINING_CLASS_REGISTRY.items()):
        for way in ("save_model", "save_inference_model"):
            for name, change in _saelens_changes(config, every) if every else [("", {})]:
                yield f"{way} {architecture}{name}", _saelens_saved(cls, config, change, way)

    for name in ("scaled", "whitened"):
        yield f"checkpoint topk, {name}", _saelens_checkpoint(name == "whitened")


def _saelens_checkpoint(whitened: bool) -> Any:
    """As sae_trainer.save_checkpoint leaves it, before rows' scale is folded into the weights."""
    from sae_lens import registry
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

    matrix = torch.linalg.qr(drawn(90, D, D).double()).Q * 1.5
    whitening = ActivationWhitening(drawn(91, D).double(), matrix, torch.linalg.inv(matrix))
    scaler = ActivationScaler(None, whitening) if whitened else ActivationScaler(0.37)
    kind = "covariance_whitening" if whitened else "expected_average_only_in"
    topk = registry.SAE_TRAINING_CLASS_REGISTRY["topk"]
    saved = _saelens_saved(*topk, {"normalize_activations": kind}, "save_model")

    def save(folder: Path) -> Callable[[Tensor], Tensor]:
        sae = saved(folder)
        scaler.save(str(folder / "activation_scaler.json"))
        return lambda x: scaler.unscale(sae(scaler.scale(x)))

    return save


def _saelens_changes(config: type, every: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """No change, and one of each field."""
    yield "", {}
    hints = typing.get_type_hints(config)
    own = {"apply_b_dec_to_input", "rescale_acts_by_decoder_norm"}
    if config.__name__ == "StandardSAEConfig":
        own |= {"normalize_activations", "reshape_activations", "dtype"}
    for field in dataclasses.fields(config):
        if field.name in _FIXED or not (every or field.name in own):
            continue
        values = others(hints[field.name], _default(field))
        values = _DTYPES if field.name == "dtype" else values
        if field.name == "normalize_activations":
            values = [*values, "constant_norm_rescale"]
        for value in values:
            yield f", {field.name}={value}", {field.name: value}


def _default(field: Any) -> Any:
    if field.name in ("k", "kval_topk"):
        return K
    return None if field.default is dataclasses.MISSING else field.default


def _saelens_saved(cls: Any, config: type, change: dict[str, Any], way: str) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    names = {field.name for field in dataclasses.fields(config)}
    given: dict[str, Any] = {"d_in": D, "d_sae": F}
    small = {"k": K, "d_out": D, "kval_topk": K, "matryoshka_widths": [F // 2, F], "target_l0": 3.0}
    small |= {"n_heads": 2, "bottleneck_factor": 1}
    given |= {name: value for name, value in small.items() if name in names}
    if "d_out" in names:  # transcoders take nothing else
        given["apply_b_dec_to_input"] = False
    hook = "attn.hook_z" if change.get("reshape_activations") == "hook_z" else "hook_resid_post"
    about = {
        "model_name": MODEL,
        "hook_name": f"blocks.{LAYER}.{hook}",
        "hook_head_index": None,
        "context_size": CONTEXT,
        "prepend_bos": True,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {},
    }

    def save(folder: Path) -> Callable[[Tensor], Tensor]:
        sae = cls(config(**{**given, **change}, metadata=SAEMetadata(**about)))
        randomize(sae)
        getattr(sae, way)(folder)
        from sae_lens import SAE, TrainingSAE

        loader = TrainingSAE if way == "save_model" and issubclass(cls, TrainingSAE) else SAE
        loaded = loader.load_from_disk(folder, dtype="float32")
        if hook == "attn.hook_z" and loaded.hook_z_reshaping_mode:
            return lambda x: loaded(x.reshape(len(x), 2, -1)).reshape(len(x), -1)
        return loaded

    return save


def saelens_keys() -> set[str]:
    from sae_lens import registry
    from sae_lens.loading.pretrained_sae_loaders import LLM_METADATA_KEYS

    keys = {"architecture", *LLM_METADATA_KEYS}
    both = (registry.SAE_CLASS_REGISTRY, registry.SAE_TRAINING_CLASS_REGISTRY)
    for classes in both:
        for _, config in classes.values():
            keys |= {field.name for field in dataclasses.fields(config)}
    return keys


# -- sparsify --------------------------------------------------------------------------------------


def sparsify(_: bool) -> Iterator[Kind]:
    from sparsify import SparseCoderConfig

    hints = typing.get_type_hints(SparseCoderConfig)
    small = {"expansion_factor": F // D, "k": 4}
    yield "sae", _sparsify_saved(small, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        yield f"sae, {dtype}".replace("torch.", ""), _sparsify_saved(small, dtype)
    for field in dataclasses.fields(SparseCoderConfig):
        for value in others(hints[field.name], small.get(field.name, field.default)):
            if field.name != "expansion_factor":
                change = {**small, field.name: value}
                yield f"sae, {field.name}={value}", _sparsify_saved(change, torch.float32)
    yield "sae, num_latents=16", _sparsify_saved({**small, "num_latents": F}, torch.float32)
    skip = {**small, "transcode": True, "skip_connection": True}
    yield "sae, transcode and skip_connection", _sparsify_saved(skip, torch.float32)


def _sparsify_saved(config: dict[str, Any], dtype: torch.dtype) -> Any:
    from sparsify import SparseCoder, SparseCoderConfig

    def save(folder: Path) -> Callable[[Tensor], Tensor]:
        sae = SparseCoder(D, SparseCoderConfig(**config), dtype=dtype)
        randomize(sae)
        sae.save_to_disk(folder)
        loaded = SparseCoder.load_from_disk(folder).float()
        return lambda x: loaded(x).sae_out

    return save


def sparsify_keys() -> set[str]:
    from sparsify import SparseCoderConfig

    return {"d_in", *(field.name for field in dataclasses.fields(SparseCoderConfig))}


# -- dictionary_learning ---------------------------------------------------------------------------


def import_dictionary_learning() -> None:
    """Make it importable: nnsight runs language models for it, which nothing here does."""
    if "nnsight" not in sys.modules:
        stub = types.ModuleType("nnsight")
        stub.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules["nnsight"] = stub


def _trainers() -> dict[str, type]:
    from dictionary_learning.trainers import (
        batch_top_k,
        gated_anneal,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        p_anneal,
        standard,
        top_k,
    )

    modules = (batch_top_k, gated_anneal, gdm, jumprelu, matryoshka_batch_top_k, p_anneal)
    found = {}
    for module in (*modules, standard, top_k):
        for name, cls in vars(module).items():
            named = inspect.isclass(cls) and cls.__module__ == module.__name__
            if named and re.search(r"Trainer(AprilUpdate)?$", name):
                found[name] = cls
    return found


def _buffer_keys() -> dict[str, list[str]]:
    """The keys of config.json's buffer, by class: read off the source, for a buffer needs text."""
    from dictionary_learning import buffer

    keys = {}
    for name, cls in vars(buffer).items():
        if inspect.isclass(cls) and hasattr(cls, "config") and cls.__module__ == buffer.__name__:
            source = inspect.getsource(cls.config.fget)
            keys[name] = re.findall(r"""['"](\w+)['"]\s*:""", source)
    return keys


def _trainer(name: str, cls: type, **change: Any) -> Any:
    given = {"steps": 10, "activation_dim": D, "dict_size": F, "layer": LAYER, "lm_name": MODEL}
    given |= {"device": "cpu", "submodule_name": f"resid_post_layer_{LAYER}", "k": K, "seed": 0}
    given |= {"warmup_steps": 1, "sparsity_warmup_steps": 1, "anneal_start": 2, "decay_start": 8}
    given |= {"group_fractions": [0.25, 0.75], **change}
    with contextlib.redirect_stdout(sys.stderr):
        parameters = inspect.signature(cls).parameters
        trainer = cls(**{key: value for key, value in given.items() if key in parameters})
    randomize(trainer.ae)
    return trainer


def dictionary_learning(every: bool) -> Iterator[Kind]:
    import_dictionary_learning()
    from dictionary_learning.dictionary import AutoEncoderNew

    for name, cls in sorted(_trainers().items()):
        yield name, _dictionary_saved(name, cls, "out")
        for io in ("in", "in_and_out") if every else ():
            yield f"{name}, io={io}", _dictionary_saved(name, cls, io)
    april = _trainers()["StandardTrainerAprilUpdate"]
    yield "AutoEncoderNew", _dictionary_saved("", april, "out", ae=AutoEncoderNew)
    yield "a transcoder", _dictionary_saved("", april, "in_and_out")


def _dictionary_saved(name: str, cls: type, io: str, ae: Any = None) -> Any:
    def save(folder: Path) -> Callable[[Tensor], Tensor]:
        from dictionary_learning.utils import load_dictionary

        trainer = _trainer(name, cls)
        config = dict(trainer.config)
        if ae is not None:  # no trainer of this version has it
            trainer.ae = ae(D, F)
            randomize(trainer.ae)
            config["dict_class"] = ae.__name__
        buffer = dict.fromkeys(_buffer_keys()["ActivationBuffer"], 4)
        buffer |= {"d_submodule": D, "ctx_len": CONTEXT, "io": io, "device": "cpu"}
        # As training.trainSAE saves them.
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": buffer}))
        torch.save(trainer.ae.state_dict(), folder / "ae.pt")
        if io != "out":
            return lambda x: torch.tensor([])  # of two sites
        return load_dictionary(str(folder), "cpu")[0]

    return save


def dictionary_learning_keys() -> dict[str, list[str]]:
    import_dictionary_learning()
    trainer: set[str] = set()
    for name, cls in _trainers().items():
        trainer |= set(_trainer(name, cls).config)
    buffer = {key for keys in _buffer_keys().values() for key in keys}
    return {"trainer": sorted(trainer), "buffer": sorted(buffer)}


# -- circuit-tracer --------------------------------------------------------------------------------


def circuit_tracer(_: bool) -> Iterator[Kind]:
    for skip in (False, True):
        for activation in ("relu", "jumprelu", "topk without ReLU"):
            yield f"{activation}{', skip' * skip}", _circuit_saved(activation, skip)


def _circuit_saved(activation: str, skip: bool) -> Any:
    from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    kinds = {
        "relu": nn.functional.relu,
        "jumprelu": JumpReLU(torch.zeros(F)),
        "topk without ReLU": TopK(K),
    }
    config = {
        "model_name": MODEL,
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": MODEL,
        **({"activation": "topk", "k": K} if activation[:4] == "topk" else {}),
    }

    def save(folder: Path) -> Callable[[Tensor], Tensor]:
        transcoder = SingleLayerTranscoder(
            D, F, kinds[activation], LAYER, skip, device=torch.device("cpu"), dtype=torch.float32
        )
        randomize(transcoder)
        folder.mkdir(parents=True)
        transcoder.to_safetensors(str(folder / f"layer_{LAYER}.safetensors"))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return transcoder

    return save


def circuit_tracer_keys() -> list[str]:
    """The keys that are looked up in config.yaml: read off the source."""
    from circuit_tracer import transcoder

    source = Path(transcoder.__file__).parents[1] / "utils" / "hf_utils.py"
    return sorted(set(re.findall(r"""config(?:\.get\(|\[)"(\w+)\"""", source.read_text())))


# -- all -------------------------------------------------------------------------------------------

LIBRARIES = {
    "saelens": ("sae-lens", saelens, saelens_keys),
    "sparsify": ("eai-sparsify", sparsify, sparsify_keys),
    "dictionary_learning": ("dictionary-learning", dictionary_learning, dictionary_learning_keys),
    "circuit_tracer": ("circuit-tracer", circuit_tracer, circuit_tracer_keys),
}


def write(library: str, out: Path, every: bool) -> None:
    package, kinds, keys = LIBRARIES[library]
    out.mkdir(parents=True)
    found = keys()
    about = {"package": package, "version": metadata.version(package)}
    about["keys"] = found if isinstance(found, dict) else sorted(found)
    (out / "about.json").write_text(json.dumps(about, indent=1))
    for name, save in kinds(every):
        folder = out / name
        try:
            function = save(folder)
            x_hat = function(X).detach().float()
        except Exception as error:
            print(f"{library}: {name}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
            x_hat = torch.tensor([])
        if not folder.exists():
            continue  # the library does not make such
        tensors = {"x": X, **({"x_hat": x_hat} if x_hat.shape == X.shape else {})}
        save_file(tensors, folder / "x_hat.safetensors")


def pack(folder: Path) -> None:
    """FOLDER.zip instead of the folder, the same bytes each time."""
    with zipfile.ZipFile(f"{folder}.zip", "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(str(path.relative_to(folder)))
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    shutil.rmtree(folder)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    every = "--every" in sys.argv
    for name in LIBRARIES:
        out = Path(sys.argv[1], name)
        try:
            write(name, out, every)
        except ImportError as error:
            print(f"{name} is not installed: {error}", file=sys.stderr)
            continue
        if not every:
            pack(out)
