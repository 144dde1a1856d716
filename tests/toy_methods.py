"""A merge method and an initialiser as a contributor adds them: what goes into each of the four files, and a package that has them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "bam_merge"

METHOD = {
    "recipe/makes/task_vectors.py": '''
class Largest(Merging):
    """base + the largest of the differences from it, by magnitude, entry by entry."""

    record: ClassVar = expressions.Largest
    make: Literal["largest"]
    base: str
    scale: Finite = 1.0

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Largest:
        return expressions.Largest(self.scale)
''',
    "expressions/task_vectors.py": '''
@dataclass(frozen=True, slots=True)
class Largest(Method):
    """base + scale * the x_i - base of the largest magnitude, entry by entry; of equal magnitudes the first."""

    scale: float
    name: ClassVar = "largest"
    about: ClassVar = About(elementwise=True, base=True, surveyed=False, operand_bytes=16)

    def arguments(self) -> Iterator[str]:
        if self.scale != 1.0:
            yield f"scale={self.scale:g}"
''',
    "merging/kernels/task_vectors.py": '''
@combine.register
def largest(method: expressions.Largest, chunk: Chunk, known: None) -> Tensor:
    """base + scale * d_i where |d_i| is largest, d_i = x_i - base."""
    assert chunk.base is not None
    chosen_C = torch.zeros_like(chunk.base)
    for d_C in chunk.deltas:
        chosen_C = torch.where(d_C.abs() > chosen_C.abs(), d_C, chosen_C)
    return chosen_C.mul_(method.scale).add_(chunk.base)
''',
    "verifying/rederive/task_vectors.py": '''
@derive.register
def _largest(method: expressions.Largest, rows: Rows) -> Derived:
    d_K = torch.stack(rows.deltas)
    reaches_K = d_K.abs() == d_K.abs().amax(0)
    first_K = reaches_K & (reaches_K.cumsum(0) == 1)
    step = method.scale * d_K.where(first_K, 0.0).sum(0)
    return Derived(rows.start() + step, step.abs() * 2 * rows.computing.unit + 2 * rows.computing.least)
''',
}  # fmt: skip
"""What a merge method is, by file."""

INITIALISER = {
    "recipe/makes/initialisers.py": '''
class Signs(Initialising):
    record: ClassVar = expressions.Signs
    step: Positive = 0.02

    def initialiser(self) -> expressions.Signs:
        return expressions.Signs(self.step)
''',
    "expressions/initialisers.py": '''
@dataclass(frozen=True, slots=True)
class Signs(Initialiser):
    """step or -step, either as likely."""

    step: float
    name: ClassVar = "signs"

    def arguments(self) -> Iterator[str]:
        yield f"step={self.step:g}"

    def size(self) -> tuple[str, float, float]:
        return "step", self.step, self.step
''',
    "values/streams.py": '''
@drawn.register
def signs(method: expressions.Signs, random: numpy.random.RandomState, shape: Shape) -> Values:
    return numpy.where(random.random_sample(shape) < 0.5, method.step, -method.step)
''',
    "verifying/rederive/initialisers.py": '''
@draw.register
def _signs(method: expressions.Signs, random: numpy.random.RandomState, shape: Shape) -> Derived:
    heads = torch.from_numpy(random.random_sample(shape)) < 0.5
    return Derived((2 * heads.double() - 1) * method.step)
''',
}  # fmt: skip
"""What an initialiser is, by file."""


def package_with(folder: Path, *additions: Mapping[str, str], without: str = "") -> Path:
    """A copy of the package below `folder` with what each addition appends to its files, one file of them forgotten; what to import from."""
    shutil.copytree(PACKAGE, folder / "bam_merge", ignore=shutil.ignore_patterns("__pycache__"))
    for addition in additions:
        assert not without or without in addition
        for file, text in addition.items():
            if file != without:
                path = folder / "bam_merge" / file
                path.write_text(f"{path.read_text()}\n\n{text.strip()}\n")
    return folder


def run_in(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """`python *arguments` with the package in `folder`."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
