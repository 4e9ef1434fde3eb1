"""Checkpoint -> ONNX, TensorRT and a Triton model repository."""
