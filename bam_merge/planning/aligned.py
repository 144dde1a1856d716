"""Sources whose vocabularies differ a little, as models of one vocabulary: embeddings and head row by row by token, config.json to fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES
from bam_merge.checkpoints.pieces import Computed, Read, Slice, Whole, whole
from bam_merge.formulas import ByToken, RowRun
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.tokenizers.alignment import UNION, Alignment
from bam_merge.sources.tokenizers.writing import renumbered_ids
from bam_merge.text import printable

ROLES = ("embed", "head", "head.bias")
"""The roles whose rows are tokens."""


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id")
"""Keys of config.json that name tokens by their ids."""


def with_one_vocabulary(models: Sequence[DenseModel], alignment: Alignment | None) -> list[DenseModel]:
    """The sources with the rows of the result in the place of their own. Where no alignment was found, which is refused, only the number of
    their rows is one, so that nothing more is said of it."""
    if alignment is None:
        return [replace(model, facts={**model.facts, "vocab_size": models[0].facts["vocab_size"]}) for model in models]
    by_name = {model.name: model for model in models}
    return [
        replace(model, facts={**model.facts, "vocab_size": alignment.rows}, tensors=dict(_tensors(model, by_name, alignment)))
        for model in models
    ]


def _tensors(model: DenseModel, models: Mapping[str, DenseModel], alignment: Alignment) -> Iterator[tuple[Any, expressions.Expr]]:
    aligned = alignment.sources[model.name]
    for site, own in model.tensors.items():
        if site[0] not in ROLES or not alignment.moves(model.name):
            yield site, own
            continue
        inputs = {name: _whole(models[name].tensors[site]) for name in aligned.reads if site in models[name].tensors}
        if len(inputs) < len(aligned.reads):  # a head that not every source has: they disagree, and are refused for that
            yield site, own
            continue
        place = {name: index for index, name in enumerate(inputs)}
        firsts = accumulate((run.rows for run in aligned.runs), initial=0)
        runs = tuple(
            RowRun(first, run.rows, tuple((place[name], row) for name, row in run.of))
            for first, run in zip(firsts, aligned.runs, strict=False)
        )
        mine = _whole(own)
        shape = (alignment.rows, *mine.shape[1:])
        yield site, Computed(model.name, mine.tensor, ByToken(str(mine), tuple(inputs), runs), tuple(inputs.values()), mine.dtype, shape)


def _whole(expr: expressions.Expr) -> Whole:
    assert isinstance(expr, Read | Computed | Slice), "a source's tensor"
    of = whole(expr)
    assert of is expr, "embeddings and heads are stored by themselves"
    return of


def alignment_problems(recipe: Recipe, models: Sequence[DenseModel]) -> Iterator[str]:
    """Why rows of several sources cannot stand in one tensor: dtypes."""
    for model in models:
        for (role, _), expr in model.tensors.items():
            if not isinstance(expr, Computed) or not isinstance(expr.formula, ByToken):
                continue
            dtypes = {part.dtype: str(part) for part in expr.inputs}
            stored = "; ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            unfit = sorted(dtypes.keys() - set(ARITHMETIC_DTYPES))
            if len(dtypes) > 1 and recipe.output.dtype == "source":
                yield (
                    f"{recipe.file}: output.dtype: source keeps what is stored, but rows of {role} are taken from sources that disagree: "
                    f"{stored}. Set dtype: bfloat16 (or another)."
                )
            elif unfit and not expressions.is_copy(expr):
                yield (
                    f"{recipe.file}: tokenizer: {printable(dtypes[unfit[0]])} is {unfit[0]}, of which no mean is made. Set "
                    "tokenizer.missing: to a source's name, or use sources in full precision."
                )


def aligned_config(config: Mapping[str, Any], recipe: Recipe, alignment: Alignment, giver: DenseModel) -> dict[str, Any]:
    """config.json for the aligned rows. With a source's tokenizer come its ids of special tokens, and for those that it does not say the
    seed's tokens by its ids; a union keeps the seed's ids."""
    aligned = {**config, "vocab_size": alignment.rows}
    if recipe.tokenizer is not None and recipe.tokenizer.source != UNION:
        for key in TOKEN_IDS:
            value = giver.config.get(key)
            value = renumbered_ids(aligned.pop(key, None), alignment.renumbered) if value is None else value
            aligned |= {} if value is None else {key: value}
    return dict(sorted(aligned.items()))
