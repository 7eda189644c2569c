"""Followers: how a training run and the harvest that it follows wait for each other."""

from __future__ import annotations

from typing import Protocol

from residual_saes.data.errors import StopRequest


class Follower(Protocol):
    """How one training run and the harvest that it follows wait for each other."""

    span: int | None  # training units per round; None: the store is whole
    at_once: int | None  # rows that are there before any is released; None: all

    def require(self, rows: int) -> None:
        """Raise SettingError if the stream does not have `rows` rows."""
        ...

    def begin(self, batch: int | None, fallback: int = 0) -> None:
        """Register: everything from batch number `batch` on is needed.

        Args:
            batch: None: no batch is needed any more.
            fallback: keep what comes from this batch on too, if all of it is there: the run goes
                back to it if its last checkpoint is damaged.

        Raises:
            StoreError: a part of what is needed is gone.
        """
        ...

    def round(self, batch: int) -> int:
        """The round in which a batch begins; a run saves a checkpoint in each."""
        ...

    def has(self, batch: int) -> bool:
        """Whether a batch can be read without waiting, or none will follow."""
        ...

    def wait(self, batch: int, stop: StopRequest) -> None:
        """Wait until a batch can be read, or until a signal comes."""
        ...

    def release(self, batch: int) -> None:
        """Nothing before batch number `batch` is needed any more."""
        ...

    def finish(self) -> None:
        """Nothing is needed any more."""
        ...

    def held_up_by(self, other: Follower, batch: int) -> str | None:
        """How to give up another run, if a batch cannot come while that one stands still.

        None: it can, or it is there.
        """
        ...


class FollowsNobody:
    """The store is whole and stays: there is nothing to wait for."""

    span: int | None = None
    at_once: int | None = None

    def require(self, rows: int) -> None:
        pass

    def begin(self, batch: int | None, fallback: int = 0) -> None:
        pass

    def round(self, batch: int) -> int:
        return 0

    def has(self, batch: int) -> bool:
        return True

    def wait(self, batch: int, stop: StopRequest) -> None:
        pass

    def release(self, batch: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def held_up_by(self, other: Follower, batch: int) -> str | None:
        return None
