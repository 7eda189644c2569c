"""`drop_tokens=` from the command line to the studies: all serve the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from residual_saes.analyze.subject import Subject
from residual_saes.data.journal import read_metrics
from residual_saes.data.rows.split import held_out_units, training_units
from residual_saes.train.run import CONFIG, METRICS
from tests.conftest import Call
from tests.data.test_left_out import BY_TOKEN, PLAIN, SINK, START, Planted, plant
from tests.train.test_command import SMALL

LOOSE = ("drop_bos=false", "drop_outliers=false")


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return plant(tmp_path / "s.zarr")


def train(call: Call, *arguments: str) -> tuple[int, str]:
    return call(
        "train", "residual_saes.train.command", *arguments, "store=s.zarr", *SMALL, "tokens=512"
    )


def recorded(run: str) -> dict[str, Any]:
    config = yaml.safe_load(Path(run, CONFIG).read_text())
    assert isinstance(config, dict)
    return config


def test_a_run_records_what_it_leaves_out_and_goes_on(planted: Planted, call: Call) -> None:
    tokens = f"drop_tokens=[{SINK},{START},{SINK}]"
    code, err = train(call, tokens, *LOOSE, "run=r")
    assert code == 0, err
    units = training_units(planted.store)
    count = len(units) * 64
    share = 1 - len(planted.kept(BY_TOKEN, units)) / count
    assert f"token ids {START}, {SINK} ({share:.3%} of rows, " in err
    config = recorded("r")
    assert config["settings"]["policy"] == BY_TOKEN.recorded()
    assert config["left_out"]["drop_tokens"]["rows"] == pytest.approx(share)

    # Go on from the last checkpoint: the same bits.
    final = Path("r/sae_final.pt").read_bytes()
    Path("r/sae_final.pt").unlink()
    code, err = train(call, f"drop_tokens=[{START},{SINK}]", *LOOSE, "run=r")
    assert (code, "\ngoes on  at step 8 of 8\n" in err) == (0, True), err
    assert Path("r/sae_final.pt").read_bytes() == final
    code, err = train(call, f"drop_tokens={SINK}", *LOOSE, "run=r")
    assert (code, "policy.drop_tokens" in err) == (2, True), err

    code, err = train(call, "run=plain")
    assert code == 0, err
    assert recorded("plain")["settings"]["policy"] == {"drop_bos": True, "drop_outliers": True}
    assert list(recorded("plain")["left_out"]) == ["drop_bos", "drop_outliers"]


def test_studies_read_the_rows_of_training(planted: Planted, call: Call) -> None:
    code, err = train(call, f"drop_tokens=[{PLAIN},{SINK}]", "run=r")
    assert code == 0, err
    subject = Subject.open(Path("r"), None, torch.device("cpu"))
    assert subject.policy.drop_tokens == (SINK, PLAIN)
    kept = planted.kept(subject.policy, held_out_units(planted.store))
    encoded = [
        firings.unit.number * 64 + firings.unit.local[firings.rows]
        for firings in subject.firings(10**6)
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate(encoded)), kept)
    trained = planted.rows[planted.kept(subject.policy, training_units(planted.store))]
    np.testing.assert_allclose(subject.moments.mean, trained.mean(0), rtol=1e-9)

    code, err = call("analyze", "residual_saes.analyze.command", "run=r", "device=cpu")
    assert code == 0, err
    figures = json.loads(Path("r/studies/quality/quality.json").read_text())
    figures = figures.get("figures", figures)
    final = read_metrics(Path("r") / METRICS)[-1]
    assert figures["rows"] == final["rows"] == len(kept)
    as_trained = figures["variance_explained"]["as trained"]
    assert as_trained["rows"] == len(kept)
    assert as_trained["centred"] == pytest.approx(final["variance_explained"], abs=1e-5)
    page = Path("r/studies/quality/quality.md").read_text()
    assert f"token ids {SINK}, {PLAIN} (" in page


def test_arms_may_differ_in_it(planted: Planted, call: Call) -> None:
    code, err = train(call, "-m", f"drop_tokens=[],[{PLAIN}],[{SINK}]", "run=${drop_tokens}")
    assert code == 0, err
    runs = f"runs=[[],[{PLAIN}],[{SINK}]]"
    code, err = call(
        "analyze", "residual_saes.analyze.command", "study=sweep", runs, "out=out", "device=cpu"
    )
    assert code == 0, err
    assert f"token ids {SINK}, {PLAIN}" in Path("out/sweep.md").read_text()


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "[1,b]", "true", "[[1]]", "<eos>"])
def test_what_is_no_token_id_is_one_line(planted: Planted, call: Call, value: str) -> None:
    code, err = train(call, f"drop_tokens={value}", "run=r")
    assert (code, err.count("\n")) == (2, 1), err
    assert "drop_tokens=" in err
    assert not Path("r").exists()
