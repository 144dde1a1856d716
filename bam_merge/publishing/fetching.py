"""From a plan by headers to one by tensors: the models of the hub are downloaded, or reached by ranges, then all that a plan looks at is
looked at."""

import os
from dataclasses import replace

from bam_merge.planning.make import make_plan
from bam_merge.planning.plan import Plan
from bam_merge.publishing.destination import target_path
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.preflight import check_target
from bam_merge.sources.recipe_places import at_hand, bring_cards, find_in
from bam_merge.sources.watching import WATCH, watched
from bam_merge.text import human_bytes, listed


def fetched(plan: Plan, output: str | os.PathLike[str] | None, options: MergeOptions) -> Plan:
    """The plan over what can be read: the same one where all sources are folders. Raises BamMergeError, before a byte is downloaded where
    the result cannot be put where it is to go."""
    if not plan.remotes:
        if plan.recipe.known:
            bring_cards(find_in(plan.recipe, store) for store in plan.recipe.stores.values() if store.path in plan.recipe.known)
        return plan
    target = target_path(plan, output)
    if not options.resume:  # what is there may be this plan's result, which is seen when the sources are here
        check_target(plan, target, options)
    with watched(replace(WATCH.get(), notify=options.notify)):
        found = make_plan(at_hand(plan.recipe, target, plan.bytes_written, options.ranges))
    if afar := [name for name, checkpoint in found.checkpoints.items() if checkpoint.afar is not None]:
        more = human_bytes(found.reading_afar(options.workers))
        options.notify(f"reading the weights of {listed(afar)} where they are, by ranges; {more} of the memory are for their blocks")
    return found
