"""The features that a study chose, as other studies and rewards read them.

The result of a stage gate or of rollouts, or a file of two lists as `study=contrast` leaves it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from residual_saes.analyze.results import FOLDER
from residual_saes.data import digests
from residual_saes.data.errors import MismatchError, SettingError, StoreError
from residual_saes.harvest.model import LanguageModel
from residual_saes.train.run import sae_digest

GATE = "stage_gate"
_JUDGED = (GATE, "rollouts")  # studies whose results have the verdict
_AGAIN = "do the study that chooses the features again"
_HOW = "`python -m analyze study=stage_gate`"


class ChosenFeatures(NamedTuple):
    """Helpful and harmful features, with what is known of their choice.

    A field is None where the file does not say it.
    """

    path: Path
    helpful: list[int]
    harmful: list[int]
    layer: int | None
    questions: set[str]  # ids of those that chose
    verdict: str | None  # the stage gate's
    missing: list[str]  # what keeps it from a pass
    settings: dict[str, Any]  # of the study that chose

    @classmethod
    def read(cls, path: Path) -> ChosenFeatures:
        """The features in a stage gate's result, or in a file of two lists.

        Raises:
            StoreError: there is no such file, or it holds no such thing.
        """
        try:
            data, settings = _content(path)
            content = json.loads(data)
            is_gate = content.get("study") in _JUDGED
            figures = content["figures"] if is_gate else content
            if is_gate and "best_of" not in figures:
                raise StoreError(f"{path} is of an earlier version; do {_HOW} again")
            layer = figures.get("layer_of_features" if is_gate else "layer")
            chose = figures["discovery"]["ids"] if is_gate else figures.get("ids", [])
            chosen = cls(
                path=path,
                helpful=[int(feature["feature"]) for feature in figures["helpful"]],
                harmful=[int(feature["feature"]) for feature in figures["harmful"]],
                layer=None if layer is None else int(layer),
                questions={str(name) for name in chose},
                verdict=figures["verdict"] if is_gate else None,
                missing=[*figures["missing"], *figures["notes"]] if is_gate else [],
                settings=settings or dict(content.get("settings", {})),
            )
        except FileNotFoundError as error:
            raise StoreError(
                f"no features at {path}; {_HOW} with run={path.parent.parent.parent} chooses them"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} is no stage gate's result, and does not hold features as "
                "{helpful: [{feature}], harmful: [...]}"
            ) from error
        if not chosen.helpful and not chosen.harmful:
            raise StoreError(f"{path} names no feature, so nothing is rewarded; give more answers")
        return chosen

    def require_layer(self, layer: int) -> None:
        """Raise MismatchError unless the features are of this layer."""
        if self.layer not in (None, layer):
            unequal = {"layer": (self.layer, layer)}
            way_out = "Give those of the run's own layer."
            raise MismatchError(f"features {self.path}", unequal, way_out)

    def require_sae(self, run: Path) -> None:
        """Raise MismatchError if the study that chose the features was of another SAE."""
        own = sae_digest(run)
        recorded = self.settings.get("sae", own)
        if recorded != own:
            way_out = f"Do {_HOW} again."
            raise MismatchError(f"features {self.path}", {"sae": (recorded, own)}, way_out)

    def require_model(self, lm: LanguageModel) -> None:
        """Raise MismatchError if the study that chose the features was of another model."""
        own = lm.identity["weights"]
        recorded = self.settings.get("weights", own)
        if recorded != own:
            way_out = "Give the model that they were chosen with."
            raise MismatchError(f"features {self.path}", {"weights": (recorded, own)}, way_out)

    def require_pass(self) -> None:
        """Raise SettingError if a stage gate chose the features and did not pass."""
        if self.verdict not in (None, "pass"):
            why = f" ({'; '.join(self.missing)})" if self.missing else ""
            raise SettingError(
                f"the verdict of {self.path} is {self.verdict}{why}; even_if_failed=True takes "
                "its features all the same"
            )

    def require_other_questions(self, judged: set[str]) -> None:
        """Raise SettingError if any of `judged` (ids) chose the features."""
        shared = len(judged & self.questions)
        if shared:
            raise SettingError(
                f"{shared} of the {len(judged)} questions of judged_on= are among the "
                f"{len(self.questions)} that chose the features of {self.path}; judge on others, "
                "or choose on a train.jsonl with problems=FOLDER"
            )

    def weights(self, d_sae: int) -> Tensor:
        """(F,) 1 for helpful features, -1 for harmful ones.

        Raises:
            StoreError: a feature is none of the SAE's.
        """
        for feature in self.helpful + self.harmful:
            if not 0 <= feature < d_sae:
                raise StoreError(
                    f"{self.path} names feature {feature}, the SAE has {d_sae} latents; choose "
                    "them again"
                )
        weights = torch.zeros(d_sae)
        weights[self.helpful] += 1
        weights[self.harmful] -= 1
        return weights


def _content(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A file of features, and what the study that left it follows from.

    A study's record, or a release's, says what the file must hold. Of another file nothing says it.

    Raises:
        StoreError: it is damaged, or of a study that did not come to its end.
    """
    for folder in (path.parent, path.parent.parent.parent):
        recorded = digests.read(folder, _AGAIN)
        name = path.relative_to(folder).as_posix()
        if recorded and name in recorded.files:
            if folder == path.parent:
                recorded.require(None, _AGAIN)
            return recorded.content(name, _AGAIN), dict(recorded.about.get("settings", {}))
    if path.exists() and path.parent.parent.name == FOLDER:
        raise StoreError(f"nothing records {path}, so it may not be whole; {_AGAIN}")
    return path.read_bytes(), {}
