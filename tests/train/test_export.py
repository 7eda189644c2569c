"""What a run in principal axes writes and says is of raw rows: the final file, and every figure."""

from dataclasses import replace

import pytest
import torch

from tests.train import killing
from tests.train.killing import BATCH, planted
from tests.train.planted import planted_stream
from tests.train.reference import dense_activations, random_sae
from tests.train.test_start import PLAIN, RECIPE, WHOLE, begun, normal


def figures(tensors, raw, mean, k):
    """The figures' definitions in float64, of an SAE on raw rows."""
    p, raw = {name: tensor.double() for name, tensor in tensors.items()}, raw.double()
    pre = (raw - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    f = pre * (pre > p["threshold"]) if "threshold" in p else dense_activations(p, raw, k)
    error = raw - (f @ p["W_dec"] + p["b_dec"])
    mse = error.square().mean()
    found = {
        "mse": mse,
        "variance_explained": 1
        - error.square().sum() / (raw - torch.from_numpy(mean)).square().sum(),
        "variance_explained_scalar": 1 - mse / raw.var(),
        "l0": (f > 0).sum() / len(raw),
    }
    return {name: pytest.approx(float(value), rel=1e-4) for name, value in found.items()}


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_the_file_of_a_rotated_run_has_the_figures_of_its_last_record(activation, tmp_path):
    reader = planted()
    final = killing.run(
        tmp_path, reader, **{**WHOLE, "sae": replace(WHOLE["sae"], activation=activation)}
    )
    content = torch.load(tmp_path / "sae_final.pt", weights_only=True)
    raw = torch.cat(list(planted_stream(reader).held_out()))
    wanted = figures(
        {name: content[name] for name in content if name != "k"}, raw, reader.mean, PLAIN.k
    )
    assert {name: final[name] for name in wanted} == wanted
    torch.testing.assert_close(content["W_dec"].norm(dim=1), torch.ones(48))


def test_records_of_training_are_of_raw_rows_too():
    reader = planted()
    trainer = begun(reader, **RECIPE)
    with torch.no_grad():
        for number in range(3):
            before, batch = (
                trainer.state.sae.folded(trainer.scale, trainer.state.basis),
                reader.draw(number, BATCH),
            )
            wanted = figures(
                {n: t.clone() for n, t in before.tensors().items()}, batch, reader.mean, PLAIN.k
            )
            record = trainer.step_(batch)
            assert {name: record[name] for name in wanted} == wanted


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_folding_an_orthogonal_basis_changes_no_output(threshold):
    sae, x, scale = random_sae(6, 32, 3, threshold=threshold), normal(40, 6).double() * 5, 0.3
    basis = torch.linalg.qr(normal(6, 6, seed=3).double()).Q
    torch.testing.assert_close(
        sae.folded(scale, basis)(x), sae(scale * x @ basis) @ basis.T / scale
    )
