"""Enhanced CT files: the volumes of tests.dicom_studies, every slice a frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from anatomynet.engine.volume import CTVolume
from tests.dicom_studies import PATIENT

BRAIN = {"CodeValue": "12738006", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Brain"}


@dataclass(frozen=True)
class Frames:
    """How the slices of a volume become frames.

    Attributes:
        order: which slice is the first frame, the second, ...
        rescale: slope and intercept of each frame; None is 1 and 0, said once for all.
        shared: whether what all frames have in common is said once or by every frame.
        stack: the StackID of all.
    """

    order: Sequence[int]
    rescale: Sequence[tuple[float, float]] | None = None
    shared: bool = True
    stack: str = "1"


def write_enhanced(path: Path, volume: CTVolume, frames: Frames | None = None, **changes: Any) -> Path:
    """One enhanced CT of a volume, its stored values as they are; some top-level elements changed, None deletes."""
    frames = frames or Frames(range(volume.geometry.shape[0]))
    dataset = _image(volume)
    common = _common_groups(volume)
    shared, items = Dataset(), [_own_groups(volume, frames, n) for n in range(len(frames.order))]
    for groups in [shared] if frames.shared else items:
        groups.update(common)
    if frames.rescale is None:
        shared.PixelValueTransformationSequence = [_rescale(1, 0)]
    dataset.NumberOfFrames = len(items)
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = items
    dataset.PixelData = volume.hu[list(frames.order)].astype("<i2").tobytes()
    for keyword, value in changes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def _dataset(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def _rescale(slope: float, intercept: float) -> Dataset:
    return _dataset(RescaleIntercept=str(intercept), RescaleSlope=str(slope), RescaleType="HU")


def _numbers(values: Sequence[float]) -> list[str]:
    return [format_number_as_ds(float(value)) for value in values]


def _own_groups(volume: CTVolume, frames: Frames, number: int) -> Dataset:
    z = frames.order[number]
    groups = _dataset(
        FrameContentSequence=[
            _dataset(
                FrameAcquisitionNumber=1,
                StackID=frames.stack,
                InStackPositionNumber=z + 1,
                DimensionIndexValues=[1, z + 1],
            )
        ],
        PlanePositionSequence=[
            _dataset(ImagePositionPatient=_numbers(volume.geometry.points_from_indices([0, 0, z]).round(6).tolist()))
        ],
    )
    if frames.rescale is not None:
        groups.PixelValueTransformationSequence = [_rescale(*frames.rescale[number])]
    return groups


def _common_groups(volume: CTVolume) -> Dataset:
    column_spacing, row_spacing, slice_spacing = volume.geometry.spacing
    cosines = np.array(volume.geometry.direction)[:, :2].T.ravel().tolist()
    measures = _dataset(
        SliceThickness=_numbers([slice_spacing])[0], PixelSpacing=_numbers([row_spacing, column_spacing])
    )
    kind = _dataset(
        FrameType=["DERIVED", "PRIMARY", "VOLUME", "NONE"],
        PixelPresentation="MONOCHROME",
        VolumetricProperties="VOLUME",
        VolumeBasedCalculationTechnique="NONE",
    )
    return _dataset(
        PixelMeasuresSequence=[measures],
        PlaneOrientationSequence=[_dataset(ImageOrientationPatient=_numbers(cosines))],
        CTImageFrameTypeSequence=[kind],
        IrradiationEventIdentificationSequence=[_dataset(IrradiationEventUID=generate_uid())],
        FrameAnatomySequence=[_dataset(FrameLaterality="U", AnatomicRegionSequence=[_dataset(**BRAIN)])],
    )


def _image(volume: CTVolume) -> Dataset:
    """What the file says once (PS3.3 A.38.1)."""
    organization = generate_uid()
    dimensions = [
        _dataset(
            DimensionOrganizationUID=organization, DimensionIndexPointer=pointer, FunctionalGroupPointer=0x00209111
        )
        for pointer in (0x00209056, 0x00209057)  # StackID, InStackPositionNumber of FrameContentSequence
    ]
    dataset = _dataset(
        SpecificCharacterSet="ISO_IR 192",
        ImageType=["DERIVED", "PRIMARY", "VOLUME", "NONE"],
        SOPClassUID=EnhancedCTImageStorage,
        SOPInstanceUID=generate_uid(),
        StudyDate="20000101",
        StudyTime="120000",
        ContentDate="20000101",
        ContentTime="120000",
        AccessionNumber="",
        Modality="CT",
        Manufacturer="AnatomyNet",
        ManufacturerModelName="AnatomyNet",
        DeviceSerialNumber="1",
        SoftwareVersions="1",
        ReferringPhysicianName="",
        **PATIENT,
        PatientSex="",
        PatientPosition="HFS",
        StudyInstanceUID=generate_uid(),
        SeriesInstanceUID=generate_uid(),
        StudyID="1",
        SeriesNumber=1,
        InstanceNumber=1,
        FrameOfReferenceUID=generate_uid(),
        PositionReferenceIndicator="",
        DimensionOrganizationSequence=[_dataset(DimensionOrganizationUID=organization)],
        DimensionIndexSequence=dimensions,
        AcquisitionContextSequence=[],
        PixelPresentation="MONOCHROME",
        VolumetricProperties="VOLUME",
        VolumeBasedCalculationTechnique="NONE",
        ContentQualification="RESEARCH",
        BurnedInAnnotation="NO",
        LossyImageCompression="00",
        PresentationLUTShape="IDENTITY",
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        Rows=volume.geometry.shape[1],
        Columns=volume.geometry.shape[2],
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        PixelRepresentation=1,
    )
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset
