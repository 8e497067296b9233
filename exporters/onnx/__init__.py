"""Engines of the target "onnx", for ONNX Runtime; other targets write their ONNX with graph.py."""
