"""Tensors of several models that stand in the same place: by role and layer, however each checkpoint names, fuses or splits them.

A side of a comparison is PATH (a folder or a safetensors file), or PATH#EXPERT, one expert of a mixture as the dense model it was:
EXPERT is its name in expert_names or its number, with or without "experts." before it. Where it is no dense model that is known (a shared
expert was trained beside it), or nothing tells of which family, it is what of the mixture is no other expert's.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bam_merge.architectures import locate
from bam_merge.architectures.anatomy import Anatomy
from bam_merge.architectures.vocabulary import SHARED_ROLES
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Leaf, Read, Slice, every_stored, stored
from bam_merge.checkpoints.reading import read_piece
from bam_merge.errors import CheckpointError
from bam_merge.sources.experts import expert_names, expert_of, split_expert
from bam_merge.sources.places import look
from bam_merge.text import nearest, printable

Place = locate.Place
"""As everywhere; but here a tensor without a role has a place as well, "?" and its name."""


@dataclass(frozen=True)
class Side:
    """A model as one side of a comparison. `left_out`: tensors that are no part of it, with the reason. `turned`: its rows of q and k are
    read in the order of another one's rotary pairs."""

    label: str
    anatomy: Anatomy
    expert: int | None
    leaves: Mapping[Place, Leaf]
    left_out: Mapping[str, str]
    turned: bool = False

    @property
    def checkpoint(self) -> Checkpoint:
        return self.anatomy.checkpoint

    def name(self, place: Place) -> str:
        """What stands there, as messages name it: the stored tensor, and the role where it is cut from a fused one."""
        leaf = self.leaves[place]
        return stored(leaf).tensor + (f" ({place[0]})" if isinstance(leaf, Slice) else "")

    def read(self, place: Place, start: int, stop: int, view: memoryview) -> None:
        """Fill `view` with the bytes of elements [start, stop) of what stands there. Raises CheckpointError."""
        read_piece(self.checkpoint, self.leaves[place], view, start, stop)


def open_side(address: str | os.PathLike[str], ranges: bool = False) -> Side:
    """Open PATH or PATH#EXPERT. Raises CheckpointError when it cannot be read, or has no such expert."""
    text = os.fsdecode(address)
    path, name = split_expert(text)
    if name is None:
        found, label = look(text, values=True, ranges=ranges)
        return Side(label, found, None, _placed(found), dict(found.dropped))
    found, label = look(path, values=True, manifest=True, ranges=ranges)
    expert, label = _expert(found, path, name), f"{label}#{text.rpartition('#')[2]}"
    if (model := expert_of(found, name)) is not None:
        own: dict[Place, Leaf] = {(role, layer, None): leaf for (role, layer), leaf in model.tensors.items() if isinstance(leaf, Leaf)}
        dense = replace(found, architecture=model.family, facts=model.facts, config=model.config)
        return Side(label, dense, expert, _by_position(found, own), model.dropped)
    leaves: dict[Place, Leaf] = {}
    left_out = dict(found.dropped)
    for (role, layer, of), leaf in _placed(found).items():
        if role.startswith("router."):
            left_out[stored(leaf).tensor] = "a router: one expert has none"
        elif role in SHARED_ROLES:
            left_out[stored(leaf).tensor] = "the shared expert's"
        elif of is None or of == expert:
            leaves[role, layer, None] = leaf
        else:
            left_out.setdefault(stored(leaf).tensor, "another expert's")
    for leaf in leaves.values():  # which holds all experts
        left_out.pop(stored(leaf).tensor, None)
    return Side(label, found, expert, leaves, left_out)


def _placed(found: Anatomy) -> dict[Place, Leaf]:
    """Every tensor at its place, those without a role under their names."""
    leaves: dict[Place, Leaf] = dict(found.leaves)
    placed = {read.tensor for leaf in leaves.values() for read in every_stored(leaf)}
    for name in (*found.unknown, *(name for name in found.places if name not in placed)):
        entry = found.checkpoint.tensors[name]
        leaves[f"? {name}", None, None] = Read("model", name, entry.dtype, entry.shape)
    return _by_position(found, leaves)


def _by_position(found: Anatomy, leaves: Mapping[Place, Leaf]) -> dict[Place, Leaf]:
    """In the order of the files."""
    position = {name: index for index, name in enumerate(found.checkpoint.tensors)}
    return dict(sorted(leaves.items(), key=lambda item: position[stored(item[1]).tensor]))


def _expert(found: Anatomy, path: str, name: str) -> int:
    """The number of the expert called `name`."""
    there = sorted({expert for _, _, expert in found.leaves if expert is not None})
    if not there:
        raise CheckpointError(f"{printable(path)}: no mixture, so there is no expert {printable(repr(name), 60)}. Give the folder alone.")
    names = expert_names(found)
    number = names.index(name) if name in names else int(name) if name.isascii() and name.isdigit() and len(name) < 9 else -1
    if number not in there:
        known = names or [str(expert) for expert in there]
        listed = ", ".join(printable(item, 60) for item in known[:20])
        raise CheckpointError(f"{printable(path)}: no expert {printable(repr(name), 60)}{nearest(name, known) or '.'} There are {listed}.")
    return number


def in_common(sides: Sequence[Side]) -> list[Place]:
    """The places that all sides have, in the first one's order."""
    first, *others = sides
    return [place for place in first.leaves if all(place in other.leaves for other in others)]


def check_comparable(sides: Sequence[Side]) -> None:
    """Raise CheckpointError when nothing stands in the same place in all of them."""
    if not in_common(sides):
        listed = ", ".join(f"{printable(side.label)} ({_what(side)})" for side in sides)
        raise CheckpointError(f"no tensor stands in the same place in {listed}: there is nothing to compare.")


def _what(side: Side) -> str:
    table = side.anatomy.architecture
    return f"{table.name if table else 'of no known family'}, {len(side.leaves)} tensors"
