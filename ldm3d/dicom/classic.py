"""Synthetic volumes as classic MR images, one object a plane: for programs that do not read Enhanced MR.

A classic MR image has to name a scanning sequence. RM, "research mode", is the one term that names none; every other parameter
of an acquisition may be empty, and is.
"""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.uid import MRImageStorage

from ldm3d.dicom.common import WHITE, Uids, add_pixels, decimal, describe_synthetic, new_file, planes_of


def to_classic(
    volume: NDArray, affine: NDArray, made: Mapping[str, Any], subject: str, suffix: str = "T1w"
) -> list[FileDataset]:
    """A generated volume as a series of classic MR images, one for each plane along the last axis.

    Args and errors: see `ldm3d.dicom.enhanced.to_dicom`. The series is another one than that of the Enhanced MR object, in the
    same study.
    """
    planes, uid = planes_of(volume, affine), Uids(made, subject)
    columns, rows, between = (decimal(side) for side in planes.spacing)
    images = []
    for k, (pixels, corner) in enumerate(zip(planes.pixels, planes.corners)):
        image = new_file(uid, MRImageStorage, f"classic instance {k}", "classic series")
        describe_synthetic(image, made, subject)
        image.SeriesNumber, image.InstanceNumber = 2, k + 1
        image.ImageType = ["DERIVED", "PRIMARY", "OTHER"]
        image.SeriesDescription = f"SYNTHETIC {suffix} by ldm3d"
        image.BodyPartExamined = "BRAIN"  # not one of a pair, so no laterality
        image.ScanningSequence, image.SequenceVariant = "RM", "NONE"
        image.ScanOptions = image.MRAcquisitionType = ""
        image.RepetitionTime = image.EchoTime = image.EchoTrainLength = None
        image.PixelSpacing, image.SliceThickness, image.SpacingBetweenSlices = [rows, columns], between, between
        image.ImagePositionPatient, image.ImageOrientationPatient = corner, planes.orientation
        image.WindowCenter, image.WindowWidth = str((WHITE + 1) // 2), str(WHITE + 1)
        add_pixels(image, pixels)
        images.append(image)
    return images
