"""The thin client: DICOM in, RTSTRUCT out."""
