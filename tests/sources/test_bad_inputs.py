"""Bad inputs through the command line: what is refused, and the exact words. Exit status 2, nothing written, no traceback.

The numbers are the rows that every release is held to. HOME stands for the folder of the test; `law` is the source that is damaged. Row 12 is
in test_recipe.py, the limits of row 15 and attacks that succeed without anything being refused in test_bad_inputs_limits.py.
"""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from safetensors.torch import load_file, save_file

from bam_merge.checkpoints.folder import INDEX

LAYER = "model.layers.1.self_attn.k_proj.weight"
ONE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Damage = Callable[[Path], Any]


# ---- damage ----------------------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / ONE)
    change(tensors)
    save_file(tensors, folder / ONE)


def add(folder: Path, name: str) -> None:
    """Add a tensor of any name: the header is written by hand, for the library refuses some."""
    header, data = split(folder / ONE)
    header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
    write(folder / ONE, json.dumps(header).encode(), data + bytes(8))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def raw(change: Callable[[bytes], bytes]) -> Damage:
    """Change the header's text."""

    def damage(folder: Path) -> None:
        header, data = split(folder / ONE)
        write(folder / ONE, change(json.dumps(header).encode()), data)

    return damage


def record(**changes: Any) -> Damage:
    """Change the header's record of one tensor."""

    def damage(folder: Path) -> None:
        header, data = split(folder / ONE)
        header[LAYER].update(changes)
        write(folder / ONE, json.dumps(header).encode(), data)

    return damage


def spans(change: Callable[[list[Any], bytes], bytes]) -> Damage:
    """Change where the tensors are: `change` gets the records in file order, and the data that it returns changed."""

    def damage(folder: Path) -> None:
        header, data = split(folder / ONE)
        records = sorted((item for name, item in header.items() if name != "__metadata__"), key=lambda item: item["data_offsets"])
        data = change(records, data)
        write(folder / ONE, json.dumps(header).encode(), data)

    return damage


def length(value: int) -> Damage:
    return lambda folder: write(
        folder / ONE, *[json.dumps(part).encode() if isinstance(part, dict) else part for part in split(folder / ONE)], value
    )


def shift_last(records: list[Any], data: bytes, by: int, pad: bytes = b"") -> bytes:
    records[-1]["data_offsets"] = [offset + by for offset in records[-1]["data_offsets"]]
    return data + pad


def alias(records: list[Any], data: bytes) -> bytes:
    records[-1].update(records[-2])
    return data[: records[-2]["data_offsets"][1]]


def cut(size: int) -> Damage:
    """Leave `size` bytes of the file, or cut -size off."""

    def damage(folder: Path) -> None:
        os.truncate(folder / ONE, size if size >= 0 else (folder / ONE).stat().st_size + size)

    return damage


def header_only(folder: Path, less: int = 0) -> None:
    os.truncate(folder / ONE, 8 + int.from_bytes((folder / ONE).read_bytes()[:8], "little") - less)


def vast(folder: Path) -> None:
    write(folder / ONE, b"{}", b"", 100_000_001)
    os.truncate(folder / ONE, 200_000_000)


def content(data: bytes, name: str = ONE) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def shard(folder: Path) -> None:
    """Split model.safetensors in two shards with an index."""
    tensors = load_file(folder / ONE)
    names = sorted(tensors)
    weight_map = {}
    for part, file in ((names[:9], FIRST), (names[9:], SECOND)):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / ONE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Shard the model, then change its index."""

    def damage(folder: Path) -> None:
        shard(folder)
        document = json.loads((folder / INDEX).read_text())
        change(document)
        (folder / INDEX).write_text(json.dumps(document))

    return damage


def moved(name: str) -> Damage:
    return index(lambda document: document["weight_map"].update({LAYER: name}))


def index_text(text: bytes) -> Damage:
    return lambda folder: (shard(folder), (folder / INDEX).write_bytes(text))


def both_shards(folder: Path) -> None:
    shard(folder)
    tensors = load_file(folder / SECOND)
    save_file({**load_file(folder / FIRST), LAYER: tensors[LAYER], "model.norm.weight": tensors["model.norm.weight"]}, folder / FIRST)


def only_pickle(folder: Path) -> None:
    (folder / ONE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def replace(name: str, make: Callable[[Path], Any]) -> Damage:
    """Put something else where a file was."""
    return lambda folder: ((folder / name).unlink(missing_ok=True), make(folder / name))


def with_index(folder: Path) -> None:
    shutil.copy(folder / ONE, folder / "x")
    shard(folder)
    os.rename(folder / "x", folder / ONE)


# ---- what nobody can read: a merge, a plan, an inspection and a comparison say the same ------------------------------------

UNREADABLE: dict[str, tuple[Damage, str]] = {
    "1 truncated by one byte": (cut(-1), "HOME/law/model.safetensors: the header promises 74,416 bytes, the file has 74,415; lm_head.weight is the first tensor cut short. The file is damaged: download or write it again."),
    "1 truncated by half": (cut(30_000), "HOME/law/model.safetensors: the header promises 74,416 bytes, the file has 30,000; model.layers.0.mlp.up_proj.weight is the first tensor cut short. The file is damaged: download or write it again."),
    "1 only the header left": (header_only, "HOME/law/model.safetensors: the header promises 74,416 bytes, the file has 2,096; model.embed_tokens.weight is the first tensor cut short. The file is damaged: download or write it again."),
    "1 truncated inside the header": (lambda law: header_only(law, 100), "HOME/law/model.safetensors: its first 8 bytes promise a header of 2,088 bytes; the file has 1,996 bytes and a header at most 100,000,000. It is truncated, or not a safetensors file."),
    "1 eight bytes left": (cut(8), "HOME/law/model.safetensors: its first 8 bytes promise a header of 2,088 bytes; the file has 8 bytes and a header at most 100,000,000. It is truncated, or not a safetensors file."),
    "1 seven bytes left": (cut(7), "HOME/law/model.safetensors: 7 bytes, too short for a safetensors header. Is the download complete?"),
    "1 nothing left": (cut(0), "HOME/law/model.safetensors: 0 bytes, too short for a safetensors header. Is the download complete?"),
    "2 trailing bytes": (spans(lambda _, data: data + b"12345"), "HOME/law/model.safetensors: 5 bytes follow the last tensor, lm_head.weight. The file is damaged: download or write it again."),
    "2 a hole": (spans(lambda records, data: shift_last(records, data, 8, bytes(8))), "HOME/law/model.safetensors: a hole between model.norm.weight and lm_head.weight: bytes 64128 and 64136. The file is damaged: download or write it again."),
    "2 an overlap": (spans(lambda records, data: shift_last(records, data[:-4], -4)), "HOME/law/model.safetensors: an overlap between model.norm.weight and lm_head.weight: bytes 64128 and 64124. The file is damaged: download or write it again."),
    "2 an alias": (spans(alias), "HOME/law/model.safetensors: an overlap between model.norm.weight and lm_head.weight: bytes 64128 and 64000. The file is damaged: download or write it again."),
    "3 header of no bytes": (length(0), "HOME/law/model.safetensors: its first 8 bytes promise a header of 0 bytes; the file has 74,597 bytes and a header at most 100,000,000. It is truncated, or not a safetensors file."),
    "3 header of one byte": (length(1), "HOME/law/model.safetensors: its first 8 bytes promise a header of 1 bytes; the file has 74,597 bytes and a header at most 100,000,000. It is truncated, or not a safetensors file."),
    "3 header beyond the file": (length(90_000_000), "HOME/law/model.safetensors: its first 8 bytes promise a header of 90,000,000 bytes; the file has 74,597 bytes and a header at most 100,000,000. It is truncated, or not a safetensors file."),
    "3 header of more than 100 MB": (vast, "HOME/law/model.safetensors: its first 8 bytes promise a header of 100,000,001 bytes; the file has 200,000,000 bytes and a header at most 100,000,000. It is truncated, or not a safetensors file."),
    "3 header of 2^63 bytes": (length(2**63), "HOME/law/model.safetensors: its first 8 bytes promise a header of 9,223,372,036,854,775,808 bytes; the file has 74,597 bytes and a header at most 100,000,000. It is truncated, or not a safetensors file."),
    "3 header of 2^64 - 1 bytes": (length(2**64 - 1), "HOME/law/model.safetensors: its first 8 bytes promise a header of 18,446,744,073,709,551,615 bytes; the file has 74,597 bytes and a header at most 100,000,000. It is truncated, or not a safetensors file."),
    "4 not UTF-8": (raw(lambda text: text.replace(b"lm_head", b"lm_\xff\xfe")), "HOME/law/model.safetensors: not UTF-8 text (byte 2187). The file is damaged: download or write it again."),
    "4 an array": (raw(lambda text: b"[" + text + b"]"), "HOME/law/model.safetensors: the header does not begin with '{'. The file is damaged: download or write it again."),
    "4 NUL padding": (raw(lambda text: text + bytes(8)), "HOME/law/model.safetensors: not valid JSON: Extra data (line 1, column 2270). The file is damaged: download or write it again."),
    "4 a leading space": (raw(lambda text: b" " + text), "HOME/law/model.safetensors: the header does not begin with '{'. The file is damaged: download or write it again."),
    "4 JSON nested 100,000 deep": (raw(lambda text: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "HOME/law/model.safetensors: nested too deeply. The file is damaged: download or write it again."),
    "4 JSON nested 1,000,000 deep": (raw(lambda text: b'{"a":' * 1_000_000), "HOME/law/model.safetensors: nested too deeply. The file is damaged: download or write it again."),
    "4 trailing JSON": (raw(lambda text: text + b"{}"), "HOME/law/model.safetensors: not valid JSON: Extra data (line 1, column 2270). The file is damaged: download or write it again."),
    "4 a name that stands twice": (raw(lambda text: text[:-1] + b', "lm_head.weight": {}}'), "HOME/law/model.safetensors: the key 'lm_head.weight' stands twice. The file is damaged: download or write it again."),
    "4 half a surrogate pair": (raw(lambda text: text.replace(b"lm_head", b"lm_\\ud800")), "HOME/law/model.safetensors: the lone surrogate \\ud800 is no character. The file is damaged: download or write it again."),
    "4 NaN": (raw(lambda text: text.replace(b"[32]", b"[NaN]", 1)), "HOME/law/model.safetensors: NaN is not a JSON number. The file is damaged: download or write it again."),
    "4 a number of 5,000 digits": (raw(lambda text: text.replace(b"[32]", b"[" + b"9" * 5000 + b"]", 1)), "HOME/law/model.safetensors: a number of thousands of digits. The file is damaged: download or write it again."),
    "4 metadata that is no text": (raw(lambda text: text.replace(b'"pt"', b"1")), "HOME/law/model.safetensors: __metadata__ does not map strings to strings. The file is damaged: download or write it again."),
    "5 a negative dimension": (record(shape=[-16, -32]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: shape and data_offsets must be non-negative integers. The file is damaged: download or write it again."),
    "5 a float dimension": (record(shape=[16.0, 32]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: shape and data_offsets must be non-negative integers. The file is damaged: download or write it again."),
    "5 a Boolean dimension": (record(shape=[True, 512]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: shape and data_offsets must be non-negative integers. The file is damaged: download or write it again."),
    "5 a huge dimension": (record(shape=[2**63 - 1]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: a shape of 1 dimensions that no file can hold. The file is damaged: download or write it again."),
    "5 a product that overflows": (record(shape=[2**32, 2**32, 2]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: a shape of 3 dimensions that no file can hold. The file is damaged: download or write it again."),
    "5 a product of a million dimensions": (record(shape=[2**62] * 1_000_000), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: a shape of 1000000 dimensions that no file can hold. The file is damaged: download or write it again."),
    "5 a million dimensions": (record(shape=[1] * 1_000_000), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: F32 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1... (3000000 characters) takes 4 bytes, its data_offsets span 2,048. The file is damaged: download or write it again."),
    "5 a size that is not shape times dtype": (record(shape=[16, 31]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: F32 [16, 31] takes 1,984 bytes, its data_offsets span 2,048. The file is damaged: download or write it again."),
    "5 half a byte": (record(dtype="F4", shape=[3]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: F4 [3] takes 12 bits, its data_offsets span 2,048. The file is damaged: download or write it again."),
    "5 an unknown dtype": (record(dtype="F33\x1b[31m"), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight has the unknown dtype F33\\x1b[31m. The file is damaged: download or write it again."),
    "5 a dtype that is no text": (record(dtype=[]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight has the unknown dtype []. The file is damaged: download or write it again."),
    "5 offsets that run backwards": (record(data_offsets=[8, 0]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: F32 [16, 32] takes 2,048 bytes, its data_offsets span -8. The file is damaged: download or write it again."),
    "5 offsets beyond 2^63": (record(data_offsets=[0, 2**63]), "HOME/law/model.safetensors: model.layers.1.self_attn.k_proj.weight: shape and data_offsets must be non-negative integers. The file is damaged: download or write it again."),
    "5 a record with something more": (record(x=1), "HOME/law/model.safetensors: the record of model.layers.1.self_attn.k_proj.weight does not have exactly dtype, shape and data_offsets. The file is damaged: download or write it again."),
    "6 a git-lfs pointer": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "HOME/law/model.safetensors: this is a git-lfs pointer, not the file itself: run `git lfs pull`."),
    "6 an HTML page": (content(b"<!DOCTYPE html><html></html>"), "HOME/law/model.safetensors: this is an HTML or XML page, probably a failed download: download it again."),
    "6 a pickle": (content(pickle.dumps({"a": 1})), "HOME/law/model.safetensors: this is a Python pickle, which is never loaded here: convert it to safetensors."),
    "6 a zip archive": (content(b"PK\x03\x04" + b"x" * 50), "HOME/law/model.safetensors: this is a zip archive (a PyTorch .bin?): convert it to safetensors."),
    "6 a GGUF file": (content(b"GGUF" + b"\3\0\0\0" * 10), "HOME/law/model.safetensors: this is a GGUF file: convert it to a Hugging Face folder."),
    "6 a config.json that is a git-lfs pointer": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "config.json"), "HOME/law/config.json: this is a git-lfs pointer, not the file itself: run `git lfs pull`."),
    "6 only pickles": (only_pickle, "HOME/law: only pytorch_model.bin present. Pickled weights are never loaded, since loading them runs code. Convert them once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)."),
    "7 index missing": (lambda law: (shard(law), (law / INDEX).unlink()), "HOME/law: model.safetensors.index.json is missing, and there is no model.safetensors (found model-00001-of-00002.safetensors, model-00002-of-00002.safetensors)."),
    "7 index and single file": (with_index, "HOME/law: both model.safetensors and model.safetensors.index.json are present. Remove the stale one."),
    "7 index that is no JSON": (index_text(b'{"weight_map": '), "HOME/law/model.safetensors.index.json: not valid JSON: Expecting value (line 1, column 16). The file is damaged: download or write it again."),
    "7 index that is an HTML page": (index_text(b"<html>"), "HOME/law/model.safetensors.index.json: this is an HTML or XML page, probably a failed download: download it again."),
    "7 index with a name twice": (index_text(b'{"weight_map": {"a": "x", "a": "y"}}'), "HOME/law/model.safetensors.index.json: the key 'a' stands twice. The file is damaged: download or write it again."),
    "7 index without a weight_map": (index(lambda i: i.pop("weight_map")), "HOME/law/model.safetensors.index.json: weight_map must be an object that maps tensor names to file names. The file is damaged: download or write it again."),
    "7 index that maps to numbers": (index(lambda i: i["weight_map"].update({LAYER: 1})), "HOME/law/model.safetensors.index.json: weight_map must be an object that maps tensor names to file names. The file is damaged: download or write it again."),
    "7 index that lists what no shard holds": (index(lambda i: i["weight_map"].update({"gh\x1bost": FIRST})), "HOME/law/model.safetensors.index.json: lists gh\\x1bost, which no shard holds. Is the download complete?"),
    "7 index that does not list what a shard holds": (index(lambda i: i["weight_map"].pop(LAYER)), "HOME/law/model.safetensors.index.json: does not list model.layers.1.self_attn.k_proj.weight, which the shards hold. The file is damaged: download or write it again."),
    "7 index that names the wrong shard": (moved(FIRST), "HOME/law/model.safetensors.index.json: places model.layers.1.self_attn.k_proj.weight in the wrong shard. The file is damaged: download or write it again."),
    "7 a tensor in two shards": (both_shards, "HOME/law: model.layers.1.self_attn.k_proj.weight, model.norm.weight in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors. Keep one."),
    "7 a shard missing": (lambda law: (shard(law), (law / SECOND).unlink()), "HOME/law: 1 of 2 files that model.safetensors.index.json names are missing: model-00002-of-00002.safetensors. Is the download complete?"),
    "7 both shards damaged": (lambda law: (shard(law), os.truncate(law / FIRST, 5), os.truncate(law / SECOND, 6)), "HOME/law/model-00001-of-00002.safetensors: 5 bytes, too short for a safetensors header. Is the download complete?\nHOME/law/model-00002-of-00002.safetensors: 6 bytes, too short for a safetensors header. Is the download complete?"),
    "7 weight_map climbs out": (moved("../seed/model.safetensors"), "HOME/law/model.safetensors.index.json: weight_map names ../seed/model.safetensors, which is no plain file in this folder. Correct the index."),
    "7 weight_map is absolute": (moved("/etc/passwd"), "HOME/law/model.safetensors.index.json: weight_map names /etc/passwd, which is no plain file in this folder. Correct the index."),
    "7 weight_map is a URL": (moved("https://example.org/model.safetensors"), "HOME/law/model.safetensors.index.json: weight_map names https://example.org/model.safetensors, which is no plain file in this folder. Correct the index."),
    "7 weight_map holds a NUL": (moved("model\0.safetensors"), "HOME/law/model.safetensors.index.json: weight_map names model\\x00.safetensors, which is no plain file in this folder. Correct the index."),
    "7 weight_map holds a backslash": (moved("..\\seed\\model.safetensors"), "HOME/law/model.safetensors.index.json: weight_map names ..\\seed\\model.safetensors, which is no plain file in this folder. Correct the index."),
    "7 weight_map names a drive": (moved("C:model.safetensors"), "HOME/law/model.safetensors.index.json: weight_map names C:model.safetensors, which is no plain file in this folder. Correct the index."),
    "7 weight_map holds an escape": (moved("\x1b]0;x\x07.safetensors"), "HOME/law/model.safetensors.index.json: weight_map names \\x1b]0;x\\x07.safetensors, which is no plain file in this folder. Correct the index."),
    "7 weight_map names the folder": (moved("."), "HOME/law/model.safetensors.index.json: weight_map names ., which is no plain file in this folder. Correct the index."),
    "7 weight_map with a name of 300 bytes": (moved("x" * 300), "HOME/law/" + "x" * 200 + "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx: File name too long."),
    "14 no such folder": (shutil.rmtree, "HOME/law: no such folder."),
    "14 a folder that is a dangling symlink": (lambda law: (shutil.rmtree(law), law.symlink_to("nowhere")), "HOME/law: a symlink to nowhere, which does not exist."),
    "14 no config.json": (lambda law: (law / "config.json").unlink(), "HOME/law: config.json is missing. Is this a Hugging Face folder?"),
    "14 no weights": (lambda law: (law / ONE).unlink(), "HOME/law: no weights found; expected model.safetensors or model.safetensors.index.json."),
    "14 config.json is a dangling symlink": (replace("config.json", lambda path: path.symlink_to("../blobs/0")), "HOME/law/config.json: a symlink to ../blobs/0, which does not exist."),
    "14 weights are a dangling symlink": (replace(ONE, lambda path: path.symlink_to("../blobs/1")), "HOME/law/model.safetensors: a symlink to ../blobs/1, which does not exist."),
    "14 weights are a symlink to themselves": (replace(ONE, lambda path: path.symlink_to(ONE)), "HOME/law/model.safetensors: Too many levels of symbolic links."),
    "14 weights are a folder": (replace(ONE, Path.mkdir), "HOME/law/model.safetensors: not a regular file."),
    "14 weights are a FIFO": (replace(ONE, os.mkfifo), "HOME/law/model.safetensors: not a regular file."),
    "14 config.json is a FIFO": (replace("config.json", os.mkfifo), "HOME/law/config.json: not a regular file."),
    "14 config.json is a folder": (replace("config.json", Path.mkdir), "HOME/law/config.json: not a regular file."),
    "14 config.json is a device without end": (replace("config.json", lambda path: path.symlink_to("/dev/zero")), "HOME/law/config.json: not a regular file."),
    "14 config.json is no JSON": (content(b"{", "config.json"), "HOME/law/config.json: not valid JSON: Expecting property name enclosed in double quotes (line 1, column 2). The file is damaged: download or write it again."),
    "14 config.json is a list": (content(b"[]", "config.json"), "HOME/law/config.json: not a JSON object. The file is damaged: download or write it again."),
    "14 config.json with a key twice": (content(b'{"a": 1, "a": 2}', "config.json"), "HOME/law/config.json: the key 'a' stands twice. The file is damaged: download or write it again."),
    "14 config.json with NaN": (content(b'{"rms_norm_eps": NaN}', "config.json"), "HOME/law/config.json: NaN is not a JSON number. The file is damaged: download or write it again."),
    "14 config.json with a number beyond float64": (content(b'{"rms_norm_eps": 1e999}', "config.json"), "HOME/law/config.json: 1e999 is beyond float64. The file is damaged: download or write it again."),
    "14 config.json nested 65 deep": (content(b'{"bos_token_id": ' + b"[" * 65 + b"]" * 65 + b"}", "config.json"), "HOME/law/config.json: nested more than 64 deep. The file is damaged: download or write it again."),
    "14 config.json of more than 100 MB": (lambda law: os.truncate(law / "config.json", 100_000_001), "HOME/law/config.json: larger than 100,000,000 bytes."),
}  # fmt: skip


def tree(home: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below `home`, by mode, size and time of change."""
    paths = {str(path.relative_to(home)): path.lstat() for path in home.rglob("*")}
    return {name: (status.st_mode, status.st_size, status.st_mtime_ns) for name, status in paths.items()}


@contextmanager
def deadline(seconds: int = 60) -> Iterator[None]:
    """Fail rather than hang."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def said(run: Any, home: Path, *arguments: object) -> list[str]:
    """What a command says that must refuse, one message each, HOME for the folder; that it wrote nothing is checked."""
    before = tree(home)
    with deadline():
        result: Result = run(*arguments)
    assert (result.status, result.out) == (2, ""), result
    assert tree(home) == before
    lines = result.err.removesuffix("\n").replace(str(home), "HOME").split("\n")
    assert all(line.isprintable() and len(line) < 1500 for line in lines)
    reading = arguments[0] in ("inspect", "diff")
    if len(lines) > 1:
        assert lines.pop() == f"{len(lines)} problems{'' if reading else '; nothing was written'}."
    assert all(line.startswith("error: ") for line in lines), result.err
    return [line.removeprefix("error: ") for line in lines]


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_nobody_can_read(name: str, llamas: Path, run: Any) -> None:
    damage, message = UNREADABLE[name]
    recipe = write_recipe(llamas)
    damage(llamas / "law")
    messages = message.split("\n")
    for merging in ((recipe,), ("plan", recipe), ("plan", recipe, "--json")):
        assert said(run, llamas, *merging) == [f"sources.law: {message}" for message in messages]
    assert said(run, llamas, "inspect", llamas / "law") == messages
    assert said(run, llamas, "diff", llamas / "seed", llamas / "law") == messages


# ---- what is a model, but not one that can be merged with the others -------------------------------------------------------

UNFIT: dict[str, tuple[Damage, str]] = {
    "8 a tensor missing": (lambda law: edit_tensors(law, lambda t: t.pop(LAYER)), "sources.law: model.layers.1.self_attn.k_proj.weight missing: 1 tensor(s). Is the download complete?"),
    "8 the head missing": (lambda law: edit_tensors(law, lambda t: t.pop("lm_head.weight")), "sources.law: lm_head.weight missing: 1 tensor(s) (config.json has tie_word_embeddings=false, so the head must be there). Is the download complete?"),
    "8 a tensor too much": (lambda law: add(law, "model.layers.2.mlp.up_proj.weight"), "sources.law: model.layers.2.mlp.up_proj.weight: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "8 a bias that config.json denies": (lambda law: edit_tensors(law, lambda t: t.update({LAYER.replace("weight", "bias"): torch.zeros(16)})), "sources.law: model.layers.1.self_attn.k_proj.bias is present, but config.json has attention_bias=false, so that transformers would ignore it. Correct config.json or remove the tensor."),
    "8 another shape": (lambda law: edit_tensors(law, lambda t: t.update({LAYER: torch.zeros(16, 31)})), "sources.law: model.layers.1.self_attn.k_proj.weight is [16, 31], config.json implies [16, 32] (K*D, d)."),
    "8 another dtype": (lambda law: edit_tensors(law, lambda t: t.update({LAYER: t[LAYER].half()})), "HOME/recipe.yaml: output.dtype: source keeps what is stored, but the sources disagree: seed:model.layers.1.self_attn.k_proj.weight is F32; law:model.layers.1.self_attn.k_proj.weight is F16. Set dtype: bfloat16 (or another)."),
    "8 another vocabulary": (lambda law: (edit_config(law, vocab_size=66), edit_tensors(law, lambda t: t.update({n: torch.zeros(66, 32) for n in ("lm_head.weight", "model.embed_tokens.weight")}))), "sources.law: vocab_size = 66, sources.seed has 64 (config.json). Embeddings are never cut; align the tokenizers first."),
    "8 other heads": (lambda law: edit_config(law, num_attention_heads=2, num_key_value_heads=1, head_dim=16), "sources.law: num_attention_heads = 2, sources.seed has 4 (config.json). Experts must share it.\nsources.law: num_key_value_heads = 1, sources.seed has 2 (config.json). Experts must share it.\nsources.law: head_dim = 16, sources.seed has 8 (config.json). Experts must share it."),
    "8 uneven heads": (lambda law: edit_config(law, num_key_value_heads=3), "sources.law: config.json: num_attention_heads 4 is not a multiple of num_key_value_heads 3."),
    "8 another rope_theta": (lambda law: edit_config(law, rope_theta=5e5), "sources.law: rotary embedding differs from sources.seed: rope_theta 500000.0 here, 10000.0 there. Experts must share it."),
    "8 rope scaling": (lambda law: edit_config(law, rope_scaling={"rope_type": "linear", "factor": 2.0, "x\x1b": "y\x1b"}), "sources.law: rotary embedding differs from sources.seed: rope_type 'linear' here, 'default' there; x\\x1b 'y\\x1b' here, none there. Experts must share it."),
    "8 rope per kind of layer": (lambda law: edit_config(law, rope_parameters={"full_attention": {"rope_theta": 3.0}}), "sources.law: config.json: rope_parameters has one set per full_attention; llama has one for all layers."),
    "8 another norm's eps": (lambda law: edit_config(law, rms_norm_eps=1e-6), "sources.law: rms_norm_eps = 1e-06, sources.seed has 1e-05 (config.json). Experts must share it."),
    "8 another activation": (lambda law: edit_config(law, hidden_act="g\x1b[31m"), "sources.law: hidden_act = 'g\\x1b[31m', sources.seed has 'silu' (config.json). Experts must share it."),
    "8 heads tied": (lambda law: (edit_config(law, tie_word_embeddings=True), edit_tensors(law, lambda t: t.pop("lm_head.weight"))), "sources.law: tie_word_embeddings = true, sources.seed has false (config.json). Tied and untied models cannot be mixed; untie the others first (save lm_head as a copy)."),
    "8 fewer layers": (lambda law: (edit_config(law, num_hidden_layers=1), edit_tensors(law, lambda t: [t.pop(k) for k in list(t) if ".1." in k])), "sources.law: num_hidden_layers = 1, sources.seed has 2 (config.json). Experts must share it."),
    "8 a key that no table knows": (lambda law: edit_config(law, residual_multiplier=0.5), "sources.law: config.json has residual_multiplier = 0.5, sources.seed has none; llama's table does not know this key, so it may matter. Make them agree."),
    "8 many differences at once": (lambda law: (edit_config(law, rms_norm_eps=1e-6, rope_theta=1.0, hidden_act="gelu", m=1), tokenizer(law, {"b": 0})), "sources.law: hidden_act = 'gelu', sources.seed has 'silu' (config.json). Experts must share it.\nsources.law: rms_norm_eps = 1e-06, sources.seed has 1e-05 (config.json). Experts must share it.\nsources.law: rotary embedding differs from sources.seed: rope_theta 1.0 here, 10000.0 there. Experts must share it.\nsources.law: config.json has m = 1, sources.seed has none; llama's table does not know this key, so it may matter. Make them agree."),
    "8 another family": (lambda law: write_sources(law.parent, CONFIGS["mistral"], ("law",)), "sources.law: family mistral, sources.seed is llama. Experts must be branches of one architecture."),
    "8 an unknown family": (lambda law: edit_config(law, model_type="gpt2"), "sources.law: model_type 'gpt2' is not a dense family known here. Known dense families: cohere, gpt_neox, llama, mistral, phi3, qwen2, qwen3."),
    "8 a mixture already": (lambda law: edit_config(law, model_type="mixtral"), "sources.law: model_type 'mixtral' is a mixture already. Known dense families: cohere, gpt_neox, llama, mistral, phi3, qwen2, qwen3."),
    "8 quantised": (lambda law: edit_config(law, quantization_config={"quant_method": "fp8"}), "sources.law: config.json has a quantization_config; quantised weights cannot be merged. Use the full-precision model."),
    "8 a size missing": (lambda law: edit_config(law, hidden_size=...), "sources.law: config.json: hidden_size must be a positive integer, found null."),
    "8 a size as text": (lambda law: edit_config(law, num_attention_heads="4\x1b"), "sources.law: config.json: num_attention_heads must be a positive integer, found '4\\x1b'."),
    "8 a size beyond any model's": (lambda law: edit_config(law, intermediate_size=2**31), "sources.law: config.json: intermediate_size must be a positive integer, found 2147483648."),
    "8 a flag as text": (lambda law: edit_config(law, tie_word_embeddings="false"), "sources.law: config.json: tie_word_embeddings must be true or false, found 'false'."),
    "8 eps as text": (lambda law: edit_config(law, rms_norm_eps="1e-5"), "sources.law: config.json: rms_norm_eps must be a number, found '1e-5'."),
    "8 layers without end": (lambda law: edit_config(law, num_hidden_layers=10**12), "sources.law: config.json: num_hidden_layers must be a positive integer, found 1000000000000."),
    "8 layer_types too short": (lambda law: edit_config(law, layer_types=["full_attention"]), "sources.law: config.json: layer_types must name the kind of each of the 2 layers, found ['full_attention']."),
    "8 rope as text": (lambda law: edit_config(law, rope_scaling="linear"), "sources.law: config.json: rope_parameters must be an object, found 'linear'."),
    "8 a window as text": (lambda law: edit_config(law, sliding_window="16"), "sources.law: config.json: sliding_window must be a positive integer, found '16'."),
    "8 an object for a token id": (lambda law: edit_config(law, eos_token_id={"auto_map": "x"}), "sources.law: config.json: eos_token_id must be a number, text or a list of numbers, found {'auto_map': 'x'}."),
    "8 other words for the same ids": (lambda law: (tokenizer(law.parent / "seed", {"a": 0, "b": 1}), tokenizer(law, {"a": "\x1b[31m", "b": 0})), "sources.law: tokenizer.json differs from sources.seed: token 'a' has id \\x1b[31m here, 0 there. The embeddings would be averaged over different words; align the tokenizers first."),
    "8 other merges": (lambda law: (tokenizer(law.parent / "seed", {"a": 0}), tokenizer(law, {"a": 0}, merges=["a a"])), "sources.law: tokenizer.json differs from sources.seed: the merges are not the same. The embeddings would be averaged over different words; align the tokenizers first."),
    "8 a tokenizer that is none": (lambda law: (tokenizer(law.parent / "seed", {"a": 0}), (law / "tokenizer.json").write_text("[]")), "sources.law: HOME/law/tokenizer.json: not a tokenizer file (TypeError: list indices must be integers or slices, not str)."),
    "11 a tensor called ../../x": (lambda law: add(law, "../../x"), "sources.law: ../../x: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor called /etc/passwd": (lambda law: add(law, "/etc/passwd"), "sources.law: /etc/passwd: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor with ESC in its name": (lambda law: add(law, "a\x1b[31mred\x1b]0;title\x07\x9b1m"), "sources.law: a\\x1b[31mred\\x1b]0;title\\x07\\x9b1m: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor with a newline in its name": (lambda law: add(law, "a\nerror: b"), "sources.law: a\\nerror: b: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor with a direction mark in its name": (lambda law: add(law, "a\u202eb"), "sources.law: a\\u202eb: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor without a name": (lambda law: add(law, ""), "sources.law: '': 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor with a name of 100 kB": (lambda law: add(law, "x" * 100_000), "sources.law: " + "x" * 200 + "... (100000 characters): 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor called __metadata": (lambda law: add(law, "__metadata"), "sources.law: __metadata: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "14 a dangling tokenizer": (lambda law: os.symlink("../../blobs/2", law / "tokenizer.json"), "sources.law: HOME/law/tokenizer.json: a symlink to ../../blobs/2, which does not exist."),
    "14 a FIFO for a tokenizer": (lambda law: os.mkfifo(law / "tokenizer_config.json"), "sources.law: HOME/law/tokenizer_config.json: not a regular file."),
}  # fmt: skip


def tokenizer(folder: Path, vocab: dict[str, Any], merges: Any = (), **more: Any) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": merges}, "added_tokens": [], **more}))


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit(name: str, llamas: Path, run: Any) -> None:
    """A merge is refused, all reasons together; inspect describes the model as far as it goes, diff says that the two differ."""
    damage, message = UNFIT[name]
    recipe = write_recipe(llamas)
    damage(llamas / "law")
    for merging in ((recipe,), ("plan", recipe)):
        assert said(run, llamas, *merging) == message.split("\n")
    for command in (("inspect", llamas / "law"), ("diff", llamas / "seed", llamas / "law")):
        with deadline():
            result: Result = run(*command)
        if command[0] == "diff" and name == "8 an unknown family":  # whose tensors have no roles
            assert result.status == 2 and "there is nothing to compare" in result.err
        else:
            assert (result.status, result.err) == (1 if command[0] == "diff" else 0, ""), command
        assert all(line.isprintable() for line in result.out.split("\n"))


def test_problems_of_all_sources_are_reported_together(llamas: Path, run: Any) -> None:
    edit_config(llamas / "code", rms_norm_eps=1e-6, rope_theta=3.0)
    edit_config(llamas / "law", hidden_act="gelu")
    result = run(write_recipe(llamas))
    assert result.err.count("error:") == 3
    assert "3 problems; nothing was written." in result.err


def test_sources_and_rules_are_reported_together(llamas: Path, run: Any) -> None:
    """A missing source does not hide that others disagree, nor a disagreement that a rule matches nothing."""
    recipe = write_recipe(llamas, "rules: [{roles: [attn.q_norm], make: mean}]", output="{path: out, layout: mixtrl}")
    edit_config(llamas / "code", rms_norm_eps=1e-6)
    result = run(recipe)
    for message in ("'mixtrl' is no layout", "rules[0]: attn.q_norm matches no tensor", "sources.code: rms_norm_eps"):
        assert message in result.err
    shutil.rmtree(llamas / "law")
    result = run(recipe)
    for message in ("'mixtrl' is no layout", "law: no such folder", "sources.code: rms_norm_eps"):
        assert message in result.err


def test_what_may_differ_does_not_matter(llamas: Path, run: Any) -> None:
    changes = {
        "use_cache": False,
        "dtype": "float16",
        "torch_dtype": "torch.float16",
        "_name_or_path": "x",
        "bos_token_id": 9,
        "max_position_embeddings": 7,
        "initializer_range": 1.0,
    }
    edit_config(llamas / "law", transformers_version="4.0", rope_theta=10000, **changes)
    assert run("plan", write_recipe(llamas)).status == 0


BAD_REQUESTS: dict[str, tuple[str, str, str, str, str]] = {
    # name: config, method, sections, output, message
    "biases into mixtral": ("llama_biased", "btx", "", "mixtral", "HOME/recipe.yaml: output.layout: mixtral needs attention_out_bias = false, this merge has true. Use layout: bam.\nHOME/recipe.yaml: output.layout: mixtral needs mlp_bias = false, this merge has true. Use layout: bam.\nHOME/recipe.yaml: output.layout: mixtral needs attention_bias = false, this merge has true. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.q.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.k.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.v.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.o.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'ffn.gate.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'ffn.up.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'ffn.down.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam."),
    "biases have no place": ("llama_biased", "btx", "", "mixtral", "HOME/recipe.yaml: output.layout: mixtral needs attention_out_bias = false, this merge has true. Use layout: bam.\nHOME/recipe.yaml: output.layout: mixtral needs mlp_bias = false, this merge has true. Use layout: bam.\nHOME/recipe.yaml: output.layout: mixtral needs attention_bias = false, this merge has true. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.q.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.k.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.v.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.o.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'ffn.gate.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'ffn.up.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'ffn.down.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam."),
    "qk-norm into mixtral": ("qwen3", "btx", "", "mixtral", "HOME/recipe.yaml: output.layout: mixtral needs qk_norm = false, this merge has true. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.q_norm' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam.\nHOME/recipe.yaml: method btx: 'attn.k_norm' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam."),
    "parallel block into mixtral": ("cohere", "btx", "", "mixtral", "HOME/recipe.yaml: output.layout: mixtral needs norm_type = rms_norm, this merge has layer_norm. Use layout: bam.\nHOME/recipe.yaml: output.layout: mixtral needs parallel_block = false, this merge has true. Use layout: bam.\nHOME/recipe.yaml: output.layout: mixtral needs rope_interleaved = false, this merge has true. Use layout: bam.\nHOME/recipe.yaml: output.layout: mixtral needs logit_scale = none, this merge has 0.0625. Use layout: bam."),
    "llama into qwen3_moe": ("llama", "btx", "", "qwen3_moe", "HOME/recipe.yaml: output.layout: qwen3_moe needs qk_norm = true, this merge has false. Use layout: bam."),
    "attention experts into mixtral": ("llama", "bam", "ffn: {gate: topk_then_softmax}", "mixtral", "HOME/recipe.yaml: method bam: 'attn.q' asks for one tensor per expert, but layout 'mixtral' stores it shared. Use make: mean, or layout: bam.\nHOME/recipe.yaml: method bam: 'attn.k' asks for one tensor per expert, but layout 'mixtral' stores it shared. Use make: mean, or layout: bam.\nHOME/recipe.yaml: method bam: 'attn.v' asks for one tensor per expert, but layout 'mixtral' stores it shared. Use make: mean, or layout: bam.\nHOME/recipe.yaml: method bam: 'attn.o' asks for one tensor per expert, but layout 'mixtral' stores it shared. Use make: mean, or layout: bam.\nHOME/recipe.yaml: router: 'router.attn' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam."),
    "soft gates into mixtral": ("llama", "btx", "ffn: {gate: softmax_then_topk}", "mixtral", "HOME/recipe.yaml: output.layout: mixtral needs norm_topk_prob = true, this merge has false. Use layout: bam (ffn.gate: topk_then_softmax sums to one)."),
    "gate_scale into qwen2_moe": ("qwen2", "btx", "ffn: {gate_scale: 2}", "qwen2_moe", "HOME/recipe.yaml: output.layout: qwen2_moe needs gate_scale = 1.0, this merge has 2.0. Use layout: bam (leave ffn.gate_scale at 1)."),
    "unknown layout": ("llama", "btx", "", "mixtrl", "HOME/recipe.yaml: output.layout: 'mixtrl' is no layout; did you mean 'mixtral'?"),
    "dense layout for a mixture": ("llama", "btx", "", "llama", "HOME/recipe.yaml: output.layout: llama is a dense family; method btx makes a mixture. Use bam, or method: merge."),
    "mixture layout for a merge": ("llama", "merge", "", "mixtral", "HOME/recipe.yaml: output.layout: method merge of llama models gives layout llama, not mixtral."),
    "rule that matches nothing": ("llama", "bam", "rules: [{roles: [attn.q_norm], make: mean}]", "bam", "HOME/recipe.yaml: rules[0]: attn.q_norm matches no tensor of this merge. Correct or remove it."),
    "rule in the shadow": ("llama", "bam", "rules: [{roles: [norm.*], make: mean}, {roles: [norm.ffn], make: copy, from: seed}]", "bam", "HOME/recipe.yaml: rules[1]: norm.ffn never applies: earlier rules make all 2 tensors it matches. Reorder or remove it."),
    "rule for absent routers": ("llama", "btx", "rules: [{roles: [router.attn], make: zeros}]", "bam", "HOME/recipe.yaml: rules[0]: router.attn matches no tensor of this merge. Correct or remove it."),
    "layers out of range": ("llama", "bam", 'rules: [{roles: [attn.k, attn.v], layers: "0-7", make: mean}]', "bam", "HOME/recipe.yaml: rules[0].layers: layer 7 does not exist; the model's layers are 0 to 1.\nHOME/recipe.yaml: rules[0]: attn.k, attn.v in layers 0-7 matches no tensor of this merge. Correct or remove it."),
    "k without v": ("llama", "bam", "rules: [{roles: [attn.k], make: mean}]", "bam", "HOME/recipe.yaml: layer 0: attn.v per expert, attn.k shared; an attention expert needs them together. Give them one rule.\nHOME/recipe.yaml: layer 1: attn.v per expert, attn.k shared; an attention expert needs them together. Give them one rule."),
    "q without o": ("llama", "bam", "rules: [{roles: [attn.q], make: mean}]", "bam", "HOME/recipe.yaml: layer 0: attn.o per expert, attn.q shared; an attention expert needs them together. Give them one rule.\nHOME/recipe.yaml: layer 0: attn.k and attn.v are per expert, attn.q and attn.o shared. Make attn.q and attn.o expert too.\nHOME/recipe.yaml: layer 1: attn.o per expert, attn.q shared; an attention expert needs them together. Give them one rule.\nHOME/recipe.yaml: layer 1: attn.k and attn.v are per expert, attn.q and attn.o shared. Make attn.q and attn.o expert too."),
    "attention experts in some layers": ("llama", "bam", "rules: [{roles: [attn.*], layers: 1, make: mean}]", "bam", "HOME/recipe.yaml: attention is per expert in layers 0 and shared in 1; it must be one or the other in all layers."),
    "k and v without q": ("llama", "btx", "rules: [{roles: [attn.k, attn.v], make: expert}]", "bam", "HOME/recipe.yaml: layer 0: attn.k and attn.v are per expert, attn.q and attn.o shared. Make attn.q and attn.o expert too.\nHOME/recipe.yaml: layer 1: attn.k and attn.v are per expert, attn.q and attn.o shared. Make attn.q and attn.o expert too."),
    "FFN averaged": ("llama", "bam", "rules: [{roles: [ffn.*], layers: 0, make: mean}]", "bam", "HOME/recipe.yaml: rules[0]: 'ffn.gate' is made once for all, but layout 'bam' stores one per expert. Use make: expert.\nHOME/recipe.yaml: rules[0]: 'ffn.up' is made once for all, but layout 'bam' stores one per expert. Use make: expert.\nHOME/recipe.yaml: rules[0]: 'ffn.down' is made once for all, but layout 'bam' stores one per expert. Use make: expert."),
    "experts of the embeddings": ("llama", "bam", "rules: [{roles: [embed], make: expert}]", "bam", "HOME/recipe.yaml: rules[0]: 'embed' asks for one tensor per expert, but layout 'bam' stores it shared. Use make: mean."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(name: str, tmp_path: Path, run: Any) -> None:
    config, method, sections, layout, message = BAD_REQUESTS[name]
    write_sources(tmp_path, CONFIGS[config])
    recipe = write_recipe(tmp_path, sections, method, output=f"{{path: out, layout: {layout}}}")
    for command in (("plan", recipe), (recipe,)):
        assert said(run, tmp_path, *command) == message.split("\n")


def test_tokenizers_that_differ_in_settings_only(llamas: Path, run: Any) -> None:
    tokenizer(llamas / "seed", {"a": 0, "b": 1})
    tokenizer(llamas / "law", {"a": 0, "b": 1}, truncation={"max_length": 7})
    assert run("plan", write_recipe(llamas)).status == 0


# ---- the output


def test_output_inside_a_source(llamas: Path, run: Any) -> None:
    result = run(write_recipe(llamas, output="{path: law/out}"))
    assert result.status == 2
    assert f"output.path: {llamas}/law/out is inside sources.law" in result.err


@pytest.mark.parametrize("how", ["itself", "symlink", "parent"])
def test_output_is_a_source(llamas: Path, run: Any, how: str) -> None:
    target = {"itself": llamas / "law", "symlink": llamas / "link", "parent": llamas}[how]
    if how == "symlink":
        os.symlink(llamas / "law", target)
    result = run(write_recipe(llamas), "--output", target, "--force")
    assert result.status == 2
    assert "is, or holds, sources." in result.err
    assert (llamas / "law" / "model.safetensors").exists()


def test_output_inside_a_source_through_a_symlink(llamas: Path, run: Any) -> None:
    os.symlink(llamas / "law", llamas / "link")
    result = run(write_recipe(llamas), "--output", llamas / "link" / "out")
    assert result.status == 2
    assert "is inside sources.law" in result.err


def test_one_folder_under_two_names(llamas: Path, run: Any) -> None:
    shutil.rmtree(llamas / "law")
    os.symlink("code", llamas / "law")
    result = run(write_recipe(llamas))
    assert result.status == 2
    assert "sources.law: the same folder as sources.code. Name it once; it may stand several times in experts." in result.err


def test_no_space(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(llamas)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    for arguments in ((), ("--dry-run",)):
        result = run(write_recipe(llamas), *arguments)
        assert result.status == 2
        assert "0.00 GB free, the merge writes 0.00 GB. Free some space, or choose another --output." in result.err


def test_no_write_permission(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's answer is simulated."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    result = run(write_recipe(llamas))
    assert result.status == 2
    assert f"no permission to write in {llamas}. Choose another --output." in result.err


def test_parent_is_a_file(llamas: Path, run: Any) -> None:
    result = run(write_recipe(llamas), "--output", llamas / "recipe.yaml" / "out")
    assert result.status == 2
    assert "recipe.yaml is not a folder" in result.err
