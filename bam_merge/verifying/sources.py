"""Are the sources still what was merged? Their files now against what the manifest records of them, and the output's companions.

A source that changed is no fault of the output: it is named, with the keys of its configuration that changed, and what depends on it
is not compared. A record that contradicts both the source and what was made of it is a forgery, or a file that was saved again.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from bam_merge.architectures.config import COMMON_FUNCTION, IGNORED, NEUTRAL, ROPE_KEYS
from bam_merge.architectures.tables import dense_families
from bam_merge.checkpoints.adapter_folder import ADAPTER_CONFIG
from bam_merge.checkpoints.folder import CONFIG, TOKENIZER_FILES, Checkpoint, is_plain_name, read_small_file
from bam_merge.checkpoints.header import read_header
from bam_merge.checkpoints.pieces import Read
from bam_merge.checkpoints.provenance import key_digests, name_digest
from bam_merge.checkpoints.reading import digest_tensor
from bam_merge.documents import load_json
from bam_merge.errors import BamMergeError
from bam_merge.planning.plan import Plan, moves_bytes
from bam_merge.recipe.schema import Recipe
from bam_merge.text import count, printable, some
from bam_merge.values.threads import default_workers

MOST_NAMES = 8
"""Changed files that are named."""


@dataclass
class Changes:
    """What of the sources is not as the manifest records it. `configs` gives the keys that changed, None where none was recorded;
    `weights` and `companions` name files; `absent` are sources that are not there, `adapters` those that are adapters.
    """

    configs: dict[str, list[str] | None] = field(default_factory=dict)
    weights: dict[str, list[str]] = field(default_factory=dict)
    companions: dict[str, list[str]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    adapters: frozenset[str] = frozenset()

    def names(self, weights: bool = True) -> str:
        """The changed files: 'law/config.json (rope_theta), seed/tokenizer.json'."""
        configs = {name: ADAPTER_CONFIG if name in self.adapters else CONFIG for name in self.configs}
        files = [f"{printable(name)}/{configs[name]}{_keys(keys)}" for name, keys in self.configs.items() if keys != []]
        for kind in (self.weights if weights else {}, self.companions):
            files += [f"{printable(name)}/{printable(file)}" for name, changed in kind.items() for file in changed]
        more = f" and {len(files) - MOST_NAMES} more" if len(files) > MOST_NAMES else ""
        return ", ".join(files[:MOST_NAMES]) + more

    def tokenizers(self) -> str:
        """The changed files that say which token has which id."""
        files = {name: [file for file in changed if file not in BESIDE_TOKENS] for name, changed in self.companions.items()}
        return some(f"{printable(name)}/{printable(file)}" for name, changed in files.items() for file in changed)


BESIDE_TOKENS = {"generation_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json"}
"""Files that go with a tokenizer and number no token."""


def _keys(keys: Sequence[str] | None) -> str:
    return f" ({some(keys, MOST_NAMES)})" if keys else ""


def opened_afar(plan: Plan | None) -> dict[str, Checkpoint]:
    """The sources of a plan that are no folders: there is no other way to their files than what was opened."""
    return {name: checkpoint for name, checkpoint in (plan.checkpoints if plan else {}).items() if checkpoint.afar is not None}


def changes(recipe: Recipe, manifest: Mapping[str, Any], opened: Mapping[str, Checkpoint]) -> Changes:
    """What changed of every source that both the recipe and the manifest name. Those in `opened` were opened just now: their headers and
    configurations are not read again."""
    found = Changes(adapters=frozenset(name for name, store in recipe.stores.items() if store.adapter))
    stores = recipe.stores
    for name, record in manifest["sources"].items():
        if name not in stores:
            continue
        folder = recipe.located(stores[name].path)
        if not folder.is_dir():
            found.absent.append(name)
            continue
        checkpoint = opened.get(name)
        config = ADAPTER_CONFIG if stores[name].adapter else CONFIG
        if (keys := _config_changes(folder / config, record, checkpoint)) is not None:
            found.configs[name] = keys or (None if "config_keys" not in record else [])
        if weights := [file for file, known in record["files"].items() if not _same_header(folder, file, known, checkpoint)]:
            found.weights[name] = weights
        if not stores[name].adapter and (others := sorted(_companion_changes(folder, record))):
            found.companions[name] = others
    return found


def _config_changes(path: Path, record: Mapping[str, Any], checkpoint: Checkpoint | None) -> list[str] | None:
    """The keys of a configuration whose values are not those that were merged; None when it is the same file."""
    try:
        data = b"" if checkpoint is not None else read_small_file(path)
        if (xxhash.xxh3_128_hexdigest(data) if checkpoint is None else checkpoint.config_digest) == record.get("config"):
            return None
        config = load_json(data) if checkpoint is None else checkpoint.config
    except (BamMergeError, ValueError) as error:
        return [printable(str(error))]
    config = config if isinstance(config, dict) else {}
    known, now = record.get("config_keys"), key_digests(config)
    if not isinstance(known, dict):
        return []
    changed = [name for name in {**now, **known} if known.get(name) != now.get(name)]
    names = {name_digest(key): key for key in (*_known_keys(), *config)}
    gone = sum(name not in names for name in changed)
    return sorted(names[name] for name in changed if name in names) + ([f"{count(gone, 'key')} that it had"] if gone else [])


def _known_keys() -> Iterator[str]:
    """Every key that a dense family's table knows: what a key that is gone may have been."""
    for family in dense_families():
        yield from (*COMMON_FUNCTION, *ROPE_KEYS, *NEUTRAL, *IGNORED, *family.function, *family.neutral, *family.defaults)


def _same_header(folder: Path, file: str, known: Mapping[str, Any], checkpoint: Checkpoint | None) -> bool:
    header = checkpoint.files.get(file) if checkpoint is not None else None
    if checkpoint is not None and checkpoint.afar is not None:
        return header is not None and (header.digest, header.identity.size) == (known["header"], known["bytes"])
    try:
        if header is None and is_plain_name(file):
            header = read_header(str(folder / file))
    except BamMergeError:
        return False
    return header is not None and (header.digest, header.identity.size) == (known["header"], known["bytes"])


def _companion_changes(folder: Path, record: Mapping[str, Any]) -> Iterator[str]:
    known = record.get("companions")
    if not isinstance(known, dict):
        return  # of a version that did not record them
    for name in dict.fromkeys((*TOKENIZER_FILES, *filter(is_plain_name, known))):
        there = (folder / name).is_file()
        try:
            if (xxhash.xxh3_128_hexdigest(read_small_file(folder / name)) if there else None) != known.get(name):
                yield name
        except BamMergeError:
            yield name


# ---- the tensors that were read ------------------------------------------------------------------------------------------------


def other_tensors(
    plan: Plan,
    manifest: Mapping[str, Any],
    sources: Sequence[str],
    proved: bool = False,
    known: Mapping[tuple[str, str], str] | None = None,
) -> dict[str, list[str]]:
    """For each of `sources`, the tensors whose bytes have not the digest that the manifest records, or that are gone.

    Where the copies are `proved`, a tensor that was copied whole has the digest of its copy, and need not be read again; nor need one whose
    digest is `known`, by (source, tensor), and as recorded.
    """
    copies, checkpoints = dict(known or {}), plan.checkpoints
    if proved:
        for step in plan.steps:
            if isinstance(step.expr, Read) and moves_bytes(step) and step.name in manifest["tensors"]:
                copies[step.expr.source, step.expr.tensor] = manifest["tensors"][step.name]["digest"]
    jobs = [
        (source, tensor, digest)
        for source in sources
        for record in manifest["sources"][source]["files"].values()
        for tensor, digest in record["tensors"].items()
        if copies.get((source, tensor)) != digest
    ]

    def same(job: tuple[str, str, str]) -> bool:
        checkpoint = checkpoints[job[0]]
        entry = checkpoint.tensors.get(job[1])
        if entry is None:
            return False
        try:
            return digest_tensor(checkpoint, entry) == job[2]
        except BamMergeError:
            return False

    with ThreadPoolExecutor(default_workers()) as pool:
        results = list(pool.map(same, jobs))
    other: dict[str, list[str]] = {}
    for (source, tensor, _), is_same in zip(jobs, results, strict=True):
        if not is_same:
            other.setdefault(source, []).append(tensor)
    return other
