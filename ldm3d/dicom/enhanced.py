"""Synthetic volumes as Enhanced MR: one object a volume.

Enhanced MR knows images that no scanner acquired: where the image type says DERIVED, no acquisition parameter is required, so
none has to be made up. (0008,001C) says that the data are synthetic, and Content Qualification that they are for research.
"""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage

from ldm3d.dicom.common import WHITE, Planes, Uids, add_pixels, decimal, describe_synthetic, new_file, planes_of


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
    planes, uid = planes_of(volume, affine), Uids(made, subject)
    dataset = new_file(uid, EnhancedMRImageStorage, "instance", "series")
    _dimensions(dataset, uid)
    describe_synthetic(dataset, made, subject)
    # No standard applies to what no scanner made; dciodvfy wants it said
    dataset.ApplicableSafetyStandardAgency = "NONE"
    dataset.AcquisitionContextSequence = Sequence([])
    _image(dataset, planes.pixels, suffix)
    dataset.SharedFunctionalGroupsSequence = Sequence([_shared(planes, dataset.ImageType)])
    dataset.PerFrameFunctionalGroupsSequence = Sequence([_frame(k, corner) for k, corner in enumerate(planes.corners)])
    return dataset


def _dimensions(dataset: FileDataset, uid: Uids) -> None:
    organization = Dataset()
    organization.DimensionOrganizationUID = uid("dimensions")
    dataset.DimensionOrganizationSequence = Sequence([organization])
    indices = [_index(uid, 0x00209056, "stack"), _index(uid, 0x00209057, "position in the stack")]
    dataset.DimensionIndexSequence = Sequence(indices)


def _index(uid: Uids, pointer: int, label: str) -> Dataset:
    index = Dataset()
    index.DimensionOrganizationUID = uid("dimensions")
    index.DimensionIndexPointer, index.FunctionalGroupPointer = pointer, 0x00209111
    index.DimensionDescriptionLabel = label
    return index


def _image(dataset: FileDataset, pixels: NDArray, suffix: str) -> None:
    """Pixels, and what kind of image they are."""
    dataset.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    dataset.PixelPresentation, dataset.VolumetricProperties = "MONOCHROME", "VOLUME"
    dataset.VolumeBasedCalculationTechnique, dataset.ComplexImageComponent = "NONE", "MAGNITUDE"
    dataset.AcquisitionContrast = "T1" if suffix == "T1w" else "UNKNOWN"
    dataset.NumberOfFrames = len(pixels)
    add_pixels(dataset, pixels)


def _group(keyword: str, **values: Any) -> dict[str, Sequence]:
    """A functional group: a sequence of one item."""
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return {keyword: Sequence([item])}


def _shared(planes: Planes, image_type: list[str]) -> Dataset:
    """What holds for all frames."""
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "12738006", "SCT", "Brain"
    columns, rows, between = (decimal(side) for side in planes.spacing)
    kind = {"PixelPresentation": "MONOCHROME", "VolumetricProperties": "VOLUME", "VolumeBasedCalculationTechnique": "NONE"}
    kind |= {"ComplexImageComponent": "MAGNITUDE", "AcquisitionContrast": "UNKNOWN"}
    groups = {
        **_group("PixelMeasuresSequence", PixelSpacing=[rows, columns], SliceThickness=between, SpacingBetweenSlices=between),
        **_group("PlaneOrientationSequence", ImageOrientationPatient=planes.orientation),
        **_group("FrameAnatomySequence", FrameLaterality="U", AnatomicRegionSequence=Sequence([region])),
        **_group("PixelValueTransformationSequence", RescaleIntercept="0", RescaleSlope="1", RescaleType="US"),
        **_group("FrameVOILUTSequence", WindowCenter=str((WHITE + 1) // 2), WindowWidth=str(WHITE + 1)),
        **_group("MRImageFrameTypeSequence", FrameType=list(image_type), **kind),
    }
    shared = Dataset()
    for keyword, sequence in groups.items():
        setattr(shared, keyword, sequence)
    return shared


def _frame(k: int, corner: list[str]) -> Dataset:
    """What holds for frame k, whose first pixel lies at this place in LPS+ mm."""
    frame = Dataset()
    content = {"StackID": "1", "InStackPositionNumber": k + 1, "DimensionIndexValues": [1, k + 1]}
    for keyword, sequence in (
        _group("FrameContentSequence", **content) | _group("PlanePositionSequence", ImagePositionPatient=corner)
    ).items():
        setattr(frame, keyword, sequence)
    return frame
