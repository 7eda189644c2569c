"""A finished run as a folder for the Hugging Face Hub, and its upload.

    README.md                           the model card: train/publish/card.py
    sae_final.pt                        as the run has it
    config.json, sae.safetensors        the same tensors by the same names
    saelens/                            the same for SAELens, which loads it by the repository's name
    config.yaml, metrics.jsonl          settings and curves; of the store's place only its last name
    quality.json, studies/NAME/*.json   figures, where they were made

Nothing else is in the folder, and nothing that is not in it is uploaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from data import durable
from data.errors import PipelineError, SettingError, StoreError
from data.journal import read_metrics, tell
from train import sae_file
from train.export.formats import FORMATS, about
from train.publish import card
from train.run import CONFIG, METRICS, read_config

FOLDER = "publish"  # in a run's directory, unless it is to be elsewhere
QUALITY, STUDIES = "quality.json", "studies"  # as analyze leaves them in a run's directory
# Studies that say where files lie: those of earlier versions do not tell it themselves.
_FILES = ("browser", "delphi", "neuronpedia")
_BLOCK_BYTES = 1 << 22

Content = bytes | Path  # of a file; a path is copied


def require_repository(repo: Any) -> str:
    """`repo` if it can be a repository's name.

    Raises:
        SettingError: it cannot.
    """
    if not repo:
        raise SettingError("repo= is missing; give OWNER/NAME, which the card's usage code names")
    try:
        validate_repo_id(str(repo))
        valid = str(repo).count("/") == 1 and str(repo).isascii()
    except HFValidationError:
        valid = False
    if not valid:
        raise SettingError(
            f"repo={repo} must be OWNER/NAME, of letters, digits, '-', '_' and '.', at most 96 in all"
        )
    return str(repo)


def require_token() -> None:
    """Raise SettingError if nothing could be uploaded, since nobody is logged in."""
    if get_token() is None:
        raise SettingError(
            "upload=true needs a token that may write: set HF_TOKEN, or log in with `hf auth login`"
        )


# -- the folder ------------------------------------------------------------------------------------


def prepare(run: Path, repo: str, folder: Path) -> dict[str, int]:
    """Write the folder; bytes of each of its files, by path in it.

    Raises:
        StoreError: the run is not finished or damaged, or the folder holds a file that is not of
            it.
    """
    files = contents(run, repo)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    for stale in {
        name for name in there - files.keys() if re.fullmatch(rf"{STUDIES}/\w+/\w+\.json", name)
    }:
        (folder / stale).unlink()  # published before, and no longer a finding of the run
        there.remove(stale)
    if foreign := sorted(there - files.keys()):
        raise StoreError(
            f"{folder / foreign[0]} is not of what is published; delete it, or choose another place with out="
        )
    written = {}
    for name, content in files.items():
        durable.make_directory((folder / name).parent)
        parts = [content] if isinstance(content, bytes) else _blocks(content)
        written[name] = durable.write(folder / name, parts).bytes
    return written


def contents(run: Path, repo: str) -> dict[str, Content]:
    """The folder's files by path, the card last.

    Raises:
        StoreError: the run is not finished, or one of its files is damaged.
    """
    config, trained, metrics = (
        read_config(run),
        sae_file.load(run / sae_file.FILE),
        read_metrics(run / METRICS),
    )
    if not (held_out := [record for record in metrics if record.get("split") == "held_out"]):
        raise StoreError(
            f"{run / METRICS} has no held-out figures: the run is not finished; run its `python -m train`"
        )
    what, digest = about(run, config), durable.digest_file(run / sae_file.FILE).xxh3_128
    studies = _studies(run, digest)
    files: dict[str, Content] = {sae_file.FILE: run / sae_file.FILE, METRICS: run / METRICS}
    files |= FORMATS["safetensors"].write(trained, what)
    files |= {
        f"saelens/{name}": content
        for name, content in FORMATS["saelens"].write(trained, what).items()
    }
    shown = {
        **config,
        "store_path": PurePosixPath(str(config.get("store_path", ""))).name,
    }  # not our folders' names
    files[CONFIG] = yaml.safe_dump(shown, sort_keys=False).encode()
    quality = _read_json(run / QUALITY) if (run / QUALITY).exists() else None
    if quality is not None:
        files[QUALITY] = run / QUALITY
    for study in studies:
        found = sorted((run / STUDIES / study).glob("*.json"))
        files |= {f"{STUDIES}/{study}/{path.name}": path for path in found}
    facts = card.Facts(
        run.name, repo, what, config, trained, digest, held_out[-1], quality, studies
    )
    return {**files, "README.md": card.card(facts, list(files)).encode()}


def _studies(run: Path, digest: str) -> dict[str, dict[str, Any]]:
    """What analyze/study.py left of the findings that were done with this SAE, by name; others are
    told.
    """
    found = {}
    for path in sorted((run / STUDIES).glob("*/*.json")):
        if path.stem != path.parent.name or f"{path.stem}.json" == QUALITY:
            continue
        study = _read_json(path)
        if not study.get("finds", path.stem not in _FILES):
            continue  # it says where files lie, which is nobody's business
        if not {"settings", "summary", "tables"} <= study.keys():
            raise StoreError(
                f"{path} is not what a study writes; delete it, or do study={path.stem} again"
            )
        if study["settings"].get("sae") == digest:
            found[path.stem] = study
        else:
            tell(
                f"{path} is of another SAE than the run's and is left out; do study={path.stem} again"
            )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as JSON; delete it, and measure again") from error
    return found


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


# -- the Hub ---------------------------------------------------------------------------------------


def upload(folder: Path, files: Mapping[str, int], repo: str, private: bool) -> None:
    """Make the repository if need be, and upload those files of the folder in one commit.

    The token is the environment's (HF_TOKEN) or the one of `hf auth login`; it is never read here.

    Raises:
        SettingError: `private` is asked, and the repository is public.
        PipelineError: the Hub refused, or could not be reached.
    """
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:  # one that was there stays as it is
            raise SettingError(f"{repo} is there and public; to publish in it set private=false")
        commit = f"Publish {folder.parent.name if folder.name == FOLDER else folder.name}"
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message=commit,
            repo_type="model",
        )
    except PipelineError:
        raise
    # the hub's client raises its own, its HTTP library's and its transfer library's kinds
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP {status}" if status else type(error).__name__
        refused = f"check that {repo.split('/')[0]} is yours and that the token may write"
        way_out = (
            refused
            if status in (401, 403, 404)
            else "check the network, and give the same command again"
        )
        # What it says itself may quote a request's headers, and with them the token: neither text
        # nor cause is kept.
        raise PipelineError(f"{repo} could not be uploaded ({reason}); {way_out}") from None
