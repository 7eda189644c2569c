"""Other libraries' SAEs are read as the function that they are, or refused by the name of what is
not known.

Expected reconstructions are the libraries' formulas in plain torch. docs/foreign.md lists the kinds
that are tried here.

Shapes: n rows, d = D, F latents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from residual_saes.data.errors import StoreError
from residual_saes.train.export.format import find
from tests.test_house import ROOT

D, F, K = 16, 48, 4
_draw = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_draw)


X = normal(200, D) + 2  # (n, d)
W_DEC = torch.nn.functional.normalize(normal(F, D), dim=1)
FREE = W_DEC * torch.linspace(0.3, 3, F)[:, None]  # a decoder whose rows have other norms
W_ENC = (W_DEC.T + 0.1 * normal(D, F)).contiguous()
B_ENC = 0.1 * normal(F)
B_DEC = torch.full((D,), 2.0)
THRESHOLD = 0.8 * normal(F)  # some below 0, where ReLU decides
SCALE = torch.linspace(0.5, 1.7, F)
W_SKIP = 0.3 * normal(D, D)  # (d_out, d), as the libraries have it
R_MAG, B_GATE, B_MAG = 0.3 * normal(F), 0.5 * normal(F), 0.5 * normal(F)
U = X @ W_ENC
V = (X - B_DEC) @ W_ENC


def kept(pre: Tensor, k: int = K, score: Tensor | None = None) -> Tensor:
    """ReLU of the k largest of each row, by `score`."""
    indices = (pre if score is None else score).topk(k, dim=1).indices
    return torch.zeros_like(pre).scatter(1, indices, pre.relu().gather(1, indices))


def above(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return pre.relu() * (pre > threshold)


def gates(product: Tensor) -> Tensor:
    return (R_MAG.exp() * product + B_MAG).relu() * (product + B_GATE > 0)


class Case(NamedTuple):
    """A file of another library."""

    library: str
    config: Mapping[str, Any] | None
    tensors: Mapping[str, Any]
    right: Tensor | None = None  # (n, d) its reconstruction of X

    def written(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if self.library == "circuit_tracer":
            save_file(dict(self.tensors), folder / "layer_5.safetensors")
            (folder / "config.yaml").write_text(yaml.safe_dump(self.config))
            return folder
        if self.library == "dictionary_learning":
            torch.save(dict(self.tensors), folder / "ae.pt")
            if self.config is not None:
                (folder / "config.json").write_text(json.dumps(self.config))
            return folder
        file = "sae_weights.safetensors" if self.library == "saelens" else "sae.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / file)
        (folder / "cfg.json").write_text(json.dumps(self.config))
        return folder


PLAIN = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
SHAPE = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
SIX = {
    **SHAPE,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.5.0", "hook_name": "blocks.5.hook_resid_post"},
}
FIVE = {
    **SHAPE,
    "hook_name": "blocks.5.hook_resid_post",
    "hook_layer": 5,
    "hook_head_index": None,
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "sae_lens_training_version": "5.0.0",
    "seqpos_slice": [None],
    "noise_scale": 0.0,
    "scale_sparsity_penalty_by_decoder_norm": True,
}


def saelens(config: Mapping[str, Any], right: Tensor | None = None, **tensors: Tensor) -> Case:
    return Case("saelens", config, {**PLAIN, **tensors}, right)


def six(kind: str, right: Tensor | None = None, change: Any = None, **tensors: Tensor) -> Case:
    return saelens({**SIX, "architecture": kind, **(change or {})}, right, **tensors)


def five(right: Tensor | None = None, change: Any = None, **tensors: Tensor) -> Case:
    return saelens({**FIVE, **(change or {})}, right, **tensors)


GATED = {"W_enc": W_ENC, "W_dec": FREE, "b_dec": B_DEC, "b_gate": B_GATE, "b_mag": B_MAG}
GATED["r_mag"] = R_MAG
TWO = {
    **SHAPE,
    "hook_point": "blocks.{layer}.hook_resid_post",
    "hook_point_layer": 5,
    "activation_fn": "relu",
    "normalize_activations": False,
    "tokens_per_buffer": 9,
}
WHOLE = {"apply_b_dec_to_input": False}
TOPK_STR = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
NORMS = FREE.norm(dim=1)

SAELENS = {
    "6: topk": six("topk", kept(V + B_ENC) @ W_DEC + B_DEC, {"k": K}),
    "6: topk, rows of W_dec of any norm": six(
        "topk", kept(V + B_ENC) @ FREE + B_DEC, {"k": K}, W_dec=FREE
    ),
    "6: topk, rescale_acts_by_decoder_norm": six(
        "topk",
        kept(V + B_ENC, score=(V + B_ENC) * NORMS) @ FREE + B_DEC,
        {"k": K, "rescale_acts_by_decoder_norm": True},
        W_dec=FREE,
    ),
    "6: topk, apply_b_dec_to_input: false": six(
        "topk", kept(U + B_ENC) @ W_DEC + B_DEC, {"k": K, **WHOLE}
    ),
    "6: standard": six("standard", (V + B_ENC).relu() @ FREE + B_DEC, W_dec=FREE),
    "6: standard, apply_b_dec_to_input: false": six(
        "standard", (U + B_ENC).relu() @ FREE + B_DEC, WHOLE, W_dec=FREE
    ),
    "6: jumprelu, as batchtopk and matryoshka are saved": six(
        "jumprelu",
        above(V + B_ENC, THRESHOLD) @ FREE + B_DEC,
        {"metadata": {"training_architecture": "matryoshka_batchtopk", "anything": [1]}},
        W_dec=FREE,
        threshold=THRESHOLD,
    ),
    "6: jumprelu, apply_b_dec_to_input: false": six(
        "jumprelu", above(U + B_ENC, THRESHOLD) @ W_DEC + B_DEC, WHOLE, threshold=THRESHOLD
    ),
    "4-6: gated": Case(
        "saelens",
        {**SIX, "architecture": "gated"},
        GATED,
        gates(V) @ FREE + B_DEC,
    ),
    "4-6: gated, apply_b_dec_to_input: false": Case(
        "saelens",
        {**SIX, "architecture": "gated", **WHOLE},
        GATED,
        gates(U) @ FREE + B_DEC,
    ),
    "4: jumprelu with log_threshold": five(
        above(V + B_ENC, THRESHOLD.abs()) @ W_DEC + B_DEC,
        {"architecture": "jumprelu"},
        log_threshold=THRESHOLD.abs().log(),
    ),
    "5: architecture: topk, k in activation_fn_kwargs": five(
        kept(V + B_ENC) @ W_DEC + B_DEC, {"architecture": "topk", **TOPK_STR}
    ),
    "3-5: standard, activation_fn_str: topk": five(
        kept(V + B_ENC) @ W_DEC + B_DEC, {"architecture": "standard", **TOPK_STR}
    ),
    "3: no architecture, activation_fn_str: relu": five(
        (V + B_ENC).relu() @ W_DEC + B_DEC, {"activation_fn_str": "relu"}
    ),
    "3-5: finetuning_scaling_factor": five(
        ((V + B_ENC).relu() * SCALE) @ W_DEC + B_DEC,
        {"activation_fn_str": "relu", "finetuning_scaling_factor": True},
        scaling_factor=SCALE,
    ),
    "3-5: finetuning_scaling_factor of topk": five(
        (kept(V + B_ENC) * SCALE) @ W_DEC + B_DEC,
        {**TOPK_STR, "finetuning_scaling_factor": True},
        finetuning_scaling_factor=SCALE,
    ),
    "1-2: scaling_factor, without a word in cfg.json": saelens(
        TWO, ((V + B_ENC).relu() * SCALE) @ W_DEC + B_DEC, scaling_factor=SCALE
    ),
}
TRANSCODER = {**WHOLE, "d_out": D}
OUT = {
    "metadata": {
        "hook_name": "blocks.5.mlp.hook_in",
        "hook_name_out": "blocks.5.hook_mlp_out",
    }
}
_decoded = (U + B_ENC).relu() @ FREE + B_DEC
_jumped = above(U + B_ENC, THRESHOLD) @ FREE + B_DEC
_skip = X @ W_SKIP.T
SAELENS |= {
    "6: transcoder": six("transcoder", _decoded, TRANSCODER, W_dec=FREE),
    "6: skip_transcoder": six(
        "skip_transcoder", _decoded + _skip, TRANSCODER, W_dec=FREE, W_skip=W_SKIP
    ),
    "6: jumprelu_transcoder": six(
        "jumprelu_transcoder", _jumped, TRANSCODER, W_dec=FREE, threshold=THRESHOLD
    ),
    "6: jumprelu_skip_transcoder": six(
        *("jumprelu_skip_transcoder", _jumped + _skip, TRANSCODER),
        W_dec=FREE,
        threshold=THRESHOLD,
        W_skip=W_SKIP,
    ),
    "6: topk, hook_name_out of another hook, apply_b_dec_to_input: false": six(
        "topk", kept(U + B_ENC) @ W_DEC + B_DEC, {"k": K, **WHOLE, **OUT}
    ),
}
LINEAR = {"encoder.weight": W_ENC.T.contiguous(), "decoder.weight": FREE.T.contiguous()}
TOPK = {**LINEAR, "encoder.bias": B_ENC, "b_dec": B_DEC}
BATCH = {**TOPK, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.8)}
MATRYOSHKA = {**PLAIN, "k": torch.tensor(K), "threshold": torch.tensor(0.8)}
MATRYOSHKA["group_sizes"] = torch.tensor([8, F - 8])
GATED_LINEAR = {**LINEAR, "decoder_bias": B_DEC}
GATED_LINEAR |= {"gate_bias": B_GATE, "mag_bias": B_MAG, "r_mag": R_MAG}
NEW = {**LINEAR, "encoder.bias": B_ENC, "decoder.bias": B_DEC}
OLD = {**LINEAR, "encoder.bias": B_ENC, "bias": B_DEC}


def learned(
    tensors: Mapping[str, Any], right: Tensor | None, kind: str | None, **more: Any
) -> Case:
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "lr": 1e-4, **more}
    config = None if kind is None else {"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}}
    return Case("dictionary_learning", config, tensors, right)


JUMP = {**PLAIN, "threshold": THRESHOLD}
_relu, _whole = (V + B_ENC).relu() @ FREE + B_DEC, (U + B_ENC).relu() @ FREE + B_DEC
_gated, _above = gates(V) @ FREE + B_DEC, above(V + B_ENC, 0.8) @ FREE + B_DEC
_jump = above(U + B_ENC, THRESHOLD) @ W_DEC + B_DEC
_nested = above(V + B_ENC, 0.8) @ W_DEC + B_DEC
DICTIONARY_LEARNING = {
    "AutoEncoder": learned(OLD, _relu, "AutoEncoder"),
    "AutoEncoder, no config.json": learned(OLD, _relu, None),
    "AutoEncoderNew": learned(NEW, _whole, "AutoEncoderNew"),
    "AutoEncoderNew, no config.json": learned(NEW, _whole, None),
    "GatedAutoEncoder": learned(GATED_LINEAR, _gated, "GatedAutoEncoder"),
    "GatedAutoEncoder, no config.json": learned(GATED_LINEAR, _gated, None),
    "JumpReluAutoEncoder": learned(JUMP, _jump, "JumpReluAutoEncoder"),
    "JumpReluAutoEncoder, no config.json": learned(JUMP, _jump, None),
    "AutoEncoderTopK": learned(BATCH, kept(V + B_ENC) @ FREE + B_DEC, "AutoEncoderTopK", k=K),
    "AutoEncoderTopK, k in config.json alone": learned(
        TOPK, kept(V + B_ENC) @ FREE + B_DEC, "AutoEncoderTopK", k=K
    ),
    "BatchTopKSAE": learned(BATCH, _above, "BatchTopKSAE", k=K),
    "BatchTopKSAE before it has a threshold (-1)": learned(
        {**BATCH, "threshold": torch.tensor(-1.0)}, _relu, "BatchTopKSAE"
    ),
    "MatryoshkaBatchTopKSAE": learned(MATRYOSHKA, _nested, "MatryoshkaBatchTopKSAE", k=K),
    "MatryoshkaBatchTopKSAE, no config.json": learned(MATRYOSHKA, _nested, None),
}
# Of two hook points with D / 2 columns each.
CROSS = {
    "encoder.weight": W_ENC.reshape(2, -1, F),
    "encoder.bias": B_ENC,
    "decoder.weight": FREE.reshape(F, 2, -1).transpose(0, 1),
    "decoder.bias": B_DEC.reshape(2, -1),
    "activation_mean": torch.full((2, D // 2), torch.nan),
}
CROSS_K = {**CROSS, "k": torch.tensor(K), "threshold": torch.tensor(0.8)}
_each = FREE.reshape(F, 2, -1).norm(dim=2)  # (F, 2)


def crossed(norm: int, right: Tensor | None, **tensors: Any) -> Case:
    state = {**CROSS_K, "code_normalization_id": torch.tensor(norm), **tensors}
    return learned(state, right, "BatchTopKCrossCoder", k=K, num_layers=2, activation_dim=D // 2)


def above_times(norm: Tensor | float) -> Tensor:
    return (U + B_ENC).relu() * ((U + B_ENC) * norm > 0.8) @ FREE + B_DEC


DICTIONARY_LEARNING |= {
    "fork: CrossCoder": learned(
        CROSS, (U + B_ENC).relu() @ FREE + B_DEC, "CrossCoder", activation_dim=D // 2
    ),
    "fork: BatchTopKCrossCoder, code_normalization NONE": crossed(4, above_times(1.0)),
    "fork: BatchTopKCrossCoder, code_normalization SAE": crossed(2, above_times(NORMS)),
    "fork: BatchTopKCrossCoder, code_normalization CROSSCODER": crossed(
        1, above_times(_each.sum(dim=1))
    ),
}
SPARSE = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}


def sparsify(change: Mapping[str, Any], right: Tensor | None = None, **tensors: Tensor) -> Case:
    return Case("sparsify", {"k": K, "d_in": D, **change}, {**SPARSE, **tensors}, right)


_topk = kept(V + B_ENC) @ W_DEC + B_DEC
SPARSIFY = {
    "topk": sparsify({"activation": "topk", "num_latents": F, "multi_topk": False}, _topk),
    "num_latents: 0, expansion_factor": sparsify({"num_latents": 0, "expansion_factor": 3}, _topk),
    "2024: signed: false": sparsify({"signed": False, "normalize_decoder": True}, _topk),
    "transcode: true": sparsify({"transcode": True}, kept(U + B_ENC) @ W_DEC + B_DEC),
    "transcode: true, skip_connection: true": sparsify(
        {"transcode": True, "skip_connection": True},
        kept(U + B_ENC) @ W_DEC + B_DEC + _skip,
        W_skip=W_SKIP,
    ),
}
LAYER = {"W_enc": W_ENC.T.contiguous(), "W_dec": FREE, "b_enc": B_ENC, "b_dec": B_DEC}
SET = {
    "model_name": "a model",
    "model_kind": "transcoder_set",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "hook_mlp_out",
    "scan": "a model",
}
JUMPS = {"activation_function.threshold": THRESHOLD}
TOPK_SET = {"activation": "topk", "k": K}


def circuits(right: Tensor | None = None, change: Any = None, **tensors: Tensor) -> Case:
    return Case("circuit_tracer", {**SET, **(change or {})}, {**LAYER, **tensors}, right)


def padded(tensor: Tensor, count: int = K) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])])


CIRCUIT_TRACER = {
    "ReLU": circuits(_decoded),
    "JumpReLU": circuits(_jumped, **JUMPS),
    "ReLU, W_skip": circuits(_decoded + _skip, W_skip=W_SKIP),
    "activation: topk, k latents of zeros at the end": circuits(
        kept(U + B_ENC) @ FREE + B_DEC,
        TOPK_SET,
        **{name: padded(tensor) for name, tensor in LAYER.items() if name != "b_dec"},
    ),
}
READ = {
    "SAELens": SAELENS,
    "dictionary_learning": DICTIONARY_LEARNING,
    "sparsify": SPARSIFY,
    "circuit_tracer": CIRCUIT_TRACER,
}

# -- what is refused, and what the message names ---------------------------------------------------

REFUSED = {
    "SAELens": {
        "activation_fn_str: tanh-relu": (
            five(None, {"activation_fn_str": "tanh-relu"}),
            "tanh-relu",
        ),
        "an activation that is not known": (five(None, {"activation_fn": "gelu"}), "gelu"),
        "activation_fn_kwargs that are not known": (
            five(None, {**TOPK_STR, "activation_fn_kwargs": {"k": K, "postact_fn": "id"}}),
            "postact_fn",
        ),
        "activation_fn_kwargs signed: true": (
            five(None, {**TOPK_STR, "activation_fn_kwargs": {"k": K, "signed": True}}),
            "signed",
        ),
        "architecture: topk with activation_fn_str: relu": (
            five(None, {"architecture": "topk", "activation_fn_str": "relu"}),
            "relu",
        ),
        "normalize_activations: expected_average_only_in, whose scale is not in the file": (
            six("topk", None, {"k": K, "normalize_activations": "expected_average_only_in"}),
            "normalize_activations",
        ),
        "normalize_activations: layer_norm, constant_norm_rescale, ...": (
            six("standard", None, {"normalize_activations": "layer_norm"}),
            "normalize_activations",
        ),
        "1-3: normalize_activations: true": (
            saelens({**TWO, "normalize_activations": True}),
            "normalize_activations",
        ),
        "reshape_activations: hook_z": (
            six("standard", None, {"reshape_activations": "hook_z"}),
            "reshape_activations",
        ),
        "hook_head_index": (five(None, {"hook_head_index": 3}), "hook_head_index"),
        "6: hook_head_index in metadata": (
            six("standard", None, {"metadata": {"hook_head_index": 3}}),
            "hook_head_index",
        ),
        "a scaling_factor that finetuning_scaling_factor: false denies": (
            five(None, {"activation_fn_str": "relu"}, scaling_factor=SCALE),
            "scaling_factor",
        ),
        "abstopk, temporal, matching_pursuit, batchtopk before it is saved for use": (
            six("abstopk", None, {"k": K}),
            "abstopk",
        ),
        "a transcoder, by its architecture or hook_name_out, with apply_b_dec_to_input: true": (
            six("topk", None, {"k": K, **OUT}),
            "apply_b_dec_to_input",
        ),
        "skip_transcoder without W_skip": (six("skip_transcoder", None, TRANSCODER), "W_skip"),
        "rescale_acts_by_decoder_norm of another architecture than topk": (
            six("standard", None, {"rescale_acts_by_decoder_norm": True}),
            "rescale_acts_by_decoder_norm",
        ),
        "topk without k": (six("topk"), "k"),
        "a key of cfg.json that is not known": (
            six("standard", None, {"temperature": 2}),
            "temperature",
        ),
        "a tensor that is not known": (six("standard", None, W_skip=torch.eye(D)), "W_skip"),
        "topk with a threshold": (six("topk", None, {"k": K}, threshold=THRESHOLD), "threshold"),
        "d_in or d_sae that the tensors do not have": (six("standard", None, {"d_in": 9}), "d_in"),
    },
    "dictionary_learning": {
        "AutoEncoderTopK or BatchTopKSAE, no config.json": (
            learned(BATCH, None, None),
            "BatchTopKSAE",
        ),
        "a dict_class that is not known": (
            learned({"encoder.weight": normal(2, D, F)}, None, "TiedCoder"),
            "TiedCoder",
        ),
        "a dict_class with the tensors of another": (learned(OLD, None, "AutoEncoderNew"), "bias"),
        "tensors that are not known, no config.json": (
            learned({**OLD, "norm": torch.ones(1)}, None, None),
            "norm",
        ),
        "a key of trainer that is not known": (
            learned(OLD, None, "AutoEncoder", activation_norm_factor=3.0),
            "activation_norm_factor",
        ),
        "buffer io: in, io: in_and_out": (
            Case(
                "dictionary_learning",
                {"trainer": {"dict_class": "AutoEncoder"}, "buffer": {"io": "in_and_out"}},
                OLD,
            ),
            "io=in_and_out",
        ),
        "k of config.json that the tensor k is not": (
            learned(BATCH, None, "AutoEncoderTopK", k=9),
            "k ",
        ),
        "fork: code_normalization MIXED or DECOUPLED": (crossed(3, None), "code_normalization 3"),
        "fork: activation_mean and activation_std of rows": (
            crossed(4, None, activation_mean=torch.zeros(2, D // 2)),
            "activation_mean",
        ),
        "group_sizes that are not all latents": (
            learned({**MATRYOSHKA, "group_sizes": torch.tensor([8])}, None, None),
            "group_sizes",
        ),
    },
    "sparsify": {
        "2024: signed: true": (sparsify({"signed": True}), "signed"),
        "W_skip, whatever cfg.json says": (sparsify({}, W_skip=torch.eye(D)), "W_skip"),
        "skip_connection: true without transcode": (
            sparsify({"skip_connection": True}, W_skip=W_SKIP),
            "skip_connection",
        ),
        "skip_connection: true without W_skip": (
            sparsify({"skip_connection": True, "transcode": True}),
            "W_skip",
        ),
        "multi_topk: true, with which its forward decodes 4k latents": (
            sparsify({"multi_topk": True}),
            "multi_topk",
        ),
        "activation: groupmax": (sparsify({"activation": "groupmax"}), "groupmax"),
        "embed_skip: true, gram_lookup: true": (sparsify({"gram_lookup": True}), "gram_lookup"),
        "a key of cfg.json that is not known": (sparsify({"leak": 0.1}), "leak"),
        "num_latents that the tensors do not have": (sparsify({"num_latents": 9}), "num_latents"),
    },
    "circuit_tracer": {
        "activation: topk without such latents, which keeps values below 0": (
            circuits(None, TOPK_SET),
            "below 0",
        ),
        "activation: topk with a threshold": (circuits(None, TOPK_SET, **JUMPS), "threshold"),
        "an activation that is not known": (circuits(None, {"activation": "gelu"}), "gelu"),
        "a key of config.yaml that is not known": (
            circuits(None, {"temperature": 2}),
            "temperature",
        ),
        "a tensor that is not known": (circuits(log_thresholds=THRESHOLD), "log_thresholds"),
    },
}


def flat(groups: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    cases = []
    for library, kinds in groups.items():
        cases += [pytest.param(case, id=f"{library}: {kind}") for kind, case in kinds.items()]
    return cases


@pytest.mark.parametrize("case", flat(READ))
def test_a_file_is_read_as_its_function(tmp_path: Path, case: Case) -> None:
    sae = find(case.library).read(case.written(tmp_path / "sae"))
    assert case.right is not None
    error = float((sae(X) - case.right).norm() / case.right.norm())
    assert error < 1e-5
    assert sae.k <= F and (sae.threshold is None or bool((sae.threshold >= 0).all()))


@pytest.mark.parametrize("case", flat(REFUSED))
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, case: tuple[Case, str]) -> None:
    file, name = case
    folder = file.written(tmp_path / "sae")
    with pytest.raises(StoreError, match=re.escape(name)) as caught:
        find(file.library).read(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("library", list(READ))
def test_tensors_that_cannot_be_right_are_refused_by_name(tmp_path: Path, library: str) -> None:
    case = next(iter(READ[library].values()))
    name = "W_dec" if "W_dec" in case.tensors else "decoder.weight"
    weight = case.tensors[name]
    for number, wrong in enumerate(
        (
            weight.clone().fill_(torch.nan),
            weight / 0,
            weight.to(torch.int8),
            torch.complex(weight, weight),
            weight[:, :-1].contiguous(),
            weight[0],
        )
    ):
        broken = case._replace(tensors={**case.tensors, name: wrong})
        with pytest.raises(StoreError, match=re.escape(str(tmp_path))):
            find(case.library).read(broken.written(tmp_path / str(number)))


@pytest.mark.parametrize("library", list(READ))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_precisions_are_taken(
    tmp_path: Path, library: str, dtype: torch.dtype
) -> None:
    case = next(iter(READ[library].values()))
    tensors = {name: tensor.to(dtype) for name, tensor in case.tensors.items()}
    sae = find(case.library).read(case._replace(tensors=tensors).written(tmp_path / "sae"))
    assert case.right is not None and sae.W_dec.dtype == torch.float32
    torch.testing.assert_close(sae(X), case.right, rtol=0.1, atol=0.2)


def test_the_kinds_of_the_page_are_the_ones_that_are_tried() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (read|refused) \|$", _page(), flags=re.MULTILINE)
    tried = [(library, kind, "read") for library, kinds in READ.items() for kind in kinds]
    tried += [(library, kind, "refused") for library, kinds in REFUSED.items() for kind in kinds]
    assert sorted(rows) == sorted(tried)


def _page() -> str:
    return (ROOT / "docs" / "foreign.md").read_text().replace("`", "")
