"""How far a pass over texts has come, kept beside the journal: the routers that are made, and the hidden states that the next block gets.

A file of its own, replaced in one step: a line with what it is of, its shapes and a digest, then the numbers. It is believed as far as the
digest holds, and only for the same plan.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from typing import Any

import torch
import xxhash
from torch import Tensor

from bam_merge._version import __version__
from bam_merge.calibrating.stage import Made, State
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.files import writing
from bam_merge.own_folder import open_file, read_file
from bam_merge.publishing.journal import begun, line
from bam_merge.publishing.staging import NEW_STATES, STATES, Staging
from bam_merge.values.tensors import decode, encode

SAVE_SECONDS = 5.0
"""How much of a pass may be lost: hidden states are written no more often than that."""


class KeptStates:
    """The states of one pass in a staging folder. `fingerprint` says what it is of."""

    def __init__(self, staging: Staging, fingerprint: str) -> None:
        self.staging, self.of, self.saved = staging, {"fingerprint": fingerprint, "version": __version__}, time.monotonic()

    def save(self, state: State, at_once: bool = False) -> None:
        """Keep `state` in place of what was kept, if that is old enough."""
        if not at_once and time.monotonic() - self.saved < SAVE_SECONDS:
            return
        made = {
            name: {"dtype": _dtype(router.values), "shape": list(router.values.shape), "tokens": router.tokens, "windows": router.windows}
            for name, router in state.made.items()
        }
        digest = xxhash.xxh3_128()
        for data in _numbers(state):
            digest.update(data)
        header = {
            **self.of, "inputs": state.inputs, "layer": state.layer, "made": made, "hidden": [list(x.shape) for x in state.hidden],
            "digest": digest.hexdigest(),
        }  # fmt: skip
        with writing(self.staging.folder / NEW_STATES):
            with suppress(FileNotFoundError):
                os.unlink(NEW_STATES, dir_fd=self.staging.lock)
            with os.fdopen(open_file(NEW_STATES, self.staging.lock, os.O_WRONLY | os.O_CREAT), "wb") as stream:
                stream.write(line(header))
                for data in _numbers(state):
                    stream.write(data)
            os.rename(NEW_STATES, STATES, src_dir_fd=self.staging.lock, dst_dir_fd=self.staging.lock)
        self.saved = time.monotonic()

    def load(self) -> State | None:
        """What an earlier run of the same plan kept; None where there is nothing, or not all of it."""
        with writing(self.staging.folder / STATES):
            data = read_file(STATES, self.staging.lock)
        end = data.find(b"\n") + 1
        header, rest = begun(data[:end]) if end else None, memoryview(data)[end:]  # without a copy of all hidden states
        if not isinstance(header, dict) or {key: header.get(key) for key in self.of} != self.of:
            return None
        return None if xxhash.xxh3_128_hexdigest(rest) != header["digest"] else _state(header, rest)


def _dtype(values: Tensor) -> str:
    return {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[values.dtype]


def _numbers(state: State) -> Iterator[memoryview]:
    for router in state.made.values():
        yield encode(router.values.flatten(), _dtype(router.values))
    for x_BTD in state.hidden:
        yield encode(x_BTD.cpu().flatten(), "F32")


def _state(header: dict[str, Any], data: memoryview) -> State:
    position = 0

    def tensor(dtype: str, shape: list[int]) -> Tensor:
        nonlocal position
        start, position = position, position + prod(shape) * DTYPE_BITS[dtype] // 8
        return decode(torch.frombuffer(bytearray(data[start:position]), dtype=torch.uint8), dtype).reshape(shape)

    made = {name: Made(tensor(said["dtype"], said["shape"]), said["tokens"], said["windows"]) for name, said in header["made"].items()}
    return State(header["inputs"], header["layer"], made, [tensor("F32", shape) for shape in header["hidden"]])
