"""What start= names: a finished run, or an SAE of another library, from which training starts.

    start=RUN                       its sae_final.pt
    start=saelens:PATH, ...         what the libraries' files hold, see train/export/readers.py

A run records the digest of the start's tensors, not its name. So a start may move, or lie in
another library's files, and one that changed is refused. Once a run has a checkpoint the start may
be gone. train/refit.py makes the weights right for other rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.foreign import reading
from residual_saes.data.journal import tell
from residual_saes.train import run
from residual_saes.train.sae import SAE, SAEConfig


@dataclass(frozen=True)
class Start:
    """An SAE from which training starts, without its weights."""

    named: str  # as start= has it
    digest: str  # of its tensors
    d_sae: int
    k: int  # of TopK; d_sae where only thresholds are known
    kind: str  # one of train.ports.KINDS; of other libraries' files sae or transcoder
    widths: tuple[int, int] | None  # read and written; None: it is gone, and was right before
    skip: bool = False

    @classmethod
    def of(cls, named: str, folder: Path) -> Start:
        """What start= names, for a run in `folder`.

        Raises:
            SettingError: nothing is there by that name.
            StoreError: it is unfinished, damaged, or not what its format says.
        """
        try:
            sae = read(named)
        except (SettingError, StoreError) as error:
            if (gone := _recorded(named, folder)) is None:
                raise
            tell(f"{error}: {folder} goes on without it, since its checkpoint has all weights")
            return gone
        kind = "sae" if sae.b_in is None else "transcoder"
        if (Path(named) / run.CONFIG).is_file():
            kind = run.read_config(Path(named))["settings"]["sae"].get("kind", kind)
        widths = (sae.d_model, sae.d_out)
        return cls(named, digest(sae), sae.d_sae, sae.k, kind, widths, sae.W_skip is not None)

    def sae(self) -> SAE:
        """The SAE, on raw rows.

        Raises:
            StoreError: it is not what it was when the run began.
        """
        sae = read(self.named)
        if (now := digest(sae)) != self.digest:
            raise StoreError(
                f"start={self.named} has other weights than at first, by their digest {now} and "
                f"not {self.digest}; restore it, or choose another run="
            )
        return sae

    def adopted(self, sae: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
        """The `sae` settings with this d_sae, and k, where the command line gives none.

        k stays where it names a dictionary, as sae=NAME.
        """
        new: dict[str, Any] = {}
        if "sae.d_sae" not in given:
            new["d_sae"] = self.d_sae
        if not {"sae", "sae.k"}.intersection(given) and self.k < self.d_sae:
            new["k"] = self.k
        changed = {name: value for name, value in new.items() if value != sae[name]}
        if changed:
            shown = " ".join(f"sae.{name}={value}" for name, value in changed.items())
            tell(f"{shown}, as start={self.named} has it")
        return {**sae, **changed}

    def require_fit(self, sae: SAEConfig, widths: tuple[int, int], rows: str) -> None:
        """Raise SettingError unless an SAE of these settings on these rows can start from it.

        Args:
            widths: of the rows that are read and written.
            rows: what they are, for the message.
        """
        start = f"start={self.named}"
        if self.kind != sae.kind:
            raise SettingError(
                f"{start} is of kind {self.kind}, and sae.kind={sae.kind}; start from one of the "
                f"same kind, or train a {self.kind}"
            )
        if self.widths not in (None, widths):
            read, written = self.widths or (0, 0)
            raise SettingError(
                f"{start} reads rows of width {read} and writes {written}, and {rows} have "
                f"{widths[0]} and {widths[1]}; start from an SAE of rows as wide, or leave start= "
                "out"
            )
        if self.d_sae != sae.d_sae:
            raise SettingError(
                f"{start} has {self.d_sae} latents, and sae.d_sae={sae.d_sae}; give "
                f"sae.d_sae={self.d_sae}, or leave sae.d_sae= out"
            )
        if self.skip and not sae.skip:
            raise SettingError(f"{start} has a skip, and sae.skip=false; give sae.skip=true")


def read(named: str) -> SAE:
    """The SAE that start= names, on raw rows.

    This is the core's one door to train.export.

    Raises:
        SettingError: nothing is there by that name.
        StoreError: it is unfinished, damaged, or not what its format says.
    """
    from residual_saes.train.export import readers

    kind, _, where = named.partition(":")
    if readers.is_foreign(named):
        with reading(f"start={named} cannot be read", f"take files that {kind} wrote"):
            return readers.READERS[kind](Path(where))
    known = ", ".join(f"{name}:PATH" for name in readers.READERS)
    if not Path(named).is_dir():
        is_file = f"start=reference:{named} takes" if Path(named).is_file() else f"{known} are for"
        raise SettingError(
            f"start={named} is no directory; give a finished run's, as runs/NAME; "
            f"{is_file} an SAE's own files"
        )
    if not (Path(named) / run.CONFIG).is_file():
        raise SettingError(
            f"start={named} is no run: it has no {run.CONFIG}; SAEs of other libraries are given "
            f"as {known}"
        )
    sae, _ = run.sae_of(Path(named))
    return sae


def digest(sae: SAE) -> str:
    """xxh3_128 of an SAE's tensors, by their names in files."""
    parts: list[Any] = []
    for name, tensor in sorted(sae.tensors().items()):
        parts += [name.encode(), tensor.contiguous().view(-1).numpy().data.cast("B")]
    return durable.digest(*parts)


def _recorded(named: str, folder: Path) -> Start | None:
    """What the run in `folder` started from; None if it would have to begin with it."""
    if not run.has_trained(folder):
        return None
    settings = run.read_config(folder)["settings"]
    sae, begun = settings["sae"], settings.get("start")
    kind = sae.get("kind", "sae")
    return begun and Start(named, begun, sae["d_sae"], sae["k"], kind, None)
