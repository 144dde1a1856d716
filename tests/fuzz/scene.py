"""Where a fault is planted: a finished merge, and whether a change of it can be told in principle.

What cannot be told is not planted: a change of a merged number that the rounding of the arithmetic may have made, and the sign of a zero,
which no computation sees (a copy's bytes are compared all the same).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import xxhash
from merge_cases import Case
from proofs import Forger
from safetensors import safe_open
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.provenance import sealed
from bam_merge.planning.plan import Plan, Step

UNITS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""The distance of 1 to the next number."""

LEAST = {"F64": 2.0**-1074, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""The smallest number above zero."""


@dataclass
class Scene:
    """A finished merge in `folder`, and what a planter draws from."""

    case: Case
    plan: Plan
    folder: Path
    chance: Random

    def __post_init__(self) -> None:
        self.forge = Forger(self.folder)
        self.manifest = self.forge.manifest

    def seal(self) -> None:
        self.forge.path.write_bytes(sealed(self.manifest))

    def pick(self, fits: Callable[[Step], bool] = lambda step: True) -> Step | None:
        """One of the output's tensors."""
        found = [step for step in self.plan.steps if fits(step)]
        return self.chance.choice(found) if found else None

    def put(self, step: Step, value: Tensor) -> str | None:
        """Write `value`; its tensor's name, or None where nobody could tell the difference."""
        before = self.forge.read(step.name)
        if not certain(self.plan, step, before, value):
            return None
        self.forge.write(step.name, value)
        return step.name

    def replace(self, name: str, data: bytes) -> str | None:
        """Write another small file, with its right digest in the manifest."""
        path = self.folder / name
        if path.exists() and path.read_bytes() == data:
            return None
        path.write_bytes(data)
        self.manifest["files"][name] = xxhash.xxh3_128_hexdigest(data)
        self.seal()
        return name


def certain(plan: Plan, step: Step, before: Tensor, after: Tensor) -> bool:
    """Whether some element of `after` cannot be what the merge may make of the sources.

    A copy has one right form. A merged element has more where it cancels or was rounded on the way: what its operands' largest elements
    times a hundred roundings allow, and a few roundings to its own dtype, are given away here.
    """
    before, after = before.flatten(), after.flatten()
    if moves_bytes(step):
        return not torch.equal(before.contiguous().view(torch.uint8), after.contiguous().view(torch.uint8))
    same = (before == after) | (before.isnan() & after.isnan())
    if isinstance(step.expr, expressions.Init | expressions.Concat) and not computes(step):
        return not bool(same.all())
    old, new = before.double(), after.double()
    wide = any(leaf.dtype == "F64" for leaf in expressions.leaves(step.expr))
    slack = 100 * UNITS["F64" if wide else "F32"] * largest(plan, step)
    allowed = slack + 4 * UNITS[step.dtype] * old.abs() + 4 * LEAST[step.dtype]
    return bool((~((new - old).abs() <= allowed) & ~same).any())


def moves_bytes(step: Step) -> bool:
    return expressions.is_copy(step.expr) and {leaf.dtype for leaf in expressions.leaves(step.expr)} == {step.dtype}


def computes(step: Step) -> bool:
    return any(isinstance(part, expressions.Merge) for part in expressions.parts(step.expr)) or step.expr.dtype != step.dtype


def largest(plan: Plan, step: Step) -> float:
    """The largest magnitude among the source tensors that a step reads."""
    found = 0.0
    for read in expressions.reads(step.expr):
        checkpoint = plan.models[read.source].checkpoint
        with safe_open(checkpoint.path / checkpoint.tensors[read.tensor].file, "pt") as file:
            found = max(found, float(file.get_tensor(read.tensor).double().abs().max()))
    return found
