"""The recipe: what to merge from what, typed and strict. Every wrong key, type or name is reported with its place."""

import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, ValidationError, create_model

from bam_merge import ops
from bam_merge.architecture import ROLES
from bam_merge.errors import RecipeError, nearest, printable
from bam_merge.strict import Path as DocumentPath
from bam_merge.strict import YamlError, load_yaml

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Weights = dict[str, Finite]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


# ---- makes: how a tensor is made ---------------------------------------------------------------------------------------


class Expert(Strict):
    """One tensor per expert, each a copy of its own source's."""

    make: Literal["expert"]


class Copy(Strict):
    """The tensor of one source."""

    make: Literal["copy"]
    from_: str = Field(alias="from", description="name of the source")


class Mean(Strict):
    """Uniform mean over the distinct sources among the experts."""

    make: Literal["mean"]


class Linear(Strict):
    """Weighted sum; the weights must sum to one."""

    make: Literal["linear"]
    weights: Weights = Field(description="source: weight")


class Slerp(Strict):
    """Spherical interpolation between two sources."""

    make: Literal["slerp"]
    from_: Annotated[tuple[str, str], Field(strict=False)] = Field(alias="from", description="the two sources: t=0 and t=1")
    t: Fraction


class TaskArithmetic(Strict):
    """base + scale * sum of weighted differences from base."""

    make: Literal["task_arithmetic"]
    base: str
    weights: Weights | None = Field(default=None, description="source: weight of its difference; default 1 for every other expert")
    scale: Finite = 1.0


class Ties(Strict):
    """TIES: trim, elect sign, merge what agrees."""

    make: Literal["ties"]
    base: str
    density: Density = Field(description="share of each difference that is kept, the largest entries")
    weights: Weights | None = None
    scale: Finite = 1.0


class DareTies(Strict):
    """DARE then TIES: drop entries at random, rescale, elect sign, merge what agrees."""

    make: Literal["dare_ties"]
    base: str
    density: Density = Field(description="probability that an entry of a difference is kept")
    weights: Weights | None = None
    scale: Finite = 1.0


class _Normal(Strict):
    std: Positive = 0.02

    def initialiser(self) -> ops.Initialiser:
        return ops.Normal(self.std)


class _Uniform(Strict):
    bound: Positive | None = Field(default=None, description="uniform on [-bound, bound]; default 1/sqrt(hidden_size)")

    def initialiser(self) -> ops.Initialiser:
        return ops.Uniform(self.bound)


class _Zeros(Strict):
    def initialiser(self) -> ops.Initialiser:
        return ops.Zeros()


class _Orthogonal(Strict):
    gain: Positive = Field(default=1.0, description="length of each row")

    def initialiser(self) -> ops.Initialiser:
        return ops.Orthogonal(self.gain)


class Normal(_Normal):
    make: Literal["normal"]


class Uniform(_Uniform):
    make: Literal["uniform"]


class Zeros(_Zeros):
    make: Literal["zeros"]


class Orthogonal(_Orthogonal):
    make: Literal["orthogonal"]


class RouterNormal(_Normal):
    init: Literal["normal"]


class RouterUniform(_Uniform):
    init: Literal["uniform"]


class RouterZeros(_Zeros):
    init: Literal["zeros"]


class RouterOrthogonal(_Orthogonal):
    init: Literal["orthogonal"]


class _Selector(Strict):
    roles: Names = Field(description="roles or globs such as attn.*; a weight's role covers its bias")
    layers: int | str | None = Field(default=None, description='layers such as 3, "0-3", "0,4-7" or "20-" (to the last)')


Merging = Mean | Copy | Linear | Slerp | TaskArithmetic | Ties | DareTies
Initialising = Normal | Uniform | Zeros | Orthogonal
Make = Expert | Merging | Initialising

if TYPE_CHECKING:

    class Rule(_Selector):
        """One of `rules`: a make with the roles and layers it is for."""

        make: str
else:  # for every make a class that has the make's keys and the selector's
    Rule = Annotated[
        Union[tuple(create_model(f"{make.__name__}Rule", __base__=(_Selector, make)) for make in get_args(Make))],
        Field(discriminator="make"),
    ]


# ---- the sections ----------------------------------------------------------------------------------------------------------


class Attention(Strict):
    kv: Literal["expert", "shared"] = "expert"
    routing: Literal["soft", "top_k"] = "soft"
    top_k: Count | None = None


class Ffn(Strict):
    top_k: Count | None = Field(default=None, description="experts per token; default 1 for bam, 2 for btx and sparse_upcycling")
    gate: Literal["softmax_then_topk", "topk_then_softmax"] | None = None
    gate_scale: Positive = 1.0


RouterInit = RouterNormal | RouterUniform | RouterZeros | RouterOrthogonal
OneInit = Annotated[RouterInit, Field(discriminator="init")]


class Routers(Strict):
    attention: OneInit = RouterNormal(init="normal")
    ffn: OneInit = RouterNormal(init="normal")


def _init_or_both(value: Any) -> str:
    return str(value["init"]) if isinstance(value, dict) and "init" in value else getattr(value, "init", "both")


RouterSection = Annotated[
    Annotated[RouterNormal, Tag("normal")]
    | Annotated[RouterUniform, Tag("uniform")]
    | Annotated[RouterZeros, Tag("zeros")]
    | Annotated[RouterOrthogonal, Tag("orthogonal")]
    | Annotated[Routers, Tag("both")],
    Discriminator(_init_or_both),
]


class Output(Strict):
    path: str = Field(min_length=1)
    layout: str | None = None
    dtype: Literal["source", "float32", "float16", "bfloat16"] = "source"
    max_shard_size: int | str = "5GB"


class Recipe(Strict):
    """A recipe as written, with defaults; `resolved` fills in what depends on the method. Paths are relative to `folder`."""

    method: Literal["bam", "btx", "sparse_upcycling", "merge"]
    sources: dict[str, str] = Field(min_length=1, description="name: a Hugging Face folder, relative to the recipe")
    experts: Names | None = Field(default=None, description="order = expert index; a source may stand more than once; default: all")
    attention: Attention | None = Field(default=None, description="method bam only")
    ffn: Ffn | None = None
    router: RouterSection | None = Field(default=None, description="both routers, or {attention: ..., ffn: ...}")
    shared: Annotated[Merging, Field(discriminator="make")] = Field(
        default=Mean(make="mean"), description="how a tensor without an expert axis is made; for method merge: every tensor"
    )
    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = Field(
        default=(), description="before the method's own rules; the first rule that matches a tensor makes it"
    )
    random_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output: Output

    _folder: Path = PrivateAttr(default_factory=Path)
    _file: str = PrivateAttr(default="recipe")

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._folder

    @property
    def file(self) -> str:
        """What error messages call this recipe."""
        return self._file

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The source of each expert, by expert index."""
        return self.experts or tuple(self.sources)

    @property
    def distinct(self) -> tuple[str, ...]:
        """The distinct sources among the experts, in order: what a mean is over."""
        return tuple(dict.fromkeys(self.expert_names))

    @property
    def seed_name(self) -> str:
        """The source whose tokenizer and neutral configuration the output takes: `seed`, or else the first expert."""
        return "seed" if "seed" in self.sources else self.expert_names[0]

    @property
    def gates(self) -> tuple[int, bool]:
        """(FFN experts per token, whether their gates are renormalised to sum to one)."""
        ffn = self.ffn or Ffn()
        top_k = ffn.top_k or (1 if self.method == "bam" else 2)
        gate = ffn.gate or ("softmax_then_topk" if self.method == "bam" else "topk_then_softmax")
        return top_k, gate == "topk_then_softmax"

    def router_init(self, role: str) -> ops.Initialiser:
        """The initialiser of `router.attn` or `router.ffn`, where no rule says otherwise."""
        router = self.router or Routers()
        if isinstance(router, Routers):
            router = router.attention if role == "router.attn" else router.ffn
        return router.initialiser()

    def relative(self, path: str) -> str:
        """`path` relative to the recipe's folder, for documents that must not hold absolute paths."""
        return os.path.relpath(os.path.join(self.folder, path), self.folder)

    def resolved(self) -> dict[str, Any]:
        """The recipe as a document with every default written out and no absolute path."""
        document = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        document["experts"] = list(self.expert_names)
        document["sources"] = {name: self.relative(path) for name, path in self.sources.items()}
        document["output"]["path"] = self.relative(self.output.path)
        if self.method != "merge":
            top_k, renormalised = self.gates
            gate = "topk_then_softmax" if renormalised else "softmax_then_topk"
            document["ffn"] = {"top_k": top_k, "gate": gate, "gate_scale": (self.ffn or Ffn()).gate_scale}
            if not isinstance(self.router, Routers):
                both = (self.router or RouterNormal(init="normal")).model_dump(mode="json", exclude_none=True)
                document["router"] = {"attention": both, "ffn": both}
        if self.method == "bam":
            document["attention"] = (self.attention or Attention()).model_dump(mode="json", exclude_none=True)
        elif "router" in document:
            del document["router"]["attention"]
        return document


def schema() -> dict[str, Any]:
    """The recipe's JSON Schema (draft 2020-12), for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "bam-merge recipe", **Recipe.model_json_schema()}


# ---- reading ---------------------------------------------------------------------------------------------------------------


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read the recipe at `path`. Raises RecipeError with every problem, each with line, column and key."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{printable(str(path))}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{printable(str(path))}: not UTF-8 text (byte {error.start}).") from None
    try:
        document, marks = load_yaml(text)
    except YamlError as error:
        place = f":{error.line}:{error.column}" if error.line else ""
        raise RecipeError(f"{printable(str(path))}{place}: {error}.") from None
    places = {key: f":{mark.line + 1}:{mark.column + 1}" for key, mark in marks.items()}
    return parse_recipe(document, file.parent, str(path), places)


def parse_recipe(document: Any, folder: Path = Path(), file: str = "recipe", places: Mapping[DocumentPath, str] | None = None) -> Recipe:
    """Check a recipe given as plain data. `places` maps paths in the document to ':line:column'. Raises RecipeError."""
    name, places = printable(file), places or {}
    if not isinstance(document, dict):
        raise RecipeError(f"{name}: a recipe is a mapping with method, sources and output; found {type(document).__name__}.")
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(*_explain(error, document, name, places)) from None
    recipe._folder, recipe._file = folder, file
    problems = [f"{name}{places.get(path, '')}: {_dotted(path)}: {text}" for path, text in _inconsistencies(recipe)]
    if problems:
        raise RecipeError(*problems)
    return recipe


def _dotted(path: DocumentPath) -> str:
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return printable(text)


_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "dict": "a mapping", "list": "a list"}


def _explain(error: ValidationError, document: Any, name: str, places: Mapping[DocumentPath, str]) -> list[str]:
    """pydantic's findings as our messages: where, what was found, what was expected, the nearest valid name."""
    messages = []
    for item in error.errors(include_url=False):
        path, tags = _document_path(item["loc"], document)
        found = item["input"]
        what = {"bool": f"{str(found).lower()} (a bare yes, no, on or off is true or false in YAML: quote it)"}.get(
            type(found).__name__, printable(repr(found), 60)
        )
        match item["type"]:
            case "extra_forbidden":
                text = f"unknown key{nearest(str(path[-1]), _valid_keys(path, tags))}"
            case "missing":
                text = "is required and missing"
                path = path if path and path[-1] == item["loc"][-1] else (*path, str(item["loc"][-1]))
            case "union_tag_not_found":
                path, text = (*path, "init" if path[0] == "router" else "make"), "is required and missing"
            case "union_tag_invalid":
                context = item["ctx"]
                key = "init" if path[0] == "router" else "make"
                valid = [tag for tag in (word.strip(" '") for word in str(context["expected_tags"]).split(",")) if tag != "both"]
                path, text = (*path, key), f"{context['tag']!r} is none of {', '.join(valid)}{nearest(str(context['tag']), valid)}"
            case "literal_error":
                valid = [word.strip(" '") for word in str(item["ctx"]["expected"]).replace(" or ", ", ").split(",")]
                text = f"found {what}, expected {' or '.join(valid)}{nearest(str(found), valid)}"
            case _:
                text = f"found {what}: {item['msg'][0].lower()}{item['msg'][1:]}"
        place = next((places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in places), "")
        messages.append(f"{name}{place}: {_dotted(path)}: {text}{'' if text.endswith('?') else '.'}")
    return list(dict.fromkeys(messages))


def _document_path(loc: tuple[int | str, ...], document: Any) -> tuple[DocumentPath, list[str]]:
    """Split pydantic's location into the path in the document and the union tags that it adds on the way."""
    path: list[str | int] = []
    tags: list[str] = []
    here = document
    for index, step in enumerate(loc):
        last = index == len(loc) - 1
        inside = (isinstance(here, dict) and step in here) or (isinstance(here, list) and isinstance(step, int) and step < len(here))
        if inside:
            path.append(step)
            here = here[step]
        elif last and isinstance(here, dict):
            path.append(step)
        else:
            tags.append(str(step))
    return tuple(path), tags


def _valid_keys(path: DocumentPath, tags: list[str]) -> list[str]:
    """The keys that are valid beside the one at `path`."""
    models: dict[str, type[BaseModel]] = {"": Recipe, "attention": Attention, "ffn": Ffn, "output": Output, "router": Routers}
    keys = set()
    for model in [models.get(str(path[0]) if len(path) > 1 else "", _Selector), *(m for m in get_args(Make) if tags)]:
        tag = model.model_fields.get("make")
        if tag is None or get_args(tag.annotation)[0] in tags:
            keys |= {info.alias or key for key, info in model.model_fields.items()}
    for init in (RouterNormal, RouterUniform, RouterZeros, RouterOrthogonal):
        if path[0] == "router":
            keys |= set(init.model_fields)
    return sorted(keys)


# ---- consistency ---------------------------------------------------------------------------------------------------------


def _inconsistencies(recipe: Recipe) -> Iterator[tuple[DocumentPath, str]]:
    """(path, message) of everything that the recipe alone shows to be wrong."""
    yield from _experts(recipe)
    yield from _gating(recipe)
    yield from _make(recipe, recipe.shared, ("shared",))
    for index, rule in enumerate(recipe.rules):
        yield from _rule(recipe, rule, ("rules", index))
    used = {*recipe.expert_names, *(name for make in (recipe.shared, *recipe.rules) for name in named_sources(make))}
    for name in recipe.sources:
        if name not in used:
            yield ("sources", name), "never used: neither an expert nor named by a rule. Remove it, or add it to experts."
    try:
        parse_size(recipe.output.max_shard_size)
    except ValueError as error:
        yield ("output", "max_shard_size"), str(error)


def _experts(recipe: Recipe) -> Iterator[tuple[DocumentPath, str]]:
    names, distinct = recipe.expert_names, recipe.distinct
    for name in recipe.sources:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            yield ("sources", name), "a source's name is letters, digits, '_', '-' and '.'; rename it."
    for index, name in enumerate(names):
        if name not in recipe.sources:
            yield ("experts", index), f"{printable(name)!r} is not among the sources{nearest(name, recipe.sources)}"
    if recipe.method == "merge":
        if len(distinct) < 2 and not isinstance(recipe.shared, Copy):
            yield ("experts",), "a merge needs at least two different sources."
        return
    if len(names) < 2:
        example = f" For several experts from one model: experts: [{names[0]}, {names[0]}, {names[0]}, {names[0]}]."
        yield ("experts",), f"a mixture needs at least two experts, found {len(names)}.{example}"
    if recipe.method == "sparse_upcycling" and len(distinct) > 1:
        yield ("experts",), f"sparse_upcycling copies one dense model, found {', '.join(distinct)}. Use btx or bam for several."


def _gating(recipe: Recipe) -> Iterator[tuple[DocumentPath, str]]:
    count = len(recipe.expert_names)
    if recipe.method == "merge":
        for key in ("ffn", "router", "attention"):
            if getattr(recipe, key) is not None:
                yield (key,), "method merge gives a dense model, which has no experts and no routers. Remove this key."
        return
    if recipe.gates[0] > count:
        yield ("ffn", "top_k"), f"{recipe.gates[0]} experts per token of only {count}. Use at most {count}."
    if recipe.attention is None:
        return
    attention = recipe.attention
    if recipe.method != "bam":
        yield ("attention",), f"method {recipe.method} has no attention experts. Remove this key, or use method: bam."
    elif attention.routing == "top_k" and attention.top_k is None:
        yield ("attention", "top_k"), "is required with routing: top_k."
    elif attention.routing == "soft" and attention.top_k is not None:
        yield ("attention", "top_k"), "soft routing uses all experts. Remove top_k, or use routing: top_k."
    elif attention.top_k is not None and attention.top_k > count:
        yield ("attention", "top_k"), f"{attention.top_k} attention experts per token of only {count}. Use at most {count}."


def named_sources(make: Any) -> Iterator[str]:
    """The sources that a make or rule names."""
    if isinstance(make, Copy):
        yield make.from_
    if isinstance(make, Slerp):
        yield from make.from_
    if isinstance(make, TaskArithmetic | Ties | DareTies):
        yield make.base
    yield from getattr(make, "weights", None) or ()


def operands(make: Any, recipe: Recipe) -> tuple[str, ...]:
    """The sources that a merging `make` combines, base apart."""
    if isinstance(make, Copy):
        return (make.from_,)
    if isinstance(make, Slerp):
        return make.from_
    if isinstance(make, Mean):
        return recipe.distinct
    return tuple(make.weights or (name for name in recipe.distinct if name != make.base))


def _make(recipe: Recipe, make: Any, path: DocumentPath) -> Iterator[tuple[DocumentPath, str]]:
    for name in dict.fromkeys(named_sources(make)):
        if name not in recipe.sources:
            yield path, f"names the source {printable(name)!r}, which is not among the sources{nearest(name, recipe.sources)}"
    if isinstance(make, Linear):
        total = sum(make.weights.values())
        if abs(total - 1) > 1e-6:
            yield (
                (*path, "weights"),
                f"sum to {total:g}, expected 1, or the tensor's scale would change. (task_arithmetic scales differences.)",
            )
    if isinstance(make, Slerp) and make.from_[0] == make.from_[1]:
        yield (*path, "from"), "slerp needs two different sources."
    if isinstance(make, TaskArithmetic | Ties | DareTies):
        if make.base in (make.weights or ()):
            yield (*path, "weights"), f"{make.base} is the base; its difference from itself is zero. Remove it."
        if not operands(make, recipe):
            yield path, f"no source but the base {make.base} is left to merge. Name others in experts or weights."


def _rule(recipe: Recipe, rule: Any, path: DocumentPath) -> Iterator[tuple[DocumentPath, str]]:
    yield from _make(recipe, rule, path)
    try:
        parse_layers(rule.layers, 10**6)
    except ValueError as error:
        yield (*path, "layers"), str(error)
    for index, pattern in enumerate(rule.roles):
        matched = [role for role in ROLES if covers(pattern, role)]
        if not matched:
            yield (*path, "roles", index), f"{printable(pattern)!r} is no role{nearest(pattern, ROLES)} Roles: {', '.join(ROLES)}."
        routers = [role.startswith("router.") for role in matched]
        if isinstance(rule, Initialising) and not all(routers):
            yield (*path, "roles", index), f"{rule.make} initialises routers only, {pattern!r} covers other tensors."
        if not isinstance(rule, Initialising) and any(routers):
            yield (*path, "roles", index), f"{pattern!r} covers routers, which no source has. Give them a rule of their own."
    if isinstance(rule, Expert) and recipe.method == "merge":
        yield (*path, "make"), "method merge gives a dense model, which has no experts."


def covers(pattern: str, role: str) -> bool:
    """Whether a rule's role pattern covers `role`: by glob, and a weight's pattern covers its bias."""
    return fnmatchcase(role, pattern) or fnmatchcase(role.removesuffix(".bias"), pattern)


def parse_layers(text: int | str | None, count: int) -> range | frozenset[int]:
    """The layer indices that `layers` names, of a model with `count` layers. Raises ValueError."""
    if text is None:
        return range(count)
    chosen: set[int] = set()
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise ValueError(f'{printable(repr(text))} is no layer range; write 3, "0-3", "0,4-7" or "20-".')
        end = int(last) if last else count - 1 if dash else int(first)
        if int(first) > end:
            raise ValueError(f"{printable(part.strip())!r} is an empty layer range.")
        if end >= count:
            raise ValueError(f"layer {end} does not exist; the model's layers are 0 to {count - 1}.")
        chosen.update(range(int(first), end + 1))
    return frozenset(chosen)


def parse_size(text: int | str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises ValueError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = str(text).strip()
    unit = number.lstrip("0123456789.")
    try:
        size = int(float(number[: len(number) - len(unit)]) * units[unit.strip().upper()])
    except (KeyError, ValueError):
        raise ValueError(f"{printable(repr(text))} is no size; write for example 5GB, 500MB or 2GiB.") from None
    if size < 1:
        raise ValueError(f"{printable(repr(text))} is no size of a file.")
    return size
