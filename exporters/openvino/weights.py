"""Constants of several OpenVINO models in one file: an .xml names its constants by their place in a .bin."""

from __future__ import annotations

import hashlib
import mmap
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import openvino as ov

ALIGNMENT = 64  # a cache line, and the widest vector register


class SharedConstants:
    """Appends constants to one file and writes models that read them there; content that it holds is not written again.

    Any OpenVINO reads such a model with `core.read_model(xml, weights)`, and maps the file instead of reading it.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.known: dict[bytes, int] = {}  # digest -> offset

    def save(self, model: ov.Model, path: Path) -> None:
        """Write the model's .xml at `path`; needs room for its weights beside it while it works."""
        with TemporaryDirectory(dir=path.parent, prefix=".constants-") as folder:
            alone = Path(folder) / path.name
            ov.save_model(model, alone, compress_to_fp16=False)
            tree = ElementTree.parse(alone)
            places = [data for data in tree.iter("data") if "offset" in data.attrib and "size" in data.attrib]
            with alone.with_suffix(".bin").open("rb") as own:
                if places:
                    with mmap.mmap(own.fileno(), 0, access=mmap.ACCESS_READ) as constants:
                        for data in places:
                            offset, size = int(data.attrib["offset"]), int(data.attrib["size"])
                            data.attrib["offset"] = str(self._place(constants[offset : offset + size]))
            tree.write(path, encoding="utf-8", xml_declaration=True)

    def _place(self, content: bytes) -> int:
        digest = hashlib.sha256(content).digest()
        if digest not in self.known:
            self.stream.write(b"\0" * (-self.stream.tell() % ALIGNMENT))
            self.known[digest] = self.stream.tell()
            self.stream.write(content)
        return self.known[digest]
