"""What must hold of an output whatever the sources' other files and the surroundings are: each target makes a result and looks at it."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import CONFIGS
from hypothesis import strategies as st
from mutations import byte_edits, edit_bytes, inputs, text_of, values
from planting import KINDS, MODES, PLACES, Victim, attacked, begun, clear, plant
from targets import check_error
from test_companions import GOOD

from bam_merge import MergeOptions
from bam_merge.demo.synthetic import branched_values, random_values, write_checkpoint
from bam_merge.errors import BamMergeError
from bam_merge.merging.tensor import Finished
from bam_merge.planning.make import make_plan, plan_file
from bam_merge.publishing.companions import write_companions
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import load_recipe


@dataclass(frozen=True)
class Property:
    """`check` is given any of `inputs`; it raises AssertionError where what must hold does not, and our errors where it refuses."""

    name: str
    good: Any
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], bool | None]

    def run(self, data: Any) -> bool:
        """Whether the input was accepted: neither refused by an error of ours nor, as `check` says by False, in another way."""
        try:
            return self.check(data) is not False
        except BamMergeError as error:
            check_error(error)
            return False


def two_sources(home: Path) -> Path:
    """Two sources of one layer, seed and code, and their recipe, whose path is returned."""
    config = {**CONFIGS["llama"], "num_hidden_layers": 1}
    for branch, name in enumerate(("seed", "code")):
        write_checkpoint(home / name, config, branched_values(7, branch) if branch else random_values(7), "BF16")
    recipe = home / "recipe.yaml"
    recipe.write_text("method: btx\nsources: {seed: seed, code: code}\noutput: {path: out, max_shard_size: 30kB}\n")
    return recipe


# ---- companions ------------------------------------------------------------------------------------------------------------

RUNS_CODE = ("auto_map", "trust_remote_code", "custom_generate", "custom_pipelines", "code_revision")
"""Keys that must not reach an output but as a token of a vocabulary."""

WRITTEN = ("config.json", "bam_merge.json", "model.safetensors.index.json", "README.md", "configuration_bam.py", "modeling_bam.py")
OTHERS = {
    "tokenizer.model": b"\x0a\x07\x0a\x01a\x15\0\0\0\0",
    "merges.txt": b"a b\n",
    "vocab.txt": b"a\nb\n",
    "chat_template.jinja": b"{{ x }}",
}
LINKS = ("secret", "secret by a link", "secret's folder", "inside", "missing", "itself", "folder", "/dev/zero", "FIFO")
"""What may stand in a companion's place instead of a file."""

spellings = st.sampled_from(
    (
        lambda key: key,
        lambda key: f"\\u{ord(key[0]):04x}{key[1:]}",
        lambda key: "".join(f"\\u{ord(letter):04X}" for letter in key),
        str.upper,
        lambda key: f" {key}",
        lambda key: f"{key}\\t",
    )
)


def companions(home: Path) -> Property:
    """Any companion set: what is published has no key that runs code, and no byte from outside the source's folder."""
    recipe = load_recipe(two_sources(home))
    seed, out = home / "seed", home / "staged"
    marker = secrets.token_hex(16)
    (home / "outside").mkdir()
    for name in (*GOOD, *OTHERS, "secret"):
        text = json.dumps({marker: 1}) if name.endswith(".json") else marker
        (home / "outside" / name).write_text(text)
    (home / "outside" / "link").symlink_to("secret")
    finished = None

    def check(files: dict[str, bytes | str]) -> None:
        nonlocal finished
        put_companions(seed, home / "outside", files)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            plan = make_plan(recipe)
            finished = finished or {step.name: Finished("0" * 32, source_digests(plan)) for step in plan.steps}
            descriptor = os.open(out, os.O_RDONLY)
            try:
                write_companions(plan, out, finished, descriptor)
            finally:
                os.close(descriptor)
            check_output(out, marker, allowed={*WRITTEN, *files})
        finally:
            for name in files:
                clear(seed / name)

    mutated = st.one_of(*(st.tuples(st.just(name), contents(name)) for name in (*GOOD, *OTHERS)))
    some = st.lists(mutated, min_size=1, max_size=3).map(dict)
    with_good = st.tuples(some, st.booleans()).map(lambda pair: {**(written_good() if pair[1] else {}), **pair[0]})
    return Property("companions", written_good(), with_good, check)


def written_good() -> dict[str, bytes | str]:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.json")
    return {name: json.dumps(GOOD[name]).encode() for name in names}


def source_digests(plan: Any) -> dict[str, str]:
    """Digests for all the tensors that a plan reads, so that a manifest need not read them again."""
    return {f"{name}:{tensor}": "0" * 32 for name, model in plan.models.items() for tensor in model.checkpoint.tensors}


def contents(name: str) -> st.SearchStrategy[bytes | str]:
    """What one companion may be: a good one with edits, with keys that run code anywhere, or a link (a text, of LINKS)."""
    links = st.sampled_from(LINKS)
    if name not in GOOD:
        edited = st.lists(byte_edits, max_size=2).map(lambda edits: _edited(OTHERS[name], edits))
        return st.one_of(edited, links)
    planted = st.tuples(
        st.sampled_from(RUNS_CODE), spellings, st.integers(0, 499), st.integers(0, 60), values, st.lists(byte_edits, max_size=1)
    )
    with_code = planted.map(lambda item: with_key(GOOD[name], *item))
    plain = inputs(GOOD[name], lambda document: text_of(document).encode("utf-8", "surrogatepass"))
    return st.one_of(with_code, with_code, plain, links)


def _edited(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for edit in edits:
        data = edit_bytes(data, edit)
    return data


def with_key(
    document: Any, key: str, spelling: Callable[[str], str], box: int, place: int, value: Any, edits: list[tuple[str, int, bytes]]
) -> bytes:
    """The document's JSON with one more key in one of its objects, spelled as JSON text; the value may be a number, as a token's."""
    text = json.dumps(document)
    openings = [index for index, letter in enumerate(text) if letter == "{"]
    at = openings[box % len(openings)] + 1
    written = text_of(value if place % 3 else place)
    comma = "" if text[at] == "}" else ", "
    return _edited(f'{text[:at]}"{spelling(key)}": {written}{comma}{text[at:]}'.encode("utf-8", "surrogatepass"), edits)


def put_companions(seed: Path, outside: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = seed / name
        clear(path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "FIFO":
            os.mkfifo(path)
        else:
            target = {
                "secret": outside / name, "secret by a link": outside / "link", "secret's folder": outside, "inside": "model.safetensors",
                "missing": "nothing", "itself": name, "/dev/zero": "/dev/zero",
            }[content]  # fmt: skip
            path.symlink_to(target)


def check_output(out: Path, marker: str, allowed: set[str]) -> None:
    for path in out.iterdir():
        assert path.is_file() and not path.is_symlink(), f"{path.name} is no file"
        assert path.name in allowed, f"{path.name} was written"
        data = path.read_bytes()
        assert marker.encode() not in data, f"{path.name} holds what stands outside the source's folder"
        if path.suffix == ".json" and path.name not in WRITTEN:
            found = sorted(code_keys(json.loads(data), path.name))
            assert not found, f"{path.name} has {found}"


VOCABULARIES = {"added_tokens.json": (), "vocab.json": (), "tokenizer.json": ("model", "vocab")}


def code_keys(value: Any, file: str, place: tuple[str, ...] = ()) -> Iterator[str]:
    """The keys at any depth that run code, however their letters are spelled; a token's text with its number is none."""
    if isinstance(value, dict):
        for key, item in value.items():
            token = place == VOCABULARIES.get(file) and type(item) is int
            if key.strip().casefold() in RUNS_CODE and not token:
                yield key
            yield from code_keys(item, file, (*place, key))
    elif isinstance(value, list):
        for item in value:
            yield from code_keys(item, file, (*place, "[]"))


# ---- staging folders -------------------------------------------------------------------------------------------------------

FULL = 12
"""One in so many staging folders is merged into to the end, which takes ten times as long as to look at it."""

Planted = tuple[list[tuple[str, str]], int, list[tuple[str, int, bytes]], bool, int]
"""Entries (place, kind), the folder's mode, edits of the journal, whether to resume, and a number that chooses how far to go."""


def staging(home: Path) -> Property:
    """Any staging folder that somebody left: refused in words, or the right bytes; what is not the run's is as it was."""
    plan = plan_file(two_sources(home))
    expected = {path.name: path.read_bytes() for path in publish(plan, home / "whole", MergeOptions(workers=1, verify=False)).iterdir()}
    victim, target, folder = Victim.make(home / "victim"), home / "out", home / ".out.bam-merge"
    unfinished = home / "unfinished"
    _interrupt(plan, target)
    shutil.move(folder, unfinished)

    def check(planted: Planted) -> bool:
        entries, mode, edits, resume, number = planted
        for path in (target, folder):
            clear(path)
        shutil.copytree(unfinished, folder)
        journal = folder / "journal"
        journal.write_bytes(_edited(journal.read_bytes(), edits))
        for place, kind in entries:
            plant(folder, place, kind, victim)
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(mode)
        said = begun(plan, target, victim, resume) if number % FULL else attacked(plan, target, victim, expected, resume)
        return not said

    entries = st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(list(KINDS))), max_size=3)
    modes = st.one_of(*[st.sampled_from(MODES[:2])] * 3, st.sampled_from(MODES))
    strategy = st.tuples(entries, modes, st.lists(byte_edits, max_size=2), st.booleans(), st.integers(0, FULL - 1))
    return Property("staging folders", ([], 0o700, [], True, 0), strategy, check)


class _Stop(Exception):
    """Ends a run in its middle."""


def _interrupt(plan: Any, target: Path) -> None:
    """Leave the staging folder of a run that has finished some tensors."""
    seen = 0

    def progress(count: int) -> None:
        nonlocal seen
        seen += count > 0
        if seen > 8:
            raise _Stop

    try:
        publish(plan, target, MergeOptions(workers=1, progress=progress, verify=False))
    except _Stop:
        return
    raise AssertionError("the merge was not interrupted")
