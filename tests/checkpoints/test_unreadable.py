"""What nobody can read: a merge, a plan, an inspection and a comparison say the same, before anything is written."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from damage import (
    FIRST,
    LAYER,
    ONE,
    SECOND,
    Damage,
    alias,
    both_shards,
    content,
    cut,
    header_only,
    index,
    index_text,
    length,
    moved,
    only_pickle,
    raw,
    record,
    replace,
    said,
    shard,
    shift_last,
    spans,
    vast,
    with_index,
)

from bam_merge.checkpoints.folder import INDEX

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
    "6 only pickles": (only_pickle, "HOME/law: only pytorch_model.bin present. Pickled weights are never loaded, since loading them runs code. Convert them once: bam-merge convert HOME/law NEW_FOLDER."),
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
