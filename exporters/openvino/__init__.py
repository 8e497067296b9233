"""Engines of the target "openvino"."""
