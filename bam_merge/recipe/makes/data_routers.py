"""Makes of routers that are made of texts: what a recipe says of the texts, and of the rule.

A class defined here is offered by every recipe (rules.py); it becomes a record of expressions/calibrators.py, whose rows are worked out in
calibrating/rows.py.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bam_merge import expressions
from bam_merge.recipe.makes.kinds import Names, Strict

TextFiles = str | Names
"""A file, a folder or a glob, or a list of these."""


SCALE, SCALE_OF_BARE_TOP_1 = 6.0, 180.0
"""What the rows of a router are multiplied with. A token of which the regression is sure gets the gate e^s / (e^s + N - 1), 0.99 at 6;
where the gate of the one chosen expert is not renormalised, it must be near 1 for tokens of which it is not so sure, too."""


class FromTexts(Strict):
    """A make of a router that says which expert gets which text: `make` in a rule, `init` in the router section."""

    record: ClassVar[type[expressions.Calibrator]]

    texts: dict[str, TextFiles] | None = Field(
        default=None, description="source: files that are typical of the expert's work: a file, a folder, a glob, or a list of these"
    )
    prompts: dict[str, Names] | None = Field(default=None, description="source: prompts, in place of texts")
    tokens: Annotated[int, Field(ge=2, le=10**7)] = Field(default=8192, description="of each text, the first so many")
    scale: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] | None = Field(
        default=None,
        description="a token of which the router is sure gets the gate e^scale / (e^scale + N - 1); default 6, and 180 for top-1 gates "
        "that are not renormalised",
    )
    inputs: Literal["seed", "mixture"] = Field(
        default="seed",
        description="whose hidden states the router is made for: the seed's, in one pass, or the mixture's own, which takes longer",
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse one that says less than is asked of it."""
        if not hasattr(cls, "record"):
            raise TypeError(f"{cls.__name__} lacks `record: ClassVar = expressions....`, the record of the calibrator")
        if cls.calibrator is FromTexts.calibrator:
            raise TypeError(f"{cls.__name__} lacks `calibrator`, which makes its record")

    def calibrator(self, scale: float, sigmoid: bool) -> expressions.Calibrator:
        """The record of the rule. `sigmoid`: gates are shares of sigmoids, which need logits that are low but for the right expert."""
        raise NotImplementedError

    @property
    def negative(self) -> Mapping[str, tuple[str, ...]]:
        """Prompts that are not typical of an expert, by source."""
        return {}

    def problems(self, experts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
        """(key, message) of what is wrong with the texts for such experts; names that are none of them apart."""
        texts, prompts = self.texts or {}, self.prompts or {}
        if self.texts is None and self.prompts is None:
            yield ("texts",), "is required and missing (or prompts): a text for each expert, by the name of its source."
            return
        for name in texts.keys() & prompts.keys():
            yield ("prompts", name), "has a text too. Keep one of the two."
        if missing := [name for name in experts if name not in texts and name not in prompts]:
            key = "texts" if self.texts is not None else "prompts"
            yield (key,), f"nothing for {', '.join(missing)}. Every expert needs a text: a router can only choose what it has seen."
        if len(experts) < 2:
            yield ("texts",), f"all experts are {experts[0]}, and no text tells them apart. Use init: normal."


class Ridge(FromTexts):
    """Ridge regression of the expert on the router's true input (arXiv 2603.29765): W = scale (S + lambda tr(S)/D I)^-1 B."""

    record: ClassVar = expressions.Ridge
    lambda_: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] = Field(
        default=0.1, alias="lambda", description="how much is added to the inputs' second moments, relative to their mean"
    )

    def calibrator(self, scale: float, sigmoid: bool) -> expressions.Ridge:
        return expressions.Ridge(scale, self.lambda_, sigmoid)


class HiddenMean(FromTexts):
    """The mean of the router's true inputs over each expert's text, of unit length; cheaper than ridge, and less accurate."""

    record: ClassVar = expressions.HiddenMean
    negative_prompts: dict[str, Names] | None = Field(
        default=None, description="source: prompts that the expert is not for; their mean is subtracted from its own"
    )

    def calibrator(self, scale: float, sigmoid: bool) -> expressions.HiddenMean:
        return expressions.HiddenMean(scale, sigmoid)

    @property
    def negative(self) -> Mapping[str, tuple[str, ...]]:
        return self.negative_prompts or {}


def default_scale(role: str, gates: tuple[int, bool]) -> float:
    """What a router of `role` is scaled with where a recipe says nothing. `gates`: FFN experts per token, and whether they sum to one."""
    return SCALE_OF_BARE_TOP_1 if role == "router.ffn" and gates == (1, False) else SCALE
