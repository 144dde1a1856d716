"""The second way to tensors that no source has."""

import numpy
import torch

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Shape
from bam_merge.values.streams import generator
from bam_merge.verifying.rederive.deriving import COMPUTING, draw
from bam_merge.verifying.rounding import Derived


def initialised(init: expressions.Init, start: int, stop: int, dtype: str) -> Derived:
    """Rows [start, stop) of a tensor that no source has."""
    computing = COMPUTING[init.dtype == "F64"]
    drawn = draw(init.method, generator(init.seed, init.name), init.shape)
    value = drawn.value[start:stop]
    if drawn.slack is None:
        return Derived(value.to(computing.torch).double())
    slack = drawn.slack[start:stop] + computing.least
    return Derived(value, slack if dtype == computing.dtype == "F32" else slack + value.abs() * computing.unit)


@draw.register
def _normal(method: expressions.Normal, random: numpy.random.RandomState, shape: Shape) -> Derived:
    return Derived(torch.from_numpy(random.standard_normal(shape)) * method.std)


@draw.register
def _uniform(method: expressions.Uniform, random: numpy.random.RandomState, shape: Shape) -> Derived:
    bound = method.bound if method.bound is not None else shape[-1] ** -0.5
    return Derived((torch.from_numpy(random.random_sample(shape)) * 2 - 1) * bound)


@draw.register
def _zeros(method: expressions.Zeros, random: numpy.random.RandomState, shape: Shape) -> Derived:
    return Derived(torch.zeros(shape, dtype=torch.float64))


@draw.register
def _ones(method: expressions.Ones, random: numpy.random.RandomState, shape: Shape) -> Derived:
    return Derived(torch.ones(shape, dtype=torch.float64))


@draw.register
def _grouped(method: expressions.Grouped, random: numpy.random.RandomState, shape: Shape) -> Derived:
    """Row i is row i of those that are drawn, counted round and round."""
    first = draw(method.of, random, (method.drawn(shape[0]), *shape[1:]))
    rows = torch.arange(shape[0]) % method.drawn(shape[0])
    return Derived(first.value[rows], None if first.slack is None else first.slack[rows])


@draw.register
def _orthogonal(method: expressions.Orthogonal, random: numpy.random.RandomState, shape: Shape) -> Derived:
    """By the definition (Gram and Schmidt), twice over for the digits that the first time loses."""
    drawn_RC = torch.from_numpy(random.standard_normal(shape))
    rows_RC = torch.zeros_like(drawn_RC)
    for row, rest_C in enumerate(drawn_RC.clone()):
        for _ in range(2):
            rest_C -= (rows_RC[:row] @ rest_C) @ rows_RC[:row]
        rows_RC[row] = rest_C / rest_C.norm()
    error = float(torch.linalg.cond(drawn_RC)) * shape[-1] * 2.0**-52  # of two correct ways to the factor Q (Higham 2002, section 19.9)
    return Derived(rows_RC * method.gain, torch.full_like(rows_RC, method.gain * error))
