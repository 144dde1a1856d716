"""Reading a file of pickled weights in a process of its own (reader.py), and in words what came of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import bam_merge
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.errors import CheckpointError
from bam_merge.text import human_bytes, printable

MOST_ANSWER = 200_000_000
"""Bytes of an answer that are believed."""


KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT", "VIRTUAL_ENV")
"""What the process is told of the environment: no token of anything."""


@dataclass(frozen=True)
class Limits:
    """What reading one file may take: `memory` bytes and `seconds` of processor time, plus so much for each byte of it.

    A file is mapped, and a tensor whose elements are not in order is put in order in memory; old files are read whole. `growth`: tensors
    may be views of one memory, so that they take more as they are written than the file has.
    """

    memory: int = 2**30
    memory_per_byte: float = 2.5
    seconds: int = 60
    seconds_per_byte: float = 30e-9
    growth: float = 4.0

    def of_memory(self, size: int) -> int:
        return self.memory + int(self.memory_per_byte * size)

    def of_seconds(self, size: int) -> int:
        return self.seconds + int(self.seconds_per_byte * size)


@dataclass(frozen=True, slots=True)
class Found:
    """One tensor of a file. `digest` (XXH3-128) where it was asked for; `memory` is the same for tensors that share theirs."""

    dtype: str
    shape: tuple[int, ...]
    digest: str | None
    memory: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Contents:
    """The tensors of a file, and what else is in it, by name: what it is."""

    tensors: Mapping[str, Found]
    left_out: Mapping[str, str] = field(default_factory=dict)


def read_pickle(
    path: Path, file: int, digest: tuple[str, ...] = (), write: Mapping[str, tuple[int, int]] | None = None, limits: Limits | None = None
) -> Contents:
    """What is in the file at `path`, opened as `file`. `digest` names tensors whose digests are wanted; `write` says to which descriptor
    and offset the bytes of each named tensor are written. Raises CheckpointError, also where the file asks for more than to be read."""
    limits = limits or Limits()
    size = os.fstat(file).st_size
    request = {
        "file": file, "memory": limits.of_memory(size), "seconds": limits.of_seconds(size), "digest": digest, "write": write,
    }  # fmt: skip
    outputs = {descriptor for descriptor, _ in (write or {}).values()}
    raw, status = _ask(request, {file, *outputs}, 10 * limits.of_seconds(size))
    where = printable(str(path))
    answer = _answer(raw)
    if answer is None:
        raise CheckpointError(f"{where}: {_ended(status, limits, size)}")
    if "problem" in answer:
        raise CheckpointError(f"{where}: {_refusal(str(answer['problem']), printable(str(answer.get('detail')), 500), limits, size)}")
    found = _contents(answer)
    if found is None:
        raise CheckpointError(f"{where}: the process that read it gave no sensible answer. Nothing was written.")
    total = sum(entry.nbytes for entry in found.tensors.values())
    if total > limits.growth * size + 2**20:
        raise CheckpointError(
            f"{where}: its tensors would take {human_bytes(total)}, the file has {human_bytes(size)}: they are views that repeat the same "
            "numbers. Save the model's own state dict (torch.save(model.state_dict(), FILE))."
        )
    return found


def _ask(request: Mapping[str, Any], descriptors: set[int], timeout: float) -> tuple[bytes, int | None]:
    """The answer's bytes, and how the process ended; None where its time was up."""
    package = Path(bam_merge.__file__).parents[1]
    environment = {key: value for key, value in os.environ.items() if key in KEPT_ENVIRONMENT}
    environment |= {"PYTHONPATH": os.pathsep.join([str(package), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "bam_merge.converting.reader"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd="/", pass_fds=tuple(descriptors),
        start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return _receive(process, timeout)
    finally:  # whatever happens here, it does not outlive this
        with suppress(OSError):
            process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def _receive(process: "subprocess.Popen[bytes]", timeout: float) -> tuple[bytes, int | None]:
    """All that the process says until it ends, at most MOST_ANSWER bytes."""
    import selectors
    import time

    assert process.stdout is not None
    data, end = bytearray(), time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(data) <= MOST_ANSWER:
            if not selector.select(max(0.0, end - time.monotonic())):
                return b"", None
            piece = os.read(process.stdout.fileno(), 2**16)
            if not piece:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)  # it ends as soon as it has said all
                return bytes(data), process.poll()
            data += piece
    return b"", 0


def _answer(raw: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(raw)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _contents(answer: Mapping[str, Any]) -> Contents | None:
    """The answer, believed in nothing: every dtype a known one, every shape numbers of a tensor that can be."""
    tensors, left_out = answer.get("tensors"), answer.get("left_out")
    if not isinstance(tensors, dict) or not isinstance(left_out, dict):
        return None
    found = {}
    for name, record in tensors.items():
        if not isinstance(record, list) or len(record) != 4:
            return None
        dtype, shape, digest, memory = record
        if dtype not in DTYPE_BITS or not isinstance(shape, list) or len(shape) > 64 or not isinstance(memory, int):
            return None
        if not all(type(n) is int and 0 <= n < 2**48 for n in shape) or prod(shape) >= 2**60:
            return None
        found[str(name)] = Found(dtype, tuple(shape), digest if isinstance(digest, str) else None, memory)
    return Contents(found, {str(key): str(value) for key, value in left_out.items()})


STATE_DICT = "save the state dict alone where the model was made (torch.save(model.state_dict(), FILE)), or take its safetensors files"


def _refusal(problem: str, detail: str, limits: Limits, size: int) -> str:
    """The message for what reader.py says went wrong."""
    match problem:
        case "code":
            return (
                f"the file asks to run {detail}, which is no part of a tensor. Nothing of it was run, and nothing was written. A file that "
                f"holds weights alone asks for no such thing. If it is yours, {STATE_DICT}."
            )
        case "pickle":
            return f"no weights alone, so it was not read further ({detail}). Nothing of it was run. If it is yours, {STATE_DICT}."
        case "script":
            return f"a TorchScript archive, which is a program and not weights alone. If it is yours, {STATE_DICT}."
        case "refused":
            return (
                f"{detail} while it was read, which reading weights does not. It was stopped, and nothing was written. Do not use the file."
            )
        case "memory":
            return f"{_too_much_memory(limits, size)}"
        case "unfit":
            return f"{detail}. Nothing was written."
        case "system":
            return f"{detail}."
    return f"damaged, or no file of torch ({detail}). Download it again, or {STATE_DICT}."


def _too_much_memory(limits: Limits, size: int) -> str:
    return (
        f"to read it takes more than {human_bytes(limits.of_memory(size))} of memory, and the file has {human_bytes(size)}: it is "
        "damaged, or made to fill memory. It was stopped, and nothing was written."
    )


def _ended(status: int | None, limits: Limits, size: int) -> str:
    """The message for a process that ended without an answer."""
    if status is None or -status == signal.SIGXCPU:
        return (
            f"to read it takes more than {limits.of_seconds(size)} seconds of processor time, and the file has {human_bytes(size)}: it is "
            "damaged, or made to read without end. It was stopped, and nothing was written."
        )
    if -status == signal.SIGKILL:
        return "the process that read it was killed, by the system for lack of memory or by somebody. Nothing was written; run again."
    if -status in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL):
        return (
            f"reading it ended in a crash ({signal.Signals(-status).name}): the file is damaged, or made to do that. Nothing was written."
        )
    return f"the process that was to read it ended (status {status}). Is torch complete? Nothing was written."
