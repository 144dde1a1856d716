"""Where and with how many threads a verification computes."""

import torch

from bam_merge.errors import VerifyError
from bam_merge.system import available_processors
from bam_merge.text import printable


def open_device(name: str) -> torch.device:
    """The device of torch's that is called `name`. Raises VerifyError where this machine, or this torch, has none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = [
            "cpu",
            *(f"cuda:{index}" for index in range(torch.cuda.device_count())),
            *(["mps"] if torch.backends.mps.is_available() else []),
        ]
        why = printable(str(error).partition("\n")[0], 200)
        raise VerifyError(f"device {printable(repr(name), 60)} cannot be used: {why}. Devices here: {', '.join(there)}.") from None
    return device


def torch_workers(most: int | None = None) -> int:
    """One thread a processor that this process may use, or fewer where OMP_NUM_THREADS or the caller asks for fewer."""
    found = min(available_processors(), torch.get_num_threads())
    return max(1, found if most is None else min(found, most))
