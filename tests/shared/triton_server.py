"""The real Triton Inference Server on this machine, without a GPU and without containers.

    python tests/shared/triton_server.py                  install it into build/triton
    python tests/shared/triton_server.py REPOSITORY ...   and run it, with further options of tritonserver

Server and Python backend come from the wheel nvidia-pytriton, unpacked apart from this project's environment: that
backend takes arrays of numpy 1 alone. Models run in an interpreter that has such a numpy, and ONNX Runtime.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from bare_environment import ROOT, CannotInstall, bare_python, is_current, mark_current, pip

FOLDER = ROOT / "build" / "triton"
WHEEL, NUMPY = "nvidia-pytriton==0.7.0", "1.26.4"  # tritonserver 2.51


@dataclass(frozen=True)
class Installed:
    """command: the server and the options that it always needs. environment: to run it in."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Running:
    """Addresses as clients want them, host:port."""

    http: str
    grpc: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path

    def stubs(self) -> list[int]:
        """Process numbers of the instances of all models."""
        return [pid for pid in _children(self.process.pid) if "triton_python_backend_stub" in _command(pid)]

    def read_metrics(self) -> dict[str, float]:
        """Every figure of the metrics page, by name and labels as they stand there."""
        with urlopen(f"http://{self.metrics}/metrics") as page:
            lines = page.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def install(folder: Path = FOLDER) -> Installed:
    """Raises CannotInstall where wheel or packages are not to be had, or there is no stub for this Python."""
    wanted, wheel, backends = [WHEEL, sys.version], folder / "server", folder / "backends"
    if not is_current(folder, wanted):
        shutil.rmtree(folder, ignore_errors=True)
        pip("install", "-q", "--no-deps", "--target", str(wheel), WHEEL)
        server = wheel / "pytriton" / "tritonserver"
        stub = server / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"
        if not stub.exists():
            raise CannotInstall(
                f"{WHEEL} has no Python backend for Python {sys.version_info.major}.{sys.version_info.minor}"
            )
        shutil.copytree(server / "backends", backends)
        shutil.copy2(stub, backends / "python")
        mark_current(folder, wanted)
    libraries = f"{wheel / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    # The stub takes the first python3 on PATH for its own, with the packages of that environment.
    python = bare_python(folder / "python", numpy=NUMPY)
    path = f"{python.parent}:{os.environ['PATH']}"
    command = (str(wheel / "pytriton/tritonserver/bin/tritonserver"), "--backend-directory", str(backends))
    return Installed(command, os.environ | {"LD_LIBRARY_PATH": libraries, "PATH": path})


@contextmanager
def serve(
    installed: Installed, repository: Path, log: Path, options: Sequence[str] = (), ready_s: float = 60.0
) -> Iterator[Running]:
    """A server over `repository` on free ports of this machine, ready; it ends with the block."""
    ports = _free_ports(3)
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in ports)
    given = [f"--{each}-port={port}" for each, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    given += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"]
    given += ["--allow-gpu-metrics=false", "--exit-timeout-secs=5", f"--model-repository={repository}"]
    shared_memory = f"dcompile_test_{os.getpid()}_{ports[0]}"
    given.append(f"--backend-config=python,shm-region-prefix-name={shared_memory}")
    with log.open("wb") as written:
        process = subprocess.Popen(
            [*installed.command, *given, *options], env=installed.environment, stdout=written, stderr=subprocess.STDOUT
        )
    running = Running(http, grpc, metrics, process, log)
    try:
        _wait_until_ready(running, ready_s)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for left in Path("/dev/shm").glob(f"{shared_memory}*"):  # by processes that were killed
            left.unlink()


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _wait_until_ready(running: Running, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and running.process.poll() is None:
        try:
            with urlopen(f"http://{running.http}/v2/health/ready", timeout=2):
                return
        except (URLError, OSError):  # not listening yet, or listening and not ready
            time.sleep(0.1)
    tail = "\n".join(running.log.read_text(errors="replace").splitlines()[-40:])
    raise RuntimeError(f"tritonserver was not ready after {seconds:.0f} s, or ended:\n{tail}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _children(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children")
    if text.exists():
        threads = Path(f"/proc/{parent}/task").iterdir()
        return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]
    raise RuntimeError("this kernel does not list the children of a process")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has ended since
        return ""


def main() -> None:
    installed = install()
    if len(sys.argv) == 1:
        print(" ".join(installed.command))
        return
    repository, *options = sys.argv[1:]
    command = [*installed.command, "--allow-gpu-metrics=false", "--model-repository", repository, *options]
    os.execve(command[0], command, dict(installed.environment))


if __name__ == "__main__":
    main()
