"""Synthetic volumes as DICOM: one Enhanced MR object a volume.

Enhanced MR knows images that no scanner acquired: where the image type says DERIVED, no acquisition parameter is required, so
none has to be made up. (0008,001C) says that the data are synthetic, and Content Qualification that they are for research.

Legend: a DICOM position is in LPS+ mm (to the left, the back and the top of the patient), an affine of ours in RAS+.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian

import ldm3d
from ldm3d.covariates import describe
from ldm3d.data.nifti import read_volume
from ldm3d.errors import InputError, shown
from ldm3d.files import replacing
from ldm3d.geometry import spacing_of

WHITE = 4095  # the stored value of intensity 1: 12 bits, which every viewer shows
RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
IMPLEMENTATION = "2.25.216459018739427501937718235911476912034"
# A date is required. This one tells that nothing was acquired, and is the same every time
DATE, TIME = "19000101", "000000"
SEXES = ("F", "M")


def convert(folder: Path | str, out: Path | str) -> int:
    """Write every volume of a folder of `ldm3d generate` as DICOM; returns how many.

    Args:
        folder: with the volumes and their sidecars.
        out: OUT/sub-syn0001.dcm and so on; files of these names are replaced.

    Raises:
        InputError: no generated volume in the folder, or one whose sidecar does not say that it is synthetic.
    """
    volumes = sorted(Path(folder).glob("sub-*/anat/*_desc-synthetic_*.nii.gz"))
    if not volumes:
        raise InputError(f"{folder} holds no volume of `ldm3d generate` (sub-*/anat/*_desc-synthetic_*.nii.gz)")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for path in volumes:
        sidecar = _sidecar(path)
        volume, affine = read_volume(path)
        subject = path.name.split("_")[0]
        dataset = to_dicom(volume, affine, sidecar, subject.removeprefix("sub-"), path.name.split("_")[-1].split(".")[0])
        with replacing(out / f"{subject}.dcm") as unfinished:
            dataset.save_as(unfinished, enforce_file_format=True)
    return len(volumes)


def _sidecar(path: Path) -> dict[str, Any]:
    """What stands beside a generated volume; other volumes are never marked as synthetic by mistake."""
    beside = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
    try:
        said = json.loads(beside.read_bytes())
        if said["synthetic"] is True and {"model_hash", "seed", "sample", "covariates"} <= said.keys():
            return said
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{path}: {beside.name} does not say that this volume is synthetic; only those of `ldm3d generate` are written"
    )


def to_dicom(volume: NDArray, affine: NDArray, made: Mapping[str, Any], subject: str, suffix: str = "T1w") -> FileDataset:
    """A generated volume as Enhanced MR object, a frame for each plane along the last axis.

    Args:
        volume: (1, X, Y, Z) in [0, 1]; stored as whole numbers from 0 to `WHITE`.
        affine: (4, 4) to RAS+ mm, without shear.
        made: the sidecar: model_hash, seed, sample, covariates. All identifiers follow from it, and from `subject`.
        subject: for the patient's name and ID.
        suffix: BIDS suffix of the volume.

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
    frames = np.ascontiguousarray(stored[::-1, ::-1].transpose(2, 1, 0))  # (Z, rows, columns)
    x, y, z = stored.shape
    dataset = _file(_Uids(made, subject))
    _describe(dataset, made, subject)
    _image(dataset, frames, suffix)
    orientation = [*(-directions[:, 0] * RAS_TO_LPS), *(-directions[:, 1] * RAS_TO_LPS)]
    dataset.SharedFunctionalGroupsSequence = Sequence([_shared(spacing, orientation, dataset.ImageType)])
    corners = [(affine @ [x - 1, y - 1, k, 1])[:3] * RAS_TO_LPS for k in range(z)]
    dataset.PerFrameFunctionalGroupsSequence = Sequence([_frame(k, corner) for k, corner in enumerate(corners)])
    return dataset


class _Uids:
    """Identifiers that follow from what was generated: the same every time, different for everything else."""

    def __init__(self, made: Mapping[str, Any], subject: str):
        self._made = json.dumps([subject, {**made}], sort_keys=True)

    def __call__(self, what: str) -> str:
        digest = hashlib.blake2b(f"{what} {self._made}".encode(), digest_size=16).digest()
        return f"2.25.{int.from_bytes(digest, 'big')}"  # a UUID's root, at most 44 characters


def _file(uid: _Uids) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = EnhancedMRImageStorage, uid("instance")
    meta.TransferSyntaxUID, meta.ImplementationClassUID = ExplicitVRLittleEndian, IMPLEMENTATION
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = EnhancedMRImageStorage, uid("instance")
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid("study"), uid("series")
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = uid("frame of reference"), ""
    organization = Dataset()
    organization.DimensionOrganizationUID = uid("dimensions")
    dataset.DimensionOrganizationSequence = Sequence([organization])
    indices = [_index(uid, 0x00209056, "stack"), _index(uid, 0x00209057, "position in the stack")]
    dataset.DimensionIndexSequence = Sequence(indices)
    return dataset


def _index(uid: _Uids, pointer: int, label: str) -> Dataset:
    index = Dataset()
    index.DimensionOrganizationUID = uid("dimensions")
    index.DimensionIndexPointer, index.FunctionalGroupPointer = pointer, 0x00209111
    index.DimensionDescriptionLabel = label
    return index


def _describe(dataset: Dataset, made: Mapping[str, Any], subject: str) -> None:
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
    # No standard applies to what no scanner made; dciodvfy wants it said
    dataset.ApplicableSafetyStandardAgency = "NONE"
    dataset.ContentDate, dataset.ContentTime = DATE, TIME
    dataset.ImageComments = _asked(made)
    dataset.AcquisitionContextSequence = Sequence([])


def _asked(made: Mapping[str, Any]) -> str:
    """What was asked for, in a line of at most 1,000 characters."""
    text = f"synthetic, by model {made['model_hash']}; asked: {describe(made['covariates'])}; seed {made['seed']}, "
    return shown(f"{text}sample {made['sample']}", 1000).strip("'\"")


def _image(dataset: Dataset, frames: NDArray, suffix: str) -> None:
    """Pixels, and what kind of image they are."""
    count, rows, columns = frames.shape
    dataset.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    dataset.PixelPresentation, dataset.VolumetricProperties = "MONOCHROME", "VOLUME"
    dataset.VolumeBasedCalculationTechnique, dataset.ComplexImageComponent = "NONE", "MAGNITUDE"
    dataset.AcquisitionContrast = "T1" if suffix == "T1w" else "UNKNOWN"
    dataset.LossyImageCompression, dataset.PresentationLUTShape = "00", "IDENTITY"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = count, rows, columns
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = frames.tobytes()


def _group(keyword: str, **values: Any) -> dict[str, Sequence]:
    """A functional group: a sequence of one item."""
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return {keyword: Sequence([item])}


def _shared(spacing: NDArray, orientation: list[float], image_type: list[str]) -> Dataset:
    """What holds for all frames."""
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "12738006", "SCT", "Brain"
    columns, rows, between = (_decimal(side) for side in spacing)
    kind = {"PixelPresentation": "MONOCHROME", "VolumetricProperties": "VOLUME", "VolumeBasedCalculationTechnique": "NONE"}
    kind |= {"ComplexImageComponent": "MAGNITUDE", "AcquisitionContrast": "UNKNOWN"}
    groups = {
        **_group("PixelMeasuresSequence", PixelSpacing=[rows, columns], SliceThickness=between, SpacingBetweenSlices=between),
        **_group("PlaneOrientationSequence", ImageOrientationPatient=[_decimal(value) for value in orientation]),
        **_group("FrameAnatomySequence", FrameLaterality="U", AnatomicRegionSequence=Sequence([region])),
        **_group("PixelValueTransformationSequence", RescaleIntercept="0", RescaleSlope="1", RescaleType="US"),
        **_group("FrameVOILUTSequence", WindowCenter=str((WHITE + 1) // 2), WindowWidth=str(WHITE + 1)),
        **_group("MRImageFrameTypeSequence", FrameType=list(image_type), **kind),
    }
    shared = Dataset()
    for keyword, sequence in groups.items():
        setattr(shared, keyword, sequence)
    return shared


def _frame(k: int, corner: NDArray) -> Dataset:
    """What holds for frame k, whose first pixel lies at this place in LPS+ mm."""
    frame = Dataset()
    content = {"StackID": "1", "InStackPositionNumber": k + 1, "DimensionIndexValues": [1, k + 1]}
    position = [_decimal(value) for value in corner]
    for keyword, sequence in (
        _group("FrameContentSequence", **content) | _group("PlanePositionSequence", ImagePositionPatient=position)
    ).items():
        setattr(frame, keyword, sequence)
    return frame


def _decimal(value: float) -> str:
    """A number in the 16 characters of a decimal string."""
    for digits in range(15, 0, -1):
        text = f"{float(value) + 0.0:.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(f"{value} has no decimal string of 16 characters")
