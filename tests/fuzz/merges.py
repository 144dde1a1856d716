"""Random merges, each verified, and each once more with one fault planted: `python tests/fuzz/merges.py --merges 200 --seed 0`.

A sound merge that verification refuses is a false alarm, a fault that it lets pass is a miss: exit status 1, with what to make it again
by. `--only 17` runs the merge with that number alone, `--keep FOLDER` leaves its folders there, `--fault manifest` plants the first kind
whose name holds that word wherever it can, instead of one kind after the other.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from merge_cases import Case, draw  # noqa: E402
from merge_sources import write_case  # noqa: E402
from planted import FAULTS, plant  # noqa: E402
from scene import Scene  # noqa: E402

from bam_merge import BamMergeError, MergeOptions, verify  # noqa: E402
from bam_merge.planning.make import plan_file  # noqa: E402
from bam_merge.planning.plan import Plan  # noqa: E402
from bam_merge.publishing.publish import publish  # noqa: E402
from bam_merge.verifying.report import Report  # noqa: E402


@dataclass
class Outcome:
    """What came of one merge: a line, the kind of its fault, and its findings."""

    number: int
    line: str = ""
    fault: str = ""
    findings: list[str] = field(default_factory=list)


def run_case(seed: int, number: int, home: Path, first: int | None = None) -> Outcome:
    """Make, verify and spoil the merge with this number, in the empty folder `home`; by the kind of fault `first`, or its own."""
    case, outcome = draw(seed, number), Outcome(number)
    outcome.line = f"{number:4} {case.summary()}"
    try:
        _merge(case, seed, outcome, home, number if first is None else first)
    except Exception as error:
        kind = "refused" if isinstance(error, BamMergeError) else "failed"
        outcome.findings.append(f"{kind}: {error}" if kind == "refused" else f"{kind}: {traceback.format_exc(limit=-4)}")
    if outcome.findings:
        kind = "" if first is None else f" --fault '{list(FAULTS)[first]}'"
        again = f"again: python tests/fuzz/merges.py --seed {seed} --only {number}{kind}"
        outcome.findings = [f"{finding}\n" for finding in outcome.findings] + [f"{again}\n{case.text()}\n"]
    return outcome


def _merge(case: Case, seed: int, outcome: Outcome, home: Path, first: int) -> None:
    plan = plan_file(write_case(case, home))
    folder = publish(plan, None, MergeOptions(workers=case.workers, verify=False))
    bytes_before = _bytes(folder)
    chance = Random(f"fault {seed} {outcome.number}")
    with_plan = chance.random() < 0.5
    for given in (plan, None):
        report = verify(folder, given)
        unmade = [f"{check.name}: {check.detail}" for check in report.checks if check.ok is None]
        if not report.ok or unmade:
            what = "FALSE ALARM" if not report.ok else "NOT CHECKED"
            outcome.findings.append(f"{what} with{'' if given else 'out'} a plan: {_failures(report) or unmade}")
    if outcome.number % 8 == 0:
        again = publish(plan, home / "again", MergeOptions(workers=4 - case.workers, verify=False))
        if _bytes(again) != bytes_before:
            outcome.findings.append("OTHER BYTES with another number of workers")
    scene = Scene(case, plan, folder, chance)
    kind, said = plant(scene, first)
    outcome.fault = kind
    found = _found(folder, plan if with_plan or kind in PLAN_NEEDED else None)
    outcome.line += f"; {kind}: {said}: {found or 'MISSED'}"
    if not found:
        outcome.findings.append(f"MISSED {'with' if with_plan else 'without'} a plan: {kind}: {said}")


PLAN_NEEDED = ("another manifest",)
"""What the manifest alone may have wrong can only be told by whoever has the recipe: its own is all that there is without."""


def _found(folder: Path, plan: Plan | None) -> str:
    """The checks that fail; '' when none does."""
    try:
        report = verify(folder, plan)
    except BamMergeError as error:
        return type(error).__name__
    return ", ".join(check.name for check in report.failures)


def _failures(report: Report) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in report.failures]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- many ------------------------------------------------------------------------------------------------------------------


def one(seed: int, number: int, keep: str | None, first: int | None) -> Outcome:
    """run_case in a folder of its own."""
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    home = Path(tempfile.mkdtemp(prefix="bam-merge-merges-", dir=keep or in_memory))
    try:
        return run_case(seed, number, home, first)
    finally:
        if not keep:
            shutil.rmtree(home)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--merges", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one merge's number")
    parser.add_argument("--keep", help="a folder for the merges' folders, which are otherwise deleted")
    parser.add_argument("--fault", help="a word of the name of a kind of fault")
    options = parser.parse_args()
    first = next(number for number, kind in enumerate(FAULTS) if options.fault in kind) if options.fault else None
    numbers = range(options.merges) if options.only is None else [options.only]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that follow
    began, kinds, failed = time.monotonic(), Counter[str](), 0
    processes = min(len(os.sched_getaffinity(0)), len(numbers)) or 1
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for outcome in pool.map(one, *zip(*((options.seed, number, options.keep, first) for number in numbers), strict=True)):
            print(outcome.line, flush=True)
            kinds[outcome.fault] += 1
            failed += bool(outcome.findings)
            for finding in outcome.findings:
                print(f"     {finding}", flush=True)
    planted = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()) if kind)
    print(
        f"merges: {len(numbers)} from seed {options.seed}, {sum(kinds.values()) - kinds['']} faults planted, {failed} with findings; "
        f"{time.monotonic() - began:.0f} s ({planted})"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
