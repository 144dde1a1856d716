"""Carries out what a plan says of routers that are made of texts: which model is run over them, and where their rows are written."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import xxhash

from bam_merge import expressions
from bam_merge.architectures.locate import cells
from bam_merge.architectures.tables import Architecture
from bam_merge.calibrating.stage import Made, Models, Wanted, Watch, WithRouters, make_routers
from bam_merge.checkpoints.folder import Checkpoint, assembled
from bam_merge.checkpoints.header import read_header
from bam_merge.errors import SyncFailed
from bam_merge.files import writing
from bam_merge.merging.outputs import write_all
from bam_merge.merging.planned_model import planned_model
from bam_merge.merging.tensor import Finished
from bam_merge.model.loading import parameter_name, stored_model
from bam_merge.model.streaming import computing_on
from bam_merge.own_folder import open_file
from bam_merge.planning.plan import Plan, Step
from bam_merge.system import sync
from bam_merge.values.tensors import encode


def calibrated_steps(plan: Plan) -> list[tuple[Step, expressions.Calibrated]]:
    """The routers that are made of texts."""
    return [(step, step.expr) for step in plan.steps if isinstance(step.expr, expressions.Calibrated)]


def wanted_routers(plan: Plan) -> list[Wanted]:
    """The same, as the pass over the texts is asked for them."""
    assert plan.calibration is not None
    parameters = _parameters(plan.layout, plan.models[plan.recipe.seed_name].facts["num_hidden_layers"])
    return [
        Wanted(
            step.name, parameters[step.role, step.layer], step.role, step.layer or 0, expr.method, expr.names,
            plan.calibration.corpora[expr.of], expr.inputs, step.dtype,
        )
        for step, expr in calibrated_steps(plan)
    ]  # fmt: skip


def _parameters(layout: Architecture, layers: int) -> dict[tuple[str, int | None], str]:
    """What the reference model calls the routers."""
    found = (cell for cell in cells(layout, layers) if cell.row.roles[:1] in (("router.attn",), ("router.ffn",)))
    return {(cell.row.roles[0], cell.layer): parameter_name(cell.row.roles[0], cell) for cell in found}


def calibrate(plan: Plan, folder: Path, device: torch.device, workers: int, watch: Watch) -> dict[str, Made]:
    """Every router of `plan` that is made of texts; `folder` holds all its other tensors. Raises CheckpointError when a model cannot be
    read, NonFiniteError when rows are no numbers of their dtype."""
    wanted = wanted_routers(plan)
    with computing_on(device, workers) as computing, _models(plan, folder, wanted) as models:
        return make_routers(wanted, models, computing, watch)


@contextmanager
def _models(plan: Plan, folder: Path, wanted: Sequence[Wanted]) -> Iterator[Models]:
    """The models that the texts go through."""
    with planned_model(plan, plan.recipe.seed_name) as seed:

        def mixture(made: Mapping[str, Made]) -> WithRouters:
            stored = stored_model(written(plan, folder))
            return WithRouters(stored.checkpoint, stored.config, stored.leaves, {router.parameter: router for router in wanted}, made)

        yield {"seed": lambda made: seed, "mixture": mixture}


def written(plan: Plan, folder: Path) -> Checkpoint:
    """What a merge has written so far, as a checkpoint: the files beside the tensors are yet to be."""
    files = {shard.file: read_header(str(folder / shard.file), shard.file) for shard in plan.shards}
    problems: list[str] = []
    found = assembled(folder, (dict(plan.config), ""), files, (None, None), lambda config: set(), problems)
    return replace(found, config=dict(plan.config))


def write_routers(
    plan: Plan, folder: Path, descriptor: int, made: Mapping[str, Made], on_finished: Callable[[Step, Finished], None]
) -> dict[str, Finished]:
    """Write routers to their places in the files of the folder of that descriptor, and sync these."""
    finished: dict[str, Finished] = {}
    by_file: dict[str, list[Step]] = {}
    for step, _ in calibrated_steps(plan):
        by_file.setdefault(step.file, []).append(step)
    for file, steps in by_file.items():
        with writing(folder / file):
            output = open_file(file, descriptor, os.O_RDWR)
        try:
            for step in steps:
                data = encode(made[step.name].values.flatten(), step.dtype)
                with writing(folder / file):
                    write_all(output, data, step.offset)
                finished[step.name] = Finished(xxhash.xxh3_128_hexdigest(data))
            with writing(folder / file, SyncFailed):
                sync(output)
        finally:
            os.close(output)
        for step in steps:
            on_finished(step, finished[step.name])
    return finished
