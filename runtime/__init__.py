"""Load a bundle and generate samples:

    with load("build") as session:
        images = session.images(session.generate(labels=["A", "B"], seed=7))

Needs numpy and the engine's own package, which is imported by `load`; never torch.
"""

from .errors import BundleError, DcompileError, EngineError, RequestError
from .manifest import Manifest
from .session import Session, Timing, load

__all__ = ["BundleError", "DcompileError", "EngineError", "Manifest", "RequestError", "Session", "Timing", "load"]
