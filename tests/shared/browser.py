"""Headless Chromium driven from Python, and the server of the page that it visits."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DRIVER = Path(__file__).parents[1] / "web" / "browser.mjs"


class Browser:
    """One page. `call("click", "#save")` is `page.click("#save")`; values travel as JSON."""

    def __init__(self, chromium: str) -> None:
        self._process = subprocess.Popen(
            ["node", str(DRIVER), chromium],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, method: str, *arguments: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the browser has gone; its last words are above"
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(f"page.{method}: {answer['error']}")
        return answer["value"]

    def run(self, script: str, argument: object = None) -> Any:
        """What the JavaScript function body `script`, which may await and reads `given`, returns."""
        return self.call("evaluate", f"(async (given) => {{ {script} }})({json.dumps(argument)})")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until the JavaScript expression `condition` is true."""
        loop = f"while (!({condition}) && performance.now() < end) await new Promise((next) => setTimeout(next, 10));"
        script = f"const end = performance.now() + given; {loop} return Boolean({condition})"
        assert self.run(script, 1000 * seconds), f"not true within {seconds} s: {condition}"

    def complaints(self) -> list[str]:
        """What the page has thrown, or written to the console as an error, since this was last asked."""
        found: list[str] = self.call("complaints")
        return found

    def close(self) -> None:
        self._process.communicate(timeout=20)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Server:
    """Serves the page, and what lies in `folder` under /bundle/."""

    url: str
    folder: Path

    def put(self, bundle: Path) -> str:
        """Makes a copy of the bundle available; gives its address, relative to the page."""
        name = f"{len(list(self.folder.iterdir()))}"
        shutil.copytree(bundle, self.folder / name)
        return f"bundle/{name}"

    def path(self, address: str) -> Path:
        """The copy that is served there."""
        return self.folder / address.removeprefix("bundle/")
