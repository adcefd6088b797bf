"""Privacy audit: does a model generate copies of its training subjects, or reveal them by membership inference?

Held-out subjects are the reference throughout: a volume as near to a training subject as they are is no copy, and a loss as
low as theirs identifies no training subject. They pass through the autoencoder first, as every generated volume does. A
subject may have several scans; no subject is both in training and held out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ldm3d.errors import InputError
from ldm3d.evaluation.subgroups import VolumeScores
from ldm3d.generation.sampling import grouped
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.calibration import calibrate
from ldm3d.privacy.descriptors import Descriptors, descriptors_of
from ldm3d.privacy.embedding import Embedding, train_embedding
from ldm3d.privacy.findings import Audit, AuditedVolume, SpaceResult
from ldm3d.privacy.guard import Guard, embed, similarity_to_training
from ldm3d.privacy.membership import REPEATS, TIMES, Membership, infer_members, losses_of
from ldm3d.privacy.nearest import SPACES, Reference, Similarity
from ldm3d.privacy.volumes import Volumes
from ldm3d.processes import ALONE, Processes, share_work
from ldm3d.statistics.conformal import Rate, p_values

MAX_ATTACKED = 200  # subjects of each group whose losses are computed
COPY_TOLERANCE, AUTHENTIC_TOLERANCE = 0.05, 0.1  # small gaps between groups of people: in shares of copies, and in AuthPct


def plan(training: int, held_out: int, synthetic: int) -> list[str]:
    """What `audit` will do, a line for each part that takes long, given the numbers of volumes."""
    attacked = min(training, MAX_ATTACKED) + min(held_out, MAX_ATTACKED)
    return [
        f"audit: encode {training} training volumes",
        f"audit: reconstruct and encode {held_out} held-out volumes, each twice (mirrored)",
        f"audit: generate or read, and encode {synthetic} synthetic volumes, each twice",
        f"audit: membership inference on up to {attacked} subjects, {len(TIMES) * REPEATS} U-Net calls each",
    ]


def audit(
    pipeline: Pipeline,
    training: Volumes,
    held_out: Volumes,
    synthetic: Volumes,
    level: float = 0.05,
    seed: int = 0,
    embedding_steps: int = 300,
    shown: int = 5,
    processes: Processes = ALONE,
) -> tuple[Audit, Guard]:
    """Audit a model.

    Args:
        pipeline: the model.
        training: all of its training volumes: copies of others are not found.
        held_out: of subjects that it was not trained on.
        synthetic: its volumes, generated or read on demand.
        level: share of new subjects' volumes that may count as copies, see `calibrate`.
        seed: of the embedding and of the noise of membership inference.
        embedding_steps: of its training.
        shown: suspects to keep volumes of.
        processes: that share the work; all of them have to call this, and all get the same answer.

    Raises:
        InputError: fewer than four training subjects, none held out, one subject in both, or no synthetic volume.
    """
    _check(training, held_out, synthetic)
    reference, embedding = _reference(pipeline, training, embedding_steps, seed, processes)
    on_held_out, on_synthetic = (
        [
            similarity_to_training(reference, embedding, each)
            for each in _descriptors(pipeline, volumes, processes, f"encode {title} volumes")
        ]
        for volumes, title in ((_reconstructed(held_out, pipeline), "held-out"), (synthetic, "synthetic"))
    )
    threshold = calibrate(on_held_out, held_out.names, level)
    scores = [each.score for each in on_held_out]
    by_chance = p_values([each.score for each in on_synthetic], scores, held_out.names)
    audited = [
        AuditedVolume(*names, each, p, training.names[each.row], threshold.is_copy(each), threshold.is_plain(each))
        for *names, each, p in zip(synthetic.names, synthetic.asked or [""] * len(synthetic), on_synthetic, by_chance)
    ]
    firsts = [on_held_out[i] for i in held_out.first_scans()]
    spaces = {space: _in_space(reference, space, (on_held_out, firsts, on_synthetic)) for space in SPACES}
    membership = _attack(pipeline, training, held_out, seed, processes)
    found = Audit(threshold, audited, scores, spaces, membership, len(training), reference.count)
    found.scores = [*_of_synthetic(audited, reference, synthetic), *_of_training(found, training, seed)]
    if processes.is_main:
        for i in sorted(range(len(audited)), key=lambda i: audited[i].similarity.score)[:shown]:
            (made,), (original,) = synthetic.read([i]), training.read([audited[i].similarity.row])
            found.suspects.append((audited[i], made, pipeline.cropped(original)))
    return found, Guard(reference, embedding, threshold, pipeline.model_hash)


def _check(training: Volumes, held_out: Volumes, synthetic: Volumes) -> None:
    both = sorted(set(training.names) & set(held_out.names))
    if both:
        raise InputError(
            f"{', '.join(both[:3])}: {len(both)} subjects are both trained on and held out; leave them out of one"
        )
    if not (len(training) and len(held_out) and len(synthetic)):
        raise InputError(
            f"{len(training)} training, {len(held_out)} held-out and {len(synthetic)} synthetic volumes; the audit needs some "
            "of each, and data that holds all the scans that the model was trained on"
        )


def _reference(
    pipeline: Pipeline, training: Volumes, steps: int, seed: int, processes: Processes
) -> tuple[Reference, Embedding]:
    """Training volumes in every space, and the embedding, which the main process trains for all."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(training.names))}
    subjects = torch.tensor([numbers[name] for name in training.names])
    found = _descriptors(pipeline, training, processes, "encode training volumes", views=False)
    coarse, latent, image = (torch.cat([getattr(each, name) for each in found]) for name in ("coarse", "latent", "image"))
    trained = None
    if processes.is_main:
        trained = train_embedding(coarse, subjects, steps, seed=seed, device=pipeline.device).state_dict()
    embedding = Embedding(coarse.shape[1:])
    embedding.load_state_dict(processes.gather(trained)[0])
    embedding.eval().requires_grad_(False)
    return Reference({"latent": latent, "image": image, "embedding": embed(embedding, coarse)}, subjects), embedding


def _reconstructed(volumes: Volumes, pipeline: Pipeline) -> Volumes:
    """The same after the autoencoder: as smooth as generated ones, as smoothness alone would look like nearness."""

    def read(numbers: Sequence[int]) -> Iterator[NDArray]:
        for volume in volumes.read(numbers):
            batch = torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None]
            yield pipeline.reconstruct(batch)[0].cpu().numpy()

    return replace(volumes, read=read)


def _descriptors(
    pipeline: Pipeline, volumes: Volumes, processes: Processes, title: str, views: bool = True
) -> list[Descriptors]:
    """Of all volumes; the volumes themselves are not kept."""

    def work(numbers: list[int]) -> list[Descriptors]:
        return [descriptors_of(pipeline, volume, views) for volume in volumes.read(numbers)]

    groups = list(grouped(range(len(volumes)), pipeline.group_size))  # whole batches: a part of one costs as much
    return [each for group in share_work(work, groups, processes, title, "batch") for each in group]


def _in_space(reference: Reference, space: str, groups: Sequence[Sequence[Similarity]]) -> SpaceResult:
    """Of all held-out volumes, of one of each held-out subject, and of synthetic volumes."""
    held_out, firsts, synthetic = groups
    ratios = [np.array([each.nearest[space].ratio for each in group]) for group in (held_out, synthetic)]
    authentic = [Rate(sum(reference.is_authentic(each, space) for each in group), len(group)) for group in (synthetic, firsts)]
    distances = ([each.nearest[space].distance for each in group] for group in (firsts, synthetic))
    return SpaceResult(*((float(r.min()), float(np.median(r))) for r in ratios), *authentic, data_copying(*distances))


def _of_synthetic(audited: Sequence[AuditedVolume], reference: Reference, synthetic: Volumes) -> list[VolumeScores]:
    """Shares of synthetic volumes, by the requested covariates; none if these are not known."""
    if synthetic.rows is None:
        return []
    given = synthetic.rows, [tuple(row.values()) for row in synthetic.rows]  # equal requests count as one person
    values = {"copies among volumes": [each.copy for each in audited]}
    values |= {
        f"AuthPct, {space} space": [reference.is_authentic(each.similarity, space) for each in audited] for space in SPACES
    }
    kinds = [("low", COPY_TOLERANCE), *[("high", AUTHENTIC_TOLERANCE)] * len(SPACES)]
    return [VolumeScores(name, np.array(own, dtype=float), *given, *kind) for (name, own), kind in zip(values.items(), kinds)]


def _of_training(found: Audit, training: Volumes, seed: int) -> list[VolumeScores]:
    """Shares of training subjects, by their covariates."""
    copied, firsts = {each.subject for each in found.volumes if each.copy}, training.first_scans()
    shares = {"training subjects copied": {i: training.names[i] in copied for i in firsts}}
    if found.membership:
        attacked = training.first_scans(MAX_ATTACKED, seed)
        shares["training subjects identified by their loss"] = dict(zip(attacked, found.membership.each_named))
    scores = []
    for name, own in shares.items():
        rows, names = ([of[i] for i in own] for of in (training.rows, training.names))
        scores.append(VolumeScores(name, np.array([*own.values()], dtype=float), rows, names, "low", COPY_TOLERANCE))
    return scores


def data_copying(held_out: Sequence[float], synthetic: Sequence[float]) -> float:
    """C_T (Meehan et al. 2020, section 3.1, in one cell): Mann-Whitney's z of distances to the training set.

    Args:
        held_out, synthetic: distance of each volume to its nearest training volume; (n,) and (m,).

    Returns:
        Far below 0, such as -3: synthetic volumes are nearer than held-out ones, as copies are. Far above 0: further, as those
        of a model that is not trained enough. 0 on average for volumes of the training distribution.
    """
    p, q = np.asarray(held_out), np.asarray(synthetic)
    u = (q[:, None] > p).sum() + 0.5 * (q[:, None] == p).sum()
    n, m = len(p), len(q)
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def _attack(pipeline: Pipeline, training: Volumes, held_out: Volumes, seed: int, processes: Processes) -> Membership | None:
    losses = []
    for volumes, title in ((training, "losses of training subjects"), (held_out, "losses of held-out subjects")):

        def work(i: int, volumes: Volumes = volumes) -> NDArray:
            (volume,) = volumes.read([i])
            return losses_of(pipeline, volume, volumes.rows[i], seed)

        chosen = volumes.first_scans(MAX_ATTACKED, seed)
        if len(chosen) < 2:
            return None
        losses.append(np.array(share_work(work, chosen, processes, title, "subject")))
    return infer_members(*losses)
