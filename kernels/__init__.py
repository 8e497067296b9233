"""Triton kernels beside their PyTorch references."""
