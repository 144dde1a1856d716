"""A source that is one expert of a mixture: the dense model that it was, or became. Its attention and FFN are the expert's, all else the
mixture's, and nothing is copied before a merge reads it: tensors are found in the mixture's files, by its layout's table.

Its config.json is written anew in the family's own keys (architectures/dense_config.py). What only a layout has (routers, a shared expert
that adds nothing, biases of zeros) is left out aloud; anything else that the family has no place for is a problem.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bam_merge.architectures.anatomy import Anatomy, anatomy
from bam_merge.architectures.config import describe, facts_of
from bam_merge.architectures.dense_config import as_said, dense_config
from bam_merge.architectures.locate import Place, applies
from bam_merge.architectures.locate import in_order as by_layers
from bam_merge.architectures.naming import Naming
from bam_merge.architectures.opening import open_folder
from bam_merge.architectures.quantisation import quantised_refusal
from bam_merge.architectures.tables import Architecture, at_layer, dense_families, evaluate, head_names
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.kinds import staged
from bam_merge.checkpoints.pieces import Leaf, Read, Shape, Slice, stored
from bam_merge.checkpoints.provenance import MANIFEST, key_digests, name_digest, read_manifest, recorded_experts
from bam_merge.errors import CheckpointError, VerifyError
from bam_merge.expressions import Expr
from bam_merge.paths import located
from bam_merge.sources.dense import DenseModel, Site
from bam_merge.sources.filled import is_filled
from bam_merge.sources.pairs import in_order, order_words
from bam_merge.sources.places import look
from bam_merge.text import nearest, printable, some


def read_expert(name: str, path: Path, expert: str, family: str | None = None, checkpoint: Checkpoint | None = None) -> DenseModel:
    """Open the source called `name`: the expert of that name or number of the mixture at `path`, as a model of `family` (None: of the one
    that it came from). Raises CheckpointError with all its problems, each prefixed with the source's name."""
    try:
        if unfinished := staged(path):
            raise CheckpointError(f"{printable(str(path), 1000)}: this is {unfinished}.")
        found = anatomy(checkpoint or open_folder(path), name)
        return _expert_of(name, found, expert, family)
    except (CheckpointError, VerifyError) as error:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in error.problems)) from None


def _expert_of(name: str, found: Anatomy, expert: str, family: str | None) -> DenseModel:
    where, layout = printable(str(found.checkpoint.path)), found.architecture
    if layout is None or layout.kind != "mixture":
        said = "a dense model" if layout is not None and layout.kind == "dense" else "no mixture that is read here"
        raise CheckpointError(
            f"{where}: {said} (model_type {printable(repr(found.config.get('model_type')), 60)}), so there is no expert "
            f"{printable(repr(expert), 60)}. Of a dense model, give the folder alone."
        )
    problems: list[str] = []
    if found.quantised is not None:
        problems.append(quantised_refusal(name, found.checkpoint).removeprefix(f"sources.{name}: "))
    facts = facts_of(layout, found.config, problems)
    if found.unknown:
        problems.append(
            f"{some(found.unknown)}: {len(found.unknown)} tensor(s) that {layout.name} does not have. Nothing is dropped silently."
        )
    if found.missing:
        problems.append(f"{some(found.missing)} missing: {len(found.missing)} tensor(s). Is the download complete?")
    if problems:
        raise CheckpointError(*problems)
    manifest = read_manifest(found.checkpoint.path) if (found.checkpoint.path / MANIFEST).exists() else None
    mixture = _Mixture(where, found, layout, facts, manifest)
    fit = mixture.as_dense(mixture.number(expert), mixture.families(family), family)
    heads = [tensor for tensor in found.dropped if tensor.endswith(head_names(layout))]  # tied: to be compared with the embeddings
    note = f"expert {printable(expert, 60)} of a mixture of layout {layout.name}, as a {fit.family.name} model"
    note += _order_note(layout, facts, fit)
    return DenseModel(
        name, found.checkpoint, fit.family, fit.config, fit.facts, fit.taken, {**found.dropped, **fit.dropped}, {},
        copies=(*fit.copies, *heads), naming=Naming({}), notes=(note,), expert=fit.number,
    )  # fmt: skip


@dataclass
class _Fit:
    """A family tried on an expert: what it makes of each tensor, and why it is not the family, if it is not."""

    number: int
    family: Architecture
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    taken: dict[Site, Expr] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)


def _is_in_order(fit: _Fit, facts: Mapping[str, Any]) -> bool:
    """Whether a mixture with these facts turns the rotary pairs that the family does."""
    return bool(fit.facts["rope_interleaved"]) == bool(facts["rope_interleaved"])


def _order_note(layout: Architecture, facts: Mapping[str, Any], fit: _Fit) -> str:
    if _is_in_order(fit, facts):
        return ""
    theirs, here = (order_words(of["rope_interleaved"]) for of in (fit.facts, facts))
    return f", with the rows of q and k in its order of rotary pairs again ({theirs} turn together; in {layout.name} {here}), bit for bit"


@dataclass(frozen=True)
class _Mixture:
    """A mixture in which one expert is looked for, called `where` in messages; `manifest` is the record of its merge, if there is one."""

    where: str
    found: Anatomy
    layout: Architecture
    facts: Mapping[str, Any]
    manifest: Mapping[str, Any] | None

    def number(self, expert: str) -> int:
        """The number of the expert called so. Raises CheckpointError for none, and for several."""
        there = sorted({number for _, _, number in self.found.leaves if number is not None})
        recipe = self.manifest["recipe"] if self.manifest is not None else {}
        names = recorded_experts(recipe) or _stated_names(self.found)
        called = [number for number, own in enumerate(names) if own == expert]
        if isinstance(recipe.get("experts"), dict) and recipe["experts"].get("shards", 1) > 1:
            raise CheckpointError(f"{self.where}: each of its experts is a part of an FFN (experts.shards), and no model by itself.")
        if len(called) > 1:
            raise CheckpointError(
                f"{self.where}: {len(called)} experts are called {printable(repr(expert), 60)}. Give the number of one: "
                f"{', '.join(map(str, called))}."
            )
        number = called[0] if called else int(expert) if expert.isascii() and expert.isdigit() and len(expert) < 9 else -1
        if number not in there:
            known = names or [str(number) for number in there]
            close = nearest(expert, known) or "."
            raise CheckpointError(f"{self.where}: no expert {printable(repr(expert), 60)}{close} There are {some(known, 20)}.")
        return number

    def families(self, given: str | None) -> Sequence[Architecture]:
        """The families that an expert can be a model of: the one that is given or recorded, or else all. Raises CheckpointError."""
        known = {family.name: family for family in dense_families()}
        if given is not None and given not in known:
            close = nearest(given, known) or f". Known: {', '.join(known)}."
            raise CheckpointError(f"family {printable(repr(given), 60)} is no dense family known here{close}")
        recorded = given or self.found.config.get("base_model_type") or self._recorded()
        return (known[recorded],) if recorded in known else tuple(known.values())

    def _recorded(self) -> str | None:
        """The family of the seed, by the digest that the manifest has of its model_type."""
        for family in dense_families():
            if self._keys(family):
                return family.name
        return None

    def _keys(self, family: Architecture) -> Mapping[str, str]:
        """The digests that the manifest has of the config.json of a source of this family, the seed's first; none where it has no such."""
        manifest: Mapping[str, Any] = self.manifest or {"sources": {}, "recipe": {}}
        names = recorded_experts(manifest["recipe"]) or []
        records = sorted(manifest["sources"].items(), key=lambda item: item[0].partition(".base")[0] != "seed")
        for name, record in records:
            keys = record.get("config_keys") if name.partition(".base")[0] in names else None
            types = (key_digests({"model_type": model_type}).items() for model_type in family.model_types)
            if isinstance(keys, dict) and any(digest <= keys.items() for digest in types):
                return keys
        return {}

    def as_dense(self, number: int, families: Sequence[Architecture], given: str | None) -> _Fit:
        """The expert as a model of the one family that it fits. Raises CheckpointError where there is none, or no single one."""
        fits = [self.fit(number, family) for family in families]
        good = [fit for fit in fits if not fit.problems]
        if len(fits) == 1 and not good:
            raise CheckpointError(*(f"{self.where}: {problem}" for problem in fits[0].problems))
        as_here = [fit for fit in good if _is_in_order(fit, self.facts)]  # rather than one whose rows stand otherwise
        good = as_here or good
        own = [fit for fit in good if self.layout.name.startswith(fit.family.name)]
        if len(good) > 1 and own:
            good = [max(own, key=lambda fit: len(fit.family.name))]
        if len(good) != 1:
            which = f"a model of {', '.join(fit.family.name for fit in good)} alike" if good else "a model of no dense family known here"
            way = " Say which: --family NAME, or in a recipe {path: ..., expert: ..., family: NAME}." if good else ""
            raise CheckpointError(f"{self.where}: without a record of its merge, each of its experts is {which}.{way}")
        return good[0]

    def fit(self, number: int, family: Architecture) -> _Fit:
        """`family` tried on the expert: with all that the layout has, or without what it has of every source, if these are zeros; the
        other way round where the record says that the merge filled them in."""
        without = {key: False for key, value in self.layout.implies.items() if value is True}
        more, fewer = ({**self.facts, **changes} for changes in ({}, without))
        first, second = (fewer, more) if self._filled_in() else (more, fewer)
        fit = self._tried(number, family, first)
        if not fit.problems or not without:
            return fit
        other = self._tried(number, family, second)
        return other if not other.problems or second is fewer else fit

    def _filled_in(self) -> bool:
        """Whether the merge filled in what the layout has of every source, and these had not."""
        records = self.manifest["tensors"] if self.manifest is not None else {}
        filled = {role for row in self.layout.rows for role in row.roles if row.make == "zeros" and role.startswith("attn.")}
        leaves = (leaf for (role, _, _), leaf in self.found.leaves.items() if role in filled)
        return any((records.get(stored(leaf).tensor) or {}).get("expression") == "zeros" for leaf in leaves)

    def _tried(self, number: int, family: Architecture, facts: Mapping[str, Any]) -> _Fit:
        fit = _Fit(number, family)
        have = dict(self._pieces(number, fit))
        if self._copied_head(have):
            fit.copies = (stored(have.pop(("head", None))).tensor,)
            fit.dropped[fit.copies[0]] = "the layout's copy of the embeddings"
            facts = {**facts, "tie_word_embeddings": True}
        facts = {**facts, "rope_interleaved": family.traits.get("rope_interleaved") is True}  # rows are put in that order below
        fit.config = dense_config(family, facts, self.found.config, fit.problems)
        if not fit.problems:
            if keys := self._keys(family):
                fit.config = as_said(family, fit.config, facts, lambda key: name_digest(key) in keys)
            fit.facts = describe(family, fit.config, fit.problems)
            self._settle(fit, have)
        if not fit.problems and not _is_in_order(fit, self.facts):
            self._put_in_order(fit)
        return fit

    def _put_in_order(self, fit: _Fit) -> None:
        """Rows of q and k in the family's order of rotary pairs, in which the merge found them."""
        put = in_order(fit.taken, fit.facts, to_halves=not fit.facts["rope_interleaved"])
        if put is not None:
            fit.taken = put
            return
        theirs, here = (order_words(facts["rope_interleaved"]) for facts in (fit.facts, self.facts))
        fit.problems.append(
            f"a {fit.family.name} model turns {theirs} together (rotary embedding), this mixture {here}, and its rows of q and k cannot be "
            "put in the other order: they are no whole rows of heads, or of a dtype below a byte."
        )

    def _pieces(self, number: int, fit: _Fit) -> Iterator[tuple[Site, Leaf]]:
        """What stands at each place of the dense model that the expert is; what stands for others is dropped."""
        for (role, layer, expert), leaf in self.found.leaves.items():
            if role.startswith("router."):
                fit.dropped[stored(leaf).tensor] = "a router: one expert has none"
            elif expert not in (None, number):
                fit.dropped.setdefault(stored(leaf).tensor, "another expert's")
            else:
                yield (role, layer), leaf

    def _copied_head(self, have: Mapping[Site, Leaf]) -> bool:
        """Whether the head is there only because the layout ties none: as the merge recorded, of the same bytes as the embeddings."""
        if self.manifest is None or self.layout.implies.get("tie_word_embeddings") is not False or ("head", None) not in have:
            return False
        records = (self.manifest["tensors"].get(stored(have[role, None]).tensor) for role in ("head", "embed"))
        head, embed = ((record or {}).get("digest") for record in records)
        return head is not None and head == embed

    def _settle(self, fit: _Fit, have: dict[Site, Leaf]) -> None:
        """Every tensor of the family is there in its shape, and what else is there adds nothing."""
        missing, taken = [], dict[Site, Read | Slice]()
        for cell in by_layers(fit.family, fit.facts["num_hidden_layers"]):
            if not applies(cell, fit.facts):
                continue
            own = at_layer(fit.facts, cell.layer)
            for role, shape in _shapes(cell.row.roles, cell.row.parts, cell.row.shape, cell.row.groups, own):
                leaf = have.pop((role, cell.layer), None)
                if leaf is None:
                    missing.append(f"{role} of layer {cell.layer}" if cell.layer is not None else role)
                elif leaf.shape != shape:
                    fit.problems.append(f"{stored(leaf).tensor} is {list(leaf.shape)}, a {fit.family.name} model has {list(shape)} for it.")
                else:
                    assert isinstance(leaf, Read | Slice), f"layout {self.layout.name} has a role in several tensors"
                    taken[role, cell.layer] = leaf
        fit.taken.update(taken)
        if missing:
            fit.problems.append(f"a {fit.family.name} model has {some(missing)}, and the mixture has not.")
        for leaf in taken.values():  # of one tensor of all experts
            fit.dropped.pop(stored(leaf).tensor, None)
        idle = {
            layer
            for (role, layer), leaf in have.items()
            if role in ("ffn.shared.up", "ffn.shared.down") and is_filled(self.found.checkpoint, leaf, "zeros")
        }
        filled = {role: row.make for row in self.layout.rows for role in row.roles if row.make}
        for (role, layer), leaf in have.items():
            tensor = stored(leaf).tensor
            if role.startswith("ffn.shared.") and layer in idle:
                fit.dropped[tensor] = "of a shared expert that adds nothing"
            elif role in filled and is_filled(self.found.checkpoint, leaf, str(filled[role]), taken.get((str(filled[role]), layer))):
                fit.dropped[tensor] = f"{filled[role]}, which the layout needs and a {fit.family.name} model has not"
            else:
                fit.problems.append(
                    f"{tensor}: a {fit.family.name} model has no place for it, and it is not what a merge fills in. One expert is not all "
                    "that this model computes with."
                )


# ---- an expert that is only looked at ------------------------------------------------------------------------------------------


def split_expert(address: str) -> tuple[str, str | None]:
    """PATH and EXPERT of PATH#experts.EXPERT or PATH#EXPERT; None for a place that is no expert's, or that is called so as it stands."""
    path, mark, name = address.rpartition("#")
    if not mark or os.path.exists(located(address)):
        return address, None
    return path, name.removeprefix("experts.")


def expert_names(found: Anatomy) -> list[str]:
    """What a mixture's experts are called, in order: by its config.json, or by the record of its merge; none where neither says it."""
    if (names := _stated_names(found)) or not (found.checkpoint.path / MANIFEST).exists():
        return names
    try:
        return recorded_experts(read_manifest(found.checkpoint.path)["recipe"]) or []
    except VerifyError:  # a damaged one names nobody
        return []


def _stated_names(found: Anatomy) -> list[str]:
    stated = found.checkpoint.config.get("expert_names")
    return list(map(str, stated)) if isinstance(stated, list) else []


def look_at_expert(
    address: str | os.PathLike[str], values: bool = False, manifest: bool = False, ranges: bool = False
) -> tuple[Anatomy, str]:
    """As places.look, of PATH or of one expert at PATH#experts.EXPERT, as the dense model that it is. Raises CheckpointError."""
    path, expert = split_expert(os.fsdecode(address))
    if expert is None:
        return look(address, values, manifest, ranges)
    mixture, label = look(path, values, manifest=True, ranges=ranges)
    try:
        model = _expert_of("model", anatomy(mixture.checkpoint), expert, None)
    except VerifyError as error:
        raise CheckpointError(*error.problems) from None
    leaves: dict[Place, Leaf] = {(role, layer, None): leaf for (role, layer), leaf in model.tensors.items() if isinstance(leaf, Leaf)}
    own, entries = {stored(leaf).tensor for leaf in leaves.values()}, mixture.checkpoint.tensors
    alone = replace(mixture.checkpoint, config=dict(model.config), tensors={name: entries[name] for name in entries if name in own})
    places: dict[str, Place] = {}
    for (role, layer, _), leaf in leaves.items():
        joined = places.get(stored(leaf).tensor)
        places[stored(leaf).tensor] = (f"{joined[0]}+{role}" if joined else role, layer, None)
    found = replace(
        mixture, checkpoint=alone, architecture=model.family, facts=model.facts, places=places, leaves=leaves, dropped=model.dropped,
        config=model.config, findings=(*mixture.findings, *(f"{note}." for note in model.notes)),
    )  # fmt: skip
    return found, f"{label}#experts.{expert}"


def expert_of(found: Anatomy, expert: str) -> DenseModel | None:
    """An expert of a mixture that is looked at, as the dense model that it is; None where it is none, or where nothing tells of which
    family."""
    try:
        return _expert_of("model", found, expert, None)
    except (CheckpointError, VerifyError):
        return None


# ---- shapes --------------------------------------------------------------------------------------------------------------------


def _shapes(
    roles: Sequence[str], parts: Sequence[str], shape: Sequence[str], groups: str, facts: Mapping[str, Any]
) -> Iterator[tuple[str, Shape]]:
    """The shape of each role of a family's row, which may be one of several in a fused tensor."""
    sizes = tuple(evaluate(size, facts) for size in shape)
    if len(roles) == 1:
        yield roles[0], sizes
        return
    for role, part in zip(roles, parts, strict=True):
        yield role, (evaluate(groups, facts) * evaluate(part, facts), *sizes[1:])
