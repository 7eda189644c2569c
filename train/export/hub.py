"""SAEs on the Hugging Face Hub: hub:OWNER/NAME[/FOLDER][@REVISION]."""

from __future__ import annotations

from pathlib import Path

from residual_saes.data import digests
from residual_saes.data.errors import SettingError
from residual_saes.data.text.retry import persistent
from residual_saes.train.export import golden
from residual_saes.train.export.readers import READERS, WEIGHTS, kind_of
from residual_saes.train.run import CONFIG

HUB = "hub:"
FORMS = (
    "a run's directory, hub:OWNER/NAME[/FOLDER][@REVISION], or KIND:PATH with the KIND "
    f"{', '.join(READERS)}"
)
# What is downloaded of a folder: the weights, and what is said of them.
_FILES = (
    *WEIGHTS,
    *("cfg.json", "config.json", "activation_scaler.json"),
    *(CONFIG, digests.FILE, golden.FILE),
)
_WAY_OUT = "check the name and the network, and log in to the Hub for a private one"


def downloaded(name: str) -> str:
    """KIND:FOLDER of an SAE on the Hub.

    Raises:
        SettingError: there is none in a format that is known.
        StoreError: the Hub refused, or cannot be reached.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    place, _, revision = name.removeprefix(HUB).partition("@")
    owner, _, rest = place.partition("/")
    repository, *inner = rest.strip("/").split("/")
    if not owner or not repository:
        raise SettingError(f"{name} names no repository; give {FORMS}")
    repo = f"{owner}/{repository}"
    wanted = ["/".join([*inner, file]) for file in _FILES]
    wanted.append("config.json")  # sparsify's lies above the folders of its layers

    def download() -> str:
        return snapshot_download(repo, revision=revision or None, allow_patterns=wanted)

    def files() -> list[str]:
        return list_repo_files(repo, revision=revision or None)

    folder = Path(persistent(name, download, _WAY_OUT)).joinpath(*inner)
    if kind := kind_of(folder):
        return f"{kind}:{folder}"
    weights = [file for file in persistent(name, files, _WAY_OUT) if file.endswith(WEIGHTS)]
    folders = sorted({file.rpartition("/")[0] for file in weights} - {""})
    has = f"has {', '.join(folders[:5])}" if folders else "has no such folder"
    raise SettingError(
        f"{name} has no SAE's files in a format that is known; take hub:{repo}/FOLDER, and it {has}"
    )
