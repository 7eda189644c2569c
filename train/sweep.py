"""Which arms of a sweep are trained on one read.

Arms share a pass if they take batches in the same rhythm: of the same store, or of two stores of
which one is the same, with the same batch, data_seed and policy, whatever their hook points. Of
those, as many go into one pass as fit into the device's memory. Arms of one stream share its
batches. Streams of a pass go side by side: what several read comes from the disk once, as long as
the page cache holds two windows of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from residual_saes.data import command_line
from residual_saes.data import device as devices
from residual_saes.data.errors import SettingError
from residual_saes.data.journal import suggest
from residual_saes.train import header
from residual_saes.train.arm import Arm, Outcome
from residual_saes.train.loop import train_together
from residual_saes.train.memory import arm_bytes, step_bytes

_ROOM = 0.9  # share of the free memory that a pass may plan with


def passes(arms: Sequence[Arm], free: int | None) -> list[list[int]]:
    """The arms' numbers, pass by pass, in their order.

    Args:
        free: bytes of memory for them; None: as much as they want.
    """
    found: list[list[int]] = []
    for group in _sharing(arms):
        room = (
            None
            if free is None
            else int(_ROOM * free) - max(step_bytes(arms[number]) for number in group)
        )
        held, current = 0, list[int]()
        for number in group:
            held += arm_bytes(arms[number])
            if current and room is not None and held > room:
                found.append(current)
                held, current = arm_bytes(arms[number]), []
            current.append(number)
        found.append(current)
    return found


def _sharing(arms: Sequence[Arm]) -> list[list[int]]:
    """Numbers of the arms that read in one rhythm."""
    groups: list[tuple[set[object], list[int]]] = []
    for number, arm in enumerate(arms):
        config = arm.config
        rhythm = config.batch, config.data_seed, config.policy
        keys: set[object] = {
            (store, *rhythm) for store in (arm.stream.identity, *arm.stream.identities)
        }
        # An arm of two stores brings the arms of each of them together.
        numbers = [number]
        for group in [group for group in groups if group[0] & keys]:
            groups.remove(group)
            keys |= group[0]
            numbers += group[1]
        groups.append((keys, sorted(numbers)))
    return sorted(numbers for _, numbers in groups)


def train_sweep(arms: Sequence[Arm], device: torch.device) -> list[Outcome]:
    """Train all arms in as few passes as memory allows; their outcomes, in order.

    Raises:
        SettingError: two arms have one directory.
        Interrupted: a signal came; checkpoints are saved.
    """
    folders = [arm.folder.resolve() for arm in arms]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise SettingError(
            f"several arms have run={twice}; leave run= out of a multirun, "
            "and each gets a folder of its own"
        )
    planned = passes(arms, devices.free_bytes(device))
    header.tell_sweep(arms, announcement(arms, planned), device)
    outcomes: dict[int, Outcome] = {}
    for numbers in planned:
        outcomes |= zip(
            numbers, train_together([arms[number] for number in numbers], device), strict=True
        )
    if all(isinstance(outcome, dict) for outcome in outcomes.values()):
        parents = {arm.folder.parent for arm in arms}
        listed = f"[{','.join(str(arm.folder) for arm in arms)}]"
        runs = listed if len(parents) > 1 else parents.pop()
        suggest(command_line.of("analyze", "study=sweep", f"runs={runs}"))
    return [outcomes[number] for number in range(len(arms))]


def announcement(arms: Sequence[Arm], planned: Sequence[Sequence[int]]) -> str:
    """How many arms are trained together."""
    readers = len({arm.stream for arm in arms})
    if len(planned) > 1:
        groups = len(_sharing(arms))
        reason = (
            "arms that differ in store, batch, data_seed or policy share no read"
            if groups > 1
            else ""
        )
        if len(planned) > groups:
            reason = ", and ".join(filter(None, [reason, "not all fit into memory at once"]))
        counts = " + ".join(str(len(numbers)) for numbers in planned)
        return f"{len(arms)} in {len(planned)} passes of {counts}: {reason}"
    if readers > 1:
        return f"{len(arms)} in one pass, with {readers} readers of the store side by side"
    return f"{len(arms)} on one read of the store"
