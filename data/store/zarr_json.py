"""The zarr.json of a store's group and arrays, by which other Zarr readers go.

They follow from the manifest, from the points and from where the text ended. A harvest writes them
before a point's first commit, in the planned shape, and again when its points are whole, in the
final one: first the arrays', then the group's, which repeats them. So beside a harvest, and after
one that was killed, each is right if it is that of some moment of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from residual_saes.data.site import HookPoint
from residual_saes.data.store.arrays import Arrays, points_of
from residual_saes.data.store.place import Place
from residual_saes.data.store.shard import UnitArray

GROUP = "zarr.json"


def key_of(name: str) -> str:
    """The zarr.json of an array."""
    return f"{name}/{GROUP}"


def is_key(key: str) -> bool:
    """Whether the object is a zarr.json."""
    return key.rpartition("/")[2] == GROUP


def texts(arrays: Arrays, points: Iterable[HookPoint]) -> dict[str, bytes]:
    """Every zarr.json of a store of these points, by key; the group's comes last."""
    of_arrays = _of(arrays, points)
    return {
        **{key_of(array.name): _text(array.metadata()) for array in of_arrays},
        GROUP: _group(arrays.manifest, of_arrays),
    }


def _of(arrays: Arrays, points: Iterable[HookPoint]) -> list[UnitArray]:
    chosen = arrays.of_spine()
    for point in sorted(points):
        chosen += arrays.of_point(point)
    return chosen


def _group(manifest: Mapping[str, Any], arrays: Iterable[UnitArray]) -> bytes:
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"manifest": manifest},
        # Spares readers a listing of the folder, in which commits/ would be no Zarr node.
        "consolidated_metadata": {
            "kind": "inline",
            "must_understand": False,
            "metadata": {array.name: array.metadata() for array in arrays},
        },
    }
    return _text(group)


def _text(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


class Found:
    """What is there of them at one moment. It is read before the records that it follows from."""

    def __init__(self, place: Place) -> None:
        """Read them, the group's first: the arrays that it repeats were written before it.

        Raises:
            OSError: one cannot be read.
        """
        self._place = place
        self.texts: dict[str, bytes] = {}
        self._read(GROUP)
        self.repeated = _repeated(self.texts.get(GROUP, b""))  # arrays by name, as the group has it
        self.names = {*self.repeated, *place.folders()}
        for name in sorted(self.names):
            self._read(key_of(name))

    def _read(self, key: str) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            self.texts[key] = self._place.read(key)

    @property
    def points(self) -> set[HookPoint]:
        """The points whose rows were declared."""
        return points_of(self.names)

    @property
    def rows(self) -> int | None:
        """S as the group has it."""
        shape = self.repeated.get("tokens", {}).get("shape")
        if isinstance(shape, list) and len(shape) == 2 and isinstance(shape[0], int):
            return shape[0]
        return None

    def faults(
        self, shapes: Iterable[Arrays], committed: Sequence[HookPoint]
    ) -> Iterator[tuple[str, str]]:
        """Each that is none of the store's, or is missing: its key, and what is wrong with it.

        Args:
            shapes: the arrays at every shape that they may have.
            committed: points that have rows, taken in behind this reading.
        """
        points = self.points | set(committed)
        allowed: dict[str, set[bytes]] = {}
        for arrays in shapes:
            of_group = _of(arrays, points_of(self.repeated))
            allowed.setdefault(GROUP, set()).add(_group(arrays.manifest, of_group))
            for array in _of(arrays, points):
                text = _text(array.metadata())
                allowed.setdefault(key_of(array.name), set()).add(text)
        required = set(map(key_of, self.repeated))
        if committed and not self._place.exists(GROUP):  # else it came after this reading
            required.add(GROUP)
        for key, of_key in sorted(allowed.items()):
            if key not in self.texts:
                if key in required:
                    yield key, "is missing: other Zarr readers need it"
            elif self.texts[key] not in of_key:
                yield key, "is not the metadata of this store: other Zarr readers go by it"


def _repeated(group: bytes) -> dict[str, dict[str, Any]]:
    """The arrays' metadata by name, as a group's zarr.json repeats it; none if it is damaged."""
    try:
        by_name = json.loads(group)["consolidated_metadata"]["metadata"]
        return {name: metadata for name, metadata in by_name.items() if isinstance(metadata, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
