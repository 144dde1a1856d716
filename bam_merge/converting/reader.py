"""The process that reads one file of pickled weights: `python -m bam_merge.converting.reader`, started by child.py and nobody else.

It gets one line of JSON on stdin: {"file": descriptor, "size": bytes, "memory": bytes, "seconds": n, "digest": [names], "write": {name:
[descriptor, offset]} or null}. It answers with one JSON document on stdout: {"tensors": {name: [dtype, shape, digest or null, alias or
null]}, "left_out": {name: what it is}}, or {"problem": kind, "detail": text}. With "write" it also writes the named tensors' bytes to
the descriptors, which whoever started it has opened. Stdin stays open as long as somebody waits for the answer.
"""

import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bam_merge.converting.confinement import Refused, confine, end_with, without_network

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params")
"""Keys under which trainers keep a model's state dict beside other things."""


DEPTH = 3
"""State dicts in one another."""


PIECE = 2**26
"""Bytes that are written at a time."""


GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def main() -> None:
    """Answer the one question that is asked on stdin."""
    without_network()
    request = json.loads(sys.stdin.readline())
    answer, silent = os.fdopen(os.dup(1), "wb"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    import torch
    import torch._weights_only_unpickler
    import xxhash

    from bam_merge.system import name_of
    from bam_merge.values.tensors import STORED_DTYPES

    torch.set_num_threads(1)
    names = {dtype: name for name, dtype in STORED_DTYPES.items()}
    place = name_of(request["file"])
    _rehearse()
    end_with(0)
    confine(request["memory"], request["seconds"])
    try:
        tensors, left_out = find(load(place))
        found = {name: _entry(name, tensor, names) for name, tensor in tensors.items()}
        for name in request["digest"]:
            if name in found:
                found[name][2] = xxhash.xxh3_128_hexdigest(_bytes(tensors[name]))
        for name, (descriptor, offset) in (request["write"] or {}).items():
            write(descriptor, offset, _bytes(tensors[name]))
        document: dict[str, Any] = {"tensors": found, "left_out": left_out}
    except BaseException as error:
        document = problem(error)
    answer.write(json.dumps(document).encode())
    answer.flush()
    os._exit(0)


class Unfit(ValueError):
    """It was read, and is not what can be written. Its text says why."""


def _rehearse() -> None:
    """Load something harmless, so that what torch imports late is here before the door is closed."""
    import torch

    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save({"x": torch.zeros(1)}, stream, _use_new_zipfile_serialization=zipped)
        stream.seek(0)
        torch.load(stream, map_location="cpu", weights_only=True)


def load(place: str) -> object:
    """What torch's weights_only loader makes of the file."""
    import torch

    with open(place, "rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    return torch.load(place, map_location="cpu", weights_only=True, mmap=True if zipped else None)


def find(document: object) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """The tensors of the state dict that `document` is or holds, and what else stands beside them."""
    import torch

    left_out: dict[str, str] = {}
    where = ""
    for _ in range(DEPTH + 1):
        if not isinstance(document, Mapping):
            raise Unfit(f"{where or 'it'} is a {type(document).__name__}, and no state dict: a mapping of names to tensors")
        inner = [key for key in WRAPPERS if isinstance(document.get(key), Mapping)]
        own = {key: value for key, value in document.items() if isinstance(value, torch.Tensor)}
        if own or not inner:
            break
        for key, value in document.items():
            if key != inner[0]:
                left_out[f"{where}{str(key)[:200]}"] = type(value).__name__
        where, document = f"{where}{inner[0]}.", document[inner[0]]
    if not own:
        raise Unfit(f"no tensor is in it{f' (looked in {where[:-1]})' if where else ''}")
    for key, value in document.items() if isinstance(document, Mapping) else ():
        if not isinstance(key, str):
            raise Unfit(f"a tensor's name is the {type(key).__name__} {str(key)[:100]}")
        if key not in own:
            left_out[f"{where}{key}"] = type(value).__name__
    return own, left_out


def _entry(name: str, tensor: "Tensor", names: Mapping[Any, str]) -> list[Any]:
    """[dtype, shape, digest, which memory it is of] of a tensor that can be written."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.is_nested:
        kind = "a quantised tensor" if tensor.is_quantized else f"no plain tensor ({tensor.layout}, {tensor.device})"
        raise Unfit(f"{name} is {kind}, which safetensors files cannot hold")
    if tensor.dtype not in names:
        raise Unfit(f"{name} is stored as {tensor.dtype}, which safetensors files cannot hold")
    memory = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    return [names[tensor.dtype], list(tensor.shape), None, memory]


def _bytes(tensor: "Tensor") -> memoryview:
    """The bytes of a tensor in the order of its elements, whatever its strides."""
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not plain.numel():
        return memoryview(b"")
    return memoryview(plain.view(torch.uint8).numpy().data)


def write(descriptor: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + PIECE], offset + done)


def problem(error: BaseException) -> dict[str, str]:
    """What went wrong, by its kind, in a few words."""
    chain = list(_causes(error))
    text = " ".join(str(error).split())
    if refused := next((link for link in chain if isinstance(link, Refused)), None):
        return {"problem": "refused", "detail": str(refused)[:300]}
    if isinstance(error, Unfit):
        return {"problem": "unfit", "detail": text[:500]}
    if isinstance(error, MemoryError) or "alloc" in text.lower() or "mmap" in text.lower():
        return {"problem": "memory", "detail": text[:300]}
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is what mapping a file that is cut off gives
        return {"problem": "system", "detail": (error.strerror or text)[:300]}
    if asked := GLOBAL.search(text):
        return {"problem": "code", "detail": asked[1][:200].rstrip(".")}
    if "TorchScript" in text:
        return {"problem": "script", "detail": ""}
    if "WeightsUnpickler error:" in text or "weights_only" in text:
        return {"problem": "pickle", "detail": text.rpartition("WeightsUnpickler error:")[2].strip().split(". ")[0][:200]}
    return {"problem": "damaged", "detail": ": ".join(filter(None, [type(error).__name__, text[:200]]))}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    main()
