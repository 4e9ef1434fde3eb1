"""AnatomyNet: whole-volume segmentation of head-and-neck CT (Zhu et al., Medical Physics 2018)."""

import os

__version__ = "0.1.0"

# ONNX Runtime (1.29 and later) reports to its maker unless this is set when it is first imported; children inherit it,
# and with them Triton's backend of that name.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
