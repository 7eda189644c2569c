"""A finished run as a folder for the Hugging Face Hub, and its upload.

    README.md                           the model card: train/publish/card.py
    sae_final.pt                        as the run has it
    config.json, sae.safetensors        the same tensors by the same names
    golden.safetensors                  rows with the latents that they have: train/export/golden.py
    saelens/                            the same for SAELens, if it has such
    training.png                        the card's picture: train/publish/picture.py
    config.yaml, metrics.jsonl          settings and curves; of the store's place only its last name
    quality.json, studies/NAME/*.json   figures, where they were made
    digests.json                        the size and digest of each: train/export/bundle.py
    studies/steering/steering_vec_L*.pt the vector that was steered

Nothing else is in the folder, and nothing that is not in it is uploaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from residual_saes.data.errors import PipelineError, SettingError, StoreError, TemporaryError
from residual_saes.data.journal import tell
from residual_saes.data.secrets import redacted
from residual_saes.data.text import retry
from residual_saes.train import sae_file
from residual_saes.train.export import bundle, golden
from residual_saes.train.export.bundle import Content
from residual_saes.train.export.format import About, about
from residual_saes.train.publish import card, findings, picture, vector
from residual_saes.train.run import CONFIG, METRICS, metrics_of, read_config, sae_of
from residual_saes.train.sae import SAE

FOLDER = "publish"  # in a run's directory, unless it is to be elsewhere


def require_repository(repo: Any) -> str:
    """`repo` if it can be a repository's name.

    Raises:
        SettingError: it cannot.
    """
    if not repo:
        raise SettingError(
            "repo= is missing; give OWNER/NAME, which the card's usage code names; without "
            "upload=true nothing is sent"
        )
    try:
        validate_repo_id(str(repo))
        valid = str(repo).count("/") == 1 and str(repo).isascii()
    except HFValidationError:
        valid = False
    if not valid:
        raise SettingError(
            f"repo={repo} must be OWNER/NAME, "
            "of letters, digits, '-', '_' and '.', at most 96 in all"
        )
    return str(repo)


def require_token() -> None:
    """Raise SettingError if nobody is logged in to the Hub."""
    if get_token() is None:
        raise SettingError(
            "upload=true needs a token that may write: set HF_TOKEN, or log in with `hf auth login`"
        )


# -- the folder ------------------------------------------------------------------------------------


def prepare(run: Path, repo: str, folder: Path) -> dict[str, int]:
    """Write the folder; bytes of each of its files, by path in it.

    Raises:
        StoreError: the run is not finished or damaged, or the folder holds a foreign file.
    """
    return bundle.write(folder, contents(run, repo))


def contents(run: Path, repo: str) -> dict[str, Content]:
    """The folder's files by path, the card last.

    Raises:
        StoreError: the run is not finished, or one of its files is damaged.
    """
    config = read_config(run)
    trained, digest = sae_of(run)
    metrics = metrics_of(run)
    held_out = [line for line in metrics if line.get("split") == "held_out"]
    if not held_out:
        raise StoreError(
            f"{run / METRICS} has no held-out figures: the run is not finished; "
            "run its `python -m train`"
        )
    described = about(run, config)
    studies = findings.of_run(run, digest)
    quality = findings.quality_of(run, digest)

    files: dict[str, Content] = {sae_file.FILE: run / sae_file.FILE, METRICS: run / METRICS}
    files |= golden.files("safetensors", trained, described)
    for name, content in _saelens(trained, described).items():
        files[f"saelens/{name}"] = content
    places: dict[str, Any] = {"store_path": _last_name(config.get("store_path", ""))}
    if "store_paths" in config:
        places["store_paths"] = [_last_name(place) for place in config["store_paths"]]
    source = {**config["source"], "architecture": described.architecture}
    public = {**config, **places, "source": source}
    files[CONFIG] = yaml.safe_dump(public, sort_keys=False).encode()
    if quality is not None:
        files[findings.QUALITY] = quality
    for name, finding in studies.items():
        for file, content in finding.files.items():
            published = findings.published(file, content, repo)
            files[f"{findings.FOLDER}/{name}/{file}"] = published
    drawn = picture.drawn(metrics, None if quality is None else json.loads(quality))
    files[picture.FILE] = drawn
    steering = vector.of_study(studies["steering"].files) if "steering" in studies else None
    facts = card.Facts(
        run.name,
        repo,
        described,
        config,
        trained,
        digest,
        held_out[-1],
        None if quality is None else json.loads(quality),
        {name: finding.record for name, finding in studies.items()},
        steering,
    )
    return {**files, "README.md": card.card(facts, list(files)).encode()}


def _saelens(trained: SAE, described: About) -> dict[str, bytes]:
    """SAELens' files; none of what it has not: crosscoders, TopK transcoders with a skip."""
    try:
        return golden.files("saelens", trained, described)
    except StoreError as error:
        tell(f"without a folder for SAELens: {error}")
        return {}


def _last_name(place: Any) -> str:
    """Of a store's place only its last name: our folders are nobody's business."""
    return PurePosixPath(redacted(str(place))).name


# -- the Hub ---------------------------------------------------------------------------------------


def upload(folder: Path, files: Mapping[str, int], repo: str, private: bool) -> None:
    """Upload those files of the folder in one commit; the repository is made if it is not there.

    The token is the environment's (HF_TOKEN) or that of `hf auth login`. It is never read here.

    Raises:
        SettingError: `private` is asked for, and the repository is public.
        PipelineError: the Hub refused.
        TemporaryError: it could not be reached.
    """
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:  # exist_ok leaves a public one public
            raise SettingError(f"{repo} is there and public; to publish in it set private=false")
        commit = f"Publish {folder.parent.name if folder.name == FOLDER else folder.name}"
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(files),
            delete_patterns=[f"{findings.FOLDER}/*"],  # of an earlier release, if not among these
            commit_message=commit,
            repo_type="model",
        )
    except PipelineError:
        raise
    # The Hub's client raises its own kinds, its HTTP library's and its transfer library's.
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP {status}" if status else type(error).__name__
        if status in (401, 403, 404):
            owner = repo.split("/")[0]
            way_out = f"check that {owner} is yours and that the token may write"
        else:
            way_out = "check the network, and give the same command again"
        # The error may quote a request's headers, and the token in them: neither its text nor
        # itself as the cause is kept.
        kind = TemporaryError if retry.may_pass(error) else PipelineError
        raise kind(f"{repo} could not be uploaded ({reason}); {way_out}") from None
