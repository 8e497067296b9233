"""Tests of the runtime run a tiny bundle."""

from tiny_bundle import tiny

__all__ = ["tiny"]
