"""AOTInductor packages (.pt2), through PyTorch: the one engine that needs it at run time.

What the exporter writes into a package's metadata, plain words and lines, so that a C++ program reads it as easily:

    dcompile.inputs, dcompile.outputs   a line each, in order: port dtype dim dim ...; "2*batch" is twice the batch
    dcompile.constants                  a line each: constant dtype first-byte packing dim dim ...
    dcompile.weights                    the file that holds them, beside the package
    dcompile.device                     cpu or cuda
    dcompile.cpu                        features that the code needs, as /proc/cpuinfo spells them
    dcompile.torch                      version it was compiled with

Packing turns a weight into the layout that oneDNN's kernels read on this very CPU:

    -         none
    linear    mkldnn::_reorder_linear_weight(weight)
    qlinear   onednn::qlinear_prepack(weight)
    qconv:STRIDE:PADDING:DILATION:GROUPS, with pairs as 1,1    onednn::qconv_prepack(weight, ...)

`tests/runtime/run_package.cpp` is a C++ program that does all this.
"""

import json
import mmap
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary, finalize

import numpy as np

from .engines import Array, Port
from .errors import EngineError, did_you_mean

_CPUINFO = Path("/proc/cpuinfo")


class Constant(NamedTuple):
    """A tensor in the weights file; see the top of this file."""

    dtype: str
    offset: int
    packing: str
    shape: tuple[int, ...]


class AotiEngine:
    """A loaded package. Weights are mapped once a process, whichever engines read them; outputs are the caller's.

    Args:
        threads: of one operator; None leaves PyTorch's setting. It holds while the engine runs, for the whole process.
        options: none are known.
    """

    def __init__(self, path: Path, *, threads: int | None = None, options: Mapping[str, str] | None = None) -> None:
        try:
            import torch
        except ImportError as error:
            raise EngineError("target 'aoti' needs PyTorch at run time: pip install torch") from error
        if options:
            raise EngineError(f"{path}: option {next(iter(options))!r}: target 'aoti' has no options; leave it out")
        self.path = path
        self._torch, self._threads = torch, threads
        about = read_metadata(path)
        self.device = _check_machine(path, about, torch)
        self._inputs = _read_ports(about["dcompile.inputs"])
        self._outputs = _read_ports(about["dcompile.outputs"])
        self.inputs = {name: _port(dtype, dims) for name, (dtype, dims) in self._inputs.items()}
        self.outputs = {name: _port(dtype, dims) for name, (dtype, dims) in self._outputs.items()}
        self.copied_bytes = 0  # of inputs that could not be passed as they are, since the engine was loaded
        try:
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except Exception as error:
            made = f"made with PyTorch {about.get('dcompile.torch')}"
            raise EngineError(
                f"{path}: PyTorch {torch.__version__} does not load it ({made}): {_first_line(error)}"
            ) from error
        self._weights = self._load_constants(about)

    def run(self, inputs: dict[str, Array], /) -> dict[str, Array]:
        values = self._tensors(inputs)
        threads = self._torch.get_num_threads()
        wanted = self._threads or threads
        try:
            if wanted != threads:
                self._torch.set_num_threads(wanted)
            results = self._loader.boxed_run(values)
        except Exception as error:
            raise EngineError(f"{self.path}: PyTorch failed: {_first_line(error)}") from error
        finally:
            if wanted != threads:
                self._torch.set_num_threads(threads)
        return {name: value.cpu().numpy() for name, value in zip(self.outputs, results, strict=True)}

    def _tensors(self, inputs: Mapping[str, Array]) -> list[Any]:
        """The inputs in order, as tensors over the same memory. The code inside reads memory by shape, unchecked."""
        if inputs.keys() != self._inputs.keys():
            name = next(iter(inputs.keys() ^ self._inputs.keys()))
            role = "given, and no input" if name in inputs else "an input, and not given"
            raise EngineError(f"{self.path}: {name!r} is {role}; {did_you_mean(name, self._inputs)}")
        batch: int | None = None
        values = []
        for name, (dtype, dims) in self._inputs.items():
            array = inputs[name]
            batch = _batch_of(array.shape, dims) if batch is None else batch
            if array.dtype != dtype or array.shape != _at(dims, batch):
                needed = f"needed {dtype} {list(_at(dims, batch))}" + ("" if batch is None else f" at batch {batch}")
                raise EngineError(f"{self.path}: input {name!r} is {array.dtype} {list(array.shape)}, {needed}")
            if not (array.flags.c_contiguous and array.flags.writeable):
                array = array.copy()  # PyTorch knows no tensors that must not be written to
                self.copied_bytes += array.nbytes
            value = self._torch.from_numpy(array)
            if self.device != "cpu":
                value = value.to(self.device)
                self.copied_bytes += array.nbytes
            values.append(value)
        return values

    def _load_constants(self, about: Mapping[str, str]) -> "_Weights":
        known = {
            name: Constant(dtype, int(offset), packing, tuple(map(int, shape)))
            for name, dtype, offset, packing, *shape in map(str.split, about["dcompile.constants"].splitlines())
        }
        weights = _open_weights(self.path.parent / about["dcompile.weights"])
        try:
            constants = {
                name: weights.tensor(known[name], self.device, self._torch) for name in self._loader.get_constant_fqns()
            }
            # user_managed: the package keeps these very tensors; otherwise each would hold a copy of its own.
            self._loader.load_constants(constants, False, True, True, False)
        except Exception as error:
            why = f"constant {error} is unknown" if isinstance(error, KeyError) else _first_line(error)
            raise EngineError(f"{self.path}: its weights in {weights.path.name} do not load: {why}") from error
        weights.free_packed_pages()
        return weights


def read_metadata(path: Path) -> dict[str, str]:
    """Of a package that is not loaded. Raises EngineError where it is none of ours."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(each for each in archive.namelist() if each.endswith("wrapper_metadata.json"))
            about: dict[str, str] = json.loads(archive.read(name))
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError) as error:
        raise EngineError(f"{path}: no AOTInductor package, or a damaged one; copy the bundle again") from error
    if "dcompile.constants" not in about:
        raise EngineError(f"{path}: an AOTInductor package that dcompile has not written; compile again")
    return about


# --- ports ---

Dims = tuple[int | tuple[Literal["batch"], int], ...]  # ("batch", k) is k times the batch


def _read_ports(lines: str) -> dict[str, tuple[str, Dims]]:
    return {name: (dtype, tuple(map(_dim, dims))) for name, dtype, *dims in map(str.split, lines.splitlines())}


def _dim(word: str) -> int | tuple[Literal["batch"], int]:
    factor, times, _ = word.partition("*")
    return ("batch", int(factor)) if times else int(factor)


def _port(dtype: str, dims: Dims) -> Port:
    return Port(dtype, tuple(each if isinstance(each, int) else None for each in dims))


def _batch_of(shape: tuple[int, ...], dims: Dims) -> int | None:
    """The batch of an array of this shape, or None if its port has none."""
    for size, dim in zip(shape, dims, strict=False):
        if not isinstance(dim, int):
            return max(size // dim[1], 1)
    return None


def _at(dims: Dims, batch: int | None) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else dim[1] * (batch or 1) for dim in dims)


# --- the machine ---


def _check_machine(path: Path, about: Mapping[str, str], torch: Any) -> str:
    """The device that the package runs on. Raises EngineError where this machine would crash instead."""
    device = about["dcompile.device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            f"{path}: compiled for CUDA, and PyTorch {torch.__version__} sees no GPU; compile for the CPU"
        )
    made_for = about.get("AOTI_MACHINE", platform.machine())
    if made_for != platform.machine():
        raise EngineError(f"{path}: compiled for {made_for}, this is {platform.machine()}; compile again here")
    missing = set(about["dcompile.cpu"].split()) - cpu_features()
    if missing:
        raise EngineError(
            f"{path}: compiled for a CPU with {', '.join(sorted(missing))}, which this one lacks; compile again here"
        )
    return device


def cpu_features() -> frozenset[str]:
    """Of this machine's CPU, as /proc/cpuinfo spells them; empty where there is no such file."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.exists() else []
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


# --- weights, one copy a process ---


class _Weights:
    """The mapped file, and the tensors made of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            # Pages are shared with every process that maps the file, as nobody writes; PyTorch wants them writable.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._tensors: dict[tuple[Constant, str], Any] = {}
        self._to_free: list[tuple[int, int]] = []  # first byte and end of weights that have been packed
        self._lock = Lock()
        finalize(self, _release, self._tensors).atexit = False

    def tensor(self, constant: Constant, device: str, torch: Any) -> Any:
        with self._lock:
            if (constant, device) not in self._tensors:
                self._tensors[constant, device] = self._make(constant, torch).to(device)
            return self._tensors[constant, device]

    def free_packed_pages(self) -> None:
        """Give back the pages of weights that were packed: only their packed copy is read from now on."""
        with self._lock:
            for begin, end in self._to_free:
                first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if last > first:
                    self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
            self._to_free.clear()

    def _make(self, constant: Constant, torch: Any) -> Any:
        dtype = getattr(torch, constant.dtype)
        count = int(np.prod(constant.shape))
        if count == 0:
            return torch.empty(constant.shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=constant.offset)
        value = flat.reshape(constant.shape).detach()  # a view would keep `flat` for as long as PyTorch keeps the view
        if constant.packing == "-":
            return value
        self._to_free.append((constant.offset, constant.offset + value.nbytes))
        return pack(value, constant.packing, torch)


def pack(weight: Any, packing: str, torch: Any) -> Any:
    """The weight in a layout of oneDNN's own; see the top of this file."""
    kind, *geometry = packing.split(":")
    if kind == "linear":
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    if kind == "qlinear":
        return torch.ops.onednn.qlinear_prepack(weight, None)
    if kind != "qconv":
        raise EngineError(f"weights are packed as {packing!r}, which this runtime does not know; upgrade dcompile")
    stride, padding, dilation = ([int(each) for each in pair.split(",")] for pair in geometry[:3])
    scales = torch.ones(weight.shape[0])  # those of the file are given with each call
    return torch.ops.onednn.qconv_prepack(weight, scales, 1.0, 0, stride, padding, dilation, int(geometry[3]), None)


_open: WeakValueDictionary[tuple[Any, ...], _Weights] = WeakValueDictionary()
_open_lock = Lock()


def _open_weights(path: Path) -> _Weights:
    """The file's one mapping in this process, for as long as an engine reads it."""
    try:
        status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        with _open_lock:
            weights = _open.get(key)
            if weights is None:
                weights = _open[key] = _Weights(path)
            return weights
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise EngineError(f"{path}: cannot be read ({_first_line(error)}); copy the bundle again") from error


def _release(tensors: dict[tuple[Constant, str], Any]) -> None:
    """Free the memory behind the tensors, which PyTorch 2.13 keeps in closed packages that manage none themselves."""
    for value in tensors.values():
        value.data = value.new_empty(0) if not value.is_mkldnn else value.to_dense()[:0].to_mkldnn()
    tensors.clear()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
