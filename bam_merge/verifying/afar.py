"""Rows of tensors elsewhere: verification's own way to them, which shares no code with that of a merge but the request itself.

A header is parsed here, and held against the safetensors library's reading of it; of a tensor as much is asked for at a time as is
likely to be compared next, from where it was asked.
"""

import json
import os
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open

from bam_merge.checkpoints.file_afar import FileAfar
from bam_merge.errors import CheckpointError
from bam_merge.system import name_of
from bam_merge.text import printable, some

AHEAD = 2**23
"""Bytes of a tensor that are asked for at a time: comparing takes them in order."""


KEPT = 12
"""Stretches that a thread keeps: one for each operand of most merges."""


class StretchesAfar:
    """Bytes of files elsewhere, for any number of threads."""

    def __init__(self) -> None:
        self._headers: dict[int, tuple[Mapping[str, Any], int]] = {}
        self._lock = threading.Lock()
        self._own = threading.local()

    def header(self, file: FileAfar) -> tuple[Mapping[str, Any], int]:
        """What a file says of its tensors, and where they begin. Raises CheckpointError."""
        with self._lock:
            if id(file) not in self._headers:
                self._headers[id(file)] = _header(file)
            return self._headers[id(file)]

    def bytes(self, file: FileAfar, tensor: tuple[int, int], first: int, count: int) -> "numpy.ndarray[Any, numpy.dtype[numpy.uint8]]":
        """`count` bytes from byte `first` of a `tensor` (first byte, end in the file). Raises CheckpointError."""
        begin, end = tensor
        kept: list[tuple[tuple[int, int], int, bytes]] = self._own.__dict__.setdefault("kept", [])
        data = numpy.empty(count, numpy.uint8)
        done = 0
        while done < count:
            at = first + done
            held = next((item for item in kept if item[0] == (id(file), begin) and item[1] <= at < item[1] + len(item[2])), None)
            if held is None:
                held = (id(file), begin), at, file.read(begin + at, min(AHEAD, end - begin - at))
                kept.append(held)
                del kept[:-KEPT]
            piece = numpy.frombuffer(held[2], numpy.uint8)[at - held[1] : at - held[1] + count - done]
            data[done : done + len(piece)] = piece
            done += len(piece)
        return data


def _header(file: FileAfar) -> tuple[Mapping[str, Any], int]:
    length = int.from_bytes(file.read(0, 8), "little")
    raw = file.read(8, length)
    tensors = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
    with tempfile.TemporaryFile(prefix="bam-merge-") as alone:  # the header, and nothing where the tensors would be
        alone.write(length.to_bytes(8, "little") + raw)
        alone.flush()
        try:
            os.truncate(alone.fileno(), 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0))
            with safe_open(name_of(alone.fileno()), "pt") as library:
                names = set(library.keys())
        except (SafetensorError, OSError):  # an older library does not know every dtype; not every disk takes a file with a hole
            names = set(tensors)
    if names != tensors.keys():
        other = some(sorted(names ^ tensors.keys()))
        raise CheckpointError(f"{printable(file.name)}: the safetensors library finds other tensors than its header names: {other}.")
    return tensors, 8 + length
