"""What the studies of a run found, read as their records vouch for it: see analyze/results.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from residual_saes.data import digests
from residual_saes.data.errors import StoreError, TemporaryError
from residual_saes.data.journal import tell

FOLDER = "studies"  # in a run's directory, as analyze leaves it
QUALITY = "quality.json"  # likewise
PACK = "reasoning_pack.json"  # chosen features, as study=stage_gate writes them for a catalogue
_PUBLISHED = (".json", ".pt")  # endings of a result's files that go into a release
_RECORD = {"finds", "settings", "summary", "tables"}  # what a study's JSON has at least


class Finding(NamedTuple):
    """A whole result of a study."""

    record: dict[str, Any]  # NAME.json: its summary, tables and figures
    files: dict[str, bytes]  # its JSON and tensors, by name


def of_run(run: Path, digest: str) -> dict[str, Finding]:
    """The findings of the SAE with this digest, by study.

    A study that only says where files lie is left out. So is one of another SAE, or with a damaged
    file, with a line.
    """
    findings = {}
    for folder in sorted((run / FOLDER).glob("*")):
        name = folder.name
        if "." in name or name == "quality":  # quality.json has its figures
            continue
        finding = _read(folder, name)
        if finding is None or not finding.record["finds"]:
            continue
        if finding.record["settings"].get("sae") == digest:
            findings[name] = finding
        else:
            tell(
                f"{folder} is of another SAE than the run's and is left out; do study={name} again"
            )
    return findings


def quality_of(run: Path, digest: str) -> bytes | None:
    """The run's quality.json; None if there is none.

    If it is damaged, or of another SAE than that with this digest, a line says so.
    """
    way_out = "it is left out; do study=quality again"
    recorded = digests.sound(run / FOLDER / ".quality", way_out)
    if recorded is None:
        if (run / QUALITY).exists():
            tell(f"nothing vouches for {run / QUALITY}; {way_out}")
        return None
    try:
        content = recorded.content(f"../../{QUALITY}", way_out)
        if json.loads(content).get("sae") != digest:
            raise StoreError(f"{run / QUALITY} is of another SAE; {way_out}")
        return content
    except TemporaryError:
        raise
    except StoreError as error:
        tell(str(error))
        return None


def published(file: str, content: bytes, repo: str) -> bytes:
    """A finding's file as a release has it: a catalogue pack names the repository of the SAE."""
    if file != PACK:
        return content
    pack = json.loads(content)
    pack["release"] = repo
    for feature in pack["features"]:
        feature["release"] = repo
    return json.dumps(pack, indent=1, ensure_ascii=False).encode() + b"\n"


def _read(folder: Path, name: str) -> Finding | None:
    way_out = f"it is left out; do study={name} again"
    recorded = digests.sound(folder, way_out)
    if recorded is None:
        if (folder / f"{name}.json").exists() and not (folder / digests.FILE).exists():
            tell(f"{folder / digests.FILE} is missing, so nothing vouches for the rest; {way_out}")
        return None
    try:
        recorded.require(None, way_out)
        files = {}
        for file in recorded.files:
            if Path(file).suffix in _PUBLISHED and "/" not in file:
                files[file] = recorded.content(file, way_out)
        record = json.loads(files.get(f"{name}.json", b"{}"))
        if not record.keys() >= _RECORD:
            raise StoreError(f"{folder / name}.json is not what a study writes; {way_out}")
        return Finding(record, files)
    except TemporaryError:
        raise
    except StoreError as error:
        tell(str(error))
        return None
