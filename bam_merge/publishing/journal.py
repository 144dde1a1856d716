"""The journal of a merge: which tensors are finished, a line each, believed as far as its checksums hold."""

import json
import zlib
from collections.abc import Callable
from typing import Any

from bam_merge.merging.tensor import Finished


def line(record: dict[str, Any]) -> bytes:
    """A journal's line: length and CRC-32 of the JSON text in hexadecimal, then the text."""
    text = json.dumps(record).encode()
    return b"%08x %08x %s\n" % (len(text), zlib.crc32(text), text)


def begun(data: bytes) -> Any:
    """What the journal says of its run, by the data that it begins with; None where it says nothing."""
    return _record(data.partition(b"\n")[0])


def read_journal(data: bytes, header: dict[str, Any], notify: Callable[[str], None]) -> tuple[dict[str, Finished], int]:
    """The finished tensors of an earlier run, and the bytes of the journal that say so; nothing when it was of another plan.

    It is believed up to the first line that is torn, or is not what `line` writes of a tensor.
    """
    first, _, rest = data.partition(b"\n")
    if (found := _record(first)) is None or len(first) == len(data):
        notify("nothing to resume: starting from the beginning.")
        return {}, 0
    if found != header:
        notify("the unfinished run was of another recipe, version or set of sources: starting from the beginning.")
        return {}, 0
    finished: dict[str, Finished] = {}
    size = len(first) + 1
    for entry in rest.split(b"\n")[:-1]:
        record = _record(entry)
        if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in _TENSOR.items()):
            break
        if not all(isinstance(digest, str) for digest in record["reads"].values()):
            break
        finished[record["name"]] = Finished(record["digest"], record["reads"], record["nonfinite"])
        size += len(entry) + 1
    return finished, size


_TENSOR = {"name": str, "digest": str, "reads": dict, "nonfinite": int}


def _record(entry: bytes) -> Any:
    """What a line holds, without its end; None when it is torn, or holds no JSON."""
    text = entry[18:]
    if entry[:18] != b"%08x %08x " % (len(text), zlib.crc32(text)):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
