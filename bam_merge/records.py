"""What a record of a merge method, an initialiser, a calibrator or a formula must say of itself; the records are in expressions/."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is to be known of a merge method beside its formula.

    `elementwise`: merging the parts of a tensor and merging the tensor is the same. `base`: it works on differences from a base.
    `surveyed`: it must see the whole tensor before it makes any of it. `operand_bytes`: what a worker holds at most per element of
    every operand and of the base: 8 for the value as stored and as widened, and more for what the kernel keeps besides. `by_rows`: what
    it makes of an element depends on the element's row (the last axis), so its kernel is given whole rows.
    """

    elementwise: bool
    base: bool
    surveyed: bool
    operand_bytes: int
    by_rows: bool = False


class Method:
    """The record of a merge method: its numbers, as a frozen dataclass; its name, and what is to be known of it.

    Its kernel (merging/kernels/) and its second way (verifying/rederive/) are found by its class.
    """

    __slots__ = ()
    name: ClassVar[str]
    about: ClassVar[About]

    def __init_subclass__(cls) -> None:
        if not isinstance(vars(cls).get("about"), About) or cls.about.operand_bytes < 8:
            raise TypeError(f"{cls.__name__} lacks `about: ClassVar = About(...)` with operand_bytes of 8 or more")
        _enter(cls, Method, METHODS)

    def arguments(self) -> Iterator[str]:
        """What its call shows after operands and base, such as density=0.5."""
        yield from ()

    def held(self, shape: tuple[int, ...]) -> int:
        """Bytes that a worker holds beside its chunks while it makes a tensor of that shape: none, unless all of it is needed at once."""
        return 0


METHODS: dict[str, type[Method]] = {}
"""The records of all merge methods, by name."""


class Initialiser:
    """The record of a way to draw a new tensor: its numbers, as a frozen dataclass, and its name.

    Its values (values/streams.py) and its second way (verifying/rederive/) are found by its class.
    """

    __slots__ = ()
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "size" not in vars(cls):
            raise TypeError(f"{cls.__name__} lacks `size`, by which a router that cannot hold its values is refused")
        _enter(cls, Initialiser, INITIALISERS)

    def arguments(self) -> Iterator[str]:
        """What a plan shows of it, such as std=0.02."""
        yield from ()

    def size(self) -> tuple[str, float, float] | None:
        """The recipe's key that sets how large the values are, its value, and the largest value there may be; None where nothing does."""
        raise NotImplementedError

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why no matrix of that shape can be so, in words that follow the recipe's key; None where one can."""
        return None


INITIALISERS: dict[str, type[Initialiser]] = {}
"""The records of all initialisers, by name."""


class Calibrator:
    """The record of a rule by which a router is made of texts: its numbers, as a frozen dataclass, and its name.

    Its rows (calibrating/rows.py) and its second way (verifying/calibrated.py) are found by its class.
    """

    __slots__ = ()
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        _enter(cls, Calibrator, CALIBRATORS)

    def arguments(self) -> Iterator[str]:
        """What a plan shows of it, such as scale=6."""
        yield from ()


CALIBRATORS: dict[str, type[Calibrator]] = {}
"""The records of all calibrators, by name."""


class Formula:
    """The record of how a tensor that no file holds is computed from stored ones, row by row: its numbers, as a frozen dataclass.

    Row i of the result is made of some rows of the stored tensors, or of whole ones that are small, never of another row of the result.
    Its kernel (merging/formulas.py) and its second way (verifying/formulas.py) are found by its class.
    """

    __slots__ = ()
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if not {"shown", "held"} <= vars(cls).keys():
            raise TypeError(f"{cls.__name__} lacks `shown`, which plans show, or `held`, by which memory is bounded")
        _enter(cls, Formula, FORMULAS)

    def shown(self, inputs: Sequence[str]) -> str:
        """What a plan shows of a tensor that is computed so, from what it shows of the inputs."""
        raise NotImplementedError

    def held(self, shapes: Sequence[tuple[int, ...]], rows: int) -> int:
        """Bytes that a worker holds at most while it makes `rows` rows from inputs of these shapes; those it keeps between the rows too."""
        raise NotImplementedError

    @property
    def moves(self) -> bool:
        """Whether every row of the result is a row of an input, or zeros: nothing is computed then, and `moved` says which."""
        return False

    def moved(self, start: int, stop: int) -> Iterator[tuple[int | None, int, int]]:
        """(input, its first row, count) of the rows that are rows [start, stop) of the result; zeros where the input is None."""
        raise NotImplementedError


FORMULAS: dict[str, type[Formula]] = {}
"""The records of all formulas, by name."""


T = TypeVar("T", bound="Method | Initialiser | Calibrator | Formula")


def _enter(record: type[T], kind: type[T], records: dict[str, type[T]]) -> None:
    """Enter a new record by its name. Raises TypeError for one that could be taken for another: by its name, or as a subclass."""
    name = vars(record).get("name")
    if record.__bases__ != (kind,):
        raise TypeError(f"{record.__name__} must be a {kind.__name__} and nothing else: kernels are found by the record's class")
    if not isinstance(name, str):
        raise TypeError(f"{record.__name__} lacks `name: ClassVar = ...`, which recipes and plans call it by")
    other = records.get(name, record)
    if (other.__module__, other.__qualname__) != (record.__module__, record.__qualname__):  # dataclass makes a class anew for its slots
        raise TypeError(f"{record.__name__}: {other.__name__} has the name {name!r} already")
    records[name] = record
