"""Making a plan: recipe, headers and config.json in, every decision out, or every problem."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from bam_merge import expressions
from bam_merge._version import __version__
from bam_merge.architectures.computable import uncomputable
from bam_merge.architectures.cost import cost_of_tensors
from bam_merge.architectures.tables import Architecture, architecture_names, load_architecture, mixture_layouts
from bam_merge.calibrating.corpus import Calibration
from bam_merge.checkpoints.dtypes import DTYPE_NAMES
from bam_merge.errors import CheckpointError, RecipeError
from bam_merge.planning.aligned import aligned_config, alignment_problems, with_one_vocabulary
from bam_merge.planning.assign import Made, assign, check_axes, check_units
from bam_merge.planning.calibration import calibration, calibration_notes
from bam_merge.planning.dtype_check import copied_only_note, copied_only_problems
from bam_merge.planning.fill import engine_faults, engine_notes
from bam_merge.planning.gating import gating_notes, with_gates
from bam_merge.planning.output_config import merge_values, output_config, refusals
from bam_merge.planning.pairs import in_order_of, order_note
from bam_merge.planning.plan import BESIDE, Plan, Step
from bam_merge.planning.processors import processor_files, processor_notes, processor_problems
from bam_merge.planning.serving import served, serving_notes, serving_problems, unserved
from bam_merge.planning.shared_expert import shared_expert, shared_notes
from bam_merge.planning.stacking import stacked
from bam_merge.planning.steps import dtype_problems, make_steps, place
from bam_merge.planning.wrapping import frame_of
from bam_merge.recipe.rules import parse_size
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.accepted import apply_accepted
from bam_merge.sources.agreement import disagreements
from bam_merge.sources.dense import DenseModel, Site
from bam_merge.sources.headers_only import by_digests, unread_heads
from bam_merge.sources.opening import open_sources, same_folder
from bam_merge.sources.tied_heads import settle_heads
from bam_merge.sources.tokenizers.agreement import align_tokenizers, compare_tokenizers
from bam_merge.sources.tokenizers.alignment import Alignment
from bam_merge.sources.tokenizers.reading import TokenizerFindings
from bam_merge.text import nearest, printable, some

# ---- making the plan -------------------------------------------------------------------------------------------------------


def make_plan(recipe: Recipe) -> Plan:
    """Plan the merge that `recipe` asks for, from headers and config.json.

    Raises RecipeError or CheckpointError carrying every problem found in the recipe, the sources and their combination.
    """
    layout, problems = _layout(recipe)
    found = _sources(recipe, problems)
    recipe, models, alignment = found.recipe, found.models, found.alignment
    seed = models[recipe.seed_name]
    if layout is None and recipe.output.layout in (None, seed.family.name) and recipe.method == "merge":
        layout = seed.family
    elif layout is None and not problems:
        problems.append(
            f"{recipe.file}: output.layout: method merge of {seed.family.name} models gives layout {seed.family.name}, "
            f"not {printable(str(recipe.output.layout), 60)}."
        )
    as_stored = seed
    if layout is not None:
        models = in_order_of(layout, models)
        seed = models[recipe.seed_name]
    recipe = with_gates(recipe, seed.facts)
    made = assign(recipe, models, problems)
    if layout is None or problems:
        raise RecipeError(*problems, *(unserved(recipe, layout, models, made) if layout else ()))
    made |= shared_expert(recipe, layout, models, problems) if layout.kind == "mixture" else {}
    values = merge_values(recipe, layout, seed, made) if layout.kind == "mixture" else dict(seed.facts)
    problems += refusals(layout, values, recipe.file)
    values |= layout.implies
    problems += _from_texts(recipe, layout, made)
    serves = served(layout, values, seed.family)
    problems += serving_problems(recipe, models, serves, refused=bool(problems))
    if layout.kind == "mixture":
        problems += [f"{recipe.file}: {text}" for text in (*check_axes(made, seed.facts["num_hidden_layers"]), *check_units(made))]
    steps = make_steps(recipe, layout, seed, made, problems)
    frame = frame_of(layout, seed)
    if frame is not None:
        steps = frame.steps(steps)
        problems += frame.problems(recipe.file, None if alignment is None else alignment.giver)
    processors = processor_files(frame, models)
    problems += processor_problems(processors, models)
    problems += [*dtype_problems(recipe, steps), *copied_only_problems(steps, recipe.file)]
    if problems:
        raise RecipeError(*dict.fromkeys(problems))
    steps = [replace(step, dtype=DTYPE_NAMES.get(recipe.output.dtype, step.dtype)) for step in steps]
    placed, shards = place(steps, parse_size(recipe.output.max_shard_size))
    config = output_config(layout, seed, values, _dtype_of_most(steps))
    if alignment is not None:
        config = aligned_config(config, recipe, alignment, models[alignment.giver])
    text = (step for step in placed if step.role != BESIDE)
    parts = (((s.role, s.layer, expert), expr.shape, s.dtype) for s in text for expert, expr in s.experts)
    config = config if frame is None else frame.config(config)
    cost = cost_of_tensors(parts, values, values["tie_word_embeddings"])
    files = {**(found.files or dict.fromkeys(seed.checkpoint.companions(), seed.name)), **processors}
    texts = calibration(recipe, models, alignment, placed, cost)
    return Plan(
        recipe=recipe,
        layout=layout,
        models=models,
        steps=placed,
        shards=shards,
        config=config,
        unused=_unused(models, placed, made),
        notes=(
            *_notes(recipe, layout, [seed, *(model for model in models.values() if model is not seed)], values, made),
            *order_note(layout, as_stored, seed),
            *(frame.notes() if frame is not None else ()),
            *processor_notes(frame, processors, models),
            *serving_notes(recipe, files),
            *copied_only_note(placed),
            *calibration_notes(recipe, texts),
            *found.notes,
        ),
        accepted=tuple(found.warnings),
        engines=engine_faults(layout, values),
        serves=serves,
        cost=cost,
        fingerprint=_fingerprint(recipe, models, config, alignment, texts),
        files=files,
        alignment=alignment,
        calibration=texts,
    )


def _from_texts(recipe: Recipe, layout: Architecture, made: Mapping[Site, Made]) -> list[str]:
    """Why routers of this layout cannot be made of texts, where the recipe asks for that."""
    texts = any(isinstance(expr, expressions.Calibrated) for item in made.values() for expr in item.exprs)
    if layout.drawn_routers is None or not texts:
        return []
    return [f"{recipe.file}: router: {layout.drawn_routers}. Use router.init: normal, uniform, zeros or orthogonal, or layout: bam."]


def _dtype_of_most(steps: Sequence[Step]) -> str:
    """The dtype that most bytes of the result have."""
    dominant = Counter({step.dtype: 0 for step in steps})
    for step in steps:
        dominant[step.dtype] += step.nbytes
    return dominant.most_common(1)[0][0]


@dataclass
class _Sources:
    """The recipe that says where each source was found; the sources by name, which files the result takes of them, and how their tokens are
    aligned, if they are; `notes` and `warnings` (of what the recipe accepts) are what a plan has to say of them."""

    recipe: Recipe
    models: dict[str, DenseModel]
    notes: list[str]
    warnings: list[str]
    files: Mapping[str, str]
    alignment: Alignment | None


def _sources(recipe: Recipe, problems: list[str]) -> _Sources:
    """The sources, opened and found to agree, or aligned.

    Raises CheckpointError with all that is wrong with them, after the recipe's own `problems`.
    """
    found = open_sources(recipe)
    recipe, models, broken = found.recipe, dict(found.models), found.problems
    ordered = [models[name] for name in dict.fromkeys((recipe.seed_name, *recipe.sources)) if name in models]
    heads = settle_heads(ordered, recipe.accept.head if recipe.accept else None)
    accepted = apply_accepted(recipe, heads.models)
    ordered, alignment = accepted.models, None
    if recipe.tokenizer is None:
        tokenizers = by_digests(ordered) or compare_tokenizers(ordered)
    elif broken:  # whose tokens are to be aligned cannot be told
        tokenizers = TokenizerFindings()
    else:
        tokenizers, alignment = align_tokenizers(ordered, recipe.tokenizer, recipe.file)
        ordered = with_one_vocabulary(ordered, alignment)
        tokenizers.problems += dict.fromkeys(alignment_problems(recipe, ordered))
    if recipe.output.layers is not None and not broken:
        stack = stacked(recipe, ordered)
        ordered = stack.models
        problems += stack.problems
    models = {name: next(model for model in ordered if model.name == name) for name in models}
    if ordered:
        broken += [*heads.problems, *same_folder(ordered), *accepted.problems, *disagreements(ordered), *tokenizers.problems]
        first = ordered[0]  # of the others it is said where they differ from it
        broken += [f"sources.{first.name}: {problem}" for problem in uncomputable(first.facts)]
    if broken or (recipe.output.layers is not None and problems):
        if (
            recipe.output.layers is None
            and len(models) == len(recipe.sources)
            and all(model.tensors.keys() == ordered[0].tensors.keys() for model in ordered)
        ):
            assign(recipe, models, problems)  # the rules can be tried all the same
        raise CheckpointError(*problems, *broken)
    notes = [*found.notes, *unread_heads(ordered), *heads.notes, *accepted.notes, *tokenizers.notes]
    return _Sources(recipe, models, notes, [*heads.warnings, *accepted.warnings], tokenizers.files, alignment)


def _layout(recipe: Recipe) -> tuple[Architecture | None, list[str]]:
    """The layout that the recipe names; None where it follows from the sources (method merge)."""
    name = recipe.output.layout
    if name is None:
        return (None if recipe.method == "merge" else load_architecture("bam")), []
    if name not in architecture_names():
        known = nearest(name, architecture_names()) or f". Known: {', '.join(architecture_names())}."
        return None, [f"{recipe.file}: output.layout: {printable(repr(name), 60)} is no layout{known}"]
    layout = load_architecture(name)
    if recipe.method == "merge":
        return None, []
    if layout.kind == "dense":
        own = [table.name for table in mixture_layouts() if set(table.model_types) & set(layout.model_types)]
        return None, [
            f"{recipe.file}: output.layout: {name} is a dense family; method {recipe.method} makes a mixture. "
            f"Use {' or '.join((*own, 'bam'))}, or method: merge."
        ]
    return layout, []


# ---- what the plan says about itself ---------------------------------------------------------------------------------------


def _unused(models: Mapping[str, DenseModel], steps: tuple[Step, ...], made: Mapping[Site, Made]) -> dict[str, dict[str, str]]:
    used = {(read.source, read.tensor) for step in steps for read in expressions.reads(step.expr)}
    unused: dict[str, dict[str, str]] = {}
    for name, model in models.items():
        for store, dropped in model.unread.items():
            left = {tensor: reason for tensor, reason in dropped.items() if (store, tensor) not in used}
            unused.setdefault(store, {}).update(left)
        for site, expr in model.tensors.items():
            for read in expressions.reads(expr):
                if (read.source, read.tensor) not in used:
                    unused.setdefault(read.source, {})[read.tensor] = f"{made[site].by} makes {site[0]} without {name}"
    return unused


def _notes(
    recipe: Recipe, layout: Architecture, models: list[DenseModel], values: Mapping[str, Any], made: Mapping[Site, Made]
) -> Iterator[str]:
    for model in models:
        yield from (f"sources.{model.name}: {note}" for note in (*(model.checkpoint.notes if not model.adapters else ()), *model.notes))
    unknown = models[0].unknown_keys
    if unknown:
        yield (
            f"config.json of {models[0].name}: {some(sorted(unknown))} not known to {models[0].family.name}'s table, so not copied. "
            "Check that it does not change what the model computes."
        )
    yield from engine_notes(layout, values, made)
    if layout.kind == "mixture":
        yield from gating_notes(recipe, models[0].facts)
        yield from shared_notes(recipe, layout)


def _fingerprint(
    recipe: Recipe,
    models: Mapping[str, DenseModel],
    config: Mapping[str, Any],
    alignment: Alignment | None,
    texts: Calibration | None,
) -> str:
    """What a finished tensor of an earlier run must have been made from to be worth keeping.

    Tokenizer and generation files are not part of it, but for the rows that they align: no other tensor depends on them, and they are
    written anew at the end of every run.
    """
    sources = {
        name: [checkpoint.config_digest]
        + [[file, header.identity.size, header.identity.state, header.digest] for file, header in checkpoint.files.items()]
        for model in models.values()
        for name, checkpoint in model.stores.items()
    }
    document = [__version__, recipe.resolved(), sources, dict(config)]
    if alignment is not None:
        document.append({name: mine.runs for name, mine in alignment.sources.items()})
    if texts is not None:
        document.append(texts.document())
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())


def plan_file(path: str | Path) -> Plan:
    """Load the recipe at `path` and plan it."""
    from bam_merge.recipe.load import load_recipe

    return make_plan(load_recipe(path))
