"""The reference model of a base with adapters: its weights worked out from the adapters' files, by a reading of its own.

The plan goes from adapter_config.json to the tensors that it names; this goes from the tensors to what they must be. Nothing of
sources/adapter*.py and of what carries out a plan is imported: names, scales and arithmetic are written a second time.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bam_merge.checkpoints.pieces import Leaf, Slice, stored
from bam_merge.model.loading import StoredModel
from bam_merge.verifying.rounding import nearest

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The reference model's names of what may be tied."""


HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
"""A head's names in the families' own models."""


@dataclass
class Part:
    """What one adapter has of one tensor of the base, in float64: factors of an update, or what stands in its place."""

    scale: float
    a: Tensor | None = None
    b: Tensor | None = None
    turned: bool = False
    lengths: Tensor | None = None
    shift: Tensor | None = None
    whole: Tensor | None = None
    base_layer: bool = False
    rows: dict[int, Tensor] = field(default_factory=dict)
    float64: bool = False

    def update(self, places: Sequence[int]) -> Tensor:
        """Rows of s B A [len(places), C]."""
        assert self.a is not None
        assert self.b is not None
        product = self.a[:, places].T @ self.b.T if self.turned else self.b[places] @ self.a
        return self.scale * product


# ---- files -------------------------------------------------------------------------------------------------------------------


def read_parts(folder: Path, weight: float, names: Sequence[str]) -> dict[str, Part]:
    """What an adapter has, by the base's tensor; `names` are all of these."""
    config = json.loads((folder / "adapter_config.json").read_bytes())
    found: dict[str, Part] = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if ".lora_velora_embed" in key:  # of the training only
                continue
            clean = re.sub(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.|^module\.|\.modules_to_save(?:\.default)?(?=\.)", "", key)
            stem, what = _cut(clean)
            target = _base_name(stem, "bias" if what.endswith("bias") else "weight", names)
            module = target.rpartition(".")[0]
            part = found.setdefault(target, Part(_scale(config, (module, *(("lm_head",) if target in HEAD_NAMES else ()))) * weight))
            value = file.get_tensor(key)
            part.float64 |= value.dtype == torch.float64
            _enter(part, what, value.double(), config, stem)
    return found


def _cut(name: str) -> tuple[str, str]:
    """(the module, what of it): 'x.q_proj.lora_A.weight' -> ('x.q_proj', 'lora_A.weight')."""
    for mark in (".lora_", ".token_adapter", ".base_layer"):
        stem, found, what = name.partition(mark)
        if found:
            return stem, mark[1:] + what
    stem, _, what = name.rpartition(".")
    return stem, what


def _enter(part: Part, what: str, value: Tensor, config: Mapping[str, Any], stem: str) -> None:
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
        part.rows = dict(zip(ids, value, strict=True))
    else:
        saved = any(stem.endswith(name) for name in config.get("modules_to_save") or ())
        part.whole, part.base_layer = value, what.startswith("base_layer") or not saved


def _base_name(stem: str, part: str, names: Sequence[str]) -> str:
    """The tensor of the base that an adapter's name means: the one that ends as it does, from the longest end on."""
    if "lm_head.weight" not in names and stem.endswith("lm_head"):  # what transformers 5 calls the head of every family
        stem = "embed_out"
    words = f"{stem}.{part}".split(".")
    for start in range(len(words)):
        end = ".".join(words[start:])
        found = [name for name in names if name == end or name.endswith(f".{end}")]
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
        return self._changed(parameter, self._base.read_rows(self._below(parameter), rows), rows).to(dtype)

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
        places = list(places)

        def once(value: Tensor) -> Tensor:
            return value if wide else nearest(value, "F32")

        value = next((part.whole[places] for part in parts if part.whole is not None), before.double())
        plain = [part for part in parts if part.a is not None and part.lengths is None]
        if plain:
            value = once(sum((part.update(places) for part in plain), value))
        for part in parts:
            if part.lengths is not None:
                value = value + part.update(places)
                value = once(value * (part.lengths[places] / value.norm(dim=1))[:, None])
            if part.shift is not None:
                value = once(value + part.scale * part.shift[places])
            for index, place in enumerate(places):
                if place in part.rows:
                    value[index] = once(part.rows[place])
        return value if wide else value.float()


def _places(leaf: Leaf) -> Sequence[int]:
    """The numbers of a leaf's rows in the whole stored tensor."""
    if not isinstance(leaf, Slice):
        return range(leaf.shape[0])
    block = leaf.of.shape[0] // leaf.groups
    return [group * block + leaf.start + row for group in range(leaf.groups) for row in range(leaf.rows)]


def adapted(under: StoredModel, adapters: Sequence[tuple[Path, float]]) -> Adapted:
    """`under` with the adapters in these folders, each with its weight."""
    tied = under.config.tie_word_embeddings
    names = [*under.checkpoint.tensors, *(HEAD_NAMES if tied else ())]
    parts: dict[str, list[Part]] = {}
    for folder, weight in adapters:
        for name, part in read_parts(folder, weight, names).items():
            parts.setdefault(HEAD if name in HEAD_NAMES and tied else name, []).append(part)
    config, leaves, embeddings = under.config, dict(under.leaves), stored(under.leaves[EMBEDDINGS]).tensor
    if tied:
        wholes = [part for name in (HEAD, embeddings) for part in parts.get(name, ()) if part.whole is not None and not part.base_layer]
        if wholes:  # one of the two was trained by itself
            config, leaves[HEAD] = replace(config, tie_word_embeddings=False), leaves[EMBEDDINGS]
        else:
            parts[embeddings] = [*parts.get(embeddings, ()), *parts.pop(HEAD, ())]
    return Adapted(under.checkpoint, config, leaves, under, parts)
