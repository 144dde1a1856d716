"""What the tasks of a merge on Ray do, each on whatever host: a part is made, a part is compared with its sources, layers are run.

Every host reads the recipe and plans by itself, and sees that it sees what the driver sees.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bam_merge.errors import BamMergeError, OutputError
from bam_merge.planning.make import make_plan
from bam_merge.planning.parts import Part, parts_of, plan_of
from bam_merge.planning.plan import Plan
from bam_merge.publishing.fetching import fetched
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.part_journals import difference, header_of
from bam_merge.publishing.parts import make_part
from bam_merge.publishing.staging import OUTPUT, staging_folder
from bam_merge.recipe.load import load_recipe
from bam_merge.recipe.places import Known
from bam_merge.system import machine
from bam_merge.text import printable

PATIENCE = 90.0
"""Seconds that a task waits for a part that a process holds which may be dead: longer than such a one counts as alive."""


@dataclass(frozen=True)
class Order:
    """What a task is told: the recipe by its file, which is read on its host, what was found of models of the hub, where the result goes,
    which part, what the driver's plan is of, and how to run; of a proof, how deep, and which layers."""

    recipe: str
    known: Mapping[str, str]
    target: str
    number: int
    of: int
    header: Mapping[str, Any]
    settings: Mapping[str, Any]
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"layers {', '.join(map(str, self.layers))}" if self.layers else f"part {self.number}/{self.of}"


def orders(plan: Plan, target: Path, parts: tuple[Part, ...], options: MergeOptions, verify: str = "none") -> Iterator[Order]:
    """An order for each part."""
    known = {text: place.recorded for text, place in plan.recipe.known.items()}
    settings = {
        "force": options.force, "workers": options.workers, "allow_nonfinite": options.allow_nonfinite, "verify": verify,
        "ranges": options.ranges,
    }  # fmt: skip
    for part in parts:
        yield Order(os.path.abspath(plan.recipe.file), known, str(target), part.number, part.of, header_of(plan, part), settings)


def run_part(order: Order) -> dict[str, Any]:
    """Make a part: the digests of its tensors."""

    def make(plan: Plan, options: MergeOptions) -> dict[str, Any]:
        made = make_part(plan, order.target, order.number, order.of, options, PATIENCE)
        return {"digests": {} if made is None else made.digests}

    return _done(order, make)


def prove(order: Order) -> dict[str, Any]:
    """When all is written: compare a part with its sources, or run layers of a mixture beside its dense models. What was found is "found",
    and nothing of it is left on the disk."""

    def look(plan: Plan, options: MergeOptions) -> dict[str, Any]:
        from bam_merge.verifying import proof

        assert options.level is not None
        output = staging_folder(Path(order.target)) / OUTPUT
        if order.layers:
            return {"found": proof.run_layers(plan, output, order.layers, options.level, options.workers)}
        mine = plan_of(plan, parts_of(plan, order.of)[order.number - 1])
        nothing: dict[str, Any] = {"tensors": {}, "sources": {}}  # the driver judges what is found
        found, _ = proof.prove(plan, mine, output, options.workers, lambda done, total: None, nothing)
        return {"found": replace(found, fresh=True)}

    return _done(order, look)


def _done(order: Order, do: Callable[[Plan, MergeOptions], dict[str, Any]]) -> dict[str, Any]:
    """What came of an order, with the host and what is to be told; or the kind of the error and its problems, for which nothing is tried
    again."""
    host, notes = machine()[0], list[str]()
    try:
        recipe = load_recipe(order.recipe)
        if order.known:
            recipe = recipe.knowing({text: Known(recorded, Path()) for text, recorded in order.known.items()})
        options = MergeOptions(**order.settings, notify=notes.append)
        plan = fetched(make_plan(recipe), order.target, options)
        if why := difference(order.header, header_of(plan, parts_of(plan, order.of)[order.number - 1])):
            raise OutputError(f"{order}: host {printable(host, 100)} does not see what the driver sees, whose plan was made {why}.")
        return {"host": host, "notes": notes, **do(plan, options)}
    except BamMergeError as error:
        return {"host": host, "notes": notes, "error": type(error).__name__, "problems": list(error.problems)}
