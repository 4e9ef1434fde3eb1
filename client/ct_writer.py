"""CTVolume -> a DICOM CT series: the way back, for phantoms, tests and research archives."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from anatomynet.client.study import CTSeries, read_ct_series
from anatomynet.engine.errors import OutputError
from anatomynet.engine.stops import temporary_folder
from anatomynet.engine.volume import CTVolume


def write_ct_series(
    study_dir: Path, volume: CTVolume, *, seed: int = 0, patient_position: str = "HFS", phantom: bool = False
) -> CTSeries:
    """Write a volume as an uncompressed CT series, one file a slice, for phantoms, tests and research archives.

    HU are stored as they are (slope 1, intercept 0), so that every int16 comes back exactly. UIDs depend on the volume
    and the seed alone: the same call writes the same bytes.

    Args:
        study_dir: the folder; made where it is not there.
        volume: HU int16 (z, y, x) in any axis-aligned orientation; the rows and columns become the slices' own.
        seed: tells studies of one volume apart.
        phantom: the header shall say that it is no patient (PS3.3 C.7.1.1, Quality Control Subject).
        patient_position: HFS, HFP, FFS or FFP, as the header shall say; the geometry alone places the voxels.

    Returns:
        The series as read back. Where the volume's z axis points against the normal of its slices, the last slice
        comes first there.

    Raises:
        GeometryError: an oblique volume.
        OutputError: a folder that cannot be written.
    """
    volume.geometry.canonical_axes()
    digest = hashlib.sha256(volume.hu.tobytes() + repr((volume.geometry, patient_position, seed)).encode()).hexdigest()
    template = _ct_template(volume, digest, patient_position)
    if phantom:
        template.QualityControlSubject = "YES"
    try:
        study_dir.mkdir(parents=True, exist_ok=True)
        with temporary_folder(prefix=".", suffix=".part", dir=study_dir) as beside:
            for k in range(volume.geometry.shape[0]):
                _fill_slice(template, volume, k, digest)
                template.save_as(Path(beside, f"CT{k + 1:04d}.dcm"), enforce_file_format=True)
            for path in sorted(Path(beside).iterdir()):
                path.replace(study_dir / path.name)
    except OSError as error:
        raise OutputError(f"{study_dir} cannot be written: {error.strerror}") from error
    return read_ct_series(study_dir, series_instance_uid=str(template.SeriesInstanceUID))


def _ct_template(volume: CTVolume, digest: str, patient_position: str) -> Dataset:
    """What all slices have in common (PS3.3 A.3, the CT Image IOD)."""
    direction = np.array(volume.geometry.direction)
    column_spacing, row_spacing, slice_spacing = volume.geometry.spacing
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": CTImageStorage,
        "StudyDate": "20000101",
        "StudyTime": "120000",
        "ContentDate": "20000101",
        "ContentTime": "120000",
        "AccessionNumber": "",
        "Modality": "CT",
        "Manufacturer": "AnatomyNet",
        "ReferringPhysicianName": "",
        "PatientName": f"AnatomyNet^{digest[:8]}",
        "PatientID": f"ANATOMYNET-{digest[:8]}",
        "PatientBirthDate": "",
        "PatientSex": "",
        "SliceThickness": format_number_as_ds(slice_spacing),
        "BodyPartExamined": "HEADNECK",
        "KVP": "",
        "PatientPosition": patient_position,
        "StudyInstanceUID": _uid_from(digest, "study"),
        "SeriesInstanceUID": _uid_from(digest, "series"),
        "StudyID": "1",
        "SeriesNumber": 1,
        "AcquisitionNumber": 1,
        "ImageOrientationPatient": [format_number_as_ds(float(c)) for c in direction[:, :2].T.ravel()],
        "FrameOfReferenceUID": _uid_from(digest, "frame of reference"),
        "PositionReferenceIndicator": "",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": volume.geometry.shape[1],
        "Columns": volume.geometry.shape[2],
        "PixelSpacing": [format_number_as_ds(row_spacing), format_number_as_ds(column_spacing)],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
        "RescaleType": "HU",
    }
    template = Dataset()
    for keyword, value in values.items():
        setattr(template, keyword, value)
    template.file_meta = FileMetaDataset()
    template.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return template


def _fill_slice(template: Dataset, volume: CTVolume, k: int, digest: str) -> None:
    position = volume.geometry.points_from_indices([0, 0, k])
    template.SOPInstanceUID = _uid_from(digest, f"slice {k}")
    template.file_meta.MediaStorageSOPInstanceUID = template.SOPInstanceUID
    template.InstanceNumber = k + 1
    template.ImagePositionPatient = [format_number_as_ds(round(float(v), 6)) for v in position]
    template.PixelData = volume.hu[k].astype("<i2", copy=False).tobytes()


def _uid_from(digest: str, what: str) -> UID:
    return generate_uid(entropy_srcs=[digest, what])
