"""A mixture whose routers are to be made anew: where they are, whose text each row is for, and what its manifest says afterwards."""

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from bam_merge import expressions
from bam_merge._version import __version__
from bam_merge.architectures.opening import open_folder
from bam_merge.calibrating.corpus import Corpus
from bam_merge.calibrating.stage import Wanted
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.pieces import Read
from bam_merge.checkpoints.provenance import MANIFEST, read_manifest
from bam_merge.errors import BamMergeError, CheckpointError, RecipeError
from bam_merge.model.loading import StoredModel, stored_model
from bam_merge.model.tokens import open_tokenizer
from bam_merge.paths import located
from bam_merge.planning.calibration import read_corpus, reading_of
from bam_merge.planning.make import make_plan
from bam_merge.planning.plan import Plan
from bam_merge.recipe.load import parse_recipe
from bam_merge.recipe.makes.data_routers import FromTexts, default_scale
from bam_merge.recipe.rules import ROUTER_INITS, covers
from bam_merge.recipe.schema import ROUTER_PLACES, Recipe
from bam_merge.sources.recipe_places import at_hand
from bam_merge.text import nearest, printable, some

ROUTER = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.router\.weight")
"""The reference model's name for a router."""


ROLES = {"self_attn": "router.attn", "mlp": "router.ffn"}


@dataclass(frozen=True)
class Mixture:
    """A mixture's folder: `names` is whose text each expert's is, `manifest` what a merge recorded, if one made it."""

    folder: Path
    stored: StoredModel
    names: tuple[str, ...]
    manifest: Mapping[str, Any] | None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.stored.checkpoint

    @property
    def routers(self) -> dict[str, tuple[str, int, TensorEntry]]:
        """Role, layer and tensor of every router, by its parameter's name."""
        found = {}
        for parameter, leaf in self.stored.leaves.items():
            if (match := ROUTER.fullmatch(parameter)) is not None:
                assert isinstance(leaf, Read), "a router is a tensor by itself"
                found[parameter] = ROLES[match[2]], int(match[1]), self.checkpoint.tensors[leaf.tensor]
        return found

    @property
    def gates(self) -> tuple[int, bool]:
        """FFN experts per token, and whether their gates sum to one."""
        return self.stored.config.num_experts_per_tok, self.stored.config.norm_topk_prob


def open_mixture(folder: str | os.PathLike[str]) -> Mixture:
    """The mixture in `folder`. Raises CheckpointError for what is none, VerifyError for a manifest that is damaged."""
    path = located(folder)
    stored = stored_model(open_folder(path))
    config, shown = stored.config, printable(str(path))
    count = max(config.num_experts, config.num_attention_experts)
    if not count:
        raise CheckpointError(f"{shown}: a dense model, which has no routers. Give a mixture.")
    manifest = read_manifest(path) if (path / MANIFEST).exists() else None
    named = manifest["recipe"].get("experts") if manifest is not None else stored.checkpoint.config.get("expert_names")
    names = tuple(named) if isinstance(named, list) and len(named) == count else tuple(map(str, range(count)))
    found = Mixture(path, stored, names, manifest)
    if odd := sorted({entry.dtype for _, _, entry in found.routers.values()} - {"F64", "F32", "F16", "BF16"}):
        raise CheckpointError(f"{shown}: its routers are {', '.join(odd)}, which nothing here computes with.")
    return found


# ---- the routers that are asked for ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What is to be made: the routers; the corpora by place; the plan of the merge over its sources, where these are at hand; the recipe as
    the manifest will have it; and what is to be said. `expressions` are those of the routers, by tensor."""

    wanted: Sequence[Wanted]
    corpora: Mapping[str, Corpus]
    plan: Plan | None
    recipe: Recipe | None
    expressions: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """What an earlier run must have been of, for its routers to be these."""
        said = [__version__, dict(self.expressions), {place: corpus.document() for place, corpus in self.corpora.items()}]
        return xxhash.xxh3_128_hexdigest(repr(said).encode())


def order_of(mixture: Mixture, section: Mapping[str, Any], target: Path) -> Order:
    """The routers that a `router` section of a recipe asks for, with paths relative to the working directory.

    Those of a merge whose sources are at hand are made for the seed's hidden states, unless the section says otherwise; all others for the
    mixture's own. Raises RecipeError, or CheckpointError, with all that is wrong.
    """
    if mixture.stored.config.dense_intermediate_size:
        raise CheckpointError(
            f"{printable(str(mixture.folder))}: its routers see the residual before the FFN's norm, and texts show what the FFN "
            "sees. Merge into layout bam for routers from texts."
        )
    section = _absolute(section)
    _check_names(mixture, section)
    if mixture.manifest is None:
        return _alone(mixture, section)
    home = Path(os.path.normpath(mixture.folder.absolute() / str(mixture.manifest.get("recipe_folder", "."))))
    inputs = section.get("inputs")
    plan, why = None, None
    if inputs != "mixture":
        try:
            plan = make_plan(_recipe(mixture, {**section, "inputs": "seed"}, home, target))
            if all(remote.ranged for remote in plan.remotes.values()):  # there is nothing to download
                plan = make_plan(at_hand(plan.recipe)) if plan.remotes else plan
            why = None if not plan.remotes and _is_of(plan, mixture) else "they are not those that it was merged of, or not downloaded"
        except BamMergeError as error:
            why = error.problems[0]
    if plan is not None and plan.calibration is not None and plan.calibration.absent:
        raise RecipeError(*plan.calibration.absent)
    if why is not None and inputs == "seed":
        raise RecipeError(f"inputs: seed: the sources are not at hand: {why} Use inputs: mixture.")
    if plan is None or why is not None:
        recipe = _recipe(mixture, {**section, "inputs": "mixture"}, home, target)
        notes = [f"the sources are not at hand, so routers are made for the mixture's own hidden states: {why}"] if why else []
        return _of(mixture, recipe, notes)
    return _planned(mixture, plan)


def _check_names(mixture: Mixture, section: Mapping[str, Any]) -> None:
    distinct = dict.fromkeys(mixture.names)
    problems = []
    for key in ("texts", "prompts", "negative_prompts"):
        for name in section.get(key) or {}:
            if name not in distinct:
                close = nearest(name, distinct) or f". Its experts: {some(distinct, 12)}."
                problems.append(f"{key}: {printable(name)!r} is no expert of {printable(str(mixture.folder))}{close}")
    if problems:
        raise RecipeError(*problems)


def _absolute(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with paths that do not depend on the working directory."""

    def place(text: str) -> str:
        return os.path.abspath(located(text, error=RecipeError))

    texts = {
        name: place(files) if isinstance(files, str) else [place(file) for file in files]
        for name, files in section.get("texts", {}).items()
    }
    return {**section, **({"texts": texts} if texts else {})}


def _recipe(mixture: Mixture, section: Mapping[str, Any], home: Path, target: Path) -> Recipe:
    """The recipe of a merge that gives the mixture with these routers, and puts it where it will be."""
    assert mixture.manifest is not None
    document = deepcopy(dict(mixture.manifest["recipe"]))
    both = {"attention": dict(section), "ffn": dict(section)}
    document["router"] = both if document.get("method") == "bam" else {"ffn": both["ffn"]}
    document["rules"] = [rule for rule in document.get("rules", []) if not makes_routers(rule)]
    if target != mixture.folder.absolute():
        document["output"] = {**document["output"], "path": os.path.relpath(target, home)}
    return parse_recipe(document, home, str(mixture.folder / MANIFEST)).of_document()


def makes_routers(rule: Any) -> bool:
    """Whether a rule of a recorded recipe is for routers."""
    roles = rule.get("roles", []) if isinstance(rule, dict) else []
    return any(covers(pattern, role) for pattern in roles for role in ROUTER_PLACES if isinstance(pattern, str))


def _is_of(plan: Plan, mixture: Mixture) -> bool:
    """Whether a plan gives the tensors that the folder has."""
    found = {name: (entry.dtype, tuple(entry.shape)) for name, entry in mixture.checkpoint.tensors.items()}
    return {step.name: (step.dtype, step.shape) for step in plan.steps} == found


def _planned(mixture: Mixture, plan: Plan) -> Order:
    assert plan.calibration is not None
    of = {step.name: step for step in plan.steps if isinstance(step.expr, expressions.Calibrated)}
    wanted = []
    for parameter, (role, layer, entry) in mixture.routers.items():
        expr = of[entry.name].expr
        assert isinstance(expr, expressions.Calibrated)
        corpus = plan.calibration.corpora[expr.of]
        wanted.append(Wanted(entry.name, parameter, role, layer, expr.method, expr.names, corpus, expr.inputs, entry.dtype))
    said = {name: step.expression for name, step in of.items()}
    return Order(wanted, plan.calibration.corpora, plan, plan.recipe, said)


def _of(mixture: Mixture, recipe: Recipe, notes: list[str]) -> Order:
    """The routers of a merge whose sources are not at hand."""
    makes = {role: recipe.router_make(role) for role in ROUTER_PLACES}
    records = {role: recipe.calibrator(make, role) for role, make in makes.items() if isinstance(make, FromTexts)}
    make = makes["router.ffn"]
    assert isinstance(make, FromTexts)
    corpus = _read(mixture, make, recipe.folder, f"{recipe.file}: router")
    return _made(mixture, make, records, corpus, recipe, notes)


def _alone(mixture: Mixture, section: Mapping[str, Any]) -> Order:
    """The routers of a mixture that no merge recorded."""
    if section.get("inputs") == "seed":
        raise RecipeError(
            f"inputs: seed: {printable(str(mixture.folder))} has no {MANIFEST}, so its seed is not known. Use inputs: mixture."
        )
    document = {
        "method": "bam",
        "sources": {name: name for name in mixture.names},
        "experts": list(mixture.names),
        "output": {"path": "out"},
    }
    recipe = parse_recipe({**document, "router": {**section, "inputs": "mixture"}}, Path(os.sep), "routers")
    make = recipe.router_make("router.ffn")
    assert isinstance(make, FromTexts)
    sigmoid = mixture.stored.config.scoring_func == "sigmoid"
    records = {
        role: make.calibrator(make.scale or default_scale(role, mixture.gates), sigmoid and role == "router.ffn") for role in ROUTER_PLACES
    }
    return _made(mixture, make, records, _read(mixture, make, Path.cwd(), "router"), None, [])


def _read(mixture: Mixture, make: FromTexts, folder: Path, where: str) -> Corpus:
    problems: list[str] = []
    config = mixture.stored.config
    reading = reading_of(make, open_tokenizer(mixture.folder), config.max_position_embeddings, folder)
    corpus = read_corpus(make, reading, where, config.vocab_size, problems)
    if problems:
        raise RecipeError(*problems)
    return corpus


def _made(
    mixture: Mixture,
    make: FromTexts,
    records: Mapping[str, expressions.Calibrator],
    corpus: Corpus,
    recipe: Recipe | None,
    notes: list[str],
) -> Order:
    wanted, said = [], {}
    for parameter, (role, layer, entry) in mixture.routers.items():
        wanted.append(Wanted(entry.name, parameter, role, layer, records[role], mixture.names, corpus, "mixture", entry.dtype))
        expr = expressions.Calibrated(
            records[role], mixture.names, ROUTER_PLACES[role], make.tokens, "mixture", entry.dtype, tuple(entry.shape)
        )
        said[entry.name] = str(expr)
    places = {ROUTER_PLACES[router.role]: corpus for router in wanted}
    return Order(wanted, places, None, recipe, said, notes)


def section_of(texts: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A `router` section. Raises RecipeError for an init that takes no texts."""
    section = {"init": "ridge", **settings, **({"texts": dict(texts)} if texts else {})}
    known = {init: kind for init, kind in ROUTER_INITS.items() if issubclass(kind, FromTexts)}
    if section["init"] not in known:
        raise RecipeError(
            f"init: {printable(repr(section['init']), 60)} is none of {', '.join(known)}{nearest(str(section['init']), known)}"
        )
    return section
