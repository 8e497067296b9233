"""The version of dcompile: at the bottom, because every layer writes or checks it."""

__version__ = "0.1.0"
