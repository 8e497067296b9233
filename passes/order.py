"""Which passes must come before which."""

from __future__ import annotations

from ..compiler.errors import PassError
from ..compiler.program import Program

_MEASURE_WEIGHTS = ("elastic_blocks", "choose_steps", "cache_steps", "quantize", "fold_timestep")


def refuse_late(program: Program, name: str, advice: str) -> None:
    """Raises PassError where a pass that changes weights comes after one that measured them."""
    late = [record.name for record in program.history if record.name in _MEASURE_WEIGHTS]
    if late:
        raise PassError(f"{name}: {late[0]} came before; {advice}")
