"""Routers that are made of texts: what a plan has to know of the texts, what it says of them, and what the pass over them costs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_merge import expressions
from bam_merge.architectures.cost import Cost, cost_of_tensors
from bam_merge.architectures.flops import Flops
from bam_merge.calibrating.corpus import Calibration, Corpus
from bam_merge.calibrating.texts import WINDOW, Reading, Text, equal_texts, find_files, read_prompts, read_text, shorter, unreadable
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES
from bam_merge.errors import BamMergeError, CheckpointError, RecipeError
from bam_merge.model.tokens import open_tokenizer
from bam_merge.planning.plan import Step
from bam_merge.recipe.makes.data_routers import FromTexts
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.tokenizers.alignment import Alignment

SHARE_FURTHER, MOST_FURTHER = 8, 2048
"""One token for so many of a text is kept apart, where the text has more than are wanted, to try the routers on; and the
most of them."""


BATCH_TOKENS = 1024
"""Tokens that go through a block together (calibrating/collect.py, which imports torch)."""


PASSES_OF_THE_MIXTURE = 2
"""A router of the mixture's own inputs changes what comes after it, so that a block is run once for its routers and once with them."""


def calibration(
    recipe: Recipe, models: Mapping[str, DenseModel], alignment: Alignment | None, steps: Sequence[Step], cost: Cost
) -> Calibration | None:
    """The texts of the routers that are made of some; None where none is. `cost` is the mixture's.

    Raises RecipeError with all that is wrong with them; of a recorded merge whose texts are not there any more, it says so.
    """
    routers = {step: step.expr for step in steps if isinstance(step.expr, expressions.Calibrated)}
    if not routers:
        return None
    used = dict.fromkeys(router.of for router in routers.values())
    seed = models[recipe.seed_name]
    giver = models[alignment.giver] if alignment is not None else seed
    problems = _unfit(recipe, seed, steps)
    corpora: dict[str, Corpus] = {}
    try:
        tokenizer = open_tokenizer(giver.checkpoint.path)
    except CheckpointError as error:
        problems += [f"{recipe.file}: {recipe.written(next(iter(used)))}: {problem}" for problem in error.problems]
    else:
        read: dict[str, Corpus] = {}
        for place in used:
            make = recipe.from_texts[place]
            asked = repr((list(_asked(make)), make.tokens))
            if asked not in read:  # one section for both routers is read once
                reading = reading_of(make, tokenizer, seed.facts["max_position_embeddings"], recipe.folder)
                where = f"{recipe.file}: {recipe.written(place)}"
                read[asked] = read_corpus(make, reading, where, giver.facts["vocab_size"], problems)
            corpora[place] = read[asked]
    if problems and recipe.from_document:
        return Calibration({}, absent=tuple(problems))
    if problems:
        raise RecipeError(*problems)
    states = _states(seed, corpora)
    return Calibration(corpora, _flops(seed, cost, routers, corpora), states + _memory(seed, routers, corpora), 2 * states)


def unreadable_texts(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the texts of a recipe whatever its sources are, for a plan that is not sound for other reasons."""
    for place, make in recipe.from_texts.items():
        for name, files in (make.texts or {}).items():
            where = f"{recipe.file}: {recipe.written(place)}.texts.{name}"
            try:
                yield from unreadable(find_files(files, recipe.folder, where), make.tokens, recipe.folder, where)
            except BamMergeError as error:
                yield from error.problems


def _unfit(recipe: Recipe, seed: DenseModel, steps: Sequence[Step]) -> list[str]:
    """Why no pass over texts can be made: weights that nothing computes with."""
    of = [step for step in steps if isinstance(step.expr, expressions.Calibrated)]
    dtypes = sorted({expr.dtype for expr in seed.tensors.values()} - set(ARITHMETIC_DTYPES))
    if any(step.expr.inputs == "mixture" for step in of if isinstance(step.expr, expressions.Calibrated)):
        dtypes = sorted({*dtypes, *(step.dtype for step in steps if step.dtype not in ARITHMETIC_DTYPES)})
    if not dtypes:
        return []
    what = f"weights are {', '.join(dtypes)}, and the pass over the texts computes with {', '.join(ARITHMETIC_DTYPES)} only"
    place = next(recipe.written(step.expr.of) for step in of if isinstance(step.expr, expressions.Calibrated))
    return [f"{recipe.file}: {place}: {what}. Use init: normal, or sources in full precision."]


def read_corpus(make: FromTexts, reading: Reading, where: str, vocabulary: int, problems: list[str]) -> Corpus:
    """The texts of a section that messages call `where`, for a model with a `vocabulary` of so many rows. Problems are appended."""
    assert reading.folder is not None
    found: tuple[dict[str, Text], dict[str, Text]] = ({}, {})
    for kind, name, text in _asked(make):
        place = f"{where}.{kind}.{name}"
        try:
            if kind == "texts":
                read = read_text(find_files(text, reading.folder, place), reading, place)
            else:
                read = read_prompts([text] if isinstance(text, str) else text, reading, place)
        except BamMergeError as error:
            problems += error.problems
            continue
        largest = max(max(ids) for ids in (*read.windows, *read.further))
        if largest >= vocabulary:
            problems.append(
                f"{place}: tokenizer.json gives the token {largest}, and the model has rows for {vocabulary}. Is it this model's tokenizer?"
            )
        found[kind == "negative_prompts"][name] = read
    texts, negative = found
    if len(texts) > 1 and len({text.windows for text in texts.values()}) == 1:
        problems.append(f"{where}.texts: all texts are the same, so no router follows from them. Give each expert its own.")
    return Corpus(texts, negative)


def reading_of(make: FromTexts, tokenizer: Any, positions: int | None, folder: Path) -> Reading:
    """How the texts of a section are read, for a model with so many positions. Paths are relative to `folder`."""
    window = min(WINDOW, positions or WINDOW)
    return Reading(tokenizer, make.tokens, min(max(window, make.tokens // SHARE_FURTHER), MOST_FURTHER), window, folder)


def _asked(make: FromTexts) -> Iterator[tuple[str, str, str | tuple[str, ...]]]:
    """(key, source, files or prompts) of all that a section names."""
    yield from (("texts", name, files) for name, files in (make.texts or {}).items())
    yield from (("prompts", name, prompts) for name, prompts in (make.prompts or {}).items())
    yield from (("negative_prompts", name, prompts) for name, prompts in make.negative.items())


# ---- what the plan says ----------------------------------------------------------------------------------------------------


def calibration_notes(recipe: Recipe, found: Calibration | None) -> Iterator[str]:
    """What is to be known of the texts, and of the gates that follow from them."""
    if found is None:
        return
    makes = {recipe.written(place): make for place, make in recipe.from_texts.items()}
    for place, corpus in {recipe.written(place): corpus for place, corpus in found.corpora.items()}.items():
        for a, b in equal_texts(corpus.texts):
            yield f"{place}.texts: {a} and {b} have the same tokens, so their experts get equal rows, and neither is told from the other."
        for name, text in corpus.texts.items():
            if name in (makes[place].texts or {}) and (short := shorter(text)) is not None:
                yield f"{place}.texts.{name}: {short} ({place}.tokens). The router is made of what there is."
    top_k, renormalised = recipe.gates
    ffn = recipe.ffn
    if (
        recipe.method == "bam"
        and not recipe.sigmoid
        and (ffn is None or ffn.top_k is None or ffn.gate is None)
        and (top_k, renormalised) != (1, False)
    ):
        yield (
            f"ffn: routers from texts, so top_k {top_k}, gate topk_then_softmax unless the recipe says otherwise (the paper's are 1 and "
            "softmax_then_topk)."
        )
    if (top_k, renormalised) == (1, False) and any(make.scale is None for make in recipe.from_texts.values()):
        yield (
            "router: scale 180 for the FFN, whose one gate is not renormalised, so that it is near 1, for use without training. "
            "To train from there give router.scale 6: with 180 the z-loss is most of the loss (docs/paper.md)."
        )


def _flops(seed: DenseModel, cost: Cost, routers: Mapping[Step, expressions.Calibrated], corpora: Mapping[str, Corpus]) -> int:
    """Of the passes, of the second moments, and of the solutions."""
    width = int(seed.facts["hidden_size"])
    tensors = (((role, layer, None), expr.shape, expr.dtype) for (role, layer), expr in seed.tensors.items())
    dense = cost_of_tensors(tensors, seed.facts, seed.facts["tie_word_embeddings"]).flops() or []
    mixed = cost.flops() or []
    total = 0
    for inputs, blocks, passes in (("seed", dense, 1), ("mixture", mixed, PASSES_OF_THE_MIXTURE)):
        texts = {t.digest: t for r in routers.values() if r.inputs == inputs for t in corpora[r.of].all}
        total += passes * sum(blocks, Flops()).total * sum(text.tokens + sum(map(len, text.further)) for text in texts.values())
    ridges = [router for router in routers.values() if isinstance(router.method, expressions.Ridge)]
    sites = 1 if seed.facts["parallel_block"] and seed.facts["parallel_norms"] == 1 else 2
    for router in ridges[:: 1 if sites == 2 else 2] if len({id(corpora[r.of]) for r in ridges}) == 1 else ridges:
        tokens = sum(text.counted for text in corpora[router.of].texts.values())
        side = min(width, tokens)
        total += 2 * (2 * tokens * width * side) + 2 * side**3 // 3  # in float64, at half the rate
    return total


def _states(seed: DenseModel, corpora: Mapping[str, Corpus]) -> int:
    """Bytes of all texts' hidden states, and of what routers are tried on, at most."""
    texts = {text.digest: text for corpus in corpora.values() for text in corpus.all}.values()
    return 4 * int(seed.facts["hidden_size"]) * sum(text.tokens + 2 * sum(map(len, text.further)) for text in texts)


def _memory(seed: DenseModel, routers: Mapping[Step, expressions.Calibrated], corpora: Mapping[str, Corpus]) -> int:
    """Bytes of the second moments of a block's routers, and of a batch's activations, of which there may be eight at a time."""
    width, inner = int(seed.facts["hidden_size"]), int(seed.facts["intermediate_size"])
    ridges = any(isinstance(router.method, expressions.Ridge) for router in routers.values())
    most = max(sum(text.counted for text in corpus.texts.values()) for corpus in corpora.values())
    moments = 3 * 8 * width * min(width, most) if ridges else 0  # two routers' sums, and a solution
    return moments + 8 * 4 * BATCH_TOKENS * max(width, inner)
