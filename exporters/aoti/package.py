"""An exported graph as an AOTInductor package (.pt2): compiled for this kind of CPU, without the weights."""

from __future__ import annotations

import collections
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...runtime.errors import EngineError

# What x86-64-v3 and -v4 stand for, as /proc/cpuinfo spells it.
_V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_CPUINFO_NAMES = {
    "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16", "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16", "amx-int8": "amx_int8", "amx-fp16": "amx_fp16",
}  # fmt: skip
_CALL = re.compile(r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_(?:cpu|cuda)_(\w+?)\(")
_FUSED = re.compile(r"^\s+(?:kernels\.)?(?:cpp|triton)_\w+\(", re.MULTILINE)
# Generated calls under names that say what they compute in.
_KERNELS = {
    "_linear_pointwise": "oneDNN linear bf16",
    "_qlinear_pointwise_tensor": "oneDNN linear int8",
    "_qconv_pointwise_tensor": "oneDNN convolution int8",
    "_scaled_dot_product_flash_attention_for_cpu": "flash attention",
    "addmm_out": "addmm",
    "mm_out": "mm",
    "bmm_out": "bmm",
}
INTEGER_KERNELS = (_KERNELS["_qlinear_pointwise_tensor"], _KERNELS["_qconv_pointwise_tensor"])


def check_compiler() -> None:
    """Raises EngineError unless the C++ compiler that inductor would call is there."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise EngineError(
            "target 'aoti' compiles C++ and found no compiler; install g++ (Debian, Ubuntu: apt-get install g++), or "
            "choose another target"
        ) from error


def needed_cpu() -> tuple[str | None, tuple[str, ...]]:
    """(the architecture to compile for, None for the compiler's own choice; the features that the code will need).

    Not "native", the default: what that means the compiler alone knows, and nobody could check it where it is loaded.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None, ()
    flags = re.findall(r"-m([\w-]+)", pick_vec_isa().build_arch_flags())
    features = {_CPUINFO_NAMES.get(flag, flag) for flag in flags}
    is_wide = "avx512f" in features
    return "x86-64-v4" if is_wide else "x86-64-v3", tuple(sorted(features.union(_V4 if is_wide else _V3)))


@dataclass(frozen=True)
class Compiled:
    """files: what a package is made of. constants: the tensors that the code reads, by the names it has for them.

    kernels: what runs, kernel -> how often the code calls it.
    """

    files: tuple[Path, ...]
    constants: Mapping[str, Tensor]
    kernels: Mapping[str, int]


def compile_program(name: str, program: ExportedProgram, folder: Path, march: str | None) -> Compiled:
    """Code for the program, under `folder`, any thread count. Raises EngineError when it does not compile."""
    from torch._inductor import aot_compile

    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(folder / name),  # not inductor's cache, where it would stay
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # it hands them over; nothing pickles them
        "aot_inductor.enable_line_tables": False,  # paths of the build machine
        "always_keep_tensor_constants": True,  # oneDNN's kernels read scales as tensors
        "cpp.dynamic_threads": True,  # else the code is for as many threads as the build had
        "cpp.march": march,
    }
    args, kwargs = program.example_inputs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor warns about its own internals
            made = aot_compile(program.module(check_guards=False), args, kwargs, options=options)
    except (MemoryError, RuntimeError, OSError) as error:
        raise EngineError(_why_not(name, error)) from error
    assert isinstance(made, list)
    files = [Path(each) for each in made if isinstance(each, str)]
    constants = next(each for each in made if not isinstance(each, str))
    code = "\n".join(file.read_text(encoding="utf-8") for file in files if file.name.endswith("wrapper.cpp"))
    values = {key: value.detach() for key, (value, _) in constants.items()}
    return Compiled(tuple(file for file in files if file.suffix != ".cpp"), values, count_kernels(code))


def write_package(compiled: Compiled, metadata: Mapping[str, str], path: Path) -> None:
    """The .pt2 with this metadata beside PyTorch's own."""
    from torch._inductor.package.package import package_aoti

    about = next(file for file in compiled.files if file.name.endswith("wrapper_metadata.json"))
    about.write_text(json.dumps({**json.loads(about.read_text(encoding="utf-8")), **metadata}), encoding="utf-8")
    package_aoti(str(path), [str(file) for file in compiled.files])


def count_kernels(code: str) -> Mapping[str, int]:
    """Calls in the code that inductor has generated."""
    found = collections.Counter(_KERNELS.get(name, name) for name in _CALL.findall(code))
    found["fused by inductor"] = len(_FUSED.findall(code))
    return dict(found)


def _why_not(name: str, error: Exception) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "Killed" in text:
        return f"engine {name!r}: compiling it ran out of memory and nothing was written; free some, and build again"
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or [repr(error)]
    return f"engine {name!r}: AOTInductor does not compile it ({lines[0].strip()}); choose another target, or report it"
