"""The models that a mixture's experts stand for: their dense models, or these with what the recipe makes anew of them.

What is made anew is worked out by rederive/, from the plan's expression of each tensor: the blocks of such a model compute what the expert
must compute, in the dense model's own architecture. Of the numbers that one correct rounding may give, those that are written are taken:
one bit of a bfloat16 more or less would be seen in what a block computes. Anything else that is written is not.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.architectures.locate import Cell
from bam_merge.model.loading import StoredModel, parameter_name
from bam_merge.planning.plan import Plan, Step
from bam_merge.recipe.makes import Varying
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.dense import Site
from bam_merge.values.tensors import TORCH_DTYPES
from bam_merge.verifying.rederive import rederive, survey_all
from bam_merge.verifying.rounding import half_ulp, nearest
from bam_merge.verifying.rows import RowReader, SourceTensors

MARK = "#"
"""Stands between the source and the number of an expert that is remade; no source's name has it."""


SURVEYED = 4
"""Tensors of which what a method must know of the whole is kept: those of one FFN."""


@dataclass(frozen=True)
class Made:
    """How one parameter is made: its expression, the dtype that it is stored in, and its name in the mixture."""

    expr: expressions.Expr
    dtype: str
    stored: str


@dataclass
class _Known:
    """What methods must know of whole tensors, of the last few that were asked for; for any number of threads."""

    sources: SourceTensors
    lock: threading.Lock = field(default_factory=threading.Lock)
    found: dict[int, dict[int, Any]] = field(default_factory=dict)

    def of(self, expr: expressions.Expr) -> dict[int, Any]:
        with self.lock:
            if id(expr) not in self.found:
                while len(self.found) >= SURVEYED:
                    self.found.pop(next(iter(self.found)))
                self.found[id(expr)] = survey_all(expr, self.sources)
            return self.found[id(expr)]


@dataclass(frozen=True)
class Remade(StoredModel):
    """The dense model `of`, with the parameters of one expert that the recipe makes anew."""

    of: StoredModel | None = None
    made: Mapping[str, Made] = field(default_factory=dict)
    known: _Known | None = None
    mixture: StoredModel | None = None

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        assert self.of is not None
        if parameter not in self.made:
            return self.of.read(parameter, dtype)
        return self._rows(parameter, 0, self.made[parameter].expr.shape[0]).to(dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        assert self.of is not None
        if parameter not in self.made:
            return self.of.read_rows(parameter, rows, dtype)
        if isinstance(rows, range) and rows.step == 1:
            return self._rows(parameter, rows.start, rows.stop).to(dtype)
        return torch.cat([self._rows(parameter, row, row + 1) for row in rows]).to(dtype)

    def _rows(self, parameter: str, start: int, stop: int) -> Tensor:
        made = self.made[parameter]
        assert self.known is not None
        derived = rederive(made.expr, self.known.sources, self.known.of(made.expr), start, stop, made.dtype)
        value, result = derived.value, nearest(derived.value, made.dtype)
        written = None if self.mixture is None else self.mixture.leaves.get(made.stored)
        if self.mixture is not None and written is not None and written.shape == made.expr.shape:
            found = self.mixture.read_rows(made.stored, range(start, stop)).double()
            slack = torch.zeros_like(value) if derived.slack is None else derived.slack
            allowed = half_ulp(value.abs() + slack, made.dtype) + slack
            result = torch.where((found - value).abs() <= allowed, found, result)
        return result.to(TORCH_DTYPES[made.dtype])


LAST = "mlp.down_proj.weight"
"""Ending of the parameter that shards are scaled in."""


ROUNDED = 2.0**-6
"""How far, relative to it, a number may be from itself times the shards, rounded to any dtype that is computed with, and divided again."""


@dataclass(frozen=True)
class Reassembled(StoredModel):
    """The dense model `of`, with what rounding its last matrices times the number of `shards` has made of them; nothing, of powers of two.

    Only roundings are taken over: where a shard has anything else, the dense model's own numbers stand.
    """

    of: StoredModel | None = None
    shards: tuple[StoredModel, ...] = ()

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        assert self.of is not None
        own = self.of.read(parameter)
        return self._scaled(own, [shard.read(parameter) for shard in self.shards] if parameter.endswith(LAST) else None).to(dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        assert self.of is not None
        own = self.of.read_rows(parameter, rows)
        return self._scaled(own, [shard.read_rows(parameter, rows) for shard in self.shards] if parameter.endswith(LAST) else None).to(
            dtype
        )

    def _scaled(self, own: Tensor, shards: list[Tensor] | None) -> Tensor:
        if shards is None:
            return own
        found, wide = torch.cat(shards, 1).double() / len(shards), own.double()
        return torch.where((found - wide).abs() <= wide.abs() * ROUNDED, found, wide)


def reassembled(models: Mapping[str, StoredModel], names: Sequence[str], recipe: Recipe) -> StoredModel:
    """The model that copies of the seed, or its shards, are together."""
    of = models[recipe.expert_names[0] if recipe.shards > 1 else recipe.seed_name]
    if recipe.shards == 1:
        return of
    first = names[:: len(names) // recipe.shards]
    return Reassembled(of.checkpoint, of.config, of.leaves, of, tuple(models[name] for name in first))


def experts_models(mixture: StoredModel, plan: Plan, dense: Mapping[str, StoredModel]) -> tuple[tuple[str, ...], dict[str, StoredModel]]:
    """The model of every expert, by a name for each; and the models by these names, with the dense ones."""
    made: dict[int, dict[str, Made]] = {}
    for step in plan.steps:
        for number, whole in step.experts if step.is_experts else ():
            assert number is not None
            for role, expr in _by_role(step, whole):
                if _is_remade(expr, (role, step.layer), plan):
                    own, stored = (_parameter(role, step, plan, expert) for expert in (None, number))
                    made.setdefault(number, {})[own] = Made(expr, step.dtype, stored)
    models, known = dict(dense), _Known(SourceTensors(plan, RowReader()))
    names = list(plan.recipe.expert_names)
    for expert, parameters in made.items():
        of = dense[names[expert]]
        names[expert] = f"{names[expert]}{MARK}{expert}"
        config = replace(of.config, intermediate_size=of.config.intermediate_size // plan.recipe.shards)
        leaves = {name: replace(of.leaves[name], shape=made.expr.shape) for name, made in parameters.items()}  # of a shard a smaller one
        models[names[expert]] = Remade(of.checkpoint, config, {**of.leaves, **leaves}, of, parameters, known, mixture)
    return tuple(names), models


def _by_role(step: Step, expr: expressions.Expr) -> Iterator[tuple[str, expressions.Expr]]:
    """(role, its expression) of all that an expert's tensor, made by `expr`, holds; nothing of one that is fused as a source has it."""
    roles = step.role.split("+")
    parts = expr.parts if isinstance(expr, expressions.Concat) and len(roles) > 1 else (expr,)
    if len(parts) == len(roles):
        yield from zip(roles, parts, strict=True)


def _is_remade(expr: expressions.Expr, site: Site, plan: Plan) -> bool:
    """Whether the recipe has a tensor of an expert made anew, or taken from the source that it names in the place of the expert's own."""
    shard = plan.recipe.shards > 1 and site[0].startswith("ffn.")
    if shard or any(isinstance(part, expressions.Merge) for part in expressions.parts(expr)):
        return True
    makes: tuple[object, ...] = (plan.recipe.experts, *plan.recipe.rules)
    named = {make.from_ for make in makes if isinstance(make, Varying) and make.from_ is not None}
    return any(expr == plan.models[name].tensors.get(site) for name in named)


def _parameter(role: str, step: Step, plan: Plan, expert: int | None) -> str:
    """The mixture's name for a parameter of an expert, or the dense model's, which has none."""
    row = next(row for row in plan.layout.rows if role in row.roles)
    return parameter_name(role, Cell(row, step.layer, expert))
