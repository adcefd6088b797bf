"""Toy brains: T1w-like heads of known anatomy, with exact labels and covariates, in any number and shape.

A phantom is a stack of closed surfaces, each a field of signed depth in mm (positive inside). Painting the layers from
the outside in gives the labels (depth > 0 at the voxel's centre) and the image (the covered part of each voxel, so that
there is partial volume) from the same fields. All people share one anatomy and one folding pattern; a person adds a
size, a smooth warp, atrophy and ventricles. Left and right differ in all of them, so that a flip is visible.

Coverages are (X, Y, Z), X to the right, Y anterior, Z superior; coordinates and depths in mm, the brain near the origin.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy import ndarray
from scipy.ndimage import gaussian_filter

from ldm3d.errors import InputError, choose

BACKGROUND, HEAD, SKULL, CSF, GREY, WHITE, LEFT_VENTRICLE, RIGHT_VENTRICLE = range(8)
LABELS = {
    BACKGROUND: "Background",
    HEAD: "Skin-and-soft-tissue",
    SKULL: "Skull",
    CSF: "Cerebrospinal-fluid",
    GREY: "Grey-matter",
    WHITE: "White-matter",
    LEFT_VENTRICLE: "Left-lateral-ventricle",
    RIGHT_VENTRICLE: "Right-lateral-ventricle",
}
VENTRICLES, BRAIN = (LEFT_VENTRICLE, RIGHT_VENTRICLE), (GREY, WHITE)

# T1-weighted intensity in raw units. Fat is suppressed to the brightness of grey matter: at toy resolutions the rim of a
# bright scalp would take half of what an autoencoder can store.
INTENSITY = {HEAD: 380.0, SKULL: 130.0, CSF: 180.0, GREY: 560.0, WHITE: 800.0, LEFT_VENTRICLE: 160.0}
FAT_INTENSITY = 580.0
NOISE = 12.0  # standard deviation in each channel of the complex signal; white matter / noise = 67
BLUR_VOXELS = 0.6  # Gaussian point spread of the acquisition, on top of partial volume

FIELD_OF_VIEW_MM = (180.0, 216.0, 180.0)  # holds the largest head
SMALLEST_SIDE = 16
CORTEX_MM, SULCUS_DEPTH_MM, FOLD_WAVELENGTH_MM = 3.8, 15.0, 36.0

# The lateral ventricle's centreline (mm; x counts away from the midline) and its radius there: chains of segments.
_BODY = [(15, 36, -1, 3.6), (12, 22, 11, 5.2), (11, 0, 17, 5.0), (15, -20, 15, 5.2), (23, -36, 5, 6.4), (22, -60, -1, 2.8)]
_TEMPORAL_HORN = [(23, -36, 5, 5.0), (33, -22, -13, 3.4), (31, -4, -19, 2.6)]

# The folding pattern, the same for all: random plane waves of one wavelength, whose zero level set is a labyrinth of sulci.
_FOLDS = np.random.default_rng(12).standard_normal((18, 4))
_FOLD_VECTORS = (2 * np.pi / FOLD_WAVELENGTH_MM * _FOLDS[:, :3] / np.linalg.norm(_FOLDS[:, :3], axis=1, keepdims=True)).astype(
    np.float32
)
_FOLD_PHASES = (np.pi * _FOLDS[:, 3]).astype(np.float32)


@dataclass(frozen=True)
class Person:
    """Covariates and the few numbers that shape a head."""

    age_years: float
    sex: str
    size: float  # linear, 1 = the template
    ventricles_ml: float  # the aim; covariates report what is counted
    atrophy_mm: float  # how far the pial surface has withdrawn from the template's


def default_spacing(shape: Sequence[int]) -> float:
    """Isotropic voxel size in mm at which any head fits into the grid: 4.5 at (40, 48, 40)."""
    return max(extent / n for extent, n in zip(FIELD_OF_VIEW_MM, shape))


@dataclass(frozen=True)
class Change:
    """What differs between a person and the twin: one covariate, and by how much.

    Args:
        name: "age" (years; downward where the twin would be older than 90), "sex" (the other one), or
            "ventricular_volume_ml".
        amount: added; of no meaning for sex.
    """

    name: str
    amount: float = 0.0

    def __post_init__(self) -> None:
        choose("covariate of twins", self.name, ("age", "sex", "ventricular_volume_ml"))
        if self.name == "age" and not 0 < abs(self.amount) <= 35:
            raise InputError(f"twins whose age differs by {self.amount:g} years: give up to 35, half of the range, and not 0")
        if self.name == "ventricular_volume_ml" and self.amount == 0:
            raise InputError("twins whose ventricles differ by 0 ml are the same; give another number")


def make_phantom(
    shape: Sequence[int],
    spacing_mm: float | None = None,
    seed: int = 0,
    index: int = 0,
    change: Change | None = None,
) -> tuple[ndarray, ndarray, dict]:
    """One phantom; the same person for the same (seed, index), at any shape.

    Args:
        shape: voxels along X, Y, Z, each at least 16.
        spacing_mm: isotropic voxel size; None for `default_spacing`. A grid smaller than the head crops it, and
            volumes are then those of what is left.
        seed: the population. index: the person in it. Both non-negative.
        change: of one covariate: the person's twin, with the same anatomy, head position, bias field and noise.

    Returns:
        Image, float32 (1, X, Y, Z) in raw units of about 0 to 1000; labels, uint8 (1, X, Y, Z), see `LABELS`; covariates:
        age (years), sex ("F", "M"), ventricular_volume_ml, brain_volume_ml (grey + white), counted on the labels.

    Raises:
        InputError: a side or the spacing is too small.
    """
    shape, spacing_mm = checked_grid(shape, spacing_mm)
    # Two streams: the person does not depend on the number of voxels.
    person = draw_person(np.random.default_rng([seed, index, 0]), change)
    rng = np.random.default_rng([seed, index, 1])

    image = np.zeros(shape, np.float32)
    labels = np.zeros(shape, np.uint8)
    for label, depth, coverage, intensity in _layers(shape, spacing_mm, person, rng):
        labels[depth > 0] = label
        image += coverage * (intensity - image)
    x = _coordinates(shape, spacing_mm)[0]
    labels[(labels == LEFT_VENTRICLE) & (x >= 0)] = RIGHT_VENTRICLE

    image = gaussian_filter(image, BLUR_VOXELS)
    bias = _waves(_coordinates(shape, spacing_mm), *_random_waves(rng, 4, 260.0)) / 4
    image *= 1 + 0.2 * bias
    noise = NOISE * rng.standard_normal((2, *shape), dtype=np.float32)
    image = np.hypot(image + noise[0], noise[1])  # Rician: the magnitude of a complex signal

    voxel_ml = spacing_mm**3 / 1000
    counts = np.bincount(labels.ravel(), minlength=len(LABELS))
    covariates = {
        "age": person.age_years,
        "sex": person.sex,
        "ventricular_volume_ml": round(float(counts[list(VENTRICLES)].sum() * voxel_ml), 2),
        "brain_volume_ml": round(float(counts[list(BRAIN)].sum() * voxel_ml), 1),
    }
    return image[None], labels[None], covariates


def draw_person(rng: np.random.Generator, change: Change | None = None) -> Person:
    """Covariates that are related as in adults: ventricles grow ever faster with age, brains shrink, men are larger.

    At one age ventricles still differ twofold either way, so that age does not determine them.
    """
    age = round(float(rng.uniform(20, 90)), 1)
    sex = str(rng.choice(["F", "M"]))
    if change and change.name == "age":
        age = round(age + change.amount if 20 <= age + change.amount <= 90 else age - change.amount, 1)
    elif change and change.name == "sex":
        sex = "M" if sex == "F" else "F"
    aged = (age - 20) / 70
    # Python floats, here and in Person: a float64 scalar of NumPy's would turn every float32 field into float64.
    size, ventricles, atrophy = np.clip(rng.standard_normal(3), -2, 2).tolist()
    size = (1.033 if sex == "M" else 1.0) * (1 + 0.02 * size)  # 1.033 cubed: a tenth more volume
    ventricles_ml = (14 + 40 * aged**1.8) * math.exp(0.38 * ventricles) * size**3
    ventricles_ml = min(max(ventricles_ml, 8.0), 110.0)
    if change and change.name == "ventricular_volume_ml":
        ventricles_ml = min(max(ventricles_ml + change.amount, 8.0), 110.0)
    return Person(age, sex, size, ventricles_ml, 0.9 * aged**1.3 + 0.12 * atrophy)


def _layers(
    shape: tuple, spacing_mm: float, person: Person, rng: np.random.Generator
) -> Iterator[tuple[int, ndarray, ndarray, float | ndarray]]:
    """Yield (label, signed depth in mm, covered part of each voxel, intensity), from the skin to the ventricles."""
    points = _coordinates(shape, spacing_mm)
    warp = [_waves(points, *_random_waves(rng, 3, 150.0)) for _ in range(3)]
    x, y, z = ((p + 0.9 * w) / person.size for p, w in zip(points, warp))
    z = z - 6.0  # the middle of the head lies below the middle of the brain
    y = y - 4.0 * x / 66  # torque: the right hemisphere lies further forward, the left one further back
    side = np.abs(x)

    def layer(label, depth, intensity=None):
        # A flat boundary at this depth covers so much of the voxel.
        return label, depth, np.clip(0.5 + depth / spacing_mm, 0, 1), INTENSITY[label] if intensity is None else intensity

    cerebellum = _ellipsoid(side - 20, y + 50, z + 39, (29, 27, 22))
    cerebrum = np.minimum(
        _ellipsoid(x, y, z, (66 - 3 * np.clip(y / 60, 0, 1), 82, np.where(z > 0, np.float32(62), np.float32(44)))),
        -2.5 - cerebellum,
    )
    stem = 11 - np.hypot(np.hypot(x, y + 20 + 0.25 * -np.minimum(z, 0)), np.maximum(np.abs(z + 34) - 26, 0))
    inside = functools.reduce(np.maximum, (cerebrum, cerebellum, stem))

    head = np.maximum(_ellipsoid(x, y, z + 6, (78, 95, 81)), inside + 12)
    yield layer(HEAD, head, INTENSITY[HEAD] + (FAT_INTENSITY - INTENSITY[HEAD]) * np.exp(-np.maximum(head, 0) / 6))
    yield layer(HEAD, 12 - np.sqrt((side - 31) ** 2 + (y - 68) ** 2 + (z + 31) ** 2), INTENSITY[CSF])  # eyes
    yield layer(SKULL, inside + 8.5)
    yield layer(CSF, inside + 3.0)

    white, sulci = cerebrum - person.atrophy_mm, []
    yield layer(GREY, white)
    ventricles = _ventricles(side, y, z, x < 0, person, spacing_mm)
    for distance, half_width in _sulci(side, y, z, x, cerebrum, -ventricles, person.atrophy_mm):
        sulci.append((distance, half_width))
        white = np.minimum(white, distance - half_width)
    nuclei = np.maximum(
        _ellipsoid(side - 13, y + 14, z - 3, (9, 14, 9)),  # thalamus
        _ellipsoid(side - 27, y - 6, z - 2, (7, 19, 11)),  # putamen and pallidum
    )
    yield layer(WHITE, np.minimum(white - CORTEX_MM, -nuclei))
    yield layer(GREY, cerebellum - 0.5 * person.atrophy_mm)
    yield layer(WHITE, cerebellum - 9)
    yield layer(WHITE, stem)
    for distance, half_width in sulci:
        # Thinner than a voxel, a sulcus has two boundaries in it: with one only, sulci would be too dark.
        depth = np.minimum(half_width - distance, cerebrum)
        covered = np.clip(0.5 + depth / spacing_mm, 0, 1) - np.clip(0.5 - (half_width + distance) / spacing_mm, 0, 1)
        yield CSF, depth, np.maximum(covered, 0), INTENSITY[CSF]
    yield layer(LEFT_VENTRICLE, ventricles)


def _sulci(side, y, z, x, depth, to_ventricle, atrophy_mm) -> Iterator[tuple[ndarray, ndarray]]:
    """Yield (distance to the middle of the sulcus, half width), in mm, for folds, midline and Sylvian fissure.

    A negative half width closes a sulcus: at its bottom, and 8 mm before a ventricle.
    """
    half_width = 0.9 + atrophy_mm
    keep_off = to_ventricle - 8
    value, slope = _waves_and_slope((side, y, z), _FOLD_VECTORS, _FOLD_PHASES)
    # |f| / |grad f| is the distance to the zero level set, to first order.
    yield np.abs(value) / (slope + 0.05), np.minimum(np.minimum(half_width, 0.5 * (SULCUS_DEPTH_MM - depth)), keep_off)

    # Between the hemispheres, except where corpus callosum and thalami join them.
    joined = np.maximum(_ellipsoid(x, y + 6, z - 4, (1e3, 42, 25)), -9 - y - z)
    yield side, np.minimum(half_width + 0.6, -0.5 * joined)

    lips = np.minimum(1.6 * half_width + 0.12 * np.maximum(y - 5, 0), 0.5 * (26 - depth))
    lips = np.minimum(np.minimum(lips, 0.4 * (y + 38)), keep_off)
    yield np.abs(z + 10 + 0.3 * (y - 10)), np.minimum(lips, 0.6 * (side - 28))


def _ventricles(side, y, z, left, person: Person, spacing_mm: float) -> ndarray:
    """Signed depth in mm of both lateral ventricles, widened until as many voxels lie inside as the person is to have."""
    ratio = np.full(side.shape, np.inf, np.float32)  # distance to the centreline in units of the radius there
    radius = np.ones(side.shape, np.float32)
    for chain in (_BODY, _TEMPORAL_HORN):
        for start, end in pairwise(chain):
            (px, py, pz, r0), (qx, qy, qz, r1) = start, end
            dx, dy, dz = qx - px, qy - py, qz - pz
            along = ((side - px) * dx + (y - py) * dy + (z - pz) * dz) / (dx * dx + dy * dy + dz * dz)
            along = np.clip(along, 0, 1)
            distance = np.sqrt((side - px - along * dx) ** 2 + (y - py - along * dy) ** 2 + (z - pz - along * dz) ** 2)
            r = r0 + along * (r1 - r0)
            nearer = distance / r < ratio
            ratio, radius = np.where(nearer, distance / r, ratio), np.where(nearer, r, radius)
    ratio = np.where(left, ratio / 1.05, ratio * 1.05)  # the left one is always larger
    ratio = np.where(side < 0.8, np.inf, ratio)  # septum
    count = round(person.ventricles_ml * 1000 / spacing_mm**3)
    inside = np.partition(ratio, min(count, ratio.size - 1), axis=None)[min(count, ratio.size - 1)]
    inside = min(inside, 3.5)  # a crop through the brain holds fewer voxels than asked
    return np.maximum((inside - ratio) * radius, -1e3)


def _ellipsoid(x, y, z, axes) -> ndarray:
    """Signed depth in mm below the surface of an ellipsoid, to first order."""
    a, b, c = axes
    r = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)
    slope = np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2 + (z / c**2) ** 2)
    return r * (1 - r) / (slope + 1e-6)


def _waves(points, vectors, phases) -> ndarray:
    """Sum of plane waves sin(k . p + phase)."""
    return sum(np.sin(v[0] * points[0] + v[1] * points[1] + v[2] * points[2] + p) for v, p in zip(vectors, phases))


def _waves_and_slope(points, vectors, phases) -> tuple[ndarray, ndarray]:
    """The same sum, and the length of its gradient."""
    value, gradient = 0.0, [0.0, 0.0, 0.0]
    for vector, phase in zip(vectors, phases):
        angle = vector[0] * points[0] + vector[1] * points[1] + vector[2] * points[2] + phase
        value = value + np.sin(angle)
        cosine = np.cos(angle)
        gradient = [g + k * cosine for g, k in zip(gradient, vector)]
    return value, np.sqrt(sum(g * g for g in gradient))


def _random_waves(rng: np.random.Generator, count: int, wavelength_mm: float) -> tuple[ndarray, ndarray]:
    """Directions and phases of plane waves of one wavelength."""
    vectors = rng.standard_normal((count, 3))
    vectors *= 2 * np.pi / wavelength_mm / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), rng.uniform(0, 2 * np.pi, count).astype(np.float32)


@functools.lru_cache(maxsize=2)
def _coordinates(shape: tuple, spacing_mm: float) -> tuple[ndarray, ndarray, ndarray]:
    """World coordinates in mm, (X, 1, 1), (1, Y, 1), (1, 1, Z), the middle of the grid at 0."""
    return tuple(np.ix_(*((np.arange(n, dtype=np.float32) - (n - 1) / 2) * spacing_mm for n in shape)))


def checked_grid(shape: Sequence[int], spacing_mm: float | None) -> tuple[tuple, float]:
    """Shape and spacing, or an InputError; None for `default_spacing`."""
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < SMALLEST_SIDE:
        raise InputError(
            f"phantom shape {shape} must have three sides of at least {SMALLEST_SIDE} voxels, below which there is "
            "no anatomy left; (32, 32, 32) is small and quick, (40, 48, 40) has room for the head"
        )
    spacing_mm = default_spacing(shape) if spacing_mm is None else float(spacing_mm)
    if not 0 < spacing_mm < np.inf:
        raise InputError(f"phantom spacing {spacing_mm} mm must be positive; leave it out for {default_spacing(shape):.3g} mm")
    return shape, spacing_mm
