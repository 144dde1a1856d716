"""What the merged folder computes: all checks that run models."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import StoredModel, stored_model
from bam_merge.model.streaming import Computing
from bam_merge.model.tokens import encode, open_tokenizer
from bam_merge.planning.plan import Plan
from bam_merge.verifying.accepted import accepted_check, as_accepted
from bam_merge.verifying.aligned import Found, in_result_ids, token_checks
from bam_merge.verifying.calibrated import calibration_checks
from bam_merge.verifying.computed import LayerErrors, against_dense, of_embeddings
from bam_merge.verifying.config import same_function, same_head
from bam_merge.verifying.conversion import as_written, open_dense
from bam_merge.verifying.levels import Level, layers_asked
from bam_merge.verifying.measuring import Way
from bam_merge.verifying.one_expert import same_experts
from bam_merge.verifying.pairs import in_order, same_as_in_the_mixture, same_in_either_order
from bam_merge.verifying.probes import as_it_is
from bam_merge.verifying.report import Check, Report
from bam_merge.verifying.stack import as_stacked, same_layers
from bam_merge.verifying.updates import same_updates
from bam_merge.verifying.work import Work

SAMPLE = """The quick brown fox jumps over the lazy dog. def add(a, b): return a + b. This licence is granted to any person who obtains a \
copy of the software. Let x be a real number such that x * x = 2; then x is not rational."""


def function_checks(
    checkpoint: Checkpoint, plan: Plan | None, proved: frozenset[str], report: Report, level: Level, computing: Computing, work: Work,
    manifest: Mapping[str, Any], measured: Mapping[int, LayerErrors],
) -> Iterator[Check]:  # fmt: skip
    """Every check of what a folder computes: against its dense models where there is a plan, and by itself. `measured` are layers of which
    another process has found what `layers_of` finds."""
    mixture = stored_model(checkpoint)
    ids_BT, sample = sample_tokens(checkpoint.path, mixture.config.vocab_size, level.tokens)
    work.finish("sources")
    if plan is not None:
        own = open_dense(plan)
        sample_of_experts = ids_BT if level.thorough else ids_BT[:1]
        yield from same_experts(plan, in_order(own, mixture.config, plan))
        yield from same_as_in_the_mixture(own, sample_of_experts, Way(level, computing))
        yield from accepted_check(mixture, own, plan.recipe)
        aligned, dense, sample_BT = _beside(checkpoint, plan, mixture, own, ids_BT, level)
        ids_BT = aligned.sample(ids_BT)
        yield from aligned.checks
        exact = in_order(as_accepted(own, plan.recipe), mixture.config, plan)
        yield from same_in_either_order(own, dense, exact, plan, sample_BT, Way(level, computing))
        yield from same_function(mixture, as_stacked(dense, plan.recipe))
        yield from same_head(mixture, dense, ids_BT, computing)
        if any(model.adapters for model in plan.models.values()):
            adapted = in_result_ids(checkpoint.path, plan, as_accepted(own, plan.recipe), mixture.config.vocab_size)
            yield from same_updates(plan, in_order(adapted, mixture.config, plan))
    if plan is not None and plan.layout.kind == "mixture":
        asked = layers_asked(mixture.config, level)
        ran = work.of_layers("isolation", mixture, *dense.values(), asked=asked)
        yield from against_dense(mixture, dense, plan, proved, sample_BT, Way(level, computing, ran), measured)
    if plan is not None and plan.recipe.output.layers is not None:
        ran = work.of_layers("isolation", mixture, asked=layers_asked(mixture.config, level))
        yield from same_layers(mixture, dense, plan, proved, sample_BT, Way(level, computing, ran))
    work.finish("isolation")
    passed = work.advancing("calibration", mixture.config.num_hidden_layers)
    yield from calibration_checks(checkpoint, plan, manifest, Way(level, computing, lambda layer: passed(1)))
    work.finish("calibration")
    yield from as_it_is(mixture, ids_BT, report, sample, Way(level, computing, work.of_layers("probes", mixture)))
    work.finish("probes")


def _beside(
    checkpoint: Checkpoint, plan: Plan, mixture: StoredModel, own: dict[str, StoredModel], ids_BT: Tensor, level: Level
) -> tuple[Found, dict[str, StoredModel], Tensor]:
    """How the sources' tokens are the result's, the dense models as the result has them, and the tokens that both sides are run on."""
    written = as_accepted(as_written(own, plan), plan.recipe)
    aligned = token_checks(checkpoint.path, plan, written, mixture.config.vocab_size)
    dense = in_order(aligned.models, mixture.config, plan)
    return aligned, dense, aligned.sample(ids_BT if level.thorough else ids_BT[:1])


def layers_of(checkpoint: Checkpoint, plan: Plan, level: Level, computing: Computing, layers: Collection[int]) -> dict[int, LayerErrors]:
    """What `function_checks` finds of some layers of a mixture beside its dense models. Only at a level at which layers get the embeddings:
    where hidden states go from one to the next, none can be run alone."""
    assert not level.thorough
    mixture = stored_model(checkpoint)
    ids_BT, _ = sample_tokens(checkpoint.path, mixture.config.vocab_size, level.tokens)
    _, dense, sample_BT = _beside(checkpoint, plan, mixture, open_dense(plan), ids_BT, level)
    return of_embeddings(mixture, dense, plan, sample_BT, Way(level, computing), layers)


def sample_tokens(folder: Path, vocabulary: int, tokens: int) -> tuple[Tensor, str]:
    """Two sequences of token ids [2, tokens], and what they are: a text, or pseudo-random ids where none can be read."""
    try:
        ids = encode(open_tokenizer(folder), SAMPLE)
    except CheckpointError as error:
        why = str(error)
    else:
        if len(ids) >= 2 * tokens and max(ids) < vocabulary:
            return torch.tensor(ids[: 2 * tokens]).view(2, -1), "a sample text"
        why = f"tokenizer.json gives {len(ids)} ids up to {max(ids, default=0)}, the vocabulary has {vocabulary}"
    return torch.randint(vocabulary, (2, tokens), generator=torch.Generator().manual_seed(0)), f"random tokens ({why})"
