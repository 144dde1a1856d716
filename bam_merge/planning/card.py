"""The model card that travels with a merged checkpoint: what it is, from what, how to use it."""

from collections.abc import Iterator
from math import prod

from bam_merge._version import __version__
from bam_merge.architectures.cost import Cost, cost_of_tensors
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_NAMES, config_name
from bam_merge.expressions import Calibrated
from bam_merge.planning.plan import Plan
from bam_merge.recipe.places import Adapted
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.tokenizers.alignment import Alignment
from bam_merge.text import printable

METHODS = {
    "bam": "BAM (Branch-Attend-Mix, arXiv 2408.08274)",
    "btx": "BTX (Branch-Train-MiX, arXiv 2403.07816)",
    "sparse_upcycling": "Sparse Upcycling (arXiv 2212.05055)",
    "merge": "a dense merge",
}


TRANSFORMERS_FLOOR = "5.10"
"""The oldest transformers whose interfaces the exported model code uses (the extra `hf` in pyproject.toml)."""


LOADING = """
## Loading

With transformers {floor} or later (5.23 for tensor-parallel training); the model code is in this folder:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
```

Without transformers, and without running code of this folder, by bam-merge's reference model:

```python
import bam_merge

model = bam_merge.load_model("THIS_FOLDER")  # model(input_ids [B, T]) -> logits [B, T, V]
```
"""


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


PUBLIC_LOADING = """
Loads in transformers as `{name}`:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
```
"""


def model_card(plan: Plan) -> str:
    """README.md of the output, in Markdown with the hub's YAML front matter. Depends on the plan alone."""
    recipe, config = plan.recipe, plan.config
    names = list(dict.fromkeys(recipe.expert_names))
    tags = ["merge", "bam-merge", *(["moe"] if recipe.method != "merge" else [])]
    seed = plan.models[recipe.seed_name]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {' + '.join(names)}, merged by {METHODS[recipe.method]}",
        "",
        f"Made by bam-merge {__version__} from {seed.family.name} models; `bam_merge.json` holds the recipe, "
        "how every tensor was made, and digests of all inputs and outputs.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(plan)),
    ]
    text = "\n".join(lines) + "\n" + _accepted(plan)
    if plan.layout.name == "bam":
        balance, z = config["router_aux_loss_coef"], config["router_z_loss_coef"]
        return text + LOADING.format(floor=TRANSFORMERS_FLOOR) + TRAINING.format(routers=_routers(plan), balance=balance, z=z)
    if recipe.method != "merge":
        text += f"\n{_routers(plan)}.\n"
    return text + PUBLIC_LOADING.format(name=plan.layout.class_name)


def _routers(plan: Plan) -> str:
    """How the routers start."""
    made = [isinstance(step.expr, Calibrated) for step in plan.steps if step.role.startswith("router.")]
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
    yield "FFN experts", f"{', '.join(names)} (expert 0 to {len(names) - 1}); {top_k} per token; {gates}"
    if config.get("num_attention_experts"):
        soft = config["attention_routing"] == "soft"
        routing = "all of them, by soft gates" if soft else f"{config['num_attention_experts_per_tok']} per token"
        kv = "each with its own keys and values" if config["attention_kv"] == "expert" else "keys and values shared"
        if config.get("shared_kv_layers"):
            kv += f", shared in layers {', '.join(map(str, config['shared_kv_layers']))}"
        yield "attention experts", f"{config['num_attention_experts']}, {kv}; {routing}"


def _place(recipe: Recipe, name: str) -> str:
    """Where a source is, and of an adapted one on what it is."""
    source = recipe.sources[name]
    if not isinstance(source, Adapted):
        return _literal(recipe.relative(recipe.source(name).path))
    base = source.base if source.base in recipe.sources else _literal(recipe.relative(source.base))
    adapters = (
        f"{item.weight:g} x {place}" if item.weight != 1 else place
        for item in source.adapters
        for place in [_literal(recipe.relative(item.path))]
    )
    return " + ".join([base, *(f"adapter {adapter}" for adapter in adapters)])


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
