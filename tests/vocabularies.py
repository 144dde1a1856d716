"""Small models whose vocabularies differ a little: one base of 13 pieces, and tokens added to it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import CONFIGS, write_recipe
from safetensors.torch import load_file

from bam_merge.demo.synthetic import branched_values, write_checkpoint

PIECES = ["<s>", "</s>", *"abcdefgh", "Ġ", "ab", "cd"]
MERGES = [["a", "b"], ["c", "d"]]
END = len(PIECES)
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def entry(number: int, token: str, special: bool = True) -> dict[str, Any]:
    return {"id": number, "content": token, **FLAGS, "special": special}


def tokenizer_json(added: Sequence[str] = (), first: int = END, pieces: Sequence[str] = PIECES, merges: Any = MERGES) -> dict[str, Any]:
    """A byte-level BPE tokenizer that the library reads, with `added` tokens from the id `first` on."""
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
    }
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [entry(number, token) for number, token in enumerate(added, first)],
        "normalizer": None, "pre_tokenizer": cut, "post_processor": None, "decoder": cut,
        "model": {**bpe, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": list(merges)},
    }  # fmt: skip


SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def source(folder: Path, name: str, added: Sequence[str] | None, rows: int, branch: int, family: str = "llama", **more: Any) -> None:
    """One source with `rows` embeddings; with `added` None it has no tokenizer. `more` are dtype, files beside, and keys of config.json."""
    dtype, files = more.pop("dtype", "F32"), more.pop("files", {})
    write_checkpoint(folder / name, {**CONFIGS[family], "vocab_size": rows, **more}, branched_values(7, branch), dtype)
    if added is not None:
        put(folder / name, {"tokenizer.json": tokenizer_json(added), "tokenizer_config.json": SETTINGS})
    put(folder / name, files)


def put(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def three(
    folder: Path, tokenizer: str = "{source: union}", text: str = "", family: str = "llama", method: str = "bam", **more: Any
) -> Path:
    """seed adds two tokens, code renames one of them and adds one, law adds another where code has one. 32, 40 and 24 rows; the recipe."""
    folder.mkdir(exist_ok=True)
    source(folder, "seed", ["<r0>", "<r1>"], 32, 0, family, **more)
    source(folder, "code", ["<r0>", "<im_start>", "<im_end>"], 40, 1, family, **more)
    source(folder, "law", ["<r0>", "<r1>", "<note>"], 24, 2, family, **more)
    return write_recipe(folder, f"tokenizer: {tokenizer}\n{text}" if tokenizer else text, method, ("seed", "code", "law"))


UNION = {"<r0>": END, "<r1>": END + 1, "<im_start>": END + 2, "<im_end>": END + 3, "<note>": END + 4}
"""The added tokens of a union of the three."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
