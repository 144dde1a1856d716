"""Faults of files: headers, configuration, companions, manifest, what is not of the merge; and damage without mended digests."""

import json
import os
import shutil
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from scene import Scene
from torch import Tensor

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


def _expression(scene: Scene) -> str | None:
    step = scene.pick()
    assert step is not None
    record = scene.manifest["tensors"][step.name]
    record["expression"] = scene.chance.choice(("seed:model.x", record["expression"] + " as F8", "zeros()"))
    return f"expression of {step.name}"


def _nonfinite(scene: Scene) -> str | None:
    step = scene.pick()
    assert step is not None
    scene.manifest["tensors"][step.name]["nonfinite"] = 3
    return f"nonfinite of {step.name}"


def _source(scene: Scene) -> str | None:
    source, key = scene.chance.choice(list(scene.manifest["sources"])), scene.chance.choice(("path", "config"))
    scene.manifest["sources"][source][key] = "0" * 32
    return f"sources.{source}.{key}"


def _source_digest(scene: Scene) -> str | None:
    source = scene.chance.choice(list(scene.manifest["sources"]))
    files = scene.manifest["sources"][source]["files"]
    if not files:
        return None
    record = files[scene.chance.choice(list(files))]
    tensor = scene.chance.choice(list(record["tensors"]))
    record["tensors"][tensor] = "0" * 32
    record["digest"] = xxhash.xxh3_128_hexdigest("".join([record["header"], *record["tensors"].values()]).encode())
    return f"sources.{source}: digest of {tensor}"


RECIPE: dict[str, Any] = {"random_seed": 99, "method": "franken", "shared": {"make": "copy", "from": "x"}, "experts": ["x"]}


def _recipe(scene: Scene) -> str | None:
    key = scene.chance.choice((*RECIPE, "output.max_shard_size"))
    if key in RECIPE:
        scene.manifest["recipe"][key] = RECIPE[key]
    else:
        scene.manifest["recipe"]["output"]["max_shard_size"] = "7GB"
    return f"recipe.{key}"


def _parameters(scene: Scene) -> str | None:
    key = scene.chance.choice(("total", "active"))
    scene.manifest["parameters"][key] += 1
    return f"parameters.{key}"


def _unused(scene: Scene) -> str | None:
    scene.manifest["unused"].setdefault(next(iter(scene.manifest["sources"])), {})["model.layers.0.x"] = "not needed"
    return "unused"


def _more(scene: Scene) -> str | None:
    scene.manifest["extra"] = 1
    return "an entry more"


ENTRIES: tuple[Callable[[Scene], str | None], ...] = (
    _expression, _nonfinite, _source, _source_digest, _recipe, _parameters, _unused, _more,
)  # fmt: skip


def manifest(scene: Scene) -> str | None:
    """One entry of the manifest says something else, and the seal is right."""
    said = scene.chance.choice(ENTRIES)(scene)
    if said:
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
