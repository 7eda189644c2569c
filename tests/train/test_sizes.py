"""Sizes that nobody gives, and what is said of those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from residual_saes.train.recipe import SIZES, filled, negative_warning, rate_warning, size_warning
from residual_saes.train.run import metrics_of
from tests.conftest import Call
from tests.train.test_command import make_store


def sizes(width: int, rows: int, batch: int | None = None, **given: int) -> dict[str, Any]:
    """What the rule makes of settings with some sizes given."""
    settings = {**dict.fromkeys(SIZES), **given}
    values, batch, _ = filled(settings, batch, width, lambda: rows)
    return {**values, "batch": batch}


def test_the_sizes_of_what_was_measured() -> None:
    large = {"d_sae": 32_768, "k": 128, "k_aux": 512, "batch": 4096}
    assert sizes(2560, 10**9) == large
    assert sizes(64, 190_000) == {"d_sae": 1024, "k": 16, "k_aux": 64, "batch": 256}
    assert sizes(384, 300_000) == {"d_sae": 4096, "k": 32, "k_aux": 128, "batch": 512}


def test_few_rows_make_a_small_dictionary_and_what_is_given_stays() -> None:
    assert sizes(64, 20_000)["d_sae"] == 256
    assert sizes(64, 100) == {"d_sae": 64, "k": 16, "k_aux": 64, "batch": 64}
    assert sizes(64, 190_000, d_sae=40)["k"] == 10
    assert sizes(64, 190_000, k=100)["d_sae"] == 1024
    assert sizes(64, 190_000, batch=7)["batch"] == 7
    whole = {"d_sae": 9, "k": 2, "k_aux": 3}
    assert filled(whole, None, 64, pytest.fail) == (whole, 4096, "")


def test_too_few_rows_are_told() -> None:
    own = dict.fromkeys(SIZES)
    assert "few rows" in filled(own, None, 64, lambda: 700)[2]
    assert "few rows" not in filled(own, None, 64, lambda: 5_000)[2]
    assert "few rows" not in filled({**own, "d_sae": 64}, None, 64, lambda: 700)[2]


def test_warnings_come_where_they_must_and_nowhere_else() -> None:
    assert rate_warning(2e-4, 32_768, 244_000) is None
    assert rate_warning(1e-2, 1024, 700) is None
    assert "optim.lr" in str(rate_warning(2e-4, 1024, 700))
    assert size_warning(1024, 16, 190_000) is None
    assert "sae.d_sae" in str(size_warning(32_768, 16, 20_000))
    record = {"split": "train", "step": 100, "variance_explained": -126.0}
    assert negative_warning([record], 100) is None
    assert negative_warning([{**record, "variance_explained": None}, record], 5) is not None
    assert negative_warning([{**record, "variance_explained": 0.1}], 5) is None


def test_training_without_settings_follows_the_rule_and_goes_on_as_it_began(
    tmp_path: Path, call: Call
) -> None:
    """Of a run that is there, the same line without sae= takes the run's own settings."""
    store = f"store={make_store(tmp_path / 's.zarr')}"
    main = ("train", "residual_saes.train.command", store, "device=cpu", "tokens=640")
    code, err = call(*main)
    assert code == 0, err
    run = tmp_path / "runs" / "s_batchtopk_L3"
    recorded = yaml.safe_load((run / "config.yaml").read_text())["settings"]
    assert (recorded["sae"]["activation"], recorded["optim"]["lr"]) == ("batchtopk", "auto")
    assert recorded["batch"] == 64 and metrics_of(run)[-1]["step"] == 10

    old = ("sae=topk_32k", "sae.d_sae=32", "sae.k=2", "batch=32", "optim.lr=5", "run=old")
    code, err = call(*main, *old)
    assert code == 0 and err.count("warning: old: optim.lr=5") == 1, err
    assert err.count("warning: old: variance explained is -") == 1, err
    code, err = call(*main, "run=old")
    assert code == 0 and "old is finished" in err, err
    code, err = call(*main, "run=old", "optim.lr=4")
    assert code == 2 and "optim.lr" in err and "sae." not in err.split("optim.lr")[0], err
