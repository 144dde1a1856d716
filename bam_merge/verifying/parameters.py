"""Is every parameter of an expert its dense model's, bit for bit, in every layer? No arithmetic, and mostly no reading.

Two reference models say what they read their parameters from, each by the table of its own folder. The plan's expression says what the
written tensor is made of, and against_sources proved that. Where the three agree, the parameter is proved; where they do not, or the
proof failed, the two parameters are read and compared.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Joined, Leaf, stored
from bam_merge.model.loading import StoredModel
from bam_merge.planning.plan import Plan, Step
from bam_merge.text import some
from bam_merge.verifying.rows import Stretch, leaf_rows, stretches

COMPARED_ROWS = 2**10
"""Rows of two parameters that are compared at a time."""


@dataclass(frozen=True)
class Stranger:
    """An expert that in one layer is not its dense model: which parameters are not, and how far off the largest number is."""

    layer: int
    expert: int
    error: float
    where: str


def strangers(
    mixture: StoredModel, dense: Mapping[str, StoredModel], names: Sequence[str], plan: Plan, proved: frozenset[str]
) -> Iterator[Stranger]:
    """Every expert that has a parameter of another model than its own, which `names` names. `proved` are the tensors that follow from the
    sources."""
    steps, sources = {step.name: step for step in plan.steps}, plan.recipe.expert_names
    wrong: dict[tuple[int, int], dict[str, float]] = {}
    for parameter, leaf in mixture.leaves.items():
        found = EXPERTS.fullmatch(parameter)
        if found is None:
            continue
        layer, half, j, rest = int(found["layer"]), found["half"], int(found["expert"]), found["rest"]
        own = f"model.layers.{layer}.{half}.{rest}"
        if j >= len(names) or own not in dense[names[j]].leaves:
            wrong.setdefault((layer, j), {})[f"{half}.{rest}"] = math.inf
        elif not is_proved(leaf, dense[names[j]].leaves[own], steps.get(stored(leaf).tensor), sources[j], proved):
            error = apart(mixture, parameter, dense[names[j]], own)
            if error:
                wrong.setdefault((layer, j), {})[f"{half}.{rest}"] = error
    for (layer, j), errors in wrong.items():
        halves = [word for half, word in HALVES.items() if any(part.startswith(f"{half}.") for part in errors)]
        yield Stranger(layer, j, max(errors.values()), f"{' and '.join(halves)} ({some([part.partition('.')[2] for part in errors], 4)})")


def shared_strangers(
    mixture: StoredModel, dense: Mapping[str, StoredModel], plan: Plan, proved: frozenset[str]
) -> Iterator[tuple[int, float, str]]:
    """(layer, how far off, parameter) of all in a shared expert that is not the FFN of the source that the recipe names."""
    source, steps = plan.recipe.shared_source, {step.name: step for step in plan.steps}
    if source is None:
        return
    for layer in range(mixture.config.num_hidden_layers):
        ffn, shared = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.mlp.shared_expert."
        for own in (name for name in dense[source].leaves if name.startswith(ffn)):
            parameter = shared + own.removeprefix(ffn)
            if parameter not in mixture.leaves:
                yield layer, math.inf, own.removeprefix(ffn)
                continue
            leaf = mixture.leaves[parameter]
            if not is_proved(leaf, dense[source].leaves[own], steps.get(stored(leaf).tensor), source, proved):
                error = apart(mixture, parameter, dense[source], own)
                if error:
                    yield layer, error, own.removeprefix(ffn)


EXPERTS = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<half>self_attn|mlp)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)")
"""The reference model's name for a parameter of one expert."""


HALVES = {"self_attn": "attention", "mlp": "FFN"}


def is_proved(leaf: Leaf, own: Leaf, step: Step | None, source: str, proved: frozenset[str]) -> bool:
    """Whether the parameter at `leaf` of a proved tensor is what the dense model called `source` reads at `own`."""
    if step is None or step.name not in proved:
        return False
    if not expressions.is_copy(step.expr):  # what it is was worked out anew; whose it is the forward passes tell
        return True
    moved = next(expressions.computed(step.expr), None) is not None
    if moved or isinstance(leaf, Joined) or isinstance(own, Joined):  # rows in another order, small vectors: sooner read than told apart
        return False
    mine = [piece for start, stop in leaf_rows(leaf) for piece in stretches(step.expr, start, stop)]
    theirs = [(source, stored(own).tensor, start, stop) for start, stop in leaf_rows(own)]
    return _joined(mine) == _joined(theirs)


def _joined(pieces: Iterable[Stretch]) -> list[Stretch]:
    """The same rows in as few stretches as they make."""
    result: list[Stretch] = []
    for source, tensor, start, stop in pieces:
        if result and result[-1][:2] == (source, tensor) and result[-1][3] == start:
            start = result.pop()[2]
        result.append((source, tensor, start, stop))
    return result


def apart(mixture: StoredModel, parameter: str, dense: StoredModel, own: str) -> float:
    """The largest difference of two parameters, relative to the largest number of the second; infinite where they cannot be compared."""
    rows = mixture.leaves[parameter].shape[0]
    if mixture.leaves[parameter].shape != dense.leaves[own].shape:
        return math.inf
    largest = worst = 0.0
    for start in range(0, rows, COMPARED_ROWS):
        some = range(start, min(start + COMPARED_ROWS, rows))
        a, b = mixture.read_rows(parameter, some), dense.read_rows(own, some)
        if a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            continue
        worst = max(worst, float((a.double() - b.double()).abs().nan_to_num(math.inf).max()) or 5e-324)  # of 0 and -0 the bits differ
        largest = max(largest, float(b.double().abs().nan_to_num(0.0).max()))
    return worst / largest if largest else math.inf if worst else 0.0
