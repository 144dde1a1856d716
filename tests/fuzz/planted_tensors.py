"""Faults of tensors, each with its right digest in the manifest: only what the bytes mean can tell."""

import json
import shutil
from typing import Any

import torch
from proofs import Forger
from safetensors.torch import load_file
from scene import Scene, certain, computes

from bam_merge import MergeOptions, expressions
from bam_merge.errors import RecipeError
from bam_merge.planning.make import make_plan
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import parse_recipe


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
    names = [step for step in scene.plan.steps if isinstance(step.expr, expressions.Init) or computes(step)]
    chance.shuffle(names)
    for step in names:
        if scene.put(step, forger.read(step.name)):
            shutil.rmtree(other)
            return f"{step.name} by another {changed}"
    shutil.rmtree(other)
    return None
