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


def _nuslerp(found: Equivalent, settings: Settings, names: list[str], base: str | None) -> Make | None:
    if base is not None:
        found.lacks.append("nuslerp with a base_model, which interpolates between differences")
        return None
    if len(names) != 2:
        found.lacks.append(f"nuslerp needs two models, found {len(names)}")
        return None
    both = list(names)

    def make(value: Callable[[str, str | None, Any], Any]) -> dict[str, Any] | str:
        weights = {name: value("weight", name, None) for name in both}
        if wrong := _numbers(weights, "weight"):
            return wrong
        total = sum(weights.values())
        t = 0.5 if abs(total) < 1e-6 else weights[both[1]] / total
        if not 0 <= t <= 1:
            return f"weights of nuslerp with a share of {t:g}; here it is from 0 to 1"
        flat = value("nuslerp_flatten", None, True)
        if not flat and value("nuslerp_row_wise", None, False):
            return "nuslerp_row_wise: true, which takes every column by itself"
        if t in (0, 1):
            return {"make": "copy", "from": both[round(t)]}
        return {"make": "nuslerp", "from": both, "t": t, **({} if flat else {"by": "rows"})}

    return make


def _karcher(found: Equivalent, settings: Settings, names: list[str], base: str | None) -> Make | None:
    if base is not None and base not in names:
        found.lacks.append("karcher with a base_model that is not among the models, which mergekit adds to them; list it")
        return None
    if len(names) < 2:
        found.lacks.append(f"karcher needs two models or more, found {len(names)}")
        return None
    found.differs.append("mergekit stops after max_iter steps, or below tol; here it goes on to float64's last digits")
    return lambda value: {"make": "karcher"}


def _without_weights(method: str) -> Callable[[Equivalent, Settings, list[str], str | None], Make | None]:
    """The methods of differences that weigh the models themselves."""
    least = {"model_stock": 2, "sce": 2}.get(method, 1)

    def make(base: str, value: Callable[[str, str | None, Any], Any]) -> dict[str, Any] | str:
        if method == "model_stock":
            return (
                "filter_wise: true, which takes every row by itself"
                if value("filter_wise", None, False)
                else {"make": method, "base": base}
            )
        key, name, default = {"sce": ("select_topk", "density", 1.0), "ram": ("epsilon", "epsilon", 1e-5)}[method]
        number = value(key, None, default)
        if wrong := _numbers({method: number}, key):
            return wrong
        if method == "sce" and number <= 0:
            return {"make": "copy", "from": base}
        if method == "ram" and not number > 0:
            return f"epsilon = {number:g}; here it is above 0"
        return {"make": method, "base": base, name: min(float(number), 1.0) if method == "sce" else float(number)}

    def converter(found: Equivalent, settings: Settings, names: list[str], base: str | None) -> Make | None:
        others = [name for name in names if name != base]
        if base is None or len(others) < least:
            found.lacks.append(f"{method} needs base_model and {'another model' if least == 1 else 'two other models'}")
            return None
        found.differs += NOTES.get(method, [])
        return lambda value: make(base, value)

    return converter


def _of_differences(method: str) -> Callable[[Equivalent, Settings, list[str], str | None], Make | None]:
    """The methods that add differences to a base."""

    def converter(found: Equivalent, settings: Settings, names: list[str], base: str | None) -> Make | None:
        others = [name for name in names if name != base]
        if base is None or not others:
            found.lacks.append(f"{method} needs base_model and other models")
            return None
        found.differs += NOTES.get(method, [])
        if method in ("dare_ties", "dare_linear", "della") and not settings.says("density", others, 1.0):
            found.differs.append(DRAWN)
        return lambda value: _difference_make(method, value, others, base)

    return converter


def _difference_make(method: str, value: Callable[[str, str | None, Any], Any], others: list[str], base: str) -> dict[str, Any] | str:
    weights = {name: value("weight", name, None) for name in others}
    densities = {name: value("density", name, 1.0) for name in others}
    scale, normalise = value("lambda", None, 1.0), value("normalize", None, method in ("ties", "della"))
    if wrong := _numbers(weights, "weight") or _numbers(densities, "density") or _numbers({method: scale}, "lambda"):
        return wrong
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights or not scale:
        return {"make": "copy", "from": base}
    made = {} if method == "task_arithmetic" else _shares_kept(method, value, {name: densities[name] for name in weights})
    if isinstance(made, str):
        return made
    if method == "task_arithmetic" and set(densities.values()) != {1.0}:
        return "density of task_arithmetic, which mergekit does not use"
    if method in ADDED:
        if normalise and abs(sum(weights.values())) < 1e-8:
            return "weights that sum to zero"
        weights = _shares(weights) if normalise else weights
    elif any(weight < 0 for weight in weights.values()):
        return f"negative weights of {method}: mergekit divides by the sum of the weights as they are, here it is that of their magnitudes"
    elif not normalise:
        if len(weights) > 1:
            return (
                f"{method} with normalize: false{' (its default)' if method == 'dare_ties' else ''}: mergekit adds up the differences "
                "whose sign agrees, here they are averaged. Set normalize: true"
            )
        scale, weights = scale * next(iter(weights.values())), dict.fromkeys(weights, 1.0)
    return {"make": method, "base": base, **made, "weights": weights, **({"scale": float(scale)} if scale != 1 else {})}


def _shares_kept(method: str, value: Callable[[str, str | None, Any], Any], densities: Mapping[str, float]) -> dict[str, Any] | str:
    """Which shares of the differences are kept and dropped: of all models the same ones, or why there are no words for it."""
    if len(set(densities.values())) > 1:
        return f"densities that differ ({some(f'{name} {density:g}' for name, density in densities.items())}); here all have one"
    density = next(iter(densities.values()))
    if not 0 < density <= 1:
        return f"density = {density:g}; here it is above 0, and at most 1"
    if method not in MORE:
        return {"density": float(density)}
    key, default = MORE[method]
    found = {name: value(key, name, default) for name in densities}
    if wrong := _numbers(found, key):
        return wrong
    number = next(iter(found.values()))
    if len(set(found.values())) > 1:
        return f"{key} that differs between the models; here all have one"
    if method == "breadcrumbs" and value("rescale", None, False):
        return "breadcrumbs with rescale: true, which restores the length of each difference"
    if not 0 <= number <= 1:
        return f"{key} = {number:g}; here it is from 0 to 1"
    if method == "della" and density < 1 and not 0 < density - number <= density + number <= 1:
        return f"density {density:g} with epsilon {number:g}: density - epsilon must be above 0, and density + epsilon at most 1"
    return {"density": float(density), key: float(number)}


ADDED = ("task_arithmetic", "dare_linear", "breadcrumbs")
"""Methods that add weighted differences up; the others elect a sign and average."""


MORE = {"breadcrumbs": ("gamma", 0.01), "della": ("epsilon", 0.15)}
"""A further number that a method has for each model, and its default."""


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
    "della": [
        "where the weighted sum of signs is exactly zero, mergekit keeps what is positive; here nothing",
        "mergekit ranks entries of equal size in the order of its sort; here they have the mean of their ranks",
    ],
    "breadcrumbs": [
        "of entries of equal size at either end mergekit keeps as many as it takes, in the order of its sort; here all of them are kept",
    ],
    "sce": [
        "of entries of equal variance at the threshold mergekit keeps as many as it takes; here all of them are kept",
        "where the sum of signs is exactly zero, mergekit keeps what is positive; here nothing",
        "where the mean squares of the differences sum to less than 1e-6 mergekit weighs all models alike; here their squares always count",
    ],
    "model_stock": ["mergekit takes products of the differences' lengths below 1e-6 for 1e-6; here any that is not 0 counts as it is"],
}


METHODS: dict[str, Callable[[Equivalent, Settings, list[str], str | None], Make | None]] = {
    "linear": _linear,
    "slerp": _slerp,
    **{name: _of_differences(name) for name in ("task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs", "della")},
    **{name: _without_weights(name) for name in ("model_stock", "sce", "ram")},
    "nuslerp": _nuslerp,
    "karcher": _karcher,
}
"""mergekit's methods that have an equivalent, each with what makes its make."""
