"""The part of a merge that makes routers of texts, after all other tensors: resumed where it stopped, and said in a sentence."""

from collections.abc import Mapping
from typing import Any

from bam_merge.calibrating.corpus import Calibration
from bam_merge.calibrating.stage import Made, State, Watch
from bam_merge.merging.calibrate import calibrate, calibrated_steps, write_routers
from bam_merge.merging.tensor import Finished
from bam_merge.planning.plan import Plan, Step
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.staging import Staging
from bam_merge.publishing.states import KeptStates
from bam_merge.text import count, printable


def make_routers(plan: Plan, staging: Staging, options: MergeOptions) -> tuple[dict[str, Made], dict[str, Finished]]:
    """Make and write the routers that are made of texts, in the staging folder; nothing where a plan has none."""
    steps = calibrated_steps(plan)
    if not steps:
        return {}, {}
    from bam_merge.verifying.devices import open_device

    assert plan.calibration is not None
    kept = KeptStates(staging, plan.fingerprint)
    watch = Watch(kept.save, kept.load, options.on_calibrate)
    made = calibrate(plan, staging.output, open_device(options.device), options.workers, watch)
    last = steps[-1][1].inputs
    kept.save(State(last, len(steps), made, []), at_once=True)

    def on_finished(step: Step, finished: Finished) -> None:
        staging.record(step.name, finished)

    written = write_routers(plan, staging.output, staging.files, made, on_finished)
    options.notify(accuracy_text(plan.calibration, made))
    return made, written


def calibration_record(found: Calibration, made: Mapping[str, Made]) -> dict[str, Any]:
    """What a manifest says of the texts and of what was measured."""
    measured = {name: {"tokens": _share(router.tokens), "windows": _share(router.windows)} for name, router in made.items()}
    return {"texts": found.document(), "accuracy": measured}


def _share(value: float) -> float:
    return round(value, 4)


def accuracy_text(found: Calibration, made: Mapping[str, Made]) -> str:
    """How often routers choose the expert whose text it is."""
    further = all(text.further for corpus in found.corpora.values() for text in corpus.texts.values())
    of = "tokens that they were not made of" if further else "their own tokens (there are no further ones)"
    tokens, windows = (sum(getattr(router, key) for router in made.values()) / len(made) for key in ("tokens", "windows"))
    name, lowest = min(made.items(), key=lambda item: item[1].tokens)
    return (
        f"{count(len(made), 'router')} from {found.tokens:,} tokens of text: {tokens:.0%} of {of} go to the expert whose text "
        f"it is, and {windows:.0%} of windows by their sum; least in {printable(name)}, {lowest.tokens:.0%}."
    )
