"""Sources whose vocabularies were aligned: each as a model of the result's token ids, by verification's own reading of all tokenizers.

The result's own tokenizer files say which token a row is for. What a source's row for it must be follows from the source's files and the
recipe alone (tokens.py); that the plan says the same is one check, that the source computes the same for its own ids another.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Computed, Read
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.formulas import ByToken
from bam_merge.model.loading import StoredModel
from bam_merge.planning.plan import Plan
from bam_merge.recipe.schema import Vocabulary
from bam_merge.text import count, printable, some
from bam_merge.values.tensors import TORCH_DTYPES
from bam_merge.verifying.report import Check
from bam_merge.verifying.tokens import NOBODY, Tokens, donors, lost_tokens, own_rows, tokens_of

UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError)
"""What reading a file that is no tokenizer raises."""


Rows = NDArray[numpy.int64]


PARAMETERS = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
"""The parameters whose rows are tokens."""


def rows_are_tokens(role: str) -> bool:
    """Whether the rows of a role's tensors are tokens."""
    return role in ("embed", "head", "head.bias")


SAMPLE = 64
"""Tokens of each source that are run through its embeddings and head, and in the result's numbering."""


HEAD_TOLERANCE = 1e-6
"""Largest difference of logits, relative to the largest: both come from the same weights by the same sums."""


@dataclass(frozen=True)
class Table:
    """For every source the row [R] that each of the result's R rows is in it, NOBODY where it has none; and what is made of the lack."""

    own: Mapping[str, Rows]
    missing: str

    def of(self, name: str) -> dict[str, Rows]:
        """For every source the rows [R] of it that the rows of `name` are made of, by mean; NOBODY where it gives none."""
        gives = donors(self.own, name, self.missing)
        made = {other: numpy.where(gives[other], rows, NOBODY) for other, rows in self.own.items()}
        return {**made, name: self.own[name]}


@dataclass(frozen=True)
class Aligned(StoredModel):
    """A dense model in the token ids of the result. `own` is the model as it is, `sources` are all models, `rows` what `Table.of` gives."""

    own: StoredModel
    sources: Mapping[str, StoredModel]
    rows: Mapping[str, Rows]

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        if parameter in PARAMETERS:
            return self.read_rows(parameter, range(self.config.vocab_size), dtype)
        return self.own.read(parameter, dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """The rows of these tokens: the mean of those that the sources give, and in float32 where it is one of several."""
        if parameter not in PARAMETERS:
            return self.own.read_rows(parameter, rows, dtype)
        wanted = numpy.asarray(rows, numpy.int64)
        shape = (len(wanted), *self.leaves[parameter].shape[1:])
        total, number = torch.zeros(shape, dtype=torch.float64), torch.zeros(len(wanted), dtype=torch.int64)
        for name, table in self.rows.items():
            taken = table[wanted]
            there = numpy.flatnonzero(taken != NOBODY)
            if len(there):
                places = torch.from_numpy(there)
                total[places] += self.sources[name].read_rows(parameter, taken[there].tolist(), torch.float64)
                number[places] += 1
        total /= number.clamp(min=1).view(-1, *[1] * (total.dim() - 1))
        stored = self.own.leaves[parameter].dtype
        exact = bool((number < 2).all()) and stored in TORCH_DTYPES
        return total.to(dtype or (TORCH_DTYPES[stored] if exact else torch.float32))


def aligned_models(dense: Mapping[str, StoredModel], table: Table, size: int) -> dict[str, StoredModel]:
    """Dense models in the token ids of a result with `size` rows."""
    return {name: _aligned(name, dense, table.of(name), size) for name in dense}


def _aligned(name: str, dense: Mapping[str, StoredModel], rows: Mapping[str, Rows], size: int) -> Aligned:
    own = dense[name]
    leaves = dict(own.leaves)
    for parameter in PARAMETERS:
        leaf = leaves.get(parameter)
        if isinstance(leaf, Read):
            leaves[parameter] = replace(leaf, shape=(size, *leaf.shape[1:]))
    return Aligned(own.checkpoint, replace(own.config, vocab_size=size), leaves, own, dense, rows)


def read_table(folder: Path, plan: Plan, dense: Mapping[str, StoredModel], wanted: Vocabulary, size: int) -> tuple[Table, list[str]]:
    """The table by the result's tokenizer files in `folder` and the sources', and what these files say wrongly.

    Raises BamMergeError, ValueError, KeyError or OSError where a file is no tokenizer.
    """
    result = tokens_of(folder)
    found = {name: tokens_of(dense[name].checkpoint.path) for name in dense}
    order = [name for name in dict.fromkeys((plan.recipe.seed_name, *plan.recipe.sources)) if name in dense]
    giver = wanted.source if wanted.source in dense else next((name for name in order if found[name] is not None), order[0])
    first = found[giver]
    if result is None or first is None:
        raise ValueError("no tokenizer in the result" if result is None else f"no tokenizer in sources.{printable(giver)}")
    tokens = {name: found[name] or first for name in order}
    sizes = {name: dense[name].config.vocab_size for name in order}
    table = Table({name: own_rows(result, tokens[name], sizes[name], size) for name in order}, wanted.missing)
    return table, [*_wrong_tokens(result, tokens, sizes, giver, union=wanted.source not in dense)]


def _wrong_tokens(result: Tokens, tokens: Mapping[str, Tokens], sizes: Mapping[str, int], giver: str, union: bool) -> Iterator[str]:
    """Where the result's tokens are not those that the recipe asks for."""
    first = tokens[giver]
    for number in sorted(first.text.keys() | result.text.keys()):
        ours, theirs = result.text.get(number), first.text.get(number)
        if theirs is not None and ours != theirs:
            yield f"id {number} is {_shown(ours)}, sources.{printable(giver)} has {_shown(theirs)}"
    more = {number: token for number, token in result.text.items() if number not in first.text}
    others = {token for name, mine in tokens.items() for number, token in mine.text.items() if number < sizes[name] and name != giver}
    for number, token in more.items():
        if not union or token not in others:
            yield f"id {number} is {_shown(token)}, of which no source has a row"
    end = max(first.text, default=-1) + 1
    if more and sorted(more) != list(range(end, end + len(more))):
        yield f"added tokens have ids {min(more)} to {max(more)}, not {end} to {end + len(more) - 1}"
    for name, mine in tokens.items():
        lost = lost_tokens(result, mine, sizes[name]) if union else ()
        if lost:
            yield f"{count(len(lost), 'token')} of sources.{printable(name)} missing: {some(map(_shown, lost))}"


def _shown(token: str | None) -> str:
    return "no token" if token is None else printable(repr(token), 60)


def in_result_ids(folder: Path, plan: Plan, dense: Mapping[str, StoredModel], size: int) -> dict[str, StoredModel]:
    """The dense models in the token ids of the result in `folder`, with `size` rows; as they are where nothing was aligned.

    Raises CheckpointError where the tokenizer files cannot be read.
    """
    if plan.recipe.tokenizer is None:
        return dict(dense)
    try:
        return aligned_models(dense, read_table(folder, plan, dense, plan.recipe.tokenizer, size)[0], size)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{printable(str(folder))}: its tokenizer files, or a source's, cannot be read: {printable(str(error))}."
        ) from None


# ---- the checks ----------------------------------------------------------------------------------------------------------------


def token_checks(folder: Path, plan: Plan, dense: Mapping[str, StoredModel], size: int) -> tuple[dict[str, StoredModel], list[Check]]:
    """The dense models in the result's token ids, and one check: every row is that of its token, by the files and by the plan, and gives
    what the source computes for its own id."""
    wanted = plan.recipe.tokenizer
    if wanted is None:
        return dict(dense), []
    try:
        table, wrong = read_table(folder, plan, dense, wanted, size)
    except BamMergeError as error:
        return dict(dense), [Check("tokens", False, "; ".join(error.problems))]
    except UNREADABLE as error:
        return dict(dense), [Check("tokens", False, f"the tokenizer files cannot be read: {printable(str(error))}")]
    models = aligned_models(dense, table, size)
    wrong += _other_rows(plan, table)
    worst = 0.0
    for name in dense:
        measured, problems = _same_computed(name, dense[name], models[name], table.own[name])
        worst = max(worst, measured)
        wrong += problems
    tokens = sum(int((rows != NOBODY).sum()) for rows in table.own.values())
    passed = f"{count(size, 'row')} are those of their tokens; {count(len(dense), 'source')} give {tokens:,} and compute the same by them"
    return models, [Check("tokens", not wrong, some(wrong, 6) if wrong else passed, worst, HEAD_TOLERANCE)]


def _other_rows(plan: Plan, table: Table) -> Iterator[str]:
    """Where the plan makes a row of other rows than the tokenizers say."""
    for name, model in plan.models.items():
        expected = table.of(name)
        for (role, _), expr in model.tensors.items():
            if not rows_are_tokens(role):
                continue
            planned = _planned(expr, name, len(table.own[name]))
            for source, rows in expected.items():
                other = planned.get(source, numpy.full_like(rows, NOBODY))
                if len(other) != len(rows):
                    yield f"sources.{printable(name)}: {role} has {len(other)} rows in the plan, the result has {len(rows)}"
                elif len(bad := numpy.flatnonzero(other != rows)):
                    row = int(bad[0])
                    what = f"row {row} of {role} is of {_row(source, int(other[row]))} in the plan, by the tokenizers of"
                    yield f"sources.{printable(name)}: {what} {_row(source, int(rows[row]))} ({count(len(bad), 'such row')})"


def _row(source: str, row: int) -> str:
    return f"no row of {printable(source)}" if row == NOBODY else f"row {row} of {printable(source)}"


def _planned(expr: expressions.Expr, name: str, size: int) -> dict[str, Rows]:
    """The rows of every source that a plan makes a source's tensor of."""
    if not isinstance(expr, Computed) or not isinstance(expr.formula, ByToken):
        return {name: numpy.arange(expr.shape[0], dtype=numpy.int64)}
    inputs = [part.source for part in expr.inputs]
    rows = {source: numpy.full(expr.shape[0], NOBODY, numpy.int64) for source in inputs}
    for first, length, of in expr.formula.runs:
        for place, row in of:
            rows[inputs[place]][first : first + length] = numpy.arange(row, row + length)
    return rows


@torch.no_grad()
def _same_computed(name: str, source: StoredModel, aligned: StoredModel, rows: Rows) -> tuple[float, list[str]]:
    """Embeddings and logits of some of a source's tokens by its own ids, and by the result's: (largest difference, what is wrong).

    The tokens that changed their ids come first, then others spread over the vocabulary.
    """
    places = numpy.flatnonzero(rows != NOBODY)
    if not len(places):
        return 0.0, [f"sources.{printable(name)}: none of its rows is in the result"]
    moved = places[rows[places] != places][: SAMPLE // 2]
    spread = places[numpy.linspace(0, len(places) - 1, SAMPLE - len(moved)).astype(numpy.int64)]
    chosen = numpy.unique(numpy.concatenate((moved, spread)))
    theirs, ours = torch.from_numpy(rows[chosen])[None], torch.from_numpy(chosen)[None]
    expected_BTD, found_BTD = source.embed(theirs), aligned.embed(ours)
    if not torch.equal(expected_BTD, found_BTD):
        first = int((expected_BTD != found_BTD).any(-1)[0].nonzero()[0])
        return float("inf"), [f"sources.{printable(name)}: token {chosen[first]} is embedded otherwise than its own {rows[chosen[first]]}"]
    last_BTD = expected_BTD[:, -1:]
    expected, found = source.head(last_BTD)[..., theirs[0]], aligned.head(last_BTD)[..., ours[0]]
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    wrong = [] if error <= HEAD_TOLERANCE else [f"sources.{printable(name)}: logits of its tokens differ by {error:.3g} of the largest"]
    return error, wrong
