"""What every synthetic DICOM object says, whichever form it has: whose it is (nobody's), what made it, where its voxels are.

Legend: a DICOM position is in LPS+ mm (to the left, the back and the top of the patient), an affine of ours in RAS+.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

import ldm3d
from ldm3d.covariates import describe
from ldm3d.errors import InputError, shown
from ldm3d.geometry import spacing_of

WHITE = 4095  # the stored value of intensity 1: 12 bits, which every viewer shows
RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
IMPLEMENTATION = "2.25.216459018739427501937718235911476912034"
# A date is required. This one tells that nothing was acquired, and is the same every time
DATE, TIME = "19000101", "000000"
SEXES = ("F", "M")


@dataclass(frozen=True)
class Planes:
    """A volume as DICOM has it.

    Attributes:
        pixels: whole numbers (Z, rows, columns) from 0 to `WHITE`, columns to the left and rows to the back.
        spacing: of the volume's axes, (3,) mm: between columns, between rows, between planes.
        orientation: six decimal strings, the directions of rows and columns.
        corners: three decimal strings a plane, where its first pixel lies.
    """

    pixels: NDArray
    spacing: NDArray
    orientation: list[str]
    corners: list[list[str]]


def planes_of(volume: NDArray, affine: NDArray) -> Planes:
    """Planes along the last axis of a volume (1, X, Y, Z) in [0, 1].

    Raises:
        InputError: several channels, or an affine with shear.
    """
    if len(volume) != 1:
        raise InputError(f"a volume of {len(volume)} channels: a DICOM image has one")
    spacing = spacing_of(affine)
    directions = affine[:3, :3] / spacing
    if np.abs(directions.T @ directions - np.eye(3)).max() > 1e-3:
        raise InputError("the axes of the volume are not at right angles; DICOM has no shear")
    stored = np.round(np.clip(volume[0], 0, 1) * WHITE).astype("<u2")
    # Columns to the patient's left and rows to the back, where the axes run to the right and the front
    pixels = np.ascontiguousarray(stored[::-1, ::-1].transpose(2, 1, 0))  # (Z, rows, columns)
    x, y, z = stored.shape
    orientation = [*(-directions[:, 0] * RAS_TO_LPS), *(-directions[:, 1] * RAS_TO_LPS)]
    corners = [(affine @ [x - 1, y - 1, k, 1])[:3] * RAS_TO_LPS for k in range(z)]
    return Planes(pixels, spacing, [decimal(value) for value in orientation], [[decimal(v) for v in c] for c in corners])


class Uids:
    """Identifiers that follow from what was generated: the same every time, different for everything else."""

    def __init__(self, made: Mapping[str, Any], subject: str):
        self._made = json.dumps([subject, {**made}], sort_keys=True)

    def __call__(self, what: str) -> str:
        digest = hashlib.blake2b(f"{what} {self._made}".encode(), digest_size=16).digest()
        return f"2.25.{int.from_bytes(digest, 'big')}"  # a UUID's root, at most 44 characters


def new_file(uid: Uids, sop_class: str, instance: str, series: str) -> FileDataset:
    """An object with its identifiers; `instance` and `series` tell it from others of the same volume."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, uid(instance)
    meta.TransferSyntaxUID, meta.ImplementationClassUID = ExplicitVRLittleEndian, IMPLEMENTATION
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, uid(instance)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid("study"), uid(series)
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = uid("frame of reference"), ""
    return dataset


def describe_synthetic(dataset: FileDataset, made: Mapping[str, Any], subject: str) -> None:
    """Who is shown (nobody), what made it, and that it is synthetic."""
    covariates = made["covariates"]
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName, dataset.PatientID = f"SYNTHETIC^{subject}", subject
    dataset.PatientBirthDate, dataset.PatientSex = "", covariates.get("sex") if covariates.get("sex") in SEXES else ""
    dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", "synthetic: no patient"
    dataset.StudyDate = dataset.StudyTime = dataset.StudyID = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = "synthetic volume, for research only"
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "MR", 1, 1
    dataset.SeriesDescription, dataset.PatientPosition = "SYNTHETIC by ldm3d", ""
    dataset.Manufacturer, dataset.ManufacturerModelName = "ldm3d", "latent diffusion model"
    dataset.DeviceSerialNumber, dataset.SoftwareVersions = made["model_hash"], ldm3d.__version__
    dataset.SyntheticData = "YES"
    dataset.ContentQualification, dataset.BurnedInAnnotation = "RESEARCH", "NO"
    dataset.ContentDate, dataset.ContentTime = DATE, TIME
    dataset.ImageComments = _asked(made)


def _asked(made: Mapping[str, Any]) -> str:
    """What was asked for, in a line of at most 1,000 characters."""
    text = f"synthetic, by model {made['model_hash']}; asked: {describe(made['covariates'])}; seed {made['seed']}, "
    return shown(f"{text}sample {made['sample']}", 1000).strip("'\"")


def add_pixels(dataset: FileDataset, pixels: NDArray) -> None:
    """Pixels (..., rows, columns) of 12 bits."""
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.LossyImageCompression, dataset.PresentationLUTShape = "00", "IDENTITY"
    dataset.PixelData = pixels.tobytes()


def decimal(value: float) -> str:
    """A number in the 16 characters of a decimal string."""
    for digits in range(15, 0, -1):
        text = f"{float(value) + 0.0:.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(f"{value} has no decimal string of 16 characters")
