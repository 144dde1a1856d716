"""How a verification is run."""

from collections.abc import Callable
from dataclasses import dataclass

from bam_merge.errors import VerifyError
from bam_merge.text import nearest, printable

LEVEL_NAMES = ("quick", "full")


@dataclass(frozen=True)
class VerifyOptions:
    """How to verify.

    `level` is quick or full; `device` is one of torch's, such as cuda or cuda:1, for what is computed; `workers` is the most threads, which
    are one a processor, or as many as OMP_NUM_THREADS says; `progress` hears of work done, and of all the work. `try_routers`: those that
    are made of texts are also tried on what follows in these. `ranges`: sources on the hub are read there, and not downloaded.
    """

    level: str = "quick"
    device: str = "cpu"
    workers: int | None = None
    progress: Callable[[int, int], None] = lambda done, total: None
    try_routers: bool = False
    ranges: bool = False


def check_level(name: str) -> None:
    """Raises VerifyError for what is no level."""
    if name not in LEVEL_NAMES:
        raise VerifyError(f"level {printable(repr(name), 60)} is none of {', '.join(LEVEL_NAMES)}{nearest(name, LEVEL_NAMES)}")
