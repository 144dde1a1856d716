"""For the tests of bad inputs through the command line: what can be wrong with a folder, done to one, and what a command says of it.

What is refused is refused in the exact words, with exit status 2, nothing written, no traceback. HOME stands for the folder of the test; `law`
is the source that is damaged.
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

import torch
from conftest import Result
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


def tree(home: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below `home`, by mode, size and time of change."""
    paths = {str(path.relative_to(home)): path.lstat() for path in home.rglob("*")}
    return {name: (status.st_mode, status.st_size, status.st_mtime_ns) for name, status in paths.items()}


@contextmanager
def deadline(seconds: int = 60) -> Iterator[None]:
    """A run that hangs (at a FIFO, say) is ended, and fails: with what no code under test takes for an answer, as it would an OSError."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

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


def tokenizer(folder: Path, vocab: dict[str, Any], merges: Any = (), **more: Any) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": merges}, "added_tokens": [], **more}))


def as_in_a_terminal() -> None:
    """What a child does before its command (preexec_fn): what runs the tests may ignore signals, as nohup does, and a child inherits that."""
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
