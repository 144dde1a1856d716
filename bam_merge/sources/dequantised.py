"""A source whose weights are 8-bit floats, as the model that they stand for: each weight is multiplied with its scales (formulas.Scaled).

Read so are the block-scaled files of DeepSeek and Qwen3 (quant_method fp8), FP8 with a scale for a tensor or for each of its rows
(compressed-tensors' float-quantized, FBGEMM, ModelOpt). Scales are data: nothing of them is known before they are read. Scales of
activations and of a key-value cache are no part of the model that computes in 16 bits: they are listed, and not read.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bam_merge.architectures.opening import open_folder
from bam_merge.architectures.quantisation import DEQUANTISED, KEYS, Quantisation, quantisation
from bam_merge.architectures.wrappers import NESTED, unwrap
from bam_merge.checkpoints.dtypes import DTYPE_NAMES
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.pieces import Computed, Read, Shape, instead, whole
from bam_merge.errors import CheckpointError
from bam_merge.formulas import Scaled
from bam_merge.sources.dense import DenseModel, read_dense
from bam_merge.text import count, printable, some

WEIGHTS = ("F8_E4M3", "F8_E5M2")
"""The dtypes of quantised weights."""


SCALES = ("F32", "BF16", "F16", "F64", "F8_E8M0")
"""The dtypes that a scale may have."""


OF_WEIGHTS = ("weight_scale_inv", "weight_scale")
"""Beside x.weight: what it is multiplied with. (It is called the inverse of what the weights were divided by.)"""


OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "input_zero_point")
OF_CACHE = ("k_scale", "v_scale", "q_scale", "kv_scale")


NOT_READ = {
    **dict.fromkeys(OF_ACTIVATIONS, "a scale of activations, which the result does not quantise"),
    **dict.fromkeys(OF_CACHE, "a scale of a quantised key-value cache, which the result does not have"),
}
"""Beside modules: what the 16-bit model has no use for, with the reason."""


def read_dequantised(name: str, path: Path, checkpoint: Checkpoint | None = None) -> DenseModel:
    """Open the source called `name` at `path`, whose weights are dequantised. Raises CheckpointError with all its problems."""
    try:
        stored = checkpoint or open_folder(path)
    except CheckpointError as error:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in error.problems)) from None
    found = _Scales(name, stored)
    found.settle()
    if found.problems:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in found.problems))
    config = _without(stored.config)
    tensors = {tensor: entry for tensor, entry in stored.tensors.items() if tensor not in found.beside}
    model = read_dense(name, path, replace(stored, config=config, tensors=tensors))
    computed = {
        site: instead(piece, found.nodes[of.tensor]) if isinstance(of := whole(piece), Read) and of.tensor in found.nodes else piece  # type: ignore[arg-type]
        for site, piece in model.tensors.items()
    }
    for weight, node in found.nodes.items():
        if weight in model.dropped:  # a tower's, beside the text model of a wrapper
            found.not_read |= {scale.tensor: model.dropped[weight] for scale in node.inputs[1:]}
    noted = replace(stored, notes=(*stored.notes, found.note(model.dropped)))
    return replace(model, checkpoint=noted, tensors=computed, dropped={**model.dropped, **found.not_read})


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, a wrapper's text model's too, without what it says of quantised weights."""
    kept = {key: value for key, value in config.items() if key not in KEYS}
    return {key: _without(value) if key in NESTED and isinstance(value, dict) else value for key, value in kept.items()}


@dataclass
class _Scales:
    """What every quantised weight is multiplied with, and every problem. `beside` are the tensors that are no weights."""

    source: str
    checkpoint: Checkpoint
    nodes: dict[str, Computed] = field(default_factory=dict)
    beside: set[str] = field(default_factory=set)
    not_read: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Every 8-bit float has its scales, every scale its weight."""
        config = self.checkpoint.config
        quantised = quantisation(config) or quantisation(unwrap(config).config)
        if quantised is None:
            self.problems.append(
                "dequantise: true, but config.json has no quantization_config. Remove the key, or use the quantised model."
            )
            return
        if not self.can(quantised):
            return
        block = self.block(quantised)
        lone = [entry.name for entry in self.checkpoint.tensors.values() if not self.take(entry, block)]
        if lone:
            tensors = count(len(lone), "tensor")
            self.problems.append(f"{some(lone)}: {tensors} of 8-bit floats without one scale beside it. Is the download complete?")
        elif not self.nodes and not self.problems:
            self.problems.append("dequantise: true, but no weight is an 8-bit float. Remove the key, or use the quantised model.")

    def take(self, entry: TensorEntry, block: tuple[int, int] | None) -> bool:
        """Whether a tensor is what can be used: a weight with its scales, a scale of a weight, or anything that is no 8-bit float."""
        tensors, (stem, _, last) = self.checkpoint.tensors, entry.name.rpartition(".")
        if last in NOT_READ:
            self.not_read[entry.name] = NOT_READ[last]
            self.beside.add(entry.name)
        elif last in OF_WEIGHTS:
            self.beside.add(entry.name)
            self.check_owner(entry.name, tensors.get(f"{stem}.weight"))
        elif entry.dtype.startswith("F8_E"):
            scales = [f"{stem}.{word}" for word in OF_WEIGHTS if last == "weight" and f"{stem}.{word}" in tensors]
            if len(scales) != 1:
                return False
            self.scale(entry, tensors[scales[0]], block)
        return True

    def check_owner(self, scale: str, weight: TensorEntry | None) -> None:
        """A scale is of a weight that is an 8-bit float."""
        if weight is None:
            self.problems.append(f"{printable(scale)} is a scale, but the weight that it is of is not there. Is the download complete?")
        elif not weight.dtype.startswith("F8_E"):
            self.problems.append(
                f"{printable(scale)} is a scale, but {printable(weight.name)} is {weight.dtype}, no 8-bit float: it may be multiplied with "
                "it already. Use the full-precision model."
            )

    def can(self, quantised: Quantisation) -> bool:
        """Whether this form is multiplied out; the reasons against it are problems."""
        why = list(_against(quantised))
        self.problems += [f"dequantise: {text}. Use the 16-bit model that it was made from." for text in why]
        return not why

    def block(self, quantised: Quantisation) -> tuple[int, int] | None:
        """The size of the blocks that the configuration names, if it names one."""
        found = quantised.settings.get("weight_block_size")
        for weights in _groups(quantised):
            found = found or weights.get("block_structure")
            size = weights.get("group_size")
            if weights.get("strategy") == "group" and _is_size(size):
                found = found or [1, size]
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != 2 or not all(map(_is_size, found)):
            self.problems.append(f"config.json: the size of blocks must be two positive integers, found {printable(repr(found), 60)}.")
            return None
        return found[0], found[1]

    def scale(self, weight: TensorEntry, scale: TensorEntry, block: tuple[int, int] | None) -> None:
        """Multiply a weight with its scales, whose shape says of which rows and columns each is."""
        name, at = printable(weight.name), printable(scale.name)
        if weight.dtype not in WEIGHTS or len(weight.shape) != 2:
            self.problems.append(f"{name} is {weight.dtype} {list(weight.shape)}; matrices of {' and '.join(WEIGHTS)} are dequantised.")
            return
        if scale.dtype not in SCALES:
            self.problems.append(f"{at} is {scale.dtype}; a scale must be {', '.join(SCALES)}.")
            return
        fitting = dict(_fitting(weight.shape, block))
        size = next((size for size, shapes in fitting.items() if scale.shape in shapes), None)
        if size is None:
            expected = " or ".join(str(list(shapes[-1])) for shapes in fitting.values())
            blocks = f" in blocks of {block[0]} x {block[1]}" if block else ""
            self.problems.append(f"{at} is {list(scale.shape)}, but {name} is {list(weight.shape)}{blocks}, which needs {expected}.")
            return
        inputs = tuple(Read(self.source, entry.name, entry.dtype, entry.shape) for entry in (weight, scale))
        self.nodes[weight.name] = Computed(self.source, weight.name, Scaled(size), inputs, self.dtype, weight.shape)

    @property
    def dtype(self) -> str:
        """What the result is stored in where a recipe does not say: what the model computes in by its config.json, or bfloat16."""
        config = unwrap(self.checkpoint.config).config
        stated = config.get("dtype") or config.get("torch_dtype")
        return DTYPE_NAMES.get(str(stated).removeprefix("torch."), "BF16")

    def note(self, dropped: Collection[str]) -> str:
        """What a plan says of it, but for the weights that are `dropped`."""
        nodes = [node for weight, node in self.nodes.items() if weight not in dropped]
        kinds = dict.fromkeys(map(_of_what, nodes))
        return f"{count(len(nodes), 'weight')} of 8-bit floats multiplied with their scales ({', '.join(kinds)}), as {self.dtype}"


def _of_what(node: Computed) -> str:
    assert isinstance(node.formula, Scaled)
    height, width = node.formula.block
    if (height, width) == node.shape:
        return "one for each tensor"
    return "one for each row" if (height, width) == (1, node.shape[1]) else f"one for each block of {height} x {width}"


def _fitting(shape: Shape, block: tuple[int, int] | None) -> Iterator[tuple[tuple[int, int], tuple[Shape, ...]]]:
    """(block, shapes that its scales may have) of every way in which the scales of a matrix of that shape may stand."""
    rows, columns = shape
    if block is not None:
        yield block, ((-(-rows // block[0]), -(-columns // block[1])),)
        return
    yield (rows, columns), ((), (1,), (1, 1))
    yield (1, columns), ((rows,), (rows, 1))


def _against(quantised: Quantisation) -> Iterator[str]:
    """Why weights of a form are not multiplied out here."""
    settings = quantised.settings
    if quantised.method not in DEQUANTISED:
        yield f"weights of {quantised.words()} are not multiplied out here, only 8-bit floats are"
        return
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
        yield f"sparsity_config has format {printable(repr(sparse['format']), 40)}, and its zeros are stored nowhere"
    if quantised.method == "compressed-tensors":
        if quantised.form not in ("float-quantized", "naive-quantized"):
            form = printable(repr(quantised.form), 40)
            yield f"compressed-tensors in the format {form}, only float-quantized weights are multiplied out here"
        for weights in _groups(quantised):
            if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
                kind = printable(f"{weights.get('type')} of {weights.get('num_bits')} bits", 60)
                yield f"compressed-tensors weights of type {kind}, only floats of 8 bits are multiplied out here"
            elif weights.get("symmetric") is False:
                yield "its weights have zero points (symmetric: false), which no 8-bit float needs"
    elif quantised.method == "modelopt" and quantised.form != "FP8":
        yield f"ModelOpt's {printable(repr(quantised.form), 40)}, only FP8 weights are multiplied out here"
    elif quantised.method == "fp8" and settings.get("fmt", "e4m3") not in ("e4m3", "e5m2"):
        yield f"FP8 in the format {printable(repr(settings['fmt']), 40)}"


def _groups(quantised: Quantisation) -> Iterator[Mapping[str, Any]]:
    """How each group of compressed-tensors' config_groups stores its weights."""
    groups = quantised.settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31
