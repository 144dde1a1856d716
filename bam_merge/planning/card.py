"""The model card that travels with a merged checkpoint: what it is, from what, how to use it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import yaml

from bam_merge._version import __version__
from bam_merge.architectures.cost import Cost, cost_of_tensors
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_NAMES, config_name
from bam_merge.documents import load_json
from bam_merge.expressions import Calibrated
from bam_merge.hub_id import hub_id
from bam_merge.planning.card_use import use
from bam_merge.planning.plan import Plan
from bam_merge.recipe.places import Adapted, Folder, folder_of
from bam_merge.recipe.schema import ROUTER_PLACES, Recipe
from bam_merge.sources.licenses import License
from bam_merge.sources.tokenizers.alignment import Alignment
from bam_merge.text import printable

METHODS = {
    "bam": "BAM (Branch-Attend-Mix, arXiv 2408.08274)",
    "btx": "BTX (Branch-Train-MiX, arXiv 2403.07816)",
    "sparse_upcycling": "Sparse Upcycling (arXiv 2212.05055)",
    "merge": "a dense merge",
}


TEMPLATES_APART = frozenset({"chat_template.jinja", "chat_template.json"})
"""Files that hold a chat template, beside tokenizer_config.json."""


TRAINING = """
## Training

{routers}, on a mix of the experts' domains, with any trainer of causal
language models (transformers' Trainer, TRL, a loop). Given labels, the model returns as `loss` the negative log-likelihood plus

    router_aux_loss_coef ({balance}) * load balance  +  router_z_loss_coef ({z}) * router z-loss

averaged over layers, without padding; change the coefficients in `model.config`. `output_router_logits=False` beside the labels
leaves both out, to measure perplexity; `aux_loss` is what was added, over router_aux_loss_coef. `configuration_bam.py` has the
formulas. `save_pretrained` writes the same tensors, one per expert, that are in this folder.
"""


FRESH = "The routers are freshly initialised: train the mixture before use"


FROM_TEXTS = "The routers were made of texts, so that the mixture can be used as it is; training makes it better"
"""What is said of routers that start at random, and of those that are all made of texts."""


@dataclass(frozen=True)
class Beside:
    """What a card says beside its plan: the `licenses` that folders of the plan state, whether the tokenizer has a chat template, the
    version that made the result, and the one that `renewed` card and code, which is said where it is another."""

    licenses: Mapping[str, License] = field(default_factory=dict)
    chat: bool = False
    version: str = __version__
    renewed: str | None = None


def has_chat_template(documents: Mapping[str, bytes]) -> bool:
    """Whether the tokenizer files of a folder, by name, hold a chat template."""
    if not TEMPLATES_APART.isdisjoint(documents):
        return True
    try:
        settings = load_json(documents.get("tokenizer_config.json", b"{}"))
    except ValueError:
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def model_card(plan: Plan, beside: Beside | None = None) -> str:
    """README.md of the output, in Markdown with the hub's YAML front matter. Depends on the plan, and what is said `beside` it, alone."""
    recipe, config, beside = plan.recipe, plan.config, beside or Beside()
    names = list(dict.fromkeys(recipe.expert_names))
    seed = plan.models[recipe.seed_name]
    other = beside.renewed not in (None, beside.version)
    renewed = f", card{' and model code' * ('auto_map' in config)} by {beside.renewed}" if other else ""
    lines = [
        "---",
        _yaml(_front_matter(plan, beside)).rstrip("\n"),
        "---",
        "",
        f"# {' + '.join(names)}, merged by {METHODS[recipe.method]}",
        "",
        f"Made by bam-merge {beside.version}{renewed} from {seed.family.name} models; `bam_merge.json` holds the recipe, "
        "how every tensor was made, and digests of all inputs and outputs.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(plan)),
        f"| licenses | {_licenses(plan, beside.licenses)} |",
    ]
    text = "\n".join(lines) + "\n" + _accepted(plan) + use(plan, beside.chat)
    if plan.layout.name == "bam":
        text += TRAINING.format(routers=_routers(plan), balance=config["router_aux_loss_coef"], z=config["router_z_loss_coef"])
    elif recipe.method != "merge":
        text += f"\n## Training\n\n{_routers(plan)}.\n"
    return text + _recipe(recipe)


def _front_matter(plan: Plan, beside: Beside) -> dict[str, Any]:
    """What the hub reads of a card: where it came from, and its license where all sources state the same one."""
    recipe = plan.recipe
    ids = [hub_id(recipe.relative(store.path)) for store in recipe.stores.values()]
    bases = list(dict.fromkeys(found.repo for found in ids if found is not None and found.commit is not None))
    agreed = set(beside.licenses.values()) if beside.licenses.keys() == recipe.stores.keys() else set()
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": bases, "base_model_relation": "merge"} if bases else {}),
        **(agreed.pop().entries() if len(agreed) == 1 else {}),
        "tags": ["merge", "bam-merge", *(["moe"] if recipe.method != "merge" else [])],
    }


def _licenses(plan: Plan, stated: Mapping[str, License]) -> str:
    """The license that each folder states."""
    if not stated:
        return "no source states one"
    return ", ".join(f"{name}: {stated.get(name, 'not stated')}" for name in plan.recipe.stores)


RECIPE = "\n## Recipe\n"


def with_routers_from_texts(card: str, recipe: Recipe | None) -> str:
    """A card of a mixture whose routers were made anew: `recipe` is the one that it follows from now, where a recipe made it."""
    card = card.replace(FRESH, FROM_TEXTS)
    before, section, _ = card.partition(RECIPE)
    return before + _recipe(recipe) if section and recipe is not None else card


def _recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, in a fence that nothing in it can close."""
    resolved = recipe.resolved()  # in the order of the schema, which a recipe from a manifest has too
    text = _yaml({key: resolved[key] for key in type(recipe).model_fields if key in resolved})
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{RECIPE}\n{fence}yaml\n{text}{fence}\n"


class _Plain(yaml.SafeDumper):
    """Writes the same value out as often as it stands, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(document: Mapping[str, Any]) -> str:
    """As YAML. Text with characters that would not be seen, or turn others around, is written in escapes."""
    as_is, escaped = (
        yaml.dump(dict(document), Dumper=_Plain, sort_keys=False, default_flow_style=None, allow_unicode=allowed, width=120)
        for allowed in (True, False)
    )
    return as_is if all(line.isprintable() for line in as_is.split("\n")) else escaped


def _routers(plan: Plan) -> str:
    """How the routers start."""
    made = [isinstance(step.expr, Calibrated) for step in plan.steps if step.role in ROUTER_PLACES]
    return FROM_TEXTS if all(made) else FRESH


def _accepted(plan: Plan) -> str:
    """What the recipe accepted of sources that differ, each with its consequence."""
    if not plan.accepted:
        return ""
    lines = ["", "## Accepted differences", "", "These sources were not alike. The recipe accepts:", ""]
    return "\n".join([*lines, *(f"* {_prose(warning)}" for warning in plan.accepted)]) + "\n"


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """The rows of the card's table."""
    recipe, config, names = plan.recipe, plan.config, plan.recipe.expert_names
    dense = sum(prod(leaf.shape) for leaf in plan.models[recipe.seed_name].tensors.values())
    yield "layout", f"`{plan.layout.name}`"
    yield "sources", ", ".join(f"{name} ({_place(recipe, name)})" for name in plan.models)
    if recipe.output.layers is not None:
        yield "layers", f"{config['num_hidden_layers']}: {', '.join(f'{item.layers} of {item.from_}' for item in recipe.output.layers)}"
    if plan.alignment is not None:
        yield "vocabulary", ", ".join(_vocabulary(plan.alignment))
    if recipe.method == "merge":
        yield "parameters", f"{plan.parameters:,}"
        return
    yield "parameters", f"{plan.parameters:,} total, {plan.active_parameters:,} active per token; a dense model has {dense:,}"
    cache, dense_cache = plan.cost.kv_cache_bytes_per_token, _dense_cost(plan).kv_cache_bytes_per_token
    if cache and dense_cache:
        times = f"{cache / dense_cache:.3g} times a dense model's {dense_cache:,}"
        yield "KV cache", f"{cache:,} bytes per token in {_cached_in(plan)}, {times}"
    top_k, renormalised = recipe.gates
    gates = "softmax over the chosen experts" if renormalised else "softmax over all experts, not renormalised"
    gates = "sigmoids of the chosen experts, divided by their sum" if recipe.sigmoid else gates
    yield "FFN experts", f"{recipe.experts_shown} (expert 0 to {len(names) - 1}); {top_k} per token; {gates}"
    if recipe.shards > 1:
        width = config.get("moe_intermediate_size", config["intermediate_size"])
        yield "expert width", f"{width:,} units, a shard of the dense FFN's {width * recipe.shards:,}"
    if config.get("num_attention_experts"):
        soft = config["attention_routing"] == "soft"
        routing = "all of them, by soft gates" if soft else f"{config['num_attention_experts_per_tok']} per token"
        kv = "each with its own keys and values" if config["attention_kv"] == "expert" else "keys and values shared"
        if config.get("shared_kv_layers"):
            kv += f", shared in layers {', '.join(map(str, config['shared_kv_layers']))}"
        if config.get("attention_linear"):
            own = config["attention_linear"] == "expert"
            kv += "; of linear attention " + ("each its own, with its own state" if own else "one for all")
        yield "attention experts", f"{config['num_attention_experts']}, {kv}; {routing}"


def _place(recipe: Recipe, name: str) -> str:
    """Where a source is, and of an adapted one on what it is."""
    source = recipe.sources[name]
    if not isinstance(source, Adapted):
        return _placed(recipe, recipe.source(name))
    base = source.base if source.base in recipe.sources else _placed(recipe, folder_of(source.base))
    adapters = (
        f"{item.weight:g} x {place}" if item.weight != 1 else place
        for item in source.adapters
        for place in [_literal(recipe.relative(item.path))]
    )
    return " + ".join([base, *(f"adapter {adapter}" for adapter in adapters)])


def _placed(recipe: Recipe, folder: Folder) -> str:
    """A folder, relative to the recipe's, or an expert of it."""
    place = _literal(recipe.relative(folder.path))
    return place if folder.expert is None else f"{place}, expert {_literal(str(folder.expert))}"


def _vocabulary(found: Alignment) -> Iterator[str]:
    """What the rows of embeddings and head are, aligned by token."""
    yield (
        f"{len(found.ids):,} tokens of {found.giver}"
        if not found.added
        else f"{len(found.ids):,} tokens, {len(found.added):,} not of {found.giver}"
    )
    for name, mine in found.sources.items():
        if mine.made or mine.lost:
            yield f"{mine.made:,} that {name} lacks" + (f" and {len(mine.lost):,} of its own left out" if mine.lost else "")
    yield f"{found.rows:,} rows"


def _literal(path: str) -> str:
    """`path` for Markdown, with nothing in it that Markdown or HTML would take for their own."""
    return "".join(c if c.isalnum() or c in "/.-_ ," else f"&#{ord(c)};" for c in printable(path))


def _prose(text: str) -> str:
    """A sentence with values from a config.json in it, for Markdown: nothing in it is a link, a tag or code."""
    return "".join(f"&#{ord(c)};" if c in "<>&[]*`\\|!" else c for c in printable(text, 2000))


def _dense_cost(plan: Plan) -> Cost:
    """What the seed would cost in the dtype of the result."""
    seed, dtype = plan.models[plan.recipe.seed_name], DTYPE_NAMES.get(plan.recipe.output.dtype)
    tensors = (((role, layer, None), expr.shape, dtype or expr.dtype) for (role, layer), expr in seed.tensors.items())
    return cost_of_tensors(tensors, seed.facts, seed.facts["tie_word_embeddings"])


def _cached_in(plan: Plan) -> str:
    """The dtypes that keys and values are cached in: those of their weights, but for weights that nothing is computed in."""
    dtypes = dict.fromkeys(step.dtype for step in plan.steps if step.role in ("attn.k", "attn.v"))
    return " and ".join(dict.fromkeys(config_name(dtype) if dtype in ARITHMETIC_DTYPES else "16 bits" for dtype in dtypes))
