"""A model's files, from its folder or from the Hugging Face hub.

Of a hub model only what is used is downloaded, in two steps: what describes it (configuration,
tokenizer, chat template), then its weights. The weights are those of the whole text decoder, not
only up to the layers that are asked for: their digest is in the store's manifest, and another layer
may be added to the store later. Shards that hold vision or audio towers alone are left out.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from residual_saes.data.errors import PipelineError, SettingError, TemporaryError
from residual_saes.data.journal import Progress, size, tell
from residual_saes.data.model_path import EMBEDDED, is_local
from residual_saes.data.text import retry
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest.weight_files import INDEX, SINGLE, needed

# What configurations, tokenizers and chat templates are read from: never weights, never code.
_DESCRIPTION = [
    *("*.json", "*.jinja", "*.model", "tokenizer.model.*", "vocab.txt", "merges.txt"),
    "additional_chat_templates/*.jinja",
]
# Patterns match across slashes: these are all folders but the one above, and other formats' files.
_NO_DESCRIPTION = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "*.bin.index.json", "trainer_state.json"]

T = TypeVar("T")


class ModelFiles(NamedTuple):
    """A model that is all there."""

    folder: Path
    # The safetensors files whose digest identifies the model. All that lie in a folder of the
    # user's; of a hub model those that it needs, whatever else its cache holds.
    weights: list[Path]


def described(path: str, revision: str) -> Path:
    """A folder with the model's configuration, tokenizer and chat template.

    Of a hub model it is the cache's folder of the commit that `revision` names.

    Raises:
        SettingError: there is no such folder, or the hub refuses the model.
    """
    if is_local(path):
        return MODEL_DIR if path == EMBEDDED else Path(path)
    folder = asked_of_hub(path, lambda: _download_description(path, revision), revision)
    if not (folder / "config.json").is_file():
        raise SettingError(
            f"model.path={path} has no config.json; take a repository of a transformers model"
        )
    return folder


def complete(path: str, revision: str) -> ModelFiles:
    """The model's folder with its weights; raises like `described`."""
    folder = described(path, revision)
    if is_local(path):
        return ModelFiles(folder, sorted(folder.glob("*.safetensors")))
    names = needed(folder)
    if not all((folder / name).is_file() for name in names):
        names = asked_of_hub(path, lambda: _download_weights(path, folder))
    return ModelFiles(folder, [folder / name for name in names])


# -- the hub ---------------------------------------------------------------------------------------


def _download_description(path: str, revision: str) -> Path:
    """The commit's folder in the cache; as it is there where no hub answers."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            path, revision=revision, allow_patterns=_DESCRIPTION, ignore_patterns=_NO_DESCRIPTION
        )
        return Path(folder)
    except OSError as error:
        # Without a network: files that were never asked for may be missing in the cache, as a
        # chat template from before this version looked for one.
        cached = Path(getattr(error, "snapshot_path", ""))
        if (cached / "config.json").is_file():
            return cached
        raise


def _download_weights(path: str, folder: Path) -> list[str]:
    """Download the weights of the commit that `folder` is of; the names of their files."""
    from huggingface_hub import snapshot_download

    commit = folder.name
    names = [SINGLE, *needed(folder)]
    found = snapshot_download(path, revision=commit, allow_patterns=names, dry_run=True)
    sizes = {file.filename: file.file_size or 0 for file in found}
    if SINGLE in sizes:  # as transformers chooses where a repository has both
        sizes = {SINGLE: sizes[SINGLE]}
    if not sizes:
        raise _no_safetensors(path)
    missing = {name: nbytes for name, nbytes in sizes.items() if not (folder / name).is_file()}
    files = f"{len(missing)} files" if len(missing) > 1 else next(iter(missing), "")
    tell(f"downloading {size(sum(missing.values()))} of weights of {path} ({files}) to {folder}")
    bar = _told_bar(f"downloading {path}")
    snapshot_download(path, revision=commit, allow_patterns=list(missing), tqdm_class=bar)
    return sorted(sizes)


def _told_bar(what: str) -> Any:
    """The hub client's bar, as a line of ours."""
    from tqdm.std import tqdm

    progress = Progress()

    class Told(tqdm):  # type: ignore[misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "file": io.StringIO(), "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.unit == "B" and self.n:  # the other bars count files
                total = max(self.total or 0, self.n)
                progress.show(f"{what}   {size(self.n)} of {size(total)}", share=self.n / total)

    return Told


def asked_of_hub(path: str, ask: Callable[[], T], revision: str = "main") -> T:
    """What `ask` gets; the hub's refusals as ours."""
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        return ask()
    except PipelineError:
        raise
    except NotASafetensorsRepoError as error:
        raise _no_safetensors(path) from error
    except Exception as error:  # network, gate, unknown name: the client has a dozen kinds
        at = "" if revision == "main" else f" at revision={revision}"
        kind = TemporaryError if retry.may_pass(error) else SettingError
        raise kind(
            f"model.path={path}{at} cannot be had from the Hugging Face hub "
            f"({type(error).__name__}). "
            "If it is gated, accept its terms on its page and set HF_TOKEN; without network give a "
            "local folder; `model=tiny text=tiny` runs offline"
        ) from error


def _no_safetensors(path: str) -> SettingError:
    return SettingError(
        f"model.path={path} has neither {SINGLE} nor {INDEX}; take a repository whose weights are "
        "in the safetensors format, or convert them"
    )
