"""Seeded randomness: every random tensor is drawn from a generator that its seed and name alone decide."""

from functools import singledispatch
from typing import Any

import numpy
import torch
import xxhash
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Shape

Values = numpy.ndarray[Any, Any]


# ---- randomness ----------------------------------------------------------------------------------------------------------------


def _key(seed: int, name: str) -> int:
    """A 128-bit generator key from the recipe's random_seed and a name, and nothing else."""
    return xxhash.xxh3_128_intdigest(f"{seed}:{name}".encode())


def uniforms(seed: int, name: str, start: int, count: int) -> Values:
    """Elements [start, start + count) of the stream of uniform numbers in [0, 1) called `name`.

    Philox (Salmon et al., SC 2011) is counter-based, so any part of the stream can be had without the rest: one counter step
    gives four 64-bit numbers. The generator's raw output is part of numpy's compatibility promise (NEP 19).
    """
    bits = numpy.random.Philox(key=_key(seed, name))
    bits.advance(start // 4)
    raw = bits.random_raw(start % 4 + count)[start % 4 :]
    return (raw >> numpy.uint64(11)) * 2.0**-53


NORMALS = 2**14
"""Numbers of one generator in a stream of normal numbers."""


def normals(seed: int, name: str, start: int, count: int) -> Values:
    """Elements [start, start + count) of the stream of normal numbers, of mean 0 and deviation 1, called `name`.

    Marsaglia's method rejects, so that a place in its stream is not known: every NORMALS numbers have a generator of their own, of which
    that of block b is called `name:b`.
    """
    first, last = start // NORMALS, -(-(start + count) // NORMALS)
    blocks = [generator(seed, f"{name}:{block}").standard_normal(NORMALS) for block in range(first, last)]
    skipped = start - first * NORMALS
    return numpy.concatenate([numpy.empty(0), *blocks])[skipped : skipped + count]


def initialise(method: expressions.Initialiser, shape: Shape, seed: int, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A new tensor of `shape` in float32 (or `dtype`), from a generator that depends on `seed` and `name` only.

    numpy's legacy stream is used because it is frozen for good (NEP 19), so that the same recipe gives the same bytes anywhere.
    """
    return torch.from_numpy(numpy.ascontiguousarray(drawn(method, generator(seed, name), shape))).to(dtype)


def generator(seed: int, name: str) -> numpy.random.RandomState:
    """The legacy generator that `seed` and `name` alone decide."""
    return numpy.random.RandomState(numpy.random.Philox(key=_key(seed, name)))


@singledispatch
def drawn(method: expressions.Initialiser, random: numpy.random.RandomState, shape: Shape) -> Values:
    """The float64 values that an initialiser draws, one function per record."""
    raise NotImplementedError(f"values/streams.py draws no {type(method).__name__}: a function under @drawn.register is missing")


@drawn.register
def normal(method: expressions.Normal, random: numpy.random.RandomState, shape: Shape) -> Values:
    return random.standard_normal(shape) * method.std


@drawn.register
def uniform(method: expressions.Uniform, random: numpy.random.RandomState, shape: Shape) -> Values:
    return (2 * random.random_sample(shape) - 1) * (shape[-1] ** -0.5 if method.bound is None else method.bound)


@drawn.register
def zeros(method: expressions.Zeros, random: numpy.random.RandomState, shape: Shape) -> Values:
    return numpy.zeros(shape)


@drawn.register
def ones(method: expressions.Ones, random: numpy.random.RandomState, shape: Shape) -> Values:
    return numpy.ones(shape)


@drawn.register
def grouped(method: expressions.Grouped, random: numpy.random.RandomState, shape: Shape) -> Values:
    return numpy.tile(drawn(method.of, random, (method.drawn(shape[0]), *shape[1:])), (method.groups, 1))[: shape[0]]


@drawn.register
def orthogonal(method: expressions.Orthogonal, random: numpy.random.RandomState, shape: Shape) -> Values:
    q, r = numpy.linalg.qr(random.standard_normal(shape).T)  # rows <= columns: a router has fewer experts than units
    return (q * numpy.sign(numpy.diag(r))).T * method.gain  # the sign makes the distribution uniform (Mezzadri 2007)
