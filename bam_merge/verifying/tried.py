"""A mixture tried on texts: perplexities, what its routers do, and what that means, as parts of a report."""

from collections.abc import Mapping, Sequence

from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.model.loading import stored_model
from bam_merge.model.routes import expert_names
from bam_merge.model.streaming import Computing
from bam_merge.planning.plan import Plan
from bam_merge.verifying.heldout import HeldOut, Routed
from bam_merge.verifying.perplexity import Advancing, perplexities
from bam_merge.verifying.report import Report
from bam_merge.verifying.router_words import readings


def try_on_texts(
    checkpoint: Checkpoint, plan: Plan | None, texts: Sequence[HeldOut], report: Report, computing: Computing,
    made_of: Mapping[str, int], own_alone: bool, advancing: Advancing = lambda whole: lambda amount: None,
) -> None:  # fmt: skip
    """Add perplexities to a report, and what the routers do with the texts whose expert is known.

    `made_of`: tokens of each source's text, where routers are made of some. With `own_alone` sources are tried on their own text alone.
    """
    report.perplexity, choices = perplexities(checkpoint, plan, texts, computing, own_alone, advancing)
    if choices:
        mixture = stored_model(checkpoint)
        routed = Routed(expert_names(mixture), [text for text in texts if text.experts], choices)
        report.held_out = routed.document()
        report.readings = readings(routed, report.held_out, report.perplexity, mixture, made_of)
