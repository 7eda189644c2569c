"""What vouches for a run's files: digests.json, from the start of the training to its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from residual_saes.data import digests
from residual_saes.data.errors import Interrupted, StoreError
from residual_saes.train.run import (
    CHECKPOINTS,
    CONFIG,
    FILES,
    METRICS,
    TIMINGS,
    is_finished,
    metrics_of,
    read_config,
    sae_digest,
    sae_of,
)
from tests.train.killing import bits, run
from tests.train.test_resume import stop_at

SAE = "sae_final.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 10."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        run(folder, stop_at(9))
    return folder


def flip(path: Path, at: float = 0.5) -> None:
    """Turn a bit of a file over, so far into it."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def test_the_record_names_what_is_durable(finished: Path, stopped: Path) -> None:
    for folder, names in ((stopped, {CONFIG}), (finished, {*FILES})):
        kept = digests.read(folder, "")
        assert kept and set(kept.files) == names
        assert not list(kept.faults())
        assert is_finished(folder) is (folder == finished)
    with pytest.raises(StoreError, match="not finished"):
        sae_of(stopped)


@pytest.mark.parametrize("name", [SAE, CONFIG, METRICS])
def test_a_flipped_bit_is_refused_with_a_way_out(copy: Path, name: str) -> None:
    read = {SAE: sae_digest, CONFIG: read_config, METRICS: metrics_of}[name]
    read(copy)
    flip(copy / name)
    with pytest.raises(StoreError, match=f"{name}.*; .*(python -m train|restore)"):
        read(copy)
    (copy / name).unlink()
    with pytest.raises(StoreError, match=name):
        read(copy)


@pytest.mark.parametrize("name", [SAE, CONFIG])
@pytest.mark.parametrize("is_left", [True, False])
def test_training_writes_the_damaged_file_again(
    copy: Path, finished: Path, name: str, is_left: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copy / name) if is_left else (copy / name).unlink()
    run(copy)
    assert f"{name} {'does not hold' if is_left else 'is missing'}" in capsys.readouterr().err
    assert (copy / name).read_bytes() == (finished / name).read_bytes()
    assert bits(copy) == bits(finished)


def test_training_refuses_damaged_metrics_and_drops_damaged_timings(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copy / TIMINGS)
    run(copy)
    assert TIMINGS in capsys.readouterr().err
    kept = digests.read(copy, "")
    assert kept and TIMINGS not in kept.files and not (copy / TIMINGS).exists()
    flip(copy / METRICS)
    with pytest.raises(StoreError, match=METRICS):
        run(copy)
    (copy / SAE).unlink()  # the checkpoint knows its metrics too
    with pytest.raises(StoreError, match=METRICS):
        run(copy)


def test_a_file_without_its_record_does_not_count(copy: Path, finished: Path) -> None:
    """As after a kill between the two."""
    kept = digests.read(copy, "")
    assert kept
    digests.put(copy, {CONFIG: kept.files[CONFIG]})
    assert not is_finished(copy)
    with pytest.raises(StoreError, match="not finished"):
        sae_digest(copy)
    flip(copy / SAE)
    run(copy)
    assert is_finished(copy)
    assert bits(copy) == bits(finished)


@pytest.mark.parametrize("name", [METRICS, TIMINGS, CONFIG])
def test_a_flip_while_the_training_rests_joins_no_record(
    stopped: Path, finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    flip(folder / name, 0.1)
    if name == METRICS:
        with pytest.raises(StoreError, match=METRICS):
            run(folder)
        return
    run(folder)
    assert name in capsys.readouterr().err
    assert bits(folder) == bits(finished)
    first = (folder / TIMINGS).read_text().splitlines()[0]
    assert json.loads(first)["step"] == (12 if name == TIMINGS else 1)


def test_a_damaged_record_is_refused_and_made_again(copy: Path, finished: Path) -> None:
    flip(copy / digests.FILE)
    for read in (sae_digest, read_config, metrics_of, run):
        with pytest.raises(StoreError, match=digests.FILE):
            read(copy)
    (copy / digests.FILE).unlink()
    run(copy)
    kept, was = digests.read(copy, ""), digests.read(finished, "")
    assert kept and was and kept.files == was.files


def test_a_run_of_an_earlier_version_is_read_and_recorded(
    copy: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / digests.FILE).unlink()
    sae_digest(copy), read_config(copy), metrics_of(copy)
    assert capsys.readouterr().err.count(digests.FILE) == 1
    assert not (copy / digests.FILE).exists()
    flip(copy / SAE)  # nobody can tell, until the checkpoint says it
    run(copy)
    assert "not what the last checkpoint gives" in capsys.readouterr().err
    assert bits(copy) == bits(finished)
    assert is_finished(copy)
    assert sae_digest(copy) == sae_digest(finished)


def test_an_earlier_one_without_checkpoints_counts_as_it_is(
    copy: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / CHECKPOINTS)
    (copy / digests.FILE).unlink()
    run(copy)
    assert "earlier version" in capsys.readouterr().err
    kept, was = digests.read(copy, ""), digests.read(finished, "")
    assert kept and was and kept.files == was.files


def test_another_sae_than_was_recorded_is_not_taken(copy: Path) -> None:
    """As of another environment, where the same checkpoint gives other bits."""
    kept = digests.read(copy, "")
    assert kept
    other = kept.files[SAE]._replace(xxh3_128="0" * 32)
    digests.put(copy, {**kept.files, SAE: other})
    with pytest.raises(StoreError, match=digests.FILE):
        run(copy)
    (copy / digests.FILE).unlink()
    run(copy)
    assert sae_digest(copy) == kept.files[SAE].xxh3_128
