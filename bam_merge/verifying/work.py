"""How much of a verification is done, for whoever waits."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.model.loading import StoredModel
from bam_merge.verifying.measuring import bytes_by_layer

COST = {"digests": 2, "sources": 8, "isolation": 4, "probes": 10}
"""What a stored byte costs in each part of a quick verification, in processor time, by the part's share on two cores."""


TOKENS_PER_BYTE = 60
"""Tokens of the texts of routers that a stored byte has to be multiplied with for what one unit costs."""


TRIALS = 7
"""What a token that a mixture is tried on costs, in tokens of a dense model: its own model, the average, and the mixture twice."""


def of_bytes(done: int, total: int) -> tuple[int, int]:
    """Work done, and all the work, when so many bytes of all were compared with what they are made of, and nothing else is done yet."""
    return done * (COST["digests"] + COST["sources"]), total * sum(COST.values())


@dataclass
class Work:
    """`tell` hears of work done and of all the work, in units of about equal time; neither ever goes down."""

    tell: Callable[[int, int], None] = lambda done, total: None
    total: int = 0
    done: int = 0
    parts: dict[str, int] = field(default_factory=dict)

    def plan(self, checkpoint: Checkpoint, texts: int = 0, tried: int = 0) -> None:
        """All that may have to be done for a folder: what turns out not to be is counted as done when `finish` is called. `texts` are the
        tokens of the texts that routers are of, `tried` those of the texts that the mixture is tried on."""
        nbytes = sum(entry.nbytes for entry in checkpoint.tensors.values())
        self.parts = {part: cost * nbytes for part, cost in COST.items()}
        self.parts["calibration"] = texts * nbytes // TOKENS_PER_BYTE
        self.parts["texts"] = TRIALS * tried * nbytes // TOKENS_PER_BYTE
        self.total = sum(self.parts.values())

    def advancing(self, part: str, whole: int) -> Callable[[int], None]:
        """What is called with amounts that sum up to `whole` while `part` is done."""
        share = self.parts.get(part, 0) / max(1, whole)

        def advance(amount: int) -> None:
            step = min(self.parts.get(part, 0), round(amount * share))
            if part in self.parts:
                self.parts[part] -= step
            self._advance(step)

        return advance

    def of_layers(self, part: str, *models: StoredModel, asked: Collection[int] | None = None) -> Callable[[int], None]:
        """What is called with each layer of some models, or each that is asked, after it has run: a layer weighs what its files do."""
        sizes = bytes_by_layer(*models)
        advance = self.advancing(part, sum(size for layer, size in sizes.items() if asked is None or layer in asked))
        return lambda layer: advance(sizes[layer])

    def finish(self, part: str) -> None:
        """Whatever is left of a part is done, or will not be."""
        self._advance(self.parts.pop(part, 0))

    def _advance(self, amount: int) -> None:
        self.done += amount
        self.tell(self.done, self.total)
