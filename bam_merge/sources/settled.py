"""What a step that settles something between the sources hands on: the sources as they count from then on, and what is to be said of it."""

from dataclasses import dataclass, field

from bam_merge.sources.dense import DenseModel


@dataclass
class Settled:
    """`warnings` are of what the recipe accepts, and travel with the result; `notes` stand in the plan alone."""

    models: list[DenseModel]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
