"""Engines of the target "trt", for TensorRT and TensorRT for RTX."""
