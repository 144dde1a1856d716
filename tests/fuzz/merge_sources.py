"""The files of a random merge: its sources' tensors by number alone, configurations, companions, and the recipe."""

import json
from pathlib import Path
from random import Random

import torch
import yaml
from merge_cases import COMPANIONS, DTYPES, Case, Source
from safetensors.torch import save_file
from torch import Tensor

from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import family_tensors
from bam_merge.architectures.tables import load_architecture
from bam_merge.values.tensors import TORCH_DTYPES

HEADS = {"gpt_neox": "embed_out.weight"}
"""The head's name where it is another one than lm_head.weight."""


def write_case(case: Case, home: Path) -> Path:
    """The sources and recipe.yaml of a case, below `home`. Returns the recipe's path."""
    family = load_architecture(case.config["model_type"])
    facts = describe(family, case.config, [])
    for branch, (name, source) in enumerate(case.sources.items()):
        folder = home / name
        folder.mkdir()
        tensors = family_tensors(family, facts, source.spelling)
        stored = {tensor: values(case, source, branch, tensor, shape) for tensor, shape in tensors}
        if source.stored_head and not facts["untied"]:
            stored[HEADS.get(family.name, "lm_head.weight")] = stored[next(iter(stored))].clone()
        _write_files(folder, stored, source.shards)
        config = {"architectures": [family.class_name], "dtype": DTYPES[source.dtype], **case.config}
        (folder / "config.json").write_text(json.dumps(config))
        for file in case.companions:
            (folder / file).write_text(json.dumps(COMPANIONS[file]))
    recipe = home / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(case.recipe, sort_keys=False))
    return recipe


def _write_files(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    if shards > 1:
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def values(case: Case, source: Source, branch: int, tensor: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a source: the seed's normal weights, moved as `source.drift` says, rounded to its dtype."""
    norm = tensor.endswith("weight") and ("norm" in tensor or any(word.startswith("ln_") for word in tensor.split(".")))
    dtype = TORCH_DTYPES[source.vectors if len(shape) == 1 else source.dtype]
    origin = _normal(f"{case.name} {tensor}", shape) * case.std + float(norm)
    step = _normal(f"{case.name} {branch} {tensor}", shape) * case.std * 0.2
    match source.drift:
        case "all":
            moved = origin + step
        case "few":  # most differences are exactly zero
            moved = origin + torch.where(step.abs() > 0.3 * case.std, step, 0.0)
        case "steps":  # differences of a few sizes: ties of every kind
            return (origin.to(dtype).double() + (step / case.std * 4).round() * 2.0**-4 * case.std).to(dtype)
        case "layer 0":
            moved = origin + step if ".0." in tensor else origin
        case "negated":
            moved = -origin if len(shape) > 1 else origin
        case _:
            moved = origin
    return moved.to(dtype)


def _normal(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(Random(name).getrandbits(63)))
