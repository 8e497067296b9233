"""Reloads models of a Triton Inference Server on this machine whose process has died.

    python -m dcompile.runtime.triton_watch --url http://localhost:8000

Triton 24.06 and later do not start a dead process of the Python backend again: the model says that it is ready, and
answers every request with an error. This program looks for such processes and has the server load the model anew,
which takes over once it is ready. It needs Linux, the rights to write to the model repository, and a server in explicit
or poll mode.
"""

import argparse
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

_STUB = "triton_python_backend_stub"
_PROCESSES = Path("/proc")


class Stub(NamedTuple):
    """A process of a model: one instance. model_py: what it runs, REPOSITORY/NAME/VERSION/model.py."""

    pid: int
    model_py: Path

    @property
    def model(self) -> str:
        return self.model_py.parents[1].name


def living_stubs() -> set[Stub]:
    """Those of all servers on this machine that this user may look at."""
    found = set()
    for folder in _PROCESSES.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(words[0])).name == _STUB:
                found.add(Stub(int(folder.name), (folder / "cwd").resolve() / os.fsdecode(words[1])))
        except OSError:  # it has ended since, or is someone else's
            continue
    return found


def died(stub: Stub) -> bool:
    """Whether it ended without its server's having ended it: the server keeps the dead process then, as a zombie."""
    try:
        status = (_PROCESSES / str(stub.pid) / "status").read_text()
    except OSError:
        return False
    return "State:\tZ" in status


def reload(stub: Stub, url: str) -> None:
    """Loads the model anew. A server takes a model whose files have not changed for the one that it has."""
    os.utime(stub.model_py)
    request = Request(f"{url}/v2/repository/models/{stub.model}/load", data=b"{}", method="POST")
    try:
        with urlopen(request):
            return
    except HTTPError as error:
        text = error.read().decode(errors="replace")
        if "polling is enabled" not in text:  # then it sees the changed file by itself
            raise OSError(f"the server does not load the model: {text}") from error


class Watch:
    """Looks once at a time: `look` does what there is to do, and gives a line about each thing that it did.

    Where a request has met a dead process, the server never ends the other instances that the new ones replace: they
    are killed when grace_s have passed, in which they finish what they were asked.
    """

    def __init__(self, url: str, grace_s: float) -> None:
        self.url, self.grace_s = url, grace_s
        self._known: set[Stub] = set()
        self._suspects: set[Stub] = set()  # dead a moment ago: that also a process is which its server has just ended
        self._replaced: dict[Stub, float] = {}  # and when

    def look(self) -> list[str]:
        self._known |= living_stubs() - self._replaced.keys()
        dead = {stub for stub in self._known if died(stub)}
        lines = [line for stub in sorted(dead & self._suspects) if stub in self._known for line in self._mend(stub)]
        self._suspects = dead & self._known
        self._known = {stub for stub in self._known if _is_there(stub)}
        return lines + self._end_replaced()

    def _mend(self, stub: Stub) -> list[str]:
        try:
            reload(stub, self.url)
        except OSError as error:
            return [f"{stub.model}: process {stub.pid} is dead: {error}"]
        old = {each for each in self._known if each.model_py == stub.model_py}
        self._known -= old
        self._replaced |= dict.fromkeys(old, time.monotonic())
        return [f"{stub.model}: process {stub.pid} is dead: loaded anew"]

    def _end_replaced(self) -> list[str]:
        lines = []
        for stub, since in list(self._replaced.items()):
            if not _is_there(stub) or died(stub):
                del self._replaced[stub]
            elif time.monotonic() - since > self.grace_s:
                os.kill(stub.pid, signal.SIGKILL)
                lines.append(f"{stub.model}: process {stub.pid} was replaced {self.grace_s:.0f} s ago: killed")
        return lines


def _is_there(stub: Stub) -> bool:
    return (_PROCESSES / str(stub.pid)).exists()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dcompile.runtime.triton_watch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--url", default="http://localhost:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks (default: %(default)s)")
    parser.add_argument(
        "--grace", type=float, default=600.0, help="seconds for replaced processes to end (default: %(default)s)"
    )
    given = parser.parse_args()
    watch = Watch(given.url.rstrip("/"), given.grace)
    while True:
        for line in watch.look():
            print(line, flush=True)
        time.sleep(given.every)


if __name__ == "__main__":
    main()
