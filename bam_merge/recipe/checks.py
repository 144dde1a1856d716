"""What a recipe alone shows to be wrong, and the words for what pydantic finds: where, found, expected, nearest name."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bam_merge.address import is_address
from bam_merge.architectures.vocabulary import ROLE_GLOBS, ROLES
from bam_merge.documents import Path as DocumentPath
from bam_merge.paths import path_problem
from bam_merge.recipe.accepting import accept_problems
from bam_merge.recipe.makes import Copy, Expert, Initialising, Merging, Varying
from bam_merge.recipe.makes.data_routers import FromTexts
from bam_merge.recipe.places import Adapted, base_problems, based_on
from bam_merge.recipe.rules import Copies, covers, list_layers, parse_layers, parse_size
from bam_merge.text import nearest, printable, some
from bam_merge.validation_words import shown

LINEAR_WORDS = ("expert", "mean")
"""What attention.linear may say beside a source's name."""


if TYPE_CHECKING:
    from bam_merge.recipe.schema import Recipe

_OF_KEYS = ("extra_forbidden", "missing", "union_tag_not_found", "union_tag_invalid")
"""Types of pydantic's errors that are about a key, not about its value."""


# ---- consistency ---------------------------------------------------------------------------------------------------------


def inconsistencies(recipe: "Recipe") -> Iterator[tuple[DocumentPath, str]]:
    """(path, message) of everything that the recipe alone shows to be wrong."""
    yield from _experts(recipe)
    yield from _gating(recipe)
    yield from _make(recipe, recipe.shared, ("shared",))
    for index, rule in enumerate(recipe.rules):
        yield from _rule(recipe, rule, ("rules", index))
    averaged = recipe.output.layers is None or ("shared" in recipe.model_fields_set and not recipe.shared.named)
    used = {
        *(recipe.expert_names if averaged else ()),
        *(name for make in (recipe.shared, *recipe.rules) if isinstance(make, Merging | Varying) for name in make.named),
    }
    used |= {name for _, name in _of_tokenizer(recipe)} | {item.from_ for item in recipe.output.layers or ()} | {recipe.shared_source or ""}
    used |= {recipe.attention.linear or ""} if recipe.attention else set()
    yield from _layers(recipe)
    yield from _tokenizer(recipe)
    for place, make in {recipe.written(place): make for place, make in recipe.from_texts.items()}.items():
        yield from _texts(recipe, make, _keys(place))
    for name in recipe.sources:
        if name not in used | based_on(recipe.sources):
            yield ("sources", name), "never used: neither an expert nor named by a rule. Remove it, or add it to experts."
    yield from base_problems(recipe.sources)
    yield from _paths(recipe)
    yield from accept_problems(recipe.accept, recipe.sources)
    try:
        parse_size(recipe.output.max_shard_size)
    except ValueError as error:
        yield ("output", "max_shard_size"), str(error)


TOKENIZER_WORDS = {"source": ("union",), "missing": ("mean", "zeros")}
"""What may stand at these keys of `tokenizer` in the place of a source."""


def _of_tokenizer(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """(key, source) of the sources that `tokenizer` names."""
    if recipe.tokenizer is not None:
        for key in ("source", "missing", "chat_template"):
            name = getattr(recipe.tokenizer, key)
            if name is not None and name not in TOKENIZER_WORDS.get(key, ()):
                yield key, name


def _tokenizer(recipe: "Recipe") -> Iterator[tuple[DocumentPath, str]]:
    for key, name in _of_tokenizer(recipe):
        if name not in recipe.sources:
            known = (*TOKENIZER_WORDS.get(key, ()), *recipe.sources)
            yield ("tokenizer", key), f"{printable(name)!r} is not among the sources{nearest(name, known)}"
    for key, words in TOKENIZER_WORDS.items():
        word = getattr(recipe.tokenizer, key, None)
        if word in words and word in recipe.sources:
            yield ("tokenizer", key), f"{word} is a word of this key, and a source is called so too; rename the source."


ELSEWHERE = "results are written into folders of this machine. Name one, and copy it there when it is finished."


def _paths(recipe: "Recipe") -> Iterator[tuple[DocumentPath, str]]:
    paths: dict[DocumentPath, str] = {}
    for name, source in recipe.sources.items():
        if not isinstance(source, Adapted):
            paths["sources", name] = source if isinstance(source, str) else source.path
            continue
        paths["sources", name, "base"] = source.base
        for index, item in enumerate(source.adapters):
            place: DocumentPath = () if isinstance(source.adapter, str) else (index, "path")
            paths["sources", name, "adapter", *place] = item.path
    for place, path in {**paths, ("output", "path"): recipe.output.path}.items():
        wrong = path_problem(path) or (ELSEWHERE if place == ("output", "path") and is_address(path) else None)
        if wrong:
            yield place, f"found {shown(path)}: {wrong}"


def _layers(recipe: "Recipe") -> Iterator[tuple[DocumentPath, str]]:
    """What is wrong with layers put behind one another, and with what cannot stand beside them."""
    if recipe.output.layers is None:
        return
    if recipe.method != "merge":
        yield ("output", "layers"), f"layers are put behind one another by method merge; {recipe.method} makes experts of whole models."
    for index, item in enumerate(recipe.output.layers):
        path: DocumentPath = ("output", "layers", index)
        if item.from_ not in recipe.sources:
            yield (*path, "from"), f"{printable(item.from_)!r} is not among the sources{nearest(item.from_, recipe.sources)}"
        try:
            list_layers(item.layers, 10**6)
        except ValueError as error:
            yield (*path, "layers"), str(error)
    for index, rule in enumerate(recipe.rules):
        inside = [role for role in ROLES if any(covers(pattern, role) for pattern in rule.roles) and role not in OUTSIDE]
        if inside or rule.layers is not None:
            yield (
                ("rules", index),
                "output.layers says what every layer is; rules are for what stands outside of them: embed, head, norm.final.",
            )


OUTSIDE = ("embed", "head", "head.bias", "norm.final", "norm.final.bias")
"""The roles that stand outside the layers."""


def _experts(recipe: "Recipe") -> Iterator[tuple[DocumentPath, str]]:
    names, distinct = recipe.expert_names, recipe.distinct
    for name in recipe.sources:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            yield ("sources", name), "a source's name is letters, digits, '_', '-' and '.'; rename it."
    if isinstance(recipe.experts, Copies):
        yield from _make(recipe, recipe.experts, ("experts",))
        yield from _shards(recipe)
        if recipe.method != "sparse_upcycling":
            yield ("experts",), f"so many experts of one model are method sparse_upcycling; with {recipe.method} list their sources."
    for index, name in enumerate(() if isinstance(recipe.experts, Copies) else names):
        if name not in recipe.sources:
            yield ("experts", index), f"{printable(name)!r} is not among the sources{nearest(name, recipe.sources)}"
    if recipe.method == "merge":
        if len(distinct) < 2 and not isinstance(recipe.shared, Copy) and recipe.output.layers is None:
            yield ("experts",), "a merge needs at least two different sources."
        return
    if len(names) < 2:
        example = f" For several experts from one model: experts: [{', '.join([printable(names[0])] * 4)}]."
        yield ("experts",), f"a mixture needs at least two experts, found {len(names)}.{example}"
    if recipe.method == "sparse_upcycling" and len(distinct) > 1:
        yield ("experts",), f"sparse_upcycling copies one dense model, found {some(distinct)}. Use btx or bam for several."


def _keys(place: str) -> DocumentPath:
    """The keys of a place such as rules[0] or router.ffn."""
    return tuple(int(key) if key.isdecimal() else key for key in re.findall(r"\w+", place))


def _shards(recipe: "Recipe") -> Iterator[tuple[DocumentPath, str]]:
    """What of a virtual group does not go into its shards."""
    if recipe.shards == 1:
        return
    name, count, (top_k, _) = recipe.expert_names[0], len(recipe.expert_names), recipe.gates
    if name not in recipe.sources:
        yield ("experts", "from"), f"{printable(name)!r} is not among the sources{nearest(name, recipe.sources)}"
    if count % recipe.shards or count < 2 * recipe.shards:
        yield ("experts", "count"), f"found {count}, expected two or more copies of each of the {recipe.shards} shards: a multiple of that."
    if top_k % recipe.shards:
        yield ("ffn", "top_k"), f"found {top_k}, expected a multiple of the {recipe.shards} shards: a token must get one copy of each."
    for place in dict.fromkeys(map(recipe.written, recipe.from_texts)):
        yield _keys(place), "no text tells shards of one FFN apart. Use init: normal."
    for index, rule in enumerate(recipe.rules):
        if any(covers(pattern, role) for pattern in rule.roles for role in ROLES if role.startswith("ffn.")):
            yield ("rules", index), "experts that are shards of the FFN are made of all of it; no rule can make ffn.* otherwise. Remove it."


def _gating(recipe: "Recipe") -> Iterator[tuple[DocumentPath, str]]:
    count = len(recipe.expert_names)
    if recipe.method == "merge":
        for key in ("ffn", "router", "attention"):
            if getattr(recipe, key) is not None:
                yield (key,), "method merge gives a dense model, which has no experts and no routers. Remove this key."
        return
    shared = recipe.shared_expert
    if shared is not None and shared not in ("zeros", *recipe.sources):
        yield ("ffn", "shared_expert"), f"{printable(shared)!r} is not among the sources{nearest(shared, ('zeros', *recipe.sources))}"
    elif shared == "zeros" and "zeros" in recipe.sources:
        yield ("ffn", "shared_expert"), "zeros is a word of this key, and a source is called so too; rename the source."
    chosen = recipe.ffn is not None and recipe.ffn.top_k is not None
    if recipe.gates[0] > count and (chosen or count >= 2 * recipe.shards):  # else it is `count` that is too small
        yield ("ffn", "top_k"), f"{recipe.gates[0]} experts per token of only {count}. Use at most {count}."
    if recipe.attention is None:
        return
    attention = recipe.attention
    if attention.linear is not None and attention.linear not in (*LINEAR_WORDS, *recipe.sources):
        words, found = " nor ".join(LINEAR_WORDS), printable(attention.linear)
        close = nearest(attention.linear, (*LINEAR_WORDS, *recipe.sources))
        yield ("attention", "linear"), f"{found!r} is neither {words} nor among the sources{close}"
    elif attention.linear in LINEAR_WORDS and attention.linear in recipe.sources:
        yield ("attention", "linear"), f"{attention.linear} is a word of this key, and a source is called so too; rename the source."
    if recipe.method != "bam":
        yield ("attention",), f"method {recipe.method} has no attention experts. Remove this key, or use method: bam."
    elif attention.routing == "top_k" and attention.top_k is None:
        yield ("attention", "top_k"), "is required with routing: top_k."
    elif attention.routing == "soft" and attention.top_k is not None:
        yield ("attention", "top_k"), "soft routing uses all experts. Remove top_k, or use routing: top_k."
    elif attention.top_k is not None and attention.top_k > count:
        yield ("attention", "top_k"), f"{attention.top_k} attention experts per token of only {count}. Use at most {count}."


def _make(recipe: "Recipe", make: Any, path: DocumentPath) -> Iterator[tuple[DocumentPath, str]]:
    if not isinstance(make, Merging | Varying):
        return
    for name in dict.fromkeys(make.named):
        if name not in recipe.sources:
            yield path, f"names the source {printable(name)!r}, which is not among the sources{nearest(name, recipe.sources)}"
    if not make.knots:
        yield from (((*path, key), text) for key, text in make.problems())
    for place in make.knots:
        where = f"{float(place):.3g} of the way through the layers: "
        yield from (((*path, key), where + text) for key, text in make.at(place).problems())
    base = make.from_base
    if base is not None and isinstance(make, Merging):
        if base in (getattr(make, "weights", None) or ()):
            yield (*path, "weights"), f"{printable(base)} is the base; its difference from itself is zero. Remove it."
        others = make.operands(recipe.distinct)
        if not others:
            yield path, f"no source but the base {printable(base)} is left to merge. Name others in experts or weights."
        elif len(others) < make.least:
            name = printable(str(getattr(make, "make", "")))
            yield (
                path,
                f"{name} needs {make.least} sources or more beside the base, found {some(map(printable, others))} alone. "
                "Name others in experts, or use task_arithmetic.",
            )


def _rule(recipe: "Recipe", rule: Any, path: DocumentPath) -> Iterator[tuple[DocumentPath, str]]:
    yield from _make(recipe, rule, path)
    try:
        parse_layers(rule.layers, 10**6)
    except ValueError as error:
        yield (*path, "layers"), str(error)
    for index, pattern in enumerate(rule.roles):
        matched = [role for role in ROLES if covers(pattern, role)]
        if not matched:
            yield (
                (*path, "roles", index),
                f"{printable(pattern)!r} is no role{nearest(pattern, (*ROLES, *ROLE_GLOBS)) or '.'} Roles: {', '.join(ROLES)}.",
            )
        routers = [role.startswith("router.") for role in matched]
        of_routers = isinstance(rule, Initialising | FromTexts)
        if isinstance(rule, Initialising | FromTexts) and not all(routers):
            yield (*path, "roles", index), f"{rule.record.name} initialises routers only, {printable(pattern)!r} covers other tensors."
        if not of_routers and any(routers):
            yield (*path, "roles", index), f"{printable(pattern)!r} covers routers, which no source has. Give them a rule of their own."
        groups = {role.partition(".")[0] for role in matched}
        if isinstance(rule, Varying) and not groups & {"router"} and not groups <= set(rule.suits):
            yield (
                (*path, "roles", index),
                f"{rule.record.name} makes tensors of experts ({', '.join(f'{group}.*' for group in rule.suits)}), "
                f"{printable(pattern)!r} covers others.",
            )
    if isinstance(rule, Expert | Varying) and recipe.method == "merge":
        yield (*path, "make"), "method merge gives a dense model, which has no experts."


def _texts(recipe: "Recipe", make: FromTexts, path: DocumentPath) -> Iterator[tuple[DocumentPath, str]]:
    """What is wrong with the texts of a router: names that are no experts, files that can be none, experts without one."""
    for key in ("texts", "prompts", "negative_prompts"):
        for name, value in (getattr(make, key, None) or {}).items():
            if name not in recipe.distinct:
                what = "is no expert, so no router chooses it" if name in recipe.sources else "is not among the experts"
                close = nearest(name, recipe.distinct) or f". Experts: {some(recipe.distinct, 8)}."
                yield (*path, key, name), f"{printable(name)!r} {what}{close}"
            elif key == "texts":
                for file in [value] if isinstance(value, str) else value:
                    if wrong := path_problem(file):
                        yield (*path, key, name), f"found {shown(file)}: {wrong}"
    yield from (((*path, *key), text) for key, text in make.problems(recipe.distinct))
