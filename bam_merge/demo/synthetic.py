"""Synthetic dense checkpoints of any family, made from its table: for the demo, the tests and the benchmarks."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy

from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import family_tensors
from bam_merge.architectures.tables import load_architecture
from bam_merge.checkpoints.dtypes import config_name
from bam_merge.checkpoints.folder import INDEX
from bam_merge.checkpoints.header import encode_header
from bam_merge.values.arrays import bfloat16_bits

Values = Callable[[str, tuple[int, ...]], "numpy.ndarray[Any, Any] | None"]
"""Gives the float32 values of a tensor by name and shape; None leaves them zero, as a hole in the file."""


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], values: Values, dtype: str = "F32", shards: int = 1, spelling: int = 0
) -> Path:
    """Write a checkpoint of the family that `config["model_type"]` names, every tensor of its table.

    dtype is F32 or BF16. `spelling` picks among the family's alternative tensor names. Returns `folder`.
    """
    family = load_architecture(config["model_type"])
    problems: list[str] = []
    facts = describe(family, config, problems)
    if problems:
        raise ValueError("; ".join(problems))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [(name, dtype, shape) for name, shape in family_tensors(family, facts, spelling)]
    values = stored_apart(values, facts["norm_offset"])
    names = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {}
    for index, file in enumerate(names):
        part = tensors[index::shards]
        weight_map.update({name: file for name, _, _ in part})
        header, spans = encode_header(part)
        with open(folder / file, "wb") as stream:
            stream.write(header)
            for (name, _, shape), (offset, nbytes) in zip(part, spans, strict=True):
                array = values(name, shape)
                if array is not None:
                    stream.seek(offset)
                    stream.write(_encode(array.reshape(shape), dtype))
                os.truncate(stream.fileno(), offset + nbytes)
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"architectures": [family.class_name], "dtype": config_name(dtype), **config}, indent=2))
    return folder


def _encode(array: "numpy.ndarray[Any, Any]", dtype: str) -> bytes:
    return array.astype("<f4", copy=False).tobytes() if dtype == "F32" else bfloat16_bits(array).tobytes()


Dense = Callable[[str, tuple[int, ...]], "numpy.ndarray[Any, Any]"]


def _centre(name: str) -> float:
    norm = "norm" in name or any(word.startswith("ln_") for word in name.split("."))
    return 1.0 if (norm and name.endswith("weight")) or name.endswith("layer_scalar") else 0.0


def stored_apart(values: Values, offset: int) -> Values:
    """`values` for a family that adds `offset` to the weights of its norms: these are stored as what is missing."""

    def apart(name: str, shape: tuple[int, ...]) -> "numpy.ndarray[Any, Any] | None":
        array = values(name, shape)
        return array if array is None or not offset else (array - offset * _centre(name)).astype("f4")

    return apart


def random_values(seed: int, scale: float = 0.05) -> Dense:
    """Normal weights; norms around one. Different for every tensor name and seed."""

    def values(name: str, shape: tuple[int, ...]) -> "numpy.ndarray[Any, Any]":
        stream = numpy.random.default_rng([seed, *name.encode()])
        return (_centre(name) + scale * stream.standard_normal(shape)).astype("f4")

    return values


def branched_values(seed: int, branch: int, drift: float = 0.01) -> Dense:
    """A branch of the model that `random_values(seed)` makes: every weight a small step away, as after continued training."""
    origin, step = random_values(seed), random_values(1000 + branch, drift)

    def values(name: str, shape: tuple[int, ...]) -> "numpy.ndarray[Any, Any]":
        return origin(name, shape) + step(name, shape) - _centre(name)

    return values
