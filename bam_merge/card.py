"""The model card that travels with a merged checkpoint: what it is, from what, how to use it."""

from bam_merge import __version__
from bam_merge.plan import Plan

METHODS = {
    "bam": "BAM (Branch-Attend-Mix, arXiv 2408.08274)",
    "btx": "BTX (Branch-Train-MiX, arXiv 2403.07816)",
    "sparse_upcycling": "Sparse Upcycling (arXiv 2212.05055)",
    "merge": "a dense merge",
}


def model_card(plan: Plan) -> str:
    """README.md of the output, in Markdown with the hub's YAML front matter. Depends on the plan alone."""
    recipe, config = plan.recipe, plan.config
    names = list(recipe.expert_names)
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, bam-merge" + (", moe" if recipe.method != "merge" else "") + "]",
        "---",
        "",
    ]
    lines += [f"# {' + '.join(dict.fromkeys(names))}, merged by {METHODS[recipe.method]}", ""]
    lines += [
        f"Made by bam-merge {__version__} from {plan.models[recipe.seed_name].family.name} models; `bam_merge.json` holds the recipe, "
        "how every tensor was made, and digests of all inputs and outputs.",
        "",
        "| | |",
        "|---|---|",
        f"| layout | `{plan.layout.name}` |",
        f"| parameters | {plan.parameters:,} total, {plan.active_parameters:,} active per token |",
    ]
    if recipe.method != "merge":
        top_k, renormalised = recipe.gates
        gates = "softmax over the chosen experts" if renormalised else "softmax over all experts, not renormalised"
        lines.append(f"| FFN experts | {', '.join(names)} (expert 0 to {len(names) - 1}); {top_k} per token; {gates} |")
    if config.get("num_attention_experts"):
        routing = (
            "all of them, by soft gates"
            if config["attention_routing"] == "soft"
            else f"{config['num_attention_experts_per_tok']} per token"
        )
        kv = "each with its own keys and values" if config["attention_kv"] == "expert" else "keys and values shared"
        lines.append(f"| attention experts | {config['num_attention_experts']}, {kv}; {routing} |")
    if recipe.method != "merge":
        lines += ["", "The routers are freshly initialised: train the mixture before use."]
    if plan.layout.name == "bam":
        lines += ["", "Runs in bam-merge's reference model:", "", "```python", "import bam_merge", ""]
        lines += ['model = bam_merge.load_model("THIS_FOLDER")  # model(input_ids [B, T]) -> logits [B, T, V]', "```"]
    else:
        lines += [
            "",
            f"Loads in transformers as `{plan.layout.class_name}`:",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "",
        ]
        lines += ['model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")', "```"]
    return "\n".join(lines) + "\n"
