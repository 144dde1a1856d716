"""One bit flipped in any region of an output: verify names the file each time, and the tensor where it is one's, without the sources."""

import random
import shutil
from pathlib import Path

import pytest

from bam_merge.checkpoints.header import read_header
from bam_merge.errors import BamMergeError
from bam_merge.verifying.verification import verify
from faults.harness import EXTENT, Merge, Points, thin


@pytest.fixture
def output(merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The result far from its sources; what it computes is not looked at, since its bytes must be enough."""
    monkeypatch.setattr("bam_merge.verifying.verification._function", lambda *args: iter(()))
    for name, data in merge.result.items():
        (tmp_path / name).write_bytes(data)
    assert verify(tmp_path).ok
    return tmp_path


def said_by_verify(folder: Path) -> str:
    try:
        report = verify(folder)
    except BamMergeError as error:
        return str(error)
    return "; ".join(f"{check.name}: {check.detail}" for check in report.failures)


def flips_of(path: Path) -> list[tuple[str, int, list[set[str]]]]:
    """(region, byte, sets of which one name each must be said) for a file: places all over it, and each tensor's ends and middle.

    A flip in a header may make a tensor's name another: then the old name is said, of which the index knows.
    """
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return [("text", place, [{path.name}]) for place in range(0, size, max(1, size // 60))]
    tensors = read_header(str(path)).tensors
    header = [("header length", place, [{path.name}]) for place in range(8)]
    known = {path.name, *(tensor.name for tensor in tensors)}
    header += [("header", place, [known]) for place in range(8, tensors[0].offset, 5)]
    places = [(tensor, place) for tensor in tensors for place in sorted({0, tensor.nbytes // 2, tensor.nbytes - 1})]
    return header + [("tensor", tensor.offset + place, [{path.name}, {tensor.name}]) for tensor, place in places]


@EXTENT
def test_every_flipped_bit_is_named(output: Path, every: int) -> None:
    chance = random.Random(3)
    names = sorted(path.name for path in output.iterdir())
    assert {"bam_merge.json", "config.json", "model.safetensors.index.json", "vocab.txt", "README.md", "modeling_bam.py"} <= set(names)
    flips = [(file, *flip) for file in names for flip in flips_of(output / file)]
    with Points("one bit flipped in an output") as points:
        for file, region, place, wanted in thin(flips, every):
            bit = chance.randrange(8)
            with points.one(f"{file}: {region}, byte {place}, bit {bit}"):
                kept = (output / file).read_bytes()
                data = bytearray(kept)
                data[place] ^= 1 << bit
                (output / file).write_bytes(data)
                said = said_by_verify(output)
                (output / file).write_bytes(kept)
                assert said, "not noticed"
                assert all(any(name in said for name in names) for names in wanted), f"not all named: {said}"


def test_every_missing_file_is_named(output: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Points("a file of an output missing, or empty") as points:
        for path in sorted(output.iterdir()):
            for damage in ("missing", "empty"):
                with points.one(f"{path.name} {damage}"):
                    copy = tmp_path_factory.mktemp("copy")
                    shutil.copytree(output, copy, dirs_exist_ok=True)
                    (copy / path.name).unlink()
                    if damage == "empty":
                        (copy / path.name).touch()
                    assert path.name in said_by_verify(copy)
