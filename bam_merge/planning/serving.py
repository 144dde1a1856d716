"""Which engines compute a result as transformers does; and where a recipe asks for one that does not, what it could be instead."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from bam_merge.architectures.tables import Architecture, Engine, mixture_layouts
from bam_merge.checkpoints.folder import VOCABULARIES
from bam_merge.planning.assign import Made, assign
from bam_merge.planning.fill import engine_faults
from bam_merge.planning.gating import with_gates
from bam_merge.planning.output_config import merge_values, refusals
from bam_merge.planning.pairs import in_order_of
from bam_merge.planning.plan import Served
from bam_merge.planning.shared_expert import shared_expert
from bam_merge.planning.steps import make_steps
from bam_merge.recipe.schema import ENGINES, Ffn, Recipe
from bam_merge.sources.dense import DenseModel, Site
from bam_merge.text import listed

OWN_TESTS = "its logits are within 1e-5 of the reference model's, in this project's tests"


AS_SOURCES = "what runs the sources runs it: names, shapes and config.json are theirs"


def served(layout: Architecture, values: Mapping[str, Any], family: Architecture) -> tuple[Served, ...]:
    """What each engine that a recipe can name does with a merge of `family` models in `layout` that has these `values`."""
    if layout.kind == "dense":
        return tuple(Served(word, name, True, "as its sources", AS_SOURCES) for word, name in ENGINES.items())
    faults = engine_faults(layout, values)
    found = [Served("transformers", "transformers", True, "tried", OWN_TESTS)]
    for word, name in list(ENGINES.items())[1:]:
        engine = next((engine for engine in layout.engines if engine.name == name), None)
        if engine is None:
            found.append(Served(word, name, False, "not", reasons=(f"it is not known whether it runs layout {layout.name}.",)))
        elif not engine.runs:
            found.append(Served(word, name, False, "not", reasons=(f"{engine.how} ({engine.version}).",)))
        elif faults[name]:
            found.append(Served(word, name, False, "not", reasons=faults[name]))
        else:
            found.append(Served(word, name, True, *_trial(engine, family.name)))
    return tuple(found)


def _trial(engine: Engine, family: str) -> tuple[str, str]:
    """Whether merges of `family` were run in the engine, or what lets one expect that they run; and the words for it."""
    if family in engine.tried:
        return "tried", f"{engine.version}, {engine.how}"
    if engine.tried:
        return "expected", f"tried with merges of {listed(engine.tried)} models: {engine.version}, {engine.how}"
    return "expected", f"not tried: {engine.version}, {engine.how}"


def serving_problems(recipe: Recipe, models: Mapping[str, DenseModel], found: Sequence[Served], refused: bool) -> Iterator[str]:
    """A message for each engine that the recipe asks for and that does not compute the merge, with what would be computed there.

    Where the layout is `refused` already, one that says which layouts would do.
    """
    asked = [item for item in found if item.word in (recipe.output.serves or ()) and item.word != "transformers"]
    unfit = [item for item in asked if not item.serves]
    instead = _instead(recipe, models, [item.name for item in asked]) if unfit or (asked and refused) else None
    for item in unfit:
        reasons, way = " ".join(item.reasons), instead or _instead(recipe, models, [item.name]) or _none(recipe, models, item.name)
        yield f"{recipe.file}: output.serves: {item.word}: {item.name} does not compute this merge as transformers does: {reasons} {way}"
    if refused and instead and not unfit:
        yield f"{recipe.file}: output.serves: {', '.join(item.word for item in asked)}: {instead}"


def unserved(recipe: Recipe, layout: Architecture, models: Mapping[str, DenseModel], made: Mapping[Site, Made]) -> Iterator[str]:
    """The same for a recipe that has other problems, so that they are told together."""
    if recipe.output.serves and layout.kind == "mixture":
        seed = models[recipe.seed_name]
        values = merge_values(recipe, layout, seed, dict(made))
        refused = bool(refusals(layout, values, recipe.file))
        yield from serving_problems(recipe, models, served(layout, {**values, **layout.implies}, seed.family), refused)


@dataclass(frozen=True)
class _Try:
    """A recipe with another method, layout or gate: the `words` for it, why the layout cannot hold the merge, what engines compute
    otherwise, and whether they were tried with merges of such sources."""

    words: str
    problems: tuple[str, ...]
    faults: tuple[str, ...]
    known: bool


def serving_notes(recipe: Recipe, files: Collection[str]) -> Iterator[str]:
    """What a plan says of engines that the recipe asks for, beside what they compute: `files` go with the result."""
    if "gguf" in (recipe.output.serves or ()) and VOCABULARIES.isdisjoint(files):
        yield "output.serves: gguf: no source has a tokenizer, and a GGUF file holds one. Put it into the folder before it is exported."


def _instead(recipe: Recipe, models: Mapping[str, DenseModel], engines: list[str]) -> str | None:
    """The layouts and gates in which all of `engines` compute a merge of these sources, with another method where it needs one."""
    for other in _others(recipe):
        fit = [tried for tried in _tries(other, models, engines) if not tried.problems and not tried.faults]
        words = [tried.words if tried.known else f"{tried.words} (not tried)" for tried in sorted(fit, key=lambda tried: not tried.known)]
        if fit:
            method = "" if other.method == recipe.method else f"method: {other.method} (no layout there has experts of attention), "
            return f"{listed(engines)} would compute {method}{', or '.join(words)}."
    return None


def _none(recipe: Recipe, models: Mapping[str, DenseModel], engine: str) -> str:
    """That no layout and gate would do, and what keeps the nearest from it."""
    tries = [tried for other in _others(recipe) for tried in _tries(other, models, [engine])]
    nearest = min(tries, key=lambda tried: (len(tried.problems), len(tried.faults), not tried.known), default=None)
    why = f" The nearest is {nearest.words}: {' '.join((*nearest.problems, *nearest.faults))}" if nearest else ""
    return f"No layout and gate would do.{why} Change what it names, or leave {engine} out of output.serves."


def _others(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe, and without experts of attention where it has them."""
    yield recipe
    if recipe.method == "bam":
        yield recipe.model_copy(update={"method": "btx", "attention": None})


def _tries(recipe: Recipe, models: Mapping[str, DenseModel], engines: list[str]) -> Iterator[_Try]:
    """Every layout that runs in `engines`, with every gate."""
    for layout in mixture_layouts():
        if any(name not in (engine.name for engine in layout.engines if engine.runs) for name in engines):
            continue
        homeless: list[str] = []
        ordered = in_order_of(layout, models)
        seed = ordered[recipe.seed_name]
        there = assign(recipe, ordered, []) | shared_expert(recipe, layout, ordered, homeless)
        make_steps(recipe, layout, seed, there, homeless)
        known = all(seed.family.name in engine.tried for engine in layout.engines if engine.name in engines)
        for gate in gates():
            ffn = (recipe.ffn or Ffn()).model_copy(update={"gate": gate})
            gated = with_gates(recipe.model_copy(update={"ffn": ffn}), seed.facts)
            values = merge_values(gated, layout, seed, there)
            problems = (*refusals(layout, values, recipe.file), *homeless)
            faults = engine_faults(layout, {**values, **layout.implies})
            found = tuple(dict.fromkeys(reason for name in engines for reason in faults[name]))
            yield _Try(f"layout: {layout.name} with ffn.gate: {gate}", tuple(_plain(text, recipe) for text in problems), found, known)


def _plain(problem: str, recipe: Recipe) -> str:
    """A problem without where it stands, and without the way out of who wants that layout."""
    return f"{problem.removeprefix(f'{recipe.file}: ').removeprefix('output.layout: ').partition('. Use ')[0].removesuffix('.')}."


def gates() -> tuple[str, ...]:
    """The gates that a recipe can name."""
    return tuple(gate for part in get_args(Ffn.model_fields["gate"].annotation) for gate in get_args(part))
