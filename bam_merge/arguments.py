"""What the command line takes: paths, tolerances, and a recipe where a command's name would stand."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from bam_merge.address import is_address
from bam_merge.paths import located, path_problem
from bam_merge.text import nearest, printable


class UserPath(click.Path):
    """A path with `~` expanded, as the shell does not after --output=; an empty one is a usage error, and not the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            if problem := path_problem(value):
                self.fail(f"{printable(repr(value))}: {problem}", param, ctx)
            value = str(located(value)) if value.startswith("~") else value
        return super().convert(value, param, ctx)


class PathHere(UserPath):
    """A path of this machine: an address is a usage error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and is_address(value):  # not repeated: it may hold a password
            self.fail(f"an address ({value.partition(':')[0]}://...): this must be a folder of this machine. Copy it here.", param, ctx)
        return super().convert(value, param, ctx)


class DefaultMerge(click.Group):
    """A group for which `bam-merge recipe.yaml` is `bam-merge merge recipe.yaml`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""  # a command stands first; a recipe may follow options, whose values may be any word
        named = self._recipe(first) or (first.startswith("-") and any(self._recipe(arg) for arg in args))
        if named and first not in self.commands:
            args = ["merge", *args]
        return super().parse_args(ctx, args)

    @staticmethod
    def _recipe(arg: str) -> bool:
        return arg.endswith((".yaml", ".yml")) or Path(arg).is_file()

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            hint = nearest(args[0], self.commands)
            ctx.fail(f"{args[0]!r} is neither a command nor a recipe file (.yaml){hint or '.'}")
        return super().resolve_command(ctx, args)


class Tolerance(click.FloatRange):
    """A number from 0 on. Python also reads nan and inf, with which nothing, or everything, would be the same."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return found


class PartOf(click.ParamType[tuple[int, int]]):
    """i/n: part i, from 1, of n."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        number, slash, of = str(value).partition("/")
        if not (slash and number.isascii() and of.isascii() and number.isdigit() and of.isdigit()):
            self.fail(f"{printable(repr(value))}: write i/n, as in 3/8 for the third part of eight.", param, ctx)
        if not 1 <= int(number) <= int(of):
            self.fail(f"{value}: parts are numbered from 1, so this is none of {int(of)}.", param, ctx)
        return int(number), int(of)


def check_division(part: tuple[int, int] | None, ray: str | None, parts: int | None) -> None:
    """Raise UsageError for ways to divide a merge that do not go together."""
    if part is not None and ray is not None:
        raise click.UsageError("--part makes one part, and --ray all of them: give one of the two.")
    if parts is not None and ray is None:
        raise click.UsageError("--parts is how many parts --ray makes; bam-merge plan --parts N lists them, and --part I/N makes one.")
    if ray is not None and ray.endswith((".yaml", ".yml")):
        raise click.UsageError(f"--ray {printable(ray)}: that is a recipe, and no address of a cluster. Give RECIPE first, then --ray.")


def named_texts(words: Iterable[str]) -> dict[str, list[str]]:
    """The texts of each expert, given as NAME=FILE, where FILE may be a folder or a glob."""
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            shown = printable(repr(word))
            raise click.UsageError(f"--texts {shown}: write NAME=FILE, as in law=texts/law/*.txt; NAME is an expert's, or its number.")
        found.setdefault(name, []).append(text)
    return found


ranges_option = click.option(
    "--ranges", is_flag=True, help="Read the weights of models of the hub there, by ranges of bytes, and download none. Default: download."
)
