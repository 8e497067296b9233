"""The page and a bundle at http://127.0.0.1:8000, with the two headers that let ONNX Runtime use several threads.

python examples/web/serve.py [BUNDLE]
"""

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Handler(SimpleHTTPRequestHandler):
    """Files of this folder, but /bundle/ is `bundle`."""

    def __init__(self, *args: object, bundle: Path, **settings: object) -> None:
        self.bundle = bundle
        super().__init__(*args, directory=str(HERE), **settings)  # type: ignore[arg-type]  # passed on as they are

    def translate_path(self, path: str) -> str:
        inside = Path(super().translate_path(path)).relative_to(HERE)  # ".." is gone by now
        if inside.parts[:1] == ("bundle",):
            return str(self.bundle.joinpath(*inside.parts[1:]))
        return super().translate_path(path)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # these two: SharedArrayBuffer, and so threads
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # a bundle that was compiled again is fetched again
        super().end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing: the page itself says what is missing."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves the page and a bundle on this machine.")
    parser.add_argument("bundle", type=Path, nargs="?", default=HERE / "bundle", help="default: bundle/ beside it")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    given = parser.parse_args()
    if not (HERE / "node_modules" / "onnxruntime-web").is_dir():
        parser.exit(2, f"error: onnxruntime-web is not installed; run: npm ci --prefix {HERE}\n")
    server = ThreadingHTTPServer(("127.0.0.1", given.port), partial(Handler, bundle=given.bundle.resolve()))
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
