"""mergekit's merge methods as makes of ours: what each parameter means, what it defaults to, and where the two part."""

from collections.abc import Callable, Mapping
from typing import Any

from bam_merge.recipe.mergekit_settings import Settings
from bam_merge.recipe.mergekit_words import Equivalent
from bam_merge.text import printable, some

Make = Callable[[Callable[[str, str | None, Any], Any]], dict[str, Any] | str]
"""Gives the make of a tensor, by what `value(parameter, model, default)` is for it; or why there is none."""


def _numbers(values: Mapping[str, Any], what: str) -> str | None:
    wrong = {name: value for name, value in values.items() if isinstance(value, bool) or not isinstance(value, int | float)}
    return f"{what} of {some(wrong)} must be a number, found {printable(repr(next(iter(wrong.values()))), 40)}" if wrong else None


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights that sum to one, as near as a float can."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _linear(found: Equivalent, settings: Settings, names: list[str], base: str | None) -> Make | None:
    def make(value: Callable[[str, str | None, Any], Any]) -> dict[str, Any] | str:
        weights = {name: value("weight", name, None) for name in names}
        if wrong := _numbers(weights, "weight"):
            return wrong
        total, normalised = sum(weights.values()), value("normalize", None, True)
        if not normalised and abs(total - 1) > 1e-6:
            return f"linear with normalize: false and weights that sum to {total:g}, which scales every tensor; here they sum to one"
        if abs(total) < 1e-12:
            return "weights that sum to zero"
        if len(set(weights.values())) == 1 < len(weights):
            return {"make": "mean"}
        shares = {name: share for name, share in _shares(weights).items() if share}
        return {"make": "copy", "from": next(iter(shares))} if len(shares) == 1 else {"make": "linear", "weights": shares}

    if settings.says("normalize", None, True) and not settings.sums_to_one("weight", names):
        found.differs.append("mergekit divides by the sum of the weights; here they are written as shares of it")
    return make


def _slerp(found: Equivalent, settings: Settings, names: list[str], base: str | None) -> Make | None:
    both = [*([base] if base else []), *(name for name in names if name != base)]
    if base is None or len(both) != 2:
        found.lacks.append(f"slerp needs base_model and one other model, found {len(both)} model(s){'' if base else ' and no base_model'}")
        return None

    def make(value: Callable[[str, str | None, Any], Any]) -> dict[str, Any] | str:
        t = value("t", None, None)
        if wrong := _numbers({"slerp": t}, "t"):
            return wrong
        if not 0 <= t <= 1:
            return f"t = {t:g}; here it is from 0 to 1"
        return {"make": "copy", "from": both[round(t)]} if t in (0, 1) else {"make": "slerp", "from": both, "t": float(t)}

    found.differs.append(
        "where two tensors are nearly parallel (less than 1.8 degrees apart) mergekit interpolates on a straight line; here it is the arc "
        "all the same, which is within 0.02% of it"
    )
    return make


def _of_differences(method: str) -> Callable[[Equivalent, Settings, list[str], str | None], Make | None]:
    """The methods that add differences to a base."""

    def converter(found: Equivalent, settings: Settings, names: list[str], base: str | None) -> Make | None:
        others = [name for name in names if name != base]
        if base is None or not others:
            found.lacks.append(f"{method} needs base_model and other models")
            return None
        found.differs += NOTES.get(method, [])
        if method == "dare_ties" and not settings.says("density", others, 1.0):
            found.differs.append(DRAWN)
        return lambda value: _difference_make(method, value, others, base)

    return converter


def _difference_make(method: str, value: Callable[[str, str | None, Any], Any], others: list[str], base: str) -> dict[str, Any] | str:
    weights = {name: value("weight", name, None) for name in others}
    densities = {name: value("density", name, 1.0) for name in others}
    scale, normalise = value("lambda", None, 1.0), value("normalize", None, method == "ties")
    if wrong := _numbers(weights, "weight") or _numbers(densities, "density") or _numbers({method: scale}, "lambda"):
        return wrong
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights or not scale:
        return {"make": "copy", "from": base}
    if method == "task_arithmetic":
        if set(densities.values()) != {1.0}:
            return "density of task_arithmetic, which mergekit does not use"
        if normalise:
            if abs(sum(weights.values())) < 1e-8:
                return "weights that sum to zero"
            weights = _shares(weights)
        return {"make": method, "base": base, "weights": weights, **({"scale": float(scale)} if scale != 1 else {})}
    if any(weight < 0 for weight in weights.values()):
        return f"negative weights of {method}: mergekit divides by the sum of the weights as they are, here it is that of their magnitudes"
    density = {densities[name] for name in weights}
    if len(density) > 1:
        return f"densities that differ ({some(f'{name} {densities[name]:g}' for name in weights)}); here all have one"
    if not normalise:
        if len(weights) > 1:
            return (
                f"{method} with normalize: false{' (its default)' if method == 'dare_ties' else ''}: mergekit adds up the differences "
                "whose sign agrees, here they are averaged. Set normalize: true"
            )
        scale, weights = scale * next(iter(weights.values())), dict.fromkeys(weights, 1.0)
    (one,) = density
    if not 0 < one <= 1:
        return f"density = {one:g}; here it is above 0, and at most 1"
    made = {"make": method, "base": base, "density": float(one), "weights": weights}
    return {**made, **({"scale": float(scale)} if scale != 1 else {})}


DRAWN = (
    "DARE draws at random which entries it drops: not the same ones as mergekit, which also restores the length of each difference "
    "where here it is divided by the density"
)


NOTES = {
    "ties": [
        "of entries of equal size at the threshold mergekit keeps as many as it takes, in the order of its sort; here all of them are kept",
        "where the weighted sum of signs is exactly zero, mergekit keeps what is positive; here nothing",
    ],
    "dare_ties": ["where the weighted sum of signs is exactly zero, mergekit keeps what is positive; here nothing"],
}


METHODS: dict[str, Callable[[Equivalent, Settings, list[str], str | None], Make | None]] = {
    "linear": _linear,
    "slerp": _slerp,
    **{name: _of_differences(name) for name in ("task_arithmetic", "ties", "dare_ties")},
}
"""mergekit's methods that have an equivalent, each with what makes its make."""
