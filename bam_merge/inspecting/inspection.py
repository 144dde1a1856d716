"""`bam-merge inspect`: what a checkpoint is, holds and costs, from its headers; with stats, also what its values are."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bam_merge.architectures.anatomy import Anatomy
from bam_merge.architectures.cost import CONTEXT, Cost, Kind, as_mixture, cost_of
from bam_merge.architectures.vocabulary import GATING, QUIET
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.pieces import stored
from bam_merge.checkpoints.provenance import MANIFEST, Origin, fates, format_note, origins, read_manifest
from bam_merge.errors import CheckpointError, VerifyError
from bam_merge.sources.experts import look_at_expert, split_expert

if TYPE_CHECKING:
    from bam_merge.inspecting.router_stats import RouterStats
    from bam_merge.inspecting.tensor_stats import TensorStats

KINDS: tuple[Kind, ...] = ("expert_kv", "shared_kv", "btx")


FORMAT = 1
"""Version of the JSON document."""


@dataclass(frozen=True)
class Values:
    """What reading every shown tensor's values found. `clones`: (router kind's experts, copy, original) whose tensors are all equal."""

    tensors: Mapping[str, "TensorStats"]
    duplicates: list[list[str]]
    clones: list[tuple[str, int, int]]
    routers: list["RouterStats"]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `document` is its JSON. `shown` are the tensors asked for, `mixtures` the costs asked for by as_bam."""

    path: str
    anatomy: Anatomy
    cost: Cost
    context: int
    shown: tuple[str, ...]
    origins: Mapping[str, Origin]
    findings: tuple[str, ...]
    mixtures: Mapping[str, Cost] = field(default_factory=dict)
    experts: int | None = None
    top_k: int = 1
    shards: int = 1
    shared_expert: bool = False
    where: list[dict[str, Any]] | None = None
    values: Values | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.anatomy.checkpoint

    @property
    def entries(self) -> list[TensorEntry]:
        return [self.checkpoint.tensors[name] for name in self.shown]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(entry.nbytes for entry in self.checkpoint.tensors.values())

    @cached_property
    def dtypes(self) -> dict[str, int]:
        """Elements stored in each dtype, most first."""
        counts: Counter[str] = Counter()
        for entry in self.checkpoint.tensors.values():
            counts[entry.dtype] += entry.numel
        return dict(counts.most_common())

    def by_layer(self, active: bool = False) -> dict[str, int] | None:
        """Parameters of every layer, and of what is outside the layers; or those that a token goes through, None where not known."""
        if active and self.cost.active is None:
            return None
        counts: Counter[str] = Counter()
        for piece in self.cost.pieces:
            copies = piece.used or 0 if active else piece.copies
            counts["outside" if piece.layer is None else str(piece.layer)] += copies * piece.size
        return dict(sorted(counts.items(), key=lambda item: (item[0] == "outside", int(item[0]) if item[0] != "outside" else 0)))

    def expert_count(self, group: str) -> int:
        """Experts stored of "ffn" or "attn"; 0 where they are not split."""
        return len({expert for role, _, expert in self.anatomy.leaves if expert is not None and role.startswith(f"{group}.")})

    @property
    def expert_names(self) -> list[str] | None:
        names = self.anatomy.facts.get("expert_names")
        return list(map(str, names)) if isinstance(names, list) else None

    def document(self) -> dict[str, Any]:
        """As `inspect --json` prints it: plain data without NaN or infinity."""
        anatomy, facts = self.anatomy, self.anatomy.facts
        parameters = {**self.cost.document()["parameters"], "by_layer": self.by_layer(), "active_by_layer": self.by_layer(active=True)}
        document: dict[str, Any] = {
            "format": FORMAT,
            "path": self.path,
            "model_type": self.checkpoint.config.get("model_type"),
            "architecture": anatomy.architecture.name if anatomy.architecture else None,
            "architecture_guessed": anatomy.guessed,
            "facts": {key: facts[key] for key in FACTS if facts.get(key) is not None and facts[key] != QUIET.get(key)},
            "parameters": parameters,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "files": {name: header.identity.size for name, header in self.checkpoint.files.items()},
            "layers": self.cost.layers if anatomy.architecture else None,
            "experts": {"ffn": self.expert_count("ffn"), "attention": self.expert_count("attn"), "names": self.expert_names},
            "kv_cache_bytes_per_token": self.cost.kv_cache_bytes_per_token,
            **({"state_bytes_per_sequence": self.cost.state_bytes} if self.cost.state_bytes else {}),
            "flops_per_token": self.cost.document(self.context)["flops_per_token"],
            "findings": list(self.findings),
            "missing": list(anatomy.missing),
            "unknown": list(anatomy.unknown),
            "dropped": dict(anatomy.dropped),
            "tensors": [self._record(entry) for entry in self.entries],
        }
        if quantised := anatomy.quantised:
            document["quantisation"] = {"method": quantised.method, "bits": quantised.bits, "group_size": quantised.group}
        if self.mixtures:
            costs = {"dense": self.cost, **self.mixtures}
            cards = {name: {**cost.document(self.context), "bytes": cost.nbytes} for name, cost in costs.items()}
            more = {"shards": self.shards} if self.shards > 1 else {}
            more |= {"shared_expert": True} if self.shared_expert else {}
            document["as_bam"] = {"experts": self.experts, "top_k": self.top_k, **more, **cards}
        if self.where is not None:
            document["where"] = self.where
        if self.values:
            document["duplicates"] = self.values.duplicates
            document["clones"] = [{"of": of, "expert": copy, "equals": original} for of, copy, original in self.values.clones]
            document["routers"] = [router.document() for router in self.values.routers]
        return document

    def _record(self, entry: TensorEntry) -> dict[str, Any]:
        role, layer, expert = self.anatomy.places.get(entry.name, (None, None, None))
        origin = self.origins.get(entry.name)
        record: dict[str, Any] = {
            "name": entry.name, "role": role, "layer": layer, "expert": expert, "dtype": entry.dtype, "shape": list(entry.shape),
            "parameters": entry.numel, "bytes": entry.nbytes, "file": entry.file,
            "expression": origin.expression if origin else None,
            "reads": [{"source": source, "tensor": tensor} for source, tensor in origin.reads] if origin else [],
        }  # fmt: skip
        if self.values and entry.name in self.values.tensors:
            record["stats"] = self.values.tensors[entry.name].document()
        return record


FACTS = (
    "base_model_type", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "norm_type", "qk_norm", "parallel_block", "parallel_norms", "gated_ffn", "attention_bias", "mlp_bias",
    "tie_word_embeddings", "sliding_window", "max_position_embeddings", "rope_parameters", "num_experts", "num_experts_per_tok",
    "norm_topk_prob", "gate_scale", "num_attention_experts", "attention_kv", "shared_kv_layers", "attention_routing",
    "num_attention_experts_per_tok", "attention_linear", *QUIET, *GATING, "logit_scale",
)  # fmt: skip
"""What the JSON repeats of config.json, in bam's words (head counts are those of one attention expert)."""


def inspect(
    path: str | os.PathLike[str],
    *,
    tensors: str | None = None,
    layer: int | None = None,
    where: str | None = None,
    stats: bool = False,
    as_bam: int | None = None,
    top_k: int | None = None,
    shards: int = 1,
    shared_expert: bool = False,
    context: int = CONTEXT,
    workers: int | None = None,
    ranges: bool = False,
) -> Inspection:
    """Look at a model folder, one safetensors file, or one expert of a mixture (FOLDER#experts.NAME). Headers only, unless `stats` asks for
    the values.

    tensors: a glob of names; layer: a number; both choose what `document()["tensors"]` lists and what `stats` reads. where:
    "SOURCE:GLOB", what became of these tensors of a merge's source. as_bam: also the cost of the mixtures that this many such models
    would make, with `top_k` FFN experts per token (None: as method bam has them); with `shards` each FFN is so many experts, with
    `shared_expert` one more FFN is every token's. context: tokens of the prompt that FLOPs are given for. ranges: values of models of the
    hub are read there, and not downloaded.
    Raises CheckpointError for files that cannot be read, or a model that as_bam does not fit, VerifyError for where without a manifest.
    """
    if context < 1 or (as_bam is not None and as_bam < 1) or shards < 1:
        raise CheckpointError("--context, --as-bam and --shards must be at least 1.")
    anatomy, called = look_at_expert(path, values=stats, manifest=where is not None, ranges=ranges)
    cost = cost_of(anatomy)
    made, fate, findings = _provenance(path, anatomy, where)
    shown = tuple(
        name
        for name in anatomy.checkpoint.tensors
        if (tensors is None or fnmatchcase(name, tensors)) and (layer is None or anatomy.places.get(name, ("", None, None))[1] == layer)
    )
    if top_k is None:
        top_k = min(2, as_bam or 2) if anatomy.facts.get("post_norms") else 1
    mixtures: dict[str, Cost] = {kind: as_mixture(cost, as_bam, kind, top_k, shards, shared_expert) for kind in KINDS} if as_bam else {}
    return Inspection(
        path=called,
        anatomy=anatomy,
        cost=cost,
        context=context,
        shown=shown,
        origins=made,
        findings=(*anatomy.findings, *findings),
        mixtures=mixtures,
        experts=as_bam,
        top_k=top_k,
        shards=shards,
        shared_expert=shared_expert,
        where=fate,
        values=_values(anatomy, shown, workers) if stats else None,
    )


def _provenance(
    path: str | os.PathLike[str], anatomy: Anatomy, where: str | None
) -> tuple[Mapping[str, Origin], list[dict[str, Any]] | None, list[str]]:
    """The manifest's origins, what became of `where`, and what is odd: a manifest that is damaged, or of other tensors."""
    folder = anatomy.checkpoint.path
    if os.path.isfile(path) or not (folder / MANIFEST).exists():
        if where is not None:
            raise VerifyError(f"--where: {path} has no {MANIFEST}, which bam-merge writes beside what it merges.")
        return {}, None, []
    try:
        manifest = read_manifest(folder)
    except (VerifyError, CheckpointError) as error:
        if where is not None:
            raise
        return {}, None, list(error.problems)
    recorded, there = manifest["tensors"], anatomy.checkpoint.tensors
    whole = split_expert(os.fsdecode(path))[1] is None  # of an expert all others' tensors are elsewhere
    lacking = sum(name not in there for name in recorded) if whole else 0
    added = sum(name not in recorded for name in there)
    odd = [f"{MANIFEST} names {lacking} tensor(s) that are not here, and not {added} that are."] if lacking or added else []
    if note := format_note(manifest):
        odd.append(f"{note}.")
    return origins(manifest), fates(manifest, where) if where is not None else None, odd


def _values(anatomy: Anatomy, names: tuple[str, ...], workers: int | None) -> Values:
    from bam_merge.inspecting.router_stats import router_stats
    from bam_merge.inspecting.tensor_stats import duplicates, tensor_stats

    stats = tensor_stats(anatomy.checkpoint, names, workers)
    routers = [router for router in router_stats(anatomy) if router.name in stats]
    return Values(stats, duplicates(stats, anatomy.checkpoint), _clones(anatomy, stats), routers)


def _clones(anatomy: Anatomy, stats: Mapping[str, "TensorStats"]) -> list[tuple[str, int, int]]:
    """Experts all of whose tensors, in every layer, are byte for byte those of an earlier one: (group, copy, original)."""
    from bam_merge.inspecting.tensor_stats import part_digest

    digests: dict[tuple[str, int], dict[tuple[str, int | None], str]] = {}
    for name, (role, layer, expert) in anatomy.places.items():
        if expert is not None and name in stats:
            digests.setdefault((role.partition(".")[0], expert), {})[role, layer] = stats[name].digest
    for (role, layer, expert), leaf in anatomy.leaves.items():  # of one tensor that holds all of them each one's part
        name = stored(leaf).tensor
        if expert is not None and name in stats and anatomy.places[name][2] is None:
            digests.setdefault((role.partition(".")[0], expert), {})[role, layer] = part_digest(anatomy.checkpoint, leaf)
    found: list[tuple[str, int, int]] = []
    seen: dict[tuple[str, frozenset[Any]], int] = {}
    for (group, expert), tensors in sorted(digests.items()):
        original = seen.setdefault((group, frozenset(tensors.items())), expert)
        if original != expert:
            found.append((group, expert, original))
    return found
