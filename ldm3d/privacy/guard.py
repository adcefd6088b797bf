"""The guard, which `ldm3d generate --audit` loads to withhold copies: descriptors of the training volumes, but no volume.

    FOLDER/guard.json           model, threshold, distribution of similarity among training subjects
    FOLDER/guard.safetensors    256 + 256 + 64 numbers a training volume, in a different order; the embedding's weights

With these files and a scan of a person one can find out whether the person is among the training subjects. Protect them like
the training data, and do not publish them with generated volumes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldm3d
from ldm3d.errors import InputError, shown
from ldm3d.models.pretrained import load_weights, read_json
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.calibration import Threshold
from ldm3d.privacy.descriptors import COARSE_SIDE, PROJECTION_SIZE, Descriptors, descriptors_of
from ldm3d.privacy.embedding import EMBEDDING_SIZE, Embedding
from ldm3d.privacy.nearest import SPACES, Reference, Similarity

FOLDER, DESCRIPTION, TENSORS = "guard", "guard.json", "guard.safetensors"
Side = Annotated[int, Field(gt=0, le=COARSE_SIDE)]


class Guard:
    """Recognises copies of training volumes.

    Args:
        reference: the training volumes.
        embedding: of its third space.
        threshold: below which a volume counts as a copy.
        model_hash: of the model that was audited.
    """

    def __init__(self, reference: Reference, embedding: Embedding, threshold: Threshold, model_hash: str):
        self.reference, self.embedding, self.threshold, self.model_hash = reference, embedding, threshold, model_hash
        self._digest = "unsaved"

    @property
    def identity(self) -> dict[str, Any]:
        """For the sidecars of volumes that it has checked."""
        return {"audit": self._digest, "threshold": rounded(self.threshold.score)}

    def withheld(self, pipeline: Pipeline, volume: NDArray) -> dict[str, Any] | None:
        """None for a volume (C, X, Y, Z) that may be written; else a record in its place, which does not name the subject."""
        found = similarity_to_training(self.reference, self.embedding, descriptors_of(pipeline, volume))
        if not self.threshold.is_copy(found):
            return None
        ratio = found.nearest[found.space].ratio
        return {**self.identity, "score": rounded(found.score), "space": found.space, "distance_ratio": rounded(ratio)}

    def save(self, folder: Path) -> None:
        """Write the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not in the order of the scan table, which is that of subjects' names
        order = self.reference.features["image"][:, 0].argsort()
        subjects = self.reference.subjects[order].tolist()
        number = {subject: i for i, subject in enumerate(dict.fromkeys(subjects))}
        tensors = {f"features/{space}": self.reference.features[space][order].float() for space in SPACES}
        tensors["subjects"] = torch.tensor([number[subject] for subject in subjects])
        tensors |= {f"embedding/{name}": value for name, value in self.embedding.state_dict().items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS)
        description = {
            "ldm3d": ldm3d.__version__,
            "model": self.model_hash,
            "threshold": self.threshold.to_dict(),
            "usual": {space: list(values) for space, values in self.reference.usual.items()},
            "coarse": list(self.embedding.shape),
            "holds": "descriptors of training volumes: personal data, though no volume",
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, model_hash: str) -> "Guard":
        """Read the folder of an audit, or the one in it.

        Args:
            folder: as `ldm3d audit` wrote it.
            model_hash: of the model; the audit of another one is refused.

        Raises:
            InputError: no such folder, a damaged one, or another model's.
        """
        folder = folder if (folder / DESCRIPTION).is_file() else folder / FOLDER
        if not (folder / DESCRIPTION).is_file() or not (folder / TENSORS).is_file():
            raise InputError(f"no audit in {folder.parent}: {FOLDER}/{DESCRIPTION} is missing; run `ldm3d audit` first")
        values = read_json(folder / DESCRIPTION)
        if values.get("model") != model_hash:
            raise InputError(
                f"{folder} is an audit of model {shown(values.get('model'))}, and this is model {model_hash}; audit this one"
            )
        try:
            tensors = load_file(folder / TENSORS)
            features, subjects = _below("features/", tensors), tensors["subjects"]
            threshold = TypeAdapter(Threshold).validate_python(values["threshold"])
            usual = TypeAdapter(dict[str, tuple[float, float]]).validate_python(values["usual"])
            coarse = TypeAdapter(Annotated[list[Side], Field(min_length=3, max_length=4)]).validate_python(values["coarse"])
            _check(features, subjects, threshold, usual)
            embedding = Embedding([1, *coarse][-4:])  # earlier audits name no channels, and have one
            load_weights(embedding, _below("embedding/", tensors), folder / TENSORS)
            reference = Reference(features, subjects, usual)
            guard = cls(reference, embedding.eval().requires_grad_(False), threshold, model_hash)
        except InputError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{folder} is damaged or of another version of ldm3d: {shown(str(error))}") from None
        digest = hashlib.sha256()
        for name in (DESCRIPTION, TENSORS):
            digest.update((folder / name).read_bytes())
        guard._digest = digest.hexdigest()[:16]
        return guard


def similarity_to_training(reference: Reference, embedding: Embedding, of: Descriptors) -> Similarity:
    """Of a volume with these descriptors."""
    return reference.similarity({"latent": of.latent, "image": of.image, "embedding": embed(embedding, of.coarse)})


@torch.no_grad()
def embed(embedding: Embedding, coarse: Tensor) -> Tensor:
    """Coarse volumes (n, C, a, b, c) -> (n, 64)."""
    return embedding(coarse)


def rounded(value: float) -> float:
    """To four digits, as the last ones of float32 differ between machines."""
    return float(f"{value:.4g}")


def _check(
    features: Mapping[str, Tensor], subjects: Tensor, threshold: Threshold, usual: Mapping[str, tuple[float, float]]
) -> None:
    """Raise ValueError unless the contents of a file, which may come from an untrusted source, are consistent."""
    shapes = {space: tuple(values.shape) for space, values in features.items()}
    if not set(SPACES) == shapes.keys() == usual.keys() == threshold.lowest.keys():
        raise ValueError(f"it has the spaces {sorted(shapes)}, {sorted(usual)} and {sorted(threshold.lowest)}")
    widths = {"latent": PROJECTION_SIZE, "image": PROJECTION_SIZE, "embedding": EMBEDDING_SIZE}
    if subjects.dtype != torch.int64 or any(shapes[space] != (len(subjects), width) for space, width in widths.items()):
        raise ValueError(f"its features are {shapes} for subjects {tuple(subjects.shape)} of {subjects.dtype}")
    if not (len(subjects) and int(subjects.min()) >= 0 and int(subjects.max()) < len(subjects)):
        raise ValueError("its subjects are numbered beyond its volumes")
    if not all(torch.isfinite(values).all() for values in features.values()):
        raise ValueError("its features are not finite")
    if not 1 <= threshold.counted <= threshold.held_out:
        raise ValueError(f"its threshold is number {threshold.counted} of {threshold.held_out}")
    if any(scale <= 0 for _, scale in usual.values()):
        raise ValueError(f"its scales are not positive: {dict(usual)}")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
