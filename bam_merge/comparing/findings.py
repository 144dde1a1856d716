"""What differs between two models beside their values: structure, storage, configuration, tokenizer."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bam_merge.checkpoints.folder import read_small_file
from bam_merge.checkpoints.pieces import stored
from bam_merge.comparing.sides import Place, Side, in_common
from bam_merge.comparing.tensor_difference import Difference, digest
from bam_merge.text import count, printable, some

INCIDENTAL = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of config.json that change nothing that a model computes: shown, but two models that differ in them alone are the same."""


@dataclass(frozen=True)
class Finding:
    """Something that tells the folders apart. `counts`: models that differ in it are different. `names` are tensors, keys or files."""

    kind: str
    text: str
    names: tuple[str, ...]
    counts: bool

    def document(self) -> dict[str, Any]:
        return {"kind": self.kind, "text": self.text, "names": list(self.names), "counts": self.counts}


# ---- findings --------------------------------------------------------------------------------------------------------------


def places(sides: Sequence[Side], wanted: set[Place]) -> list[Finding]:
    """What only one side has; pairs of such with the same bytes were renamed."""
    missing = [[place for place in side.leaves if place in wanted and place not in other.leaves] for side, other in (sides, sides[::-1])]
    findings = []
    digests = [_digests(side, places) for side, places in zip(sides, missing, strict=True)]
    renamed = [pair for key in digests[0] if key in digests[1] for pair in zip(digests[0][key], digests[1][key], strict=False)]
    for place_a, place_b in renamed:
        pair = sides[0].name(place_a), sides[1].name(place_b)
        findings.append(Finding("renamed", f"{printable(pair[0])} is called {printable(pair[1])} in B", pair, True))
    for side, label, places, index in zip(sides, "AB", missing, (0, 1), strict=True):
        gone = {both[index] for both in renamed}
        names = tuple(side.name(place) for place in places if place not in gone)
        if names:
            findings.append(Finding(f"only in {label}", f"only in {label}: {count(len(names), 'tensor')}, {some(names)}", names, True))
    return findings


def _digests(side: Side, places: list[Place]) -> dict[tuple[Any, ...], list[Place]]:
    """The places by dtype, shape and digest."""
    found: dict[tuple[Any, ...], list[Place]] = {}
    for place in places:
        leaf = side.leaves[place]
        found.setdefault((leaf.dtype, leaf.shape, digest(side, place)), []).append(place)
    return found


def moves(sides: Sequence[Side], compared: Sequence[Difference]) -> list[Finding]:
    """Tensors of A that stand elsewhere in B with the same bytes: swapped layers, permuted experts, gate for up."""
    changed = [d for d in compared if not d.same and d.prints[0] is not None]
    where: dict[tuple[Any, ...], list[Difference]] = {}
    for d in changed:
        where.setdefault((d.dtypes[1], d.shapes[1], d.prints[1]), []).append(d)
    moves: dict[tuple[str, str], list[Difference]] = {}
    for found in changed:
        others = where.get((found.dtypes[0], found.shapes[0], found.prints[0]), [])
        others = [other for other in others if digest(sides[0], found.place) == digest(sides[1], other.place)]
        for other in sorted(others, key=lambda other: other.place[0] != found.place[0])[:1]:  # the same role elsewhere, before another
            alike = other.place[0] == found.place[0]
            moves.setdefault((_where(found.place, alike), _where(other.place, alike)), []).append(found)
    findings = []
    for (a, b), members in moves.items():
        names = tuple(d.name_a for d in members)
        back = moves.get((b, a), [])
        if back and a > b:
            continue  # said already
        what = f"{a} and {b} are swapped" if back else f"{a} of A is {b} of B"
        text = f"{what}: {count(len(members), 'tensor')}, {some(names)}"
        findings.append(Finding("moved", text, (*names, *(d.name_a for d in back)), True))
    return findings


def _where(place: Place, alike: bool) -> str:
    """Where a tensor stands, in words; its role too where that is another."""
    role, layer, expert = place
    words = [f"layer {layer}"] * (layer is not None) + [f"expert {expert}"] * (expert is not None)
    return ", ".join([printable(role.removeprefix("? "))] * (not alike or not words) + words)


def storage(sides: Sequence[Side], wanted: set[Place]) -> list[Finding]:
    """How the same tensors are named, typed and spread over files. Tells nothing of what they hold."""
    a, b = sides
    both = [place for place in in_common(sides) if place in wanted]
    findings = []
    dtypes = Counter((a.leaves[place].dtype, b.leaves[place].dtype) for place in both)
    for (one, other), number in dtypes.items():
        if one != other:
            names = tuple(a.name(place) for place in both if (a.leaves[place].dtype, b.leaves[place].dtype) == (one, other))
            findings.append(Finding("dtype", f"{count(number, 'tensor')}: {one} in A, {other} in B", names, False))
    renamed = tuple(a.name(place) for place in both if a.name(place) != b.name(place))
    if renamed:
        example = next(place for place in both if a.name(place) != b.name(place))
        text = f"{count(len(renamed), 'tensor')} of another name, or fused in one of the two, as "
        text += f"{printable(a.name(example))} and {printable(b.name(example))}"
        findings.append(Finding("names", text, renamed, False))
    files = [len(side.checkpoint.files) for side in sides]
    layouts = [_layout(side, set(both)) for side in sides]
    if not renamed and a.expert is None and b.expert is None and (files[0] != files[1] or layouts[0] != layouts[1]):
        text = f"tensors stand in another order or other files: {count(files[0], 'file')} in A, {files[1]} in B"
        findings.append(Finding("shards", text, (), False))
    return findings


def _layout(side: Side, places: set[Place]) -> list[tuple[int, str]]:
    """The tensors in their order, each with the number of its file."""
    number = {file: index for index, file in enumerate(side.checkpoint.files)}
    names = [stored(leaf).tensor for place, leaf in side.leaves.items() if place in places]
    return [(number[side.checkpoint.tensors[name].file], name) for name in names]


def config_findings(sides: Sequence[Side], called: Sequence[str] = "AB") -> list[Finding]:
    """Keys of config.json that differ. Where the model types do, what the two configurations mean is compared instead."""
    a, b = (side.anatomy.config for side in sides)
    if not all(side.checkpoint.config_digest for side in sides):
        return [Finding("config.json", "config.json is not there on both sides: not compared", (), False)] if a or b else []
    what = "config.json"
    if a.get("model_type") != b.get("model_type") or any(side.expert is not None for side in sides):
        left, right = ({k: v for k, v in side.anatomy.facts.items() if not _of_mixtures(k)} for side in sides)
        keys = left.keys() & right.keys()
        a, b, what = {k: left[k] for k in keys}, {k: right[k] for k in keys}, "what config.json says"
    findings = []
    if sides[1].turned:
        text = f"rows of q and k of {called[1]} are compared in the order of rotary pairs of {called[0]}: what they compute is the same"
        findings.append(Finding("rotary order", text, (), False))
        a, b = ({key: value for key, value in side.items() if key != "rope_interleaved"} for side in (a, b))
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key) or (key in a) != (key in b):
            shown = [printable(json.dumps(side[key], default=str), 100) if key in side else "absent" for side in (a, b)]
            text = f"{what}: {printable(key)} is {shown[0]} in {called[0]}, {shown[1]} in {called[1]}"
            findings.append(Finding("config.json", text, (key,), key not in INCIDENTAL))
    return findings


def _of_mixtures(key: str) -> bool:
    return "expert" in key or key.startswith(("router", "gate", "norm_topk", "attention_kv", "attention_routing", "shared_kv"))


def tokenizer_findings(sides: Sequence[Side], called: Sequence[str] = "AB") -> list[Finding]:
    """Tokenizer and generation files that differ in content, or that one folder lacks."""
    checkpoints = [side.checkpoint for side in sides]
    there = [set(checkpoint.companions()) for checkpoint in checkpoints]
    findings = []
    for name in sorted(there[0] | there[1]):
        if name not in there[0] & there[1]:
            findings.append(Finding("tokenizer", f"{name} is only in {called[name not in there[0]]}", (name,), False))
        elif len({read_small_file(checkpoint.path / name) for checkpoint in checkpoints}) > 1:
            findings.append(Finding("tokenizer", f"{name} differs", (name,), name != "generation_config.json"))
    return findings
