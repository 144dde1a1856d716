"""Fuzzing of everything that reads what others wrote: `python tests/fuzz/run.py --cases 100000 --seed 0`.

Every case must end in a result or in one of our errors, within SECONDS of processor time and MEMORY bytes. Exit status 1 when one did not;
the smallest input that shows it is printed. Then, with `--merges 200`, so many random merges (merges.py).
"""

import argparse
import faulthandler
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path[:0] = [str(Path(__file__).parents[1] / station) for station in (".", "architectures", "sources")]
from meanings import edited_tokenizers, spelled_twice, tokenizers  # noqa: E402
from properties import Property, companions, staging  # noqa: E402
from targets import Target, targets  # noqa: E402

SECONDS = 5
"""Processor time of one case: a thousand times what a good input takes."""

MEMORY = 400_000_000
"""Bytes that the process may have beyond those it has when the targets are ready. No input is longer than 200 kB."""

BATCH = 500
"""Cases from one seed; a batch ends at its first failure."""


class Hang(Exception):
    """A case took too long."""


def watch() -> None:
    """Raise Hang in a case after SECONDS of processor time, or after a minute that it slept away."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS} s of processor time, or a minute of waiting")

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)


def limit_memory() -> None:
    """Let an allocation fail with MemoryError that takes the process more than MEMORY beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + MEMORY,) * 2)


def hunt(target: Target | Property, cases: int, first_seed: int, counts: Counter[str]) -> str | None:
    """Run one batch; the report of its failure, if any."""
    failing: list[Any] = []

    def case(data: Any) -> None:
        if not failing:
            counts["cases"] += 1
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 60)
        try:
            counts["accepted"] += target.run(data) and not failing
        except BaseException:
            failing[:] = [data]
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    how = settings(
        max_examples=cases, database=None, deadline=None, report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        seed(first_seed)(how(given(target.inputs)(case)))()
    except Exception:
        shown = repr(failing[0]) if failing else "?"
        more = f" ... ({len(shown)} characters)" if len(shown) > 1000 else ""
        return f"{target.name}, seed {first_seed}: {shown[:1000]}{more}\n{traceback.format_exc(limit=-6)}"
    return None


def all_targets(home: Path) -> list[Target | Property]:
    """Those that read one edited file, and those that make a result; each in a folder of its own below `home`."""
    found: list[Target | Property] = []
    for make in (targets, companions, staging, tokenizers, edited_tokenizers, spelled_twice):
        (home / make.__name__).mkdir()
        made = make(home / make.__name__)
        found += made if isinstance(made, list) else [made]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="", help="only targets whose name holds this")
    parser.add_argument("--merges", type=int, default=0, help="random merges, each verified and spoilt, after the cases")
    options = parser.parse_args()
    began, failures, counts = time.monotonic(), 0, Counter[str]()
    watch()
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="bam-merge-fuzz-", dir=in_memory) as home:
        aims = [target for target in all_targets(Path(home)) if options.target in target.name]
        for target in aims:
            assert target.run(target.good), f"{target.name}: the good input is refused"
        limit_memory()
        batch = 0
        while counts["cases"] < options.cases:
            faulthandler.dump_traceback_later(900, exit=True)  # a batch that nothing else could stop
            target = aims[batch % len(aims)]
            report = hunt(target, min(BATCH, options.cases - counts["cases"]), options.seed * 1_000_000 + batch, counts)
            batch += 1
            if report:
                failures += 1
                print(report, flush=True)
            if batch % 20 == 0:
                print(f"{counts['cases']:,} cases, {failures} failures", file=sys.stderr, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(
        f"fuzz: {counts['cases']:,} cases from seed {options.seed}, {counts['accepted']:,} accepted, {failures} failures; "
        f"{time.monotonic() - began:.0f} s, {peak:.0f} MB at most"
    )
    if options.merges:  # in processes of their own: here memory is limited
        command = [sys.executable, str(Path(__file__).with_name("merges.py")), "--merges", str(options.merges), "--seed", str(options.seed)]
        sys.stdout.flush()
        failures += subprocess.run(command, check=False).returncode
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
