"""Faults for finished merges: each changes one thing, and mends the manifest's digests where a forger would, so that only meaning can tell.

What cannot be told in principle is not planted: a change of a merged number that the rounding of the arithmetic may have made, and the
sign of a zero, which no computation sees (a copy's bytes are compared all the same).
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import xxhash
from merge_cases import Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from verifying import Forger

from bam_merge import MergeOptions, expressions
from bam_merge.checkpoints.provenance import sealed
from bam_merge.errors import RecipeError
from bam_merge.planning.make import make_plan
from bam_merge.planning.plan import Plan, Step
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import parse_recipe

UNITS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""The distance of 1 to the next number."""

LEAST = {"F64": 2.0**-1074, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""The smallest number above zero."""


@dataclass
class Scene:
    """A finished merge in `folder`, and what a planter draws from."""

    case: Case
    plan: Plan
    folder: Path
    chance: Random

    def __post_init__(self) -> None:
        self.forge = Forger(self.folder)
        self.manifest = self.forge.manifest

    def seal(self) -> None:
        self.forge.path.write_bytes(sealed(self.manifest))

    def pick(self, fits: Callable[[Step], bool] = lambda step: True) -> Step | None:
        """One of the output's tensors."""
        found = [step for step in self.plan.steps if fits(step)]
        return self.chance.choice(found) if found else None

    def put(self, step: Step, value: Tensor) -> str | None:
        """Write `value`; its tensor's name, or None where nobody could tell the difference."""
        before = self.forge.read(step.name)
        if not certain(self.plan, step, before, value):
            return None
        self.forge.write(step.name, value)
        return step.name

    def replace(self, name: str, data: bytes) -> str | None:
        """Write another small file, with its right digest in the manifest."""
        path = self.folder / name
        if path.exists() and path.read_bytes() == data:
            return None
        path.write_bytes(data)
        self.manifest["files"][name] = xxhash.xxh3_128_hexdigest(data)
        self.seal()
        return name


def certain(plan: Plan, step: Step, before: Tensor, after: Tensor) -> bool:
    """Whether some element of `after` cannot be what the merge may make of the sources.

    A copy has one right form. A merged element has more where it cancels or was rounded on the way: what its operands' largest elements
    times a hundred roundings allow, and a few roundings to its own dtype, are given away here.
    """
    before, after = before.flatten(), after.flatten()
    if moves_bytes(step):
        return not torch.equal(before.contiguous().view(torch.uint8), after.contiguous().view(torch.uint8))
    same = (before == after) | (before.isnan() & after.isnan())
    if isinstance(step.expr, expressions.Init | expressions.Concat) and not _computes(step):
        return not bool(same.all())
    old, new = before.double(), after.double()
    wide = any(leaf.dtype == "F64" for leaf in expressions.leaves(step.expr))
    slack = 100 * UNITS["F64" if wide else "F32"] * largest(plan, step)
    allowed = slack + 4 * UNITS[step.dtype] * old.abs() + 4 * LEAST[step.dtype]
    return bool((~((new - old).abs() <= allowed) & ~same).any())


def moves_bytes(step: Step) -> bool:
    return expressions.is_copy(step.expr) and {leaf.dtype for leaf in expressions.leaves(step.expr)} == {step.dtype}


def _computes(step: Step) -> bool:
    return any(isinstance(part, expressions.Merge) for part in expressions.parts(step.expr)) or step.expr.dtype != step.dtype


def largest(plan: Plan, step: Step) -> float:
    """The largest magnitude among the source tensors that a step reads."""
    found = 0.0
    for read in expressions.reads(step.expr):
        checkpoint = plan.models[read.source].checkpoint
        with safe_open(checkpoint.path / checkpoint.tensors[read.tensor].file, "pt") as file:
            found = max(found, float(file.get_tensor(read.tensor).double().abs().max()))
    return found


# ---- tensors ---------------------------------------------------------------------------------------------------------------


def a_bit(scene: Scene) -> str | None:
    """One bit of one element."""
    step = scene.pick()
    assert step is not None
    value = scene.forge.read(step.name)
    bits = value.view(-1).view(torch.uint8)
    at, bit = scene.chance.randrange(len(bits)), scene.chance.randrange(8)
    bits[at] ^= 1 << bit
    return scene.put(step, value) and f"bit {bit} of byte {at} of {step.name}"


def an_element(scene: Scene) -> str | None:
    """The first, the last or any element is another number: larger, smaller, negated, zero, that of its neighbour."""
    step = scene.pick()
    assert step is not None
    value = scene.forge.read(step.name)
    flat = value.view(-1)
    at = scene.chance.choice((0, -1, scene.chance.randrange(len(flat))))
    flat[at] = scene.chance.choice((flat[at] * 1.5, flat[at] / 2, -flat[at], 0 * flat[at], flat[at - 1], flat[at] + 1))
    return scene.put(step, value) and f"element {at} of {step.name}"


def not_finite(scene: Scene) -> str | None:
    step = scene.pick()
    assert step is not None
    value = scene.forge.read(step.name)
    value.view(-1)[scene.chance.randrange(value.numel())] = scene.chance.choice((torch.nan, torch.inf, -torch.inf))
    return scene.put(step, value)


def scaled(scene: Scene) -> str | None:
    """A tensor times almost one, or far from it."""
    step = scene.pick()
    assert step is not None
    factor = scene.chance.choice((1.01, 0.99, 1.1, 2.0, -1.0, 0.0))
    value = scene.forge.read(step.name)
    return scene.put(step, (value.double() * factor).to(value.dtype)) and f"{step.name} times {factor}"


def rearranged(scene: Scene) -> str | None:
    """Rows moved by one, reversed columns, a square transposed."""
    step = scene.pick(lambda step: len(step.shape) == 2)
    assert step is not None
    value = scene.forge.read(step.name)
    forms = [value.roll(1, 0), value.roll(1, 1), value.flip(1), value.flip(0), *([value.T] if value.shape[0] == value.shape[1] else [])]
    return scene.put(step, scene.chance.choice(forms))


def narrowed(scene: Scene) -> str | None:
    """Rounded through a narrower dtype on the way."""
    step = scene.pick(lambda step: step.dtype in ("F32", "F64"))
    if step is None:
        return None
    value = scene.forge.read(step.name)
    narrow = scene.chance.choice([torch.bfloat16, torch.float16, *([torch.float32] if step.dtype == "F64" else [])])
    return scene.put(step, value.to(narrow).to(value.dtype)) and f"{step.name} through {narrow}"


def exchanged(scene: Scene) -> str | None:
    """Two tensors of one shape have changed places: of two experts, two layers, two parts."""
    step = scene.pick()
    assert step is not None
    other = scene.pick(lambda item: item.name != step.name and (item.shape, item.dtype) == (step.shape, step.dtype))
    if other is None:
        return None
    mine, theirs = scene.forge.read(step.name), scene.forge.read(other.name)
    if not certain(scene.plan, step, mine, theirs) or not certain(scene.plan, other, theirs, mine):
        return None
    scene.forge.swap(step.name, other.name)
    return f"{step.name} and {other.name}"


def another_source(scene: Scene) -> str | None:
    """An expert's tensor, or a copied one, is that of another source."""
    step = scene.pick(lambda step: expressions.is_copy(step.expr) and isinstance(step.expr, expressions.Read))
    if step is None:
        return None
    assert isinstance(step.expr, expressions.Read)
    model = scene.plan.models[scene.chance.choice(list(scene.plan.models))]
    checkpoint, before = model.checkpoint, scene.forge.read(step.name)
    entry = checkpoint.tensors.get(step.expr.tensor)
    if entry is None:
        return None
    value = load_file(checkpoint.path / entry.file)[step.expr.tensor]
    return scene.put(step, value.to(before.dtype)) and f"{step.name} of {model.name}"


def router(scene: Scene) -> str | None:
    """A router's rows exchanged, one negated, one of another seed, one shifted a little."""
    step = scene.pick(lambda step: step.role.startswith("router"))
    if step is None:
        return None
    value = scene.forge.read(step.name)
    row = scene.chance.randrange(len(value))
    match scene.chance.randrange(4):
        case 0:
            value = value.flip(0)
        case 1:
            value[row] = -value[row]
        case 2:
            value[row] = torch.randn(value.shape[1], generator=torch.Generator().manual_seed(5)).to(value.dtype) * 0.02
        case _:
            value[row] += 0.01
    return scene.put(step, value) and f"row {row} of {step.name}"


CHANGES: dict[str, tuple[Any, ...]] = {
    "density": (0.3, 0.7), "t": (0.45, 0.8), "scale": (0.9, 1.3), "std": (0.03,), "bound": (0.2,), "gain": (0.7,), "base": (), "from": (), "weights": (),
}  # fmt: skip


def another_recipe(scene: Scene) -> str | None:
    """One tensor as another recipe makes it: other density, weights, base, random numbers or method."""
    chance = scene.chance
    recipe = json.loads(json.dumps(scene.case.recipe))
    makes = [recipe["shared"]] if "shared" in recipe else []
    makes += [recipe["router"]] if "init" in recipe.get("router", {}) else []
    makes += [rule for rule in recipe.get("rules", ()) if chance.random() < 0.5]
    if chance.random() < 0.3 or not makes:
        recipe["random_seed"] = 17
        changed = "random_seed"
    else:
        make = chance.choice(makes)
        changed = chance.choice([key for key in CHANGES if key in make] or ["make"])
        if changed == "make" and "make" in make and "make" != "mean":
            for key in list(make.keys() - {"roles", "layers"}):
                del make[key]
            make |= {"make": "copy", "from": next(iter(scene.case.sources))}
        elif CHANGES.get(changed):
            make[changed] = chance.choice(CHANGES[changed])
        else:
            return None
    try:
        plan = make_plan(parse_recipe(recipe, scene.folder.parent))
    except RecipeError:
        return None
    if [step.name for step in plan.steps] != [step.name for step in scene.plan.steps]:
        return None
    other = publish(plan, scene.folder.parent / "other", MergeOptions(workers=1, verify=False))
    forger = Forger(other)
    names = [step for step in scene.plan.steps if isinstance(step.expr, expressions.Init) or _computes(step)]
    chance.shuffle(names)
    for step in names:
        if scene.put(step, forger.read(step.name)):
            shutil.rmtree(other)
            return f"{step.name} by another {changed}"
    shutil.rmtree(other)
    return None


# ---- headers and files -----------------------------------------------------------------------------------------------------

LOOKALIKE = {"F16": "BF16", "BF16": "F16", "F32": "I32", "F64": "I64"}


def another_header(scene: Scene) -> str | None:
    """A header in which two names have changed places, or a dtype of the same size stands; the manifest agrees."""
    file = scene.chance.choice(scene.plan.shards).file
    path = scene.folder / file
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = scene.chance.choice([key for key in header if key != "__metadata__"])
    alike = [key for key in header if key != name and key != "__metadata__" and header[key]["shape"] == header[name]["shape"]]
    if alike and scene.chance.random() < 0.5:
        other = scene.chance.choice(alike)
        if header[name]["dtype"] != header[other]["dtype"] or scene.forge.read(name).equal(scene.forge.read(other)):
            return None
        header[name], header[other] = header[other], header[name]
        mine, theirs = scene.manifest["tensors"][name], scene.manifest["tensors"][other]
        mine["digest"], theirs["digest"] = theirs["digest"], mine["digest"]
        said = f"{name} and {other} in the header of {file}"
    else:
        header[name]["dtype"] = scene.manifest["tensors"][name]["dtype"] = LOOKALIKE[header[name]["dtype"]]
        said = f"{name} as {header[name]['dtype']} in the header of {file}"
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > length:
        return None
    raw = data[:8] + text.ljust(length)
    path.write_bytes(raw + data[8 + length :])
    scene.manifest["shards"][file]["header"] = xxhash.xxh3_128_hexdigest(raw)
    scene.seal()
    return said


def more_or_less(scene: Scene) -> str | None:
    """A file with one tensor too many or too few, in the manifest too."""
    file = scene.chance.choice(scene.plan.shards).file
    path = scene.folder / file
    tensors = load_file(path)
    name = scene.chance.choice(list(tensors))
    if len(tensors) > 1 and scene.chance.random() < 0.5:
        del tensors[name], scene.manifest["tensors"][name]
        said = f"{name} is missing"
    else:
        extra = f"{name}_scale"
        tensors[extra] = torch.ones(2, dtype=tensors[name].dtype)
        record = {**scene.manifest["tensors"][name], "shape": [2], "digest": _digest(tensors[extra])}
        scene.manifest["tensors"][extra] = record
        said = f"{extra} is added"
    save_file(tensors, path, {"format": "pt"})
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    scene.manifest["shards"][file] = {"bytes": len(data), "header": xxhash.xxh3_128_hexdigest(data[:length])}
    scene.seal()
    return said


def _digest(value: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(value.contiguous().view(torch.uint8).numpy().tobytes())


def configuration(scene: Scene) -> str | None:
    """A key of config.json has another value, is missing, or is one too many."""
    config = json.loads((scene.folder / "config.json").read_text())
    key = scene.chance.choice(list(config))
    match scene.chance.randrange(4):
        case 0:
            del config[key]
        case 1:
            key = scene.chance.choice(("auto_map", "quantization_config", "_attn_implementation", "rope_theta", "head_dim", "x"))
            if key in config:
                return None
            config[key] = {"AutoModelForCausalLM": "evil.Model"} if key == "auto_map" else 7
        case _:
            config[key] = _other(config[key], scene.chance)
    return scene.replace("config.json", json.dumps(config, indent=2).encode()) and f"config.json: {key}"


def _other(value: Any, chance: Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + chance.choice((1, -1, 2)) if value else 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list) and value:
        return [*value[:-1], _other(value[-1], chance)]
    if isinstance(value, dict) and value:
        key = chance.choice(list(value))
        return {**value, key: _other(value[key], chance)}
    return 1


def companion(scene: Scene) -> str | None:
    """A file beside the tensors says something else, is missing, or is one too many; the manifest agrees."""
    chance, files = scene.chance, scene.manifest["files"]
    names = [name for name in files if name != "config.json"]
    name = chance.choice(names)
    kind = chance.randrange(4)
    if kind == 0:
        (scene.folder / name).unlink()
        del files[name]
        scene.seal()
        return f"{name} is missing"
    if kind == 1:
        name = chance.choice(("tokenizer.model", "chat_template.jinja", "vocab.json", "merges.txt", "custom.py", "added_tokens.json"))
        return scene.replace(name, b"{}") and f"{name} is added"
    data = (scene.folder / name).read_bytes()
    if not name.endswith(".json"):
        return scene.replace(name, data + b"\n# one line more\n")
    if (
        kind == 2 and name != "model.safetensors.index.json"
    ):  # a file of the seed is copied byte for byte; an index says the same in any form
        return scene.replace(name, data.replace(b" ", b"  ", 1))
    return scene.replace(name, json.dumps(_other(json.loads(data), chance)).encode())


FOREIGN = (
    "custom_generate/generate.py", "additional_chat_templates/x.jinja", "kernel.so", "X.PY", ".hidden/a.bin", "model.safetensors.bak", "pytorch_model.bin",
    "sub/config.json", "adapter_config.json", "notes.md", "modeling_bam.pyc", "Config.json", "chat_template.jinja2",
)  # fmt: skip


def foreign(scene: Scene) -> str | None:
    """An entry that is not of the merge: a file, a link, an empty folder."""
    name = scene.chance.choice(FOREIGN)
    path = scene.folder / name
    path.parent.mkdir(exist_ok=True)
    match scene.chance.randrange(4):
        case 0:
            os.symlink("/etc/hostname", path)
            return f"{name}, a link"
        case 1:
            path.mkdir()
            return f"{name}, a folder"
        case _:
            path.write_bytes(b"{}")
            return name


def a_link(scene: Scene) -> str | None:
    """A file of the merge is a link to its own bytes, outside."""
    name = scene.chance.choice([*scene.manifest["files"], *scene.manifest["shards"]])
    away = scene.folder.parent / f"away-{name}"
    shutil.move(scene.folder / name, away)
    os.symlink(away, scene.folder / name)
    return f"{name}, a link"


def manifest(scene: Scene) -> str | None:
    """One entry of the manifest says something else, and the seal is right."""
    document, chance = scene.manifest, scene.chance
    match chance.randrange(9):
        case 0:
            step = scene.pick()
            assert step is not None
            record = document["tensors"][step.name]
            record["expression"] = scene.chance.choice(("seed:model.x", record["expression"] + " as F8", "zeros()"))
            said = f"expression of {step.name}"
        case 1:
            source = chance.choice(list(document["sources"]))
            key = chance.choice(("path", "config"))
            document["sources"][source][key] = "0" * 32
            said = f"sources.{source}.{key}"
        case 2:
            source = chance.choice(list(document["sources"]))
            files = document["sources"][source]["files"]
            if not files:
                return None
            file = chance.choice(list(files))
            record = files[file]
            tensor = chance.choice(list(record["tensors"]))
            record["tensors"][tensor] = "0" * 32
            record["digest"] = xxhash.xxh3_128_hexdigest("".join([record["header"], *record["tensors"].values()]).encode())
            said = f"sources.{source}: digest of {tensor}"
        case 3:
            key = chance.choice(("random_seed", "method", "shared", "experts"))
            document["recipe"][key] = {"random_seed": 99, "method": "franken", "shared": {"make": "copy", "from": "x"}, "experts": ["x"]}[
                key
            ]
            said = f"recipe.{key}"
        case 4:
            key = chance.choice(("total", "active"))
            document["parameters"][key] += 1
            said = f"parameters.{key}"
        case 5:
            name = next(iter(document["sources"]))
            document["unused"].setdefault(name, {})["model.layers.0.x"] = "not needed"
            said = "unused"
        case 6:
            document["extra"] = 1
            said = "an entry more"
        case 7:
            step = scene.pick()
            assert step is not None
            document["tensors"][step.name]["nonfinite"] = 3
            said = f"nonfinite of {step.name}"
        case _:
            document["recipe"]["output"]["max_shard_size"] = "7GB"
            said = "recipe.output.max_shard_size"
    scene.seal()
    return said


# ---- damage, without mended digests ------------------------------------------------------------------------------------------


def damaged(scene: Scene) -> str | None:
    """A bit of any file flipped, a file cut, emptied or deleted."""
    path = scene.chance.choice(sorted(scene.folder.iterdir()))
    data = bytearray(path.read_bytes())
    match scene.chance.randrange(6):
        case 0:
            path.unlink()
            return f"{path.name} deleted"
        case 1:
            path.write_bytes(data[: scene.chance.randrange(len(data))])
            return f"{path.name} cut"
        case _:
            at = scene.chance.randrange(len(data))
            data[at] ^= 1 << scene.chance.randrange(8)
            path.write_bytes(data)
            return f"byte {at} of {path.name}"


FAULTS: dict[str, Callable[[Scene], str | None]] = {
    "a bit flipped": a_bit, "an element replaced": an_element, "NaN or infinity": not_finite, "a tensor scaled": scaled, "a tensor rearranged": rearranged,
    "a tensor through a narrower dtype": narrowed, "two tensors exchanged": exchanged, "a tensor of another source": another_source, "a router's row": router,
    "a tensor by another recipe": another_recipe, "another header": another_header, "a tensor more or less": more_or_less,
    "another configuration": configuration, "another companion": companion, "a foreign entry": foreign, "a link in a file's place": a_link,
    "another manifest": manifest, "damage": damaged,
}  # fmt: skip


def plant(scene: Scene, first: int) -> tuple[str, str]:
    """Plant one fault, the kind with the number `first` or the next that is possible here: its kind, and what was done."""
    kinds = list(FAULTS)
    for number in range(first, first + len(kinds)):
        kind = kinds[number % len(kinds)]
        for _ in range(10):
            if said := FAULTS[kind](scene):
                return kind, said
            scene.__post_init__()  # without what a planter had begun
    raise AssertionError("no fault can be planted")
