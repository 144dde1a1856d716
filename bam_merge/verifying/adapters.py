"""The reference model of a base with adapters: its weights worked out from the adapters' files, by a reading of its own.

The plan goes from adapter_config.json to the tensors that it names; this goes from the tensors to what they must be. Nothing of
sources/adapter*.py and of what carries out a plan is imported: names, scales and arithmetic are written a second time.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bam_merge.architectures.wrappers import Wrapper
from bam_merge.checkpoints.pieces import Leaf, Slice, stored
from bam_merge.model.loading import StoredModel
from bam_merge.model.wrapped import ANYWHERE, wrapper_of

CHANGED_ELEMENTS = 2**16
"""Elements that are changed at a time, in float64: few enough for a processor's cache."""


EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The reference model's names of what may be tied."""


HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
"""A head's names in the families' own models."""


@dataclass(frozen=True)
class InFile:
    """A tensor of an adapter, read when it is needed: adapters of large models are large."""

    file: Path
    name: str

    def value(self) -> Tensor:
        """All of it, in float64."""
        with safe_open(self.file, "pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor.double()

    def along(self, axis: int, places: Sequence[int]) -> Tensor:
        """What stands at these places of one axis, as stored; no more of the file is read than from the first of them to the last."""
        first, last = min(places), max(places) + 1
        with safe_open(self.file, "pt") as file:
            part: Tensor = file.get_slice(self.name)[(slice(None),) * axis + (slice(first, last),)]
        return part if isinstance(places, range) else part.index_select(axis, torch.tensor(places) - first)


@dataclass
class Part:
    """What one adapter has of one tensor of the base: factors of an update, or what stands in its place."""

    scale: float
    a: InFile | None = None
    b: InFile | None = None
    turned: bool = False
    lengths: InFile | None = None
    shift: InFile | None = None
    whole: InFile | None = None
    base_layer: bool = False
    ids: Sequence[int] = ()
    rows: InFile | None = None
    float64: bool = False

    def change(self, places: Sequence[int]) -> "Change":
        """What it does to these rows."""
        result = Change()
        if self.a is not None and self.b is not None:
            if self.turned:
                result.left, result.right = self.a.along(1, places).double().T, self.b.value().T
            else:
                result.left, result.right = self.b.along(0, places).double(), self.a.value()
            result.left = self.scale * result.left
        if self.lengths is not None:
            result.lengths = self.lengths.along(0, places).double()
        if self.shift is not None:
            result.shift = self.scale * self.shift.along(0, places).double()
        return result


@dataclass
class Change:
    """What a part does to P rows, in float64: s B [P, r] and A [r, C] of the update, lengths [P] to bring rows to, what is added [P]."""

    left: Tensor | None = None
    right: Tensor | None = None
    lengths: Tensor | None = None
    shift: Tensor | None = None

    def update(self, rows: slice, value: Tensor) -> Tensor:
        """`value`, some of the rows, with the update; itself where there is none."""
        return value if self.left is None or self.right is None else torch.addmm(value, self.left[rows], self.right)


# ---- files -------------------------------------------------------------------------------------------------------------------


def read_parts(folder: Path, weight: float, names: Mapping[str, str], wrapper: Wrapper | None = None) -> dict[str, Part]:
    """What an adapter has, by the base's tensor; `names` are all of these, by what they are called without what wrapping programs put into
    them. What it has of a `wrapper` around the base's text model is none of it."""
    config = json.loads((folder / "adapter_config.json").read_bytes())
    found: dict[str, Part] = {}
    base_names = BaseNames(names)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if ".lora_velora_embed" in key:  # of the training only
                continue
            clean = re.sub(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.|^module\.|\.modules_to_save(?:\.default)?(?=\.)", "", key)
            stem, what = _cut(clean)
            trained = re.sub(r"^base_model\.(model\.)?", "", stem)
            if wrapper is not None and _is_beside(trained, wrapper):
                continue
            target = names[base_names.find(stem, "bias" if what.endswith("bias") else "weight")]
            modules = (trained, target.rpartition(".")[0], *(("lm_head",) if target in HEAD_NAMES else ()))
            part = found.setdefault(target, Part(_scale(config, modules) * weight))
            part.float64 |= file.get_slice(key).get_dtype() == "F64"
            _enter(part, what, InFile(folder / "adapter_model.safetensors", key), config, stem)
    return found


def _cut(name: str) -> tuple[str, str]:
    """(the module, what of it): 'x.q_proj.lora_A.weight' -> ('x.q_proj', 'lora_A.weight')."""
    for mark in (".lora_", ".token_adapter", ".base_layer"):
        stem, found, what = name.partition(mark)
        if found:
            return stem, mark[1:] + what
    stem, _, what = name.rpartition(".")
    return stem, what


def _enter(part: Part, what: str, value: InFile, config: Mapping[str, Any], stem: str) -> None:
    if what.startswith("lora_magnitude_vector"):
        part.lengths = value
    elif what.startswith("lora_") and what.endswith("bias"):
        part.shift = value
    elif what.startswith("lora_"):
        part.turned = what.startswith("lora_embedding")
        if re.match(r"lora_(embedding_)?A", what):
            part.a = value
        else:
            part.b = value
    elif what.startswith("token_adapter"):
        ids = config["trainable_token_indices"]
        if isinstance(ids, dict):
            ids = next(rows for name, rows in ids.items() if f".{stem}".endswith(f".{name}"))
        part.ids, part.rows = ids, value
    else:
        saved = any(stem.endswith(name) for name in config.get("modules_to_save") or ())
        part.whole, part.base_layer = value, what.startswith("base_layer") or not saved


def _plain(name: str) -> str:
    """A stored name without the words that a wrapping program puts into it."""
    return ".".join(word for word in name.split(".") if word not in ANYWHERE)


def _is_beside(module: str, wrapper: Wrapper) -> bool:
    """Whether a module of a wrapper is in one of its towers, whatever the wrapper's own words before that."""
    words = module.split(".")
    steps = next((at for at, word in enumerate(words) if word not in ("model", "module")), len(words))
    return any(wrapper.what(".".join(words[at:])) is not None for at in range(steps + 1))


class BaseNames:
    """The tensors of a base, by how their names end."""

    def __init__(self, names: Collection[str]) -> None:
        self.has_head = any(name.rpartition(".lm_head.")[2] in ("weight", "lm_head.weight") for name in names)
        self._ends: dict[str, list[str]] = {}
        for name in names:
            words = name.split(".")
            for start in range(len(words)):
                self._ends.setdefault(".".join(words[start:]), []).append(name)

    def find(self, stem: str, part: str) -> str:
        """The tensor that an adapter's name means: the one that ends as it does, from the longest end on."""
        if not self.has_head and stem.endswith("lm_head"):  # what transformers 5 calls the head of every family
            stem = "embed_out"
        words = f"{stem}.{part}".split(".")
        for start in range(len(words)):
            found = self._ends.get(".".join(words[start:]), [])
            if len(found) == 1:
                return found[0]
        raise AssertionError(f"{stem} is a module of the base, or there would be no plan")


def _scale(config: Mapping[str, Any], names: Sequence[str]) -> float:
    """alpha / r of a module, or alpha / sqrt(r), by the first pattern that one of its names ends in."""
    values = []
    for key, default in (("alpha_pattern", config.get("lora_alpha", 8)), ("rank_pattern", config.get("r", 8))):
        patterns = (config.get(key) or {}).items()
        of_module = (value for pattern, value in patterns for name in names if re.search(rf"(?:^|\.)(?:{pattern})$", name))
        values.append(next(of_module, default))
    alpha, rank = values
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


# ---- the model ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapted(StoredModel):
    """`under`, a base, with adapters: `parts` says by the base's tensor what each does to it. Weights come in float32, as the updates
    give them and not rounded to what is stored, or in float64 where something of them is."""

    under: StoredModel | None = None
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._changed(parameter, self._base.read(self._below(parameter)), _places(self.leaves[parameter])).to(dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        places = _places(self.leaves[parameter])
        at = places[rows.start : rows.stop] if isinstance(rows, range) else [places[row] for row in rows]
        return self._changed(parameter, self._base.read_rows(self._below(parameter), rows), at).to(dtype)

    @property
    def _base(self) -> StoredModel:
        assert self.under is not None
        return self.under

    def _below(self, parameter: str) -> str:
        """The base's parameter: that of a head which the base ties is the embeddings'."""
        return parameter if parameter in self._base.leaves else EMBEDDINGS

    def _changed(self, parameter: str, before: Tensor, places: Sequence[int]) -> Tensor:
        """Rows of a tensor of which `before` are the base's; `places` are their numbers in the base's stored tensor."""
        name = HEAD if parameter == HEAD and HEAD not in self._base.leaves else stored(self.leaves[parameter]).tensor
        parts = self.parts.get(name, ())
        if not parts:
            return before
        wide = before.dtype == torch.float64 or any(part.float64 for part in parts)
        before = next((part.whole.along(0, places) for part in parts if part.whole is not None), before)
        changes = [part.change(places) for part in parts]
        result = torch.empty(before.shape, dtype=torch.float64 if wide else torch.float32)
        step = max(1, CHANGED_ELEMENTS // max(1, math.prod(before.shape[1:])))
        for start in range(0, len(places), step):
            rows = slice(start, start + step)
            result[rows] = _carried_out(changes, rows, before[rows].double(), wide)
        for part in parts:
            if part.rows is not None:
                trained, row_of = part.rows.value(), {row: index for index, row in enumerate(part.ids)}
                for index, place in enumerate(places):
                    if place in row_of:
                        result[index] = trained[row_of[place]]
        return result


def _carried_out(changes: Sequence[Change], rows: slice, value: Tensor, wide: bool) -> Tensor:
    """`value`, some of the rows, after all changes; rounded to float32 where a merge is, if not `wide`."""

    def once(value: Tensor) -> Tensor:
        return value if wide else value.float().double()

    for change in changes:
        if change.lengths is None:
            value = change.update(rows, value)
    value = once(value)
    for change in changes:
        if change.lengths is not None:
            value = change.update(rows, value)
            value = once(value * (change.lengths[rows] / value.norm(dim=1))[:, None])
        if change.shift is not None:
            value = once(value + change.shift[rows])
    return value


def _places(leaf: Leaf) -> Sequence[int]:
    """The numbers of a leaf's rows in the whole stored tensor."""
    if not isinstance(leaf, Slice):
        return range(leaf.shape[0])
    block = leaf.of.shape[0] // leaf.groups
    return [group * block + leaf.start + row for group in range(leaf.groups) for row in range(leaf.rows)]


def adapted(under: StoredModel, adapters: Sequence[tuple[Path, float]]) -> Adapted:
    """`under` with the adapters in these folders, each with its weight."""
    tied = under.config.tie_word_embeddings
    text = {_plain(name): name for name in dict.fromkeys(stored(leaf).tensor for leaf in under.leaves.values())}
    names = {**text, **dict(zip(HEAD_NAMES, HEAD_NAMES, strict=True))} if tied else text
    wrapper = wrapper_of(under.checkpoint.config)
    parts: dict[str, list[Part]] = {}
    for folder, weight in adapters:
        for name, part in read_parts(folder, weight, names, wrapper).items():
            parts.setdefault(HEAD if name in HEAD_NAMES and tied else name, []).append(part)
    config, leaves, embeddings = under.config, dict(under.leaves), stored(under.leaves[EMBEDDINGS]).tensor
    if tied:
        wholes = [part for name in (HEAD, embeddings) for part in parts.get(name, ()) if part.whole is not None and not part.base_layer]
        if wholes:  # one of the two was trained by itself
            config, leaves[HEAD] = replace(config, tie_word_embeddings=False), leaves[EMBEDDINGS]
        else:
            parts[embeddings] = [*parts.get(embeddings, ()), *parts.pop(HEAD, ())]
    return Adapted(under.checkpoint, config, leaves, under, parts)
