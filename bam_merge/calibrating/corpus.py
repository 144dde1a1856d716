"""What a plan says of the texts that routers are made of: their tokens, what was read, and what the pass over them costs. No torch."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from bam_merge.calibrating.texts import Text
from bam_merge.values.threads import default_workers


@dataclass(frozen=True)
class Corpus:
    """The texts of one place in a recipe, by source; `negative` ones are not typical of it."""

    texts: Mapping[str, Text]
    negative: Mapping[str, Text] = field(default_factory=dict)

    @property
    def all(self) -> list[Text]:
        return [*self.texts.values(), *self.negative.values()]

    def document(self) -> dict[str, Any]:
        """What plans and manifests record of it."""
        found = {"texts": {name: _document(text) for name, text in self.texts.items()}}
        return found | ({"negative_prompts": {name: _document(text) for name, text in self.negative.items()}} if self.negative else {})


def _document(text: Text) -> dict[str, Any]:
    return {
        "tokens": text.tokens,
        "further": sum(map(len, text.further)),
        "digest": text.digest,
        "read": [{"name": part.name, "bytes": part.nbytes, "digest": part.digest} for part in text.parts],
    }


@dataclass(frozen=True)
class Calibration:
    """The texts of every place in the recipe that routers are made of; and what the pass over them takes: floating-point operations, bytes
    of memory, and of disk, where it keeps how far it has come.

    `absent` says why the texts are not at hand, where a recorded merge is planned again: nothing can be made then, and routers not proved.
    """

    corpora: Mapping[str, Corpus]
    flops: int = 0
    memory: int = 0
    disk: int = 0
    absent: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that a model sees in all, with those that the routers are tried on."""
        texts = {text.digest: text for corpus in self.corpora.values() for text in corpus.all}
        return sum(text.tokens + sum(map(len, text.further)) for text in texts.values())

    @property
    def seconds(self) -> float:
        """How long the pass takes on this machine's processors, about."""
        return self.flops / flop_rate()

    def document(self) -> dict[str, Any]:
        return {place: corpus.document() for place, corpus in self.corpora.items()}


MEASURED_WIDTH = 1024
"""Rows and columns of the matrices by whose products a machine's rate is taken: a tenth of a second."""


SHARE_OF_RATE = 0.55
"""Of the rate at which such products are worked out by all processors, what a pass comes to. SmolLM2-135M takes 0.68 for each processor
second: a pass also reads and widens weights, attends, and adds up moments in float64, which has half the rate. Not all of it is done by all
processors at once."""


@cache
def flop_rate() -> float:
    """Floating-point operations a second that a pass does here, about: from products of small matrices, one for each worker at a time.

    By the clock or by the processors' time, whichever says more: what else the machine does now lengthens the first, and threads that wait
    for each other the second.
    """
    import numpy

    workers = default_workers()
    a = numpy.ones((MEASURED_WIDTH, MEASURED_WIDTH), numpy.float32)
    times = []
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(4):  # the first of which starts threads
            clock, processors = time.perf_counter(), time.process_time()
            list(pool.map(lambda _: a @ a, range(workers)))
            times += [time.perf_counter() - clock, (time.process_time() - processors) / workers]
    return SHARE_OF_RATE * 2 * MEASURED_WIDTH**3 * workers / max(min(times), 1e-6)
