"""Which questions choose, and which judge what was chosen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data import durable
from data.errors import SettingError

TRAIN = "train"  # the part of the problems that chooses, see analyze.problems


def in_discovery(
    question: NDArray[np.str_], share: float, part: NDArray[np.str_] | None = None
) -> NDArray[np.bool_]:
    """(n,) whether an answer's question is one of those that choose.

    Args:
        question: (n,) ids. Without parts, a question's side is a function of its id alone.
        share: of the questions, about; not used with parts.
        part: (n,) of the problems, where they come in two: `TRAIN` chooses.
    """
    if part is not None:
        return np.asarray(part == TRAIN)
    ids, number = np.unique(question, return_inverse=True)
    positions = []
    for name in ids:
        digest = durable.digest(f"stage gate {name}".encode())
        positions.append(int(digest[:13], 16) / 16**13)  # in [0, 1)
    return np.asarray(np.array(positions)[number] < share)


def require_share(share: float) -> None:
    """Raise SettingError unless study.discovery can be a share of the questions."""
    if not 0 < share < 1:
        raise SettingError(f"study.discovery={share} must be above 0 and below 1, such as 0.5")
