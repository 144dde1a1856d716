"""Rules to tensors: decides, for every role and layer, how it is made and from which source tensors."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from pydantic import TypeAdapter

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_NAMES
from bam_merge.planning.dtype_check import dtype_of_new_tensors
from bam_merge.planning.magnitudes import out_of_range
from bam_merge.planning.router_check import router_problem
from bam_merge.planning.shards import shards_of
from bam_merge.recipe.makes import UNITS, Expert, Initialising, Merging, Varying
from bam_merge.recipe.makes.data_routers import FromTexts
from bam_merge.recipe.rules import Copies, Rule, covers, parse_layers
from bam_merge.recipe.schema import ROUTER_PLACES, Attention, Recipe
from bam_merge.sources.dense import DenseModel, Site
from bam_merge.text import some

KV_ROLES = ("attn.k", "attn.v", "attn.k_norm", "attn.k_norm.bias")


QO_ROLES = ("attn.q", "attn.gate", "attn.o", "attn.q_norm", "attn.q_norm.bias")


DECAYS = ("linear.A_log", "linear.dt_bias")
"""What says how fast a state is forgotten, as a logarithm and inside of a softplus: it is one source's, where nothing else is asked for."""


BEFORE_THE_LAYERS = ("embed",)
"""Roles of tensors that no layer has and that come before the first; the others come behind the last."""


@dataclass(frozen=True)
class Made:
    """How one site is made: one expression per expert, or one for all. `by` names the rule."""

    by: str
    exprs: tuple[expressions.Expr, ...]
    per_expert: bool = False


def method_rules(recipe: Recipe) -> list[tuple[str, Rule]]:
    """All rules in order, each with what messages call it: the recipe's, then the method's own."""
    own: list[dict[str, object]] = []
    shared = recipe.shared.model_dump(by_alias=True, exclude_none=True)
    if recipe.method == "bam":
        if (recipe.attention or Attention()).kv == "shared":
            own.append({"roles": KV_ROLES, **shared})
        own.append({"roles": ["attn.*", "ffn.*"], "make": "expert"})
        own += linear_rules(recipe)
    elif recipe.method in ("btx", "sparse_upcycling"):
        made: dict[str, object] = {"make": "expert"}
        if isinstance(recipe.experts, Copies) and recipe.shards == 1:
            made = recipe.experts.model_dump(by_alias=True, exclude={"count"})
        own.append({"roles": ["ffn.*"], **made})
    if recipe.output.layers is not None and "shared" not in recipe.model_fields_set:  # as mergekit has it: of the first and the last one
        own.append({"roles": ["embed"], "make": "copy", "from": recipe.output.layers[0].from_})
        shared = {"make": "copy", "from": recipe.output.layers[-1].from_}
    if recipe.output.layers is None and shared["make"] != "copy":
        own.append({"roles": DECAYS, "make": "copy", "from": shared.get("base") or recipe.seed_name})
    own.append({"roles": ["*"], **shared})
    parsed = TypeAdapter(list[Rule]).validate_python(own)
    every = [(f"rules[{index}]", rule) for index, rule in enumerate(recipe.rules)] + [(f"method {recipe.method}", rule) for rule in parsed]
    if recipe.output.layers is not None:  # the sources are stacked already (stacking.py): in each of them stand the result's layers
        stack = {"roles": ["*"], "layers": "0-", "make": "copy", "from": recipe.output.layers[0].from_}
        every.insert(0, ("output.layers", TypeAdapter(Rule).validate_python(stack)))
    return every


def linear_rules(recipe: Recipe) -> list[dict[str, object]]:
    """How layers with linear attention are made by method bam."""
    linear = (recipe.attention or Attention()).linear or "expert"
    if linear == "expert":
        return [{"roles": ["linear.*"], "make": "expert"}]
    if linear == "mean":
        return [{"roles": DECAYS, "make": "copy", "from": recipe.seed_name}, {"roles": ["linear.*"], "make": "mean"}]
    return [{"roles": ["linear.*"], "make": "copy", "from": linear}]


@dataclass
class _Rules:
    """The rules in order, and how often each was looked at and applied."""

    rules: list[tuple[str, Rule]]
    layers: list[range | frozenset[int]]
    matched: Counter[int] = field(default_factory=Counter)
    applied: Counter[int] = field(default_factory=Counter)

    def choose(self, site: Site) -> tuple[str, Rule]:
        """The first rule that matches `site`, and its name. The method's last rule matches everything."""
        role, layer = site
        chosen = [
            index
            for index, (_, rule) in enumerate(self.rules)
            if (rule.layers is None or (layer is not None and layer in self.layers[index]))
            and any(covers(pattern, role) for pattern in rule.roles)
        ]
        self.matched.update(chosen)
        self.applied[chosen[0]] += 1
        label, rule = self.rules[chosen[0]]
        if isinstance(rule, Merging) and rule.knots:
            rule = rule.at(_through(self.layers[chosen[0]], site))
        return label, rule

    def idle(self) -> Iterator[str]:
        """A message for every rule of the recipe that made nothing."""
        for index, (label, rule) in enumerate(self.rules):
            if self.applied[index] or not label.startswith("rules"):
                continue
            where = f"{label}: {', '.join(rule.roles)}" + (f" in layers {rule.layers}" if rule.layers is not None else "")
            if self.matched[index]:
                yield f"{where} never applies: earlier rules make all {self.matched[index]} tensors it matches. Reorder or remove it."
            else:
                yield f"{where} matches no tensor of this merge. Correct or remove it."


def _through(layers: range | frozenset[int], site: Site) -> Fraction:
    """How far through the layers that a rule is for a tensor stands: 0 in the first and before it, 1 in the last and behind it."""
    role, layer = site
    if layer is None:
        return Fraction(int(role.removesuffix(".bias") not in BEFORE_THE_LAYERS))
    if len(layers) < 2:
        return Fraction(1)
    return Fraction(sorted(layers).index(layer), len(layers) - 1)


def assign(recipe: Recipe, models: Mapping[str, DenseModel], problems: list[str]) -> dict[Site, Made]:
    """How every site of the sources, and every router, is made. Problems are appended."""
    first = models[recipe.expert_names[0]]
    count = first.facts["num_hidden_layers"]
    problems += [f"{recipe.file}: {text}" for text in out_of_range(recipe)]
    rules = _Rules(method_rules(recipe), [])
    for label, rule in rules.rules:
        try:
            rules.layers.append(parse_layers(rule.layers, count))
        except ValueError as error:
            problems.append(f"{recipe.file}: {label}.layers: {error}")
            rules.layers.append(frozenset())
    made = {site: _make(site, *rules.choose(site), recipe, models, problems) for site in first.tensors}
    for role, like in (("router.attn", "attn.q"), ("router.attn", "linear.o"), ("router.ffn", "ffn.up")):
        for layer in range(count):
            if (like, layer) in made and made[like, layer].per_expert:
                made[role, layer] = _router(role, *rules.choose((role, layer)), recipe, first, problems)
    problems += [f"{recipe.file}: {text}" for text in rules.idle()]
    if recipe.attention is not None and recipe.attention.linear is not None and not any(role == "linear.o" for role, _ in made):
        problems.append(f"{recipe.file}: attention.linear: no layer of these sources has linear attention. Remove this key.")
    return made


def _make(site: Site, label: str, rule: Rule, recipe: Recipe, models: Mapping[str, DenseModel], problems: list[str]) -> Made:
    if isinstance(rule, Expert) and recipe.shards > 1 and site[0].startswith("ffn."):
        return Made(label, shards_of(site, recipe, models, problems), per_expert=True)
    if isinstance(rule, Expert):
        return Made(label, tuple(models[name].tensors[site] for name in recipe.expert_names), per_expert=True)
    if isinstance(rule, Varying):
        exprs = (_varied(site, index, label, rule, recipe, models, problems) for index in range(len(recipe.expert_names)))
        return Made(label, tuple(exprs), per_expert=True)
    if not isinstance(rule, Merging):
        raise AssertionError(f"{rule.make} makes no tensor that sources have")
    names = rule.operands(recipe.distinct)
    role, layer = site
    method = rule.method(names, f"{role}:{layer}", recipe.random_seed)
    parts = tuple((name, models[name].tensors[site]) for name in names)
    same = len({expr for _, expr in parts}) == 1
    if (method is None and len(parts) == 1) or (isinstance(method, expressions.Mean) and len(parts) > 1 and same):
        return Made(label, (parts[0][1],))  # the mean of adapters' tensors that are all their base's is that one
    if method is None or type(method) is not rule.record:
        raise TypeError(f"{type(rule).__name__}.method makes {method} of {len(parts)} operands, and its record is {rule.record}")
    base = (rule.from_base, models[rule.from_base].tensors[site]) if rule.from_base else None
    return Made(label, (_merged(method, parts, base, f"{recipe.file}: {label}", problems),))


def _varied(
    site: Site, expert: int, label: str, rule: Varying, recipe: Recipe, models: Mapping[str, DenseModel], problems: list[str]
) -> expressions.Expr:
    """The tensor of one expert, made of its source's."""
    role, layer = site
    name = rule.from_ or recipe.expert_names[expert]
    own, base = models[name].tensors[site], (rule.from_base, models[rule.from_base].tensors[site]) if rule.from_base else None
    method = rule.vary(role, own.shape, f"{layer}:{expert}", recipe.random_seed)
    if method is None or (base is not None and base[1] == own):  # the difference of the base, or of an adapter that leaves it, is nothing
        return own
    return _merged(method, ((name, own),), base, f"{recipe.file}: {label}", problems)


def _merged(
    method: expressions.Method,
    parts: tuple[tuple[str, expressions.Expr], ...],
    base: tuple[str, expressions.Expr] | None,
    label: str,
    problems: list[str],
) -> expressions.Merge:
    """The merge of `parts` by `method`, of one dtype; what only copies cannot be computed with, which is a problem of `label`."""
    dtypes = {expr.dtype for _, expr in (*parts, *((base,) if base else ()))}
    unfit = sorted(dtypes - set(ARITHMETIC_DTYPES))
    if unfit:
        where = f"{label}: "
        why = f" is {unfit[0]}, and {method.name} computes with {', '.join(ARITHMETIC_DTYPES)} only. "
        if not any(text.startswith(where) and why in text for text in problems):  # one message for all tensors of a rule
            problems.append(f"{where}{parts[0][1]}{why}Use make: copy, or sources in full precision.")
    dtype = next(dtype for dtype in (*ARITHMETIC_DTYPES, *unfit) if dtype in dtypes)
    return expressions.Merge(method, parts, base, dtype, parts[0][1].shape)


def _router(role: str, label: str, rule: Rule, recipe: Recipe, first: DenseModel, problems: list[str]) -> Made:
    """A router starts as the first rule that names it says, else as the recipe's `router` section."""
    by_rule = isinstance(rule, Initialising | FromTexts)
    make = rule if isinstance(rule, Initialising | FromTexts) else recipe.router_make(role)
    shape = (len(recipe.expert_names), first.facts["hidden_size"])
    dtype = dtype_of_new_tensors(first)
    if isinstance(make, FromTexts):
        of = label if by_rule else ROUTER_PLACES[role]
        record = recipe.calibrator(make, role)
        return Made(of, (expressions.Calibrated(record, recipe.expert_names, of, make.tokens, make.inputs, dtype, shape),))
    method = expressions.Grouped(make.initialiser(), recipe.shards) if recipe.shards > 1 else make.initialiser()
    init = expressions.Init(method, "", recipe.random_seed, dtype, shape)
    wanted = DTYPE_NAMES.get(recipe.output.dtype, dtype)
    problem = router_problem(init, wanted) if wanted in ARITHMETIC_DTYPES else None  # what only copies is refused by name
    if problem:
        both = recipe.written(ROUTER_PLACES[role])
        text = f"{recipe.file}: {label if by_rule else both}: {problem}"
        problems += [text] if text not in problems else []  # one message for all layers
    return Made(label if by_rule else "router", (init,))


def check_units(made: Mapping[Site, Made]) -> Iterator[str]:
    """Where units of an FFN are drawn anew, one rule must make all that they have in it: else half a unit would be."""
    labels: dict[int | None, dict[str, list[str]]] = {}
    for (role, layer), item in made.items():
        if role in UNITS:
            labels.setdefault(layer, {}).setdefault(item.by, []).append(role)
    drops = {item.by for item in made.values() if any(_drops(expr) for expr in item.exprs)}
    for layer, by in labels.items():
        if len(by) > 1 and drops & by.keys():
            split = "; ".join(f"{label} makes {some(roles)}" for label, roles in by.items())
            yield f"layer {layer}: a dropped unit has its entries in gate, up and down, but {split}. Give ffn.* one rule."


def _drops(expr: expressions.Expr) -> bool:
    return isinstance(expr, expressions.Merge) and isinstance(expr.method, expressions.Drop)


def check_axes(made: Mapping[Site, Made], layers: int) -> list[str]:
    """What of attention is per expert must fit together: q with o, k with v, and k and v alone only as shared."""
    problems = []
    kinds: dict[bool, list[int]] = {}
    attention: dict[int | None, dict[str, bool]] = {}
    for (role, at), item in made.items():
        if role.startswith("attn."):
            attention.setdefault(at, {})[role] = item.per_expert
    for layer in range(layers):
        axes = attention.get(layer, {})
        if not axes:  # linear attention
            continue
        for group in (QO_ROLES, KV_ROLES):
            split = {role: axis for role, axis in axes.items() if role.removesuffix(".bias") in group}
            if len(set(split.values())) > 1:
                problems.append(
                    f"layer {layer}: {some(r for r, a in split.items() if a)} per expert, "
                    f"{some(r for r, a in split.items() if not a)} shared; an attention expert needs them together. Give them one rule."
                )
        if axes.get("attn.k") and not axes.get("attn.q"):
            problems.append(
                f"layer {layer}: attn.k and attn.v are per expert, attn.q and attn.o shared. Make attn.q and attn.o expert too."
            )
        kinds.setdefault(axes.get("attn.q", False), []).append(layer)
    problems += _linear_axes(made, layers, any(kinds))
    if len(kinds) > 1:
        problems.append(
            f"attention is per expert in layers {some(map(str, kinds[True]))} and shared in {some(map(str, kinds[False]))}; "
            "it must be one or the other in all layers."
        )
    return problems


def _linear_axes(made: Mapping[Site, Made], layers: int, attention: bool) -> Iterator[str]:
    """What of layers with linear attention does not fit: an expert is all of a layer, in all such layers, and only where `attention` has
    experts too."""
    kinds: dict[bool, list[int]] = {}
    for layer in range(layers):
        axes = {role: item.per_expert for (role, at), item in made.items() if at == layer and role.startswith("linear.")}
        if len(set(axes.values())) > 1:
            split, one = ([role for role, axis in axes.items() if axis is per_expert] for per_expert in (True, False))
            yield (
                f"layer {layer}: {some(split)} per expert, {some(one)} shared; an expert of linear attention is all of them. "
                "Give linear.* one rule."
            )
        elif axes:
            kinds.setdefault(axes["linear.o"], []).append(layer)
    if len(kinds) > 1:
        yield (
            f"linear attention is per expert in layers {some(map(str, kinds[True]))} and shared in {some(map(str, kinds[False]))}; "
            "it must be one or the other in all layers."
        )
    elif True in kinds and not attention and any(role == "attn.q" for role, _ in made):
        yield "linear.* is per expert, attn.* shared. Make attn.* expert too, or linear.* shared."
