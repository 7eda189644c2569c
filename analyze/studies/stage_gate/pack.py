"""The chosen features as a catalogue pack of the reference project, with the gate's verdict in it.

Its format (caiovicentino/mechreward, catalogs/*/reasoning_pack.json) names features in
`helpful_features` and `harmful_features`, and says in `validation` how they were judged. Its loader
(src/mechreward/features/catalog.py) reads the list `features` alone, of which each needs
feature_id, name and description. So both are there. `validated` is true only if the gate passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.studies.contrast.means import Means
from residual_saes.analyze.studies.stage_gate.words import SCORE
from residual_saes.analyze.study import Study
from residual_saes.data import durable
from residual_saes.data.neutral import neutral

FILE = "reasoning_pack.json"
VERSION = "1.0.0"  # of the pack's content, as the reference counts it
_VERDICTS = {"pass": "PASS", "weak": "WEAK", "fail": "FAIL", "undecided": "UNDECIDED"}


def write(study: Study, figures: Mapping[str, Any], means: Means) -> None:
    """Write FILE beside the gate's figures.

    Args:
        figures: the gate's, its verdict included.
        means: of the answers that were judged.
    """
    content = dumped(pack(study, figures, means)).encode()
    durable.write(study.folder / FILE, [content, b"\n"])


def pack(study: Study, figures: Mapping[str, Any], means: Means) -> dict[str, Any]:
    """What FILE holds."""
    subject = study.subject
    model = neutral(str(subject.store.manifest["model"]["id"])).rstrip("/")
    name = f"{model.rpartition('/')[2].lower()}/reasoning_pack"
    sae_id = f"layer_{subject.layer}" if subject.is_resid_post else subject.label
    passed = figures["verdict"] == "pass"
    discovery = np.isin(means.question, [str(number) for number in figures["discovery"]["ids"]])
    by_sign = {"helpful": 1.0, "harmful": -1.0}
    lists = {}
    for sign, weight in by_sign.items():
        rows = [feature["feature"] for feature in figures[sign]]
        right, wrong = _means_of(means, discovery, rows)
        lists[sign] = [
            {
                "feature_id": int(feature["feature"]),
                "effect_size": float(feature["g"]),
                "mean_correct": float(a),
                "mean_wrong": float(b),
                "weight": weight,
                "validated": passed,
            }
            for feature, a, b in zip(figures[sign], right, wrong, strict=True)
        ]
    release = neutral(subject.run.resolve().name)
    return {
        "name": name,
        "version": VERSION,
        "model_name": model if _is_hub_id(model) else model.rpartition("/")[2],
        "release": release,
        "sae_id": sae_id,
        "description": _description(subject.where, figures),
        "features": _as_loaded(lists, release, sae_id),
        "helpful_features": lists["helpful"],
        "harmful_features": lists["harmful"],
        "validation": _validation(figures, subject.where),
        "metadata": _metadata(study),
    }


def _means_of(
    means: Means, rows: NDArray[np.bool_], features: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean activation of some features over right answers, and over wrong ones."""
    chosen = means.features[np.flatnonzero(rows)][:, features].toarray().astype(np.float64)
    correct = means.correct[rows]
    return chosen[correct].mean(0), chosen[~correct].mean(0)


def _is_hub_id(model: str) -> bool:
    """Whether it is OWNER/NAME. A folder's path is nobody's business: its last name is taken."""
    return model.count("/") == 1 and not model.startswith((".", "~", "/"))


def _description(where: str, figures: Mapping[str, Any]) -> str:
    """What the features are, beginning with the verdict where it is no pass."""
    text = (
        f"Features of {where} that differ most between right and wrong answers, by Hedges' g on "
        f"{figures['discovery']['questions']} discovery questions."
    )
    if figures["verdict"] == "pass":
        return f"{text} They passed the stage gate within questions."
    why = "; ".join([*figures["missing"], *figures["notes"]])
    return f"NOT VALIDATED: the stage gate's verdict is {figures['verdict']} ({why}). {text}"


def _as_loaded(
    lists: Mapping[str, list[dict[str, Any]]], release: str, sae_id: str
) -> list[dict[str, Any]]:
    """The same features as the reference's loader reads them."""
    features = []
    for sign, side in (("helpful", "right"), ("harmful", "wrong")):
        for number, feature in enumerate(lists[sign], 1):
            features.append(
                {
                    "feature_id": feature["feature_id"],
                    "name": f"{sign}_{number}",
                    "description": f"Fires more in {side} answers; it has no name yet.",
                    "weight": feature["weight"],
                    "release": release,
                    "sae_id": sae_id,
                    "activation_threshold": 0.0,
                    "validated": feature["validated"],
                    "metadata": {"effect_size": feature["effect_size"]},
                }
            )
    return features


def _validation(figures: Mapping[str, Any], where: str) -> dict[str, Any]:
    own = figures["scores"][SCORE]
    within = own["within"]
    return {
        "method": "stage gate within questions",
        "rule": figures["rule"],
        "verdict": _VERDICTS[figures["verdict"]],
        "missing": [*figures["missing"], *figures["notes"]],
        "n_questions": figures["validation"]["questions"],
        "n_answers": figures["validation"]["answers"],
        "n_correct": figures["validation"]["right"],
        "spearman_rho": own["rho"]["value"],
        "spearman_p": own["p"],
        "within_questions": within
        and {
            "questions": within["questions"],
            "rho": within["rho"],
            "rho_given_length": within["rho_given_length"],
            "auroc": within["auroc"],
            "p": within["p"],
        },
        "reward_formula": (
            "R = sum(helpful activations) - sum(harmful activations), each averaged over the "
            f"answer's tokens at {where}"
        ),
    }


def _metadata(study: Study) -> dict[str, Any]:
    subject = study.subject
    return {
        "architecture": str(study.description.whole.model_type),
        "d_model": subject.sae.d_model,
        "d_sae": subject.sae.d_sae,
        "k": subject.sae.k,
        "num_hidden_layers": study.n_layers,
        "target_layer": subject.only_layer,
        "training_tokens": subject.config["settings"].get("tokens"),
        "sae_digest": subject.digest,
    }
