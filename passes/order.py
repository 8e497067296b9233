"""Which passes must come before which."""

from __future__ import annotations

from ..compiler.errors import PassError
from ..compiler.program import Program

_MEASURE_WEIGHTS = ("elastic_blocks", "choose_steps", "cache_steps", "quantize", "fold_timestep")


def refuse_late(program: Program, name: str, advice: str) -> None:
    """Raises PassError where a pass that changes weights or steps comes after one that measured or planned them."""
    late = [record.name for record in program.history if record.name in _MEASURE_WEIGHTS]
    if late or program.plan.sites:
        raise PassError(f"{name}: {late[0] if late else 'a plan of what steps compute'} came before; {advice}")
