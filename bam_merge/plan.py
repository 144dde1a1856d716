"""Recipe x architectures x headers -> Plan: every output tensor, how it is made, where it goes; and every problem at once.

Nothing here reads tensor data or imports torch.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from bam_merge import __version__, ops
from bam_merge.architecture import Architecture, architecture_names, evaluate, load_architecture, natural_order
from bam_merge.assign import ARITHMETIC_DTYPES, DTYPE_NAMES, Made, assign, check_axes
from bam_merge.dense import DenseModel, Site, disagreements, read_dense
from bam_merge.errors import BamMergeError, CheckpointError, RecipeError, nearest, some
from bam_merge.makes import parse_size
from bam_merge.output_config import merge_values, output_config, refusals
from bam_merge.recipe import Recipe
from bam_merge.safetensors_header import DTYPE_BITS, encode_header
from bam_merge.tokenizer_check import tokenizer_disagreements

CHUNK_ELEMENTS = 2**17
"""Elements of one operand that a worker holds at a time: few enough for a processor's cache, which halves the time of 2**20."""

BASE_MEMORY = 270_000_000
"""Resident bytes of the process with torch imported, before any tensor (measured, Linux x86-64, torch 2.13 CPU)."""

COPY_BUFFER = 2**20
"""Bytes that a worker's plain copy holds at a time."""


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor. `offset` counts bytes from the start of `file`, which holds it in `nbytes` bytes."""

    name: str
    role: str
    layer: int | None
    expert: int | None
    dtype: str
    shape: tuple[int, ...]
    expr: ops.Expr
    by: str
    file: str = ""
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def expression(self) -> str:
        """How the tensor is made, as plans and manifests show it."""
        cast = f" as {self.dtype}" if self.expr.dtype != self.dtype and not isinstance(self.expr, ops.Init) else ""
        return str(self.expr).removesuffix(f": {self.name}") + cast


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, its header (with the 8 length bytes) and its total size in bytes."""

    file: str
    header: bytes
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do. `unused` maps each source to its tensors that are not read, with the reason."""

    recipe: Recipe
    layout: Architecture
    models: Mapping[str, DenseModel]
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    unused: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]
    active_parameters: int
    fingerprint: str

    @property
    def parameters(self) -> int:
        return sum(prod(step.shape) for step in self.steps)

    @property
    def bytes_written(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes that the merge reads from the sources, each operand once (methods that survey a tensor first read it again)."""
        return sum(prod(part.shape) * DTYPE_BITS[part.dtype] // 8 for step in self.steps for part in ops.leaves(step.expr))

    def peak_memory(self, workers: int = 2) -> int:
        """Estimated peak resident bytes: the interpreter with torch, and each worker's chunk of every operand, stored and widened.

        TIES and DARE-TIES keep every operand's difference, trimmed and weighted, besides.
        """
        per_element = 0
        for step in self.steps:
            merges = [part for part in ops.parts(step.expr) if isinstance(part, ops.Merge)]
            for merge in merges:
                operands = len(merge.operands) + (merge.base is not None)
                extra = 24 * operands if isinstance(merge.method, ops.Ties | ops.DareTies) else 0
                per_element = max(per_element, 8 * operands + 16 + extra)
        return BASE_MEMORY + workers * (COPY_BUFFER + CHUNK_ELEMENTS * max(per_element, 16))

    def document(self, workers: int = 2) -> dict[str, Any]:
        """The plan as `plan --json` prints it."""
        return {
            "method": self.recipe.method,
            "layout": self.layout.name,
            "parameters": {"total": self.parameters, "active": self.active_parameters},
            "bytes": {"read": self.bytes_read, "write": self.bytes_written},
            "peak_memory": self.peak_memory(workers),
            "shards": [{"file": shard.file, "bytes": shard.nbytes} for shard in self.shards],
            "tensors": [
                {
                    "name": step.name, "role": step.role, "layer": step.layer, "expert": step.expert, "dtype": step.dtype,
                    "shape": list(step.shape), "expression": step.expression,
                    "reads": [{"source": read.source, "tensor": read.tensor} for read in ops.reads(step.expr)],
                }
                for step in self.steps
            ],
            "config": dict(self.config),
            "unused": {name: dict(tensors) for name, tensors in self.unused.items() if tensors},
            "notes": list(self.notes),
        }  # fmt: skip


# ---- making the plan -------------------------------------------------------------------------------------------------------


def make_plan(recipe: Recipe) -> Plan:
    """Plan the merge that `recipe` asks for, from headers and config.json only.

    Raises RecipeError or CheckpointError carrying every problem found in the recipe, the sources and their combination.
    """
    layout, problems = _layout(recipe)
    models, broken = _open_sources(recipe)
    ordered = [models[name] for name in dict.fromkeys((recipe.seed_name, *recipe.sources)) if name in models]
    broken += [*_same_folder(ordered), *disagreements(ordered), *tokenizer_disagreements(ordered)] if ordered else []
    comparable = len(models) == len(recipe.sources) and all(model.tensors.keys() == ordered[0].tensors.keys() for model in ordered)
    if broken:
        if comparable:  # the rules can be tried all the same
            assign(recipe, models, problems)
        raise CheckpointError(*problems, *broken)
    seed = models[recipe.seed_name]
    if layout is None and recipe.output.layout in (None, seed.family.name) and recipe.method == "merge":
        layout = seed.family
    elif layout is None and not problems:
        problems.append(
            f"{recipe.file}: output.layout: method merge of {seed.family.name} models gives layout {seed.family.name}, "
            f"not {recipe.output.layout}."
        )
    made = assign(recipe, models, problems)
    if layout is None or problems:
        raise RecipeError(*problems)
    values = merge_values(recipe, seed, made) if layout.kind == "mixture" else dict(seed.facts)
    problems += refusals(layout, values, recipe.file)
    if layout.kind == "mixture":
        problems += [f"{recipe.file}: {text}" for text in check_axes(made, seed.facts["num_hidden_layers"])]
    steps = _steps(recipe, layout, seed, made, problems)
    problems += _dtype_problems(recipe, steps)
    if problems:
        raise RecipeError(*dict.fromkeys(problems))
    steps = [replace(step, dtype=DTYPE_NAMES.get(recipe.output.dtype, step.dtype)) for step in steps]
    placed, shards = _place(steps, parse_size(recipe.output.max_shard_size))
    dominant = Counter({step.dtype: 0 for step in steps})
    for step in steps:
        dominant[step.dtype] += step.nbytes
    config = output_config(layout, seed, values, dominant.most_common(1)[0][0])
    return Plan(
        recipe=recipe,
        layout=layout,
        models=models,
        steps=placed,
        shards=shards,
        config=config,
        unused=_unused(models, placed, made),
        notes=tuple(_notes(recipe, layout, ordered, values)),
        active_parameters=_active(placed, values),
        fingerprint=_fingerprint(recipe, models, config),
    )


def _layout(recipe: Recipe) -> tuple[Architecture | None, list[str]]:
    """The layout that the recipe names; None where it follows from the sources (method merge)."""
    name = recipe.output.layout
    if name is None:
        return (None if recipe.method == "merge" else load_architecture("bam")), []
    if name not in architecture_names():
        return None, [f"{recipe.file}: output.layout: {name!r} is no layout{nearest(name, architecture_names())}"]
    layout = load_architecture(name)
    if recipe.method == "merge":
        return None, []
    if layout.kind == "dense":
        return None, [
            f"{recipe.file}: output.layout: {name} is a dense family; method {recipe.method} makes a mixture. Use bam, or method: merge."
        ]
    return layout, []


def _open_sources(recipe: Recipe) -> tuple[dict[str, DenseModel], list[str]]:
    """Every source, and all problems of all of them."""

    def attempt(item: tuple[str, str]) -> DenseModel | CheckpointError:
        try:
            return read_dense(item[0], recipe.folder / item[1])
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(max_workers=4) as pool:
        opened = list(pool.map(attempt, recipe.sources.items()))
    models = {model.name: model for model in opened if isinstance(model, DenseModel)}
    return models, [problem for error in opened if isinstance(error, BamMergeError) for problem in error.problems]


def _same_folder(models: list[DenseModel]) -> list[str]:
    """Sources that are one model by identity: a folder under two names, or weight files that are links to the same ones."""
    seen: dict[tuple[str, Any], str] = {}
    problems = []
    for model in models:
        status = os.stat(model.checkpoint.path)
        files = frozenset((identity.device, identity.inode) for identity in model.checkpoint.identities.values())
        for what, key in (("folder", (status.st_dev, status.st_ino)), ("weight files", files)):
            other = seen.setdefault((what, key), model.name)
            if other != model.name:
                problems.append(
                    f"sources.{model.name}: the same {what} as sources.{other}. Name it once; it may stand several times in experts."
                )
                break
    return problems


def _steps(recipe: Recipe, layout: Architecture, seed: DenseModel, made: Mapping[Site, Made], problems: list[str]) -> list[Step]:
    """The output tensors in file order, by the layout's rows; whatever is made and stored nowhere is a problem."""
    steps: list[Step] = []
    stored: set[Site] = set()
    default_dtype = seed.tensors["embed", None].dtype
    for row, layer in natural_order(layout, seed.facts["num_hidden_layers"]):
        if row.make == "zeros":
            shape = tuple(evaluate(size, seed.facts) for size in row.shape)
            zeros = ops.Init(ops.Zeros(), row.name(layer), recipe.random_seed, default_dtype, shape)
            steps.append(Step(row.name(layer), row.roles[0], layer, None, default_dtype, shape, zeros, f"layout {layout.name}"))
            continue
        sites = [made.get((role, layer)) for role in row.roles]
        parts = [item for item in sites if item is not None and item.per_expert == row.per_expert]
        if len(parts) < len(row.roles):
            continue
        stored.update((role, layer) for role in row.roles)
        spelling = next((s for s in range(len(row.names)) if row.name(layer, spelling=s) in seed.checkpoint.tensors), 0)
        for index in range(len(parts[0].exprs)):
            expert = index if row.per_expert else None
            exprs = tuple(part.exprs[index] for part in parts)
            expr = ops.fuse(exprs, evaluate(row.groups, seed.facts)) if len(exprs) > 1 else exprs[0]
            if isinstance(expr, ops.Init):
                expr = replace(expr, name=row.name(layer, expert, spelling))
            role = row.roles[0] if len(row.roles) == 1 else "+".join(row.roles)
            steps.append(Step(row.name(layer, expert, spelling), role, layer, expert, expr.dtype, expr.shape, expr, parts[0].by))
    problems += _homeless(recipe, layout, made, stored)
    return steps


def _homeless(recipe: Recipe, layout: Architecture, made: Mapping[Site, Made], stored: set[Site]) -> list[str]:
    """A message per role that is made in a form for which the layout has no row."""
    rows = {(role, row.per_expert) for row in layout.rows for role in row.roles}
    problems = []
    for role, by in dict.fromkeys((site[0], item.by) for site, item in made.items() if site not in stored):
        where = f"{recipe.file}: {by}: {role!r}"
        if (role, False) in rows and (role, True) not in rows:
            problems.append(
                f"{where} asks for one tensor per expert, but layout {layout.name!r} stores it shared. Use make: mean, or layout: bam."
            )
        elif (role, True) in rows:
            problems.append(f"{where} is made once for all, but layout {layout.name!r} stores one per expert. Use make: expert.")
        else:
            remedy = " Use layout: bam." if layout.name != "bam" else ""
            problems.append(f"{where} is a tensor of the sources that layout {layout.name!r} has no place for.{remedy}")
    return problems


def _dtype_problems(recipe: Recipe, steps: list[Step]) -> list[str]:
    """dtype: source needs sources that agree; a conversion needs dtypes that can be converted."""
    target = DTYPE_NAMES.get(recipe.output.dtype)
    mixed: dict[tuple[str, ...], str] = {}
    per_site: dict[tuple[str, int | None], dict[str, str]] = {}
    unfit: dict[str, str] = {}
    for step in steps:
        for leaf in ops.leaves(step.expr):
            read = leaf.of if isinstance(leaf, ops.Slice) else leaf
            per_site.setdefault((step.role, step.layer), {}).setdefault(read.dtype, str(read))
            if target and read.dtype != target and read.dtype not in ARITHMETIC_DTYPES:
                unfit.setdefault(read.dtype, str(read))
    for dtypes in per_site.values():
        if len(dtypes) > 1:
            mixed.setdefault(tuple(sorted(dtypes)), "; ".join(f"{name} is {dtype}" for dtype, name in dtypes.items()))
    problems = [f"{recipe.file}: output.dtype: {name} is {dtype}, which cannot be converted to {target}." for dtype, name in unfit.items()]
    if target is None:
        problems += [
            f"{recipe.file}: output.dtype: source keeps what is stored, but the sources disagree: {text}. Set dtype: bfloat16 (or another)."
            for text in mixed.values()
        ]
    return problems


def _place(steps: list[Step], limit: int) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
    """Distribute tensors over files of at most `limit` bytes (a larger tensor has a file to itself), and fix every offset."""
    groups: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if groups[-1] and size + step.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(step)
        size += step.nbytes
    placed: list[Step] = []
    shards: list[Shard] = []
    for index, group in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        group = sorted(group, key=lambda step: -DTYPE_BITS[step.dtype])  # wide dtypes first keeps every tensor aligned
        header, spans = encode_header((step.name, step.dtype, step.shape) for step in group)
        placed += [replace(step, file=file, offset=offset) for step, (offset, _) in zip(group, spans, strict=True)]
        shards.append(Shard(file, header, len(header) + sum(step.nbytes for step in group)))
    return tuple(placed), tuple(shards)


# ---- what the plan says about itself ---------------------------------------------------------------------------------------


def _unused(models: Mapping[str, DenseModel], steps: tuple[Step, ...], made: Mapping[Site, Made]) -> dict[str, dict[str, str]]:
    used = {(read.source, read.tensor) for step in steps for read in ops.reads(step.expr)}
    unused: dict[str, dict[str, str]] = {}
    for name, model in models.items():
        unused[name] = dict(model.dropped)
        for site, expr in model.tensors.items():
            for read in ops.reads(expr):
                if (name, read.tensor) not in used:
                    unused[name][read.tensor] = f"{made[site].by} makes {site[0]} without {name}"
    return unused


def _active(steps: tuple[Step, ...], values: Mapping[str, Any]) -> int:
    """Parameters that one token's forward multiplies with (formats.md): all shared ones, and the chosen share of each expert axis."""
    count = values.get("num_experts", 1)
    total = 0
    for step in steps:
        size = prod(step.shape)
        if step.expert is None:
            total += size
        elif step.role.startswith("ffn."):
            total += size * values["num_experts_per_tok"] if step.expert == 0 else 0
        else:
            chosen = values["num_attention_experts_per_tok"] if values["attention_routing"] == "top_k" else count
            total += size * chosen if step.expert == 0 else 0
    return total


def _notes(recipe: Recipe, layout: Architecture, models: list[DenseModel], values: Mapping[str, Any]) -> Iterator[str]:
    for model in models:
        yield from (f"sources.{model.name}: {note}" for note in model.checkpoint.notes)
    unknown = models[0].unknown_keys
    if unknown:
        yield (
            f"config.json of {models[0].name}: {some(sorted(unknown))} not known to {models[0].family.name}'s table, so not copied. "
            "Check that it does not change what the model computes."
        )
    if layout.kind == "mixture" and values["num_experts_per_tok"] == 1 and values["norm_topk_prob"]:
        yield "ffn: top_k 1 with renormalised gates: the gate is always 1, so the router gets no gradient from the language-model loss."


def _fingerprint(recipe: Recipe, models: Mapping[str, DenseModel], config: Mapping[str, Any]) -> str:
    """What a finished tensor of an earlier run must have been made from to be worth keeping."""
    sources = {
        name: [model.checkpoint.config_digest]
        + [[file, header.identity.size, header.identity.mtime_ns, header.digest] for file, header in model.checkpoint.files.items()]
        for name, model in models.items()
    }
    document = [__version__, recipe.resolved(), sources, dict(config)]
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())


def plan_file(path: str | Path) -> Plan:
    """Load the recipe at `path` and plan it."""
    from bam_merge.recipe import load_recipe

    return make_plan(load_recipe(path))
