"""The expert of every token, beside those that routers choose, in layouts that have one: a source's FFN, where the recipe asks for one."""

from collections.abc import Iterator, Mapping

from bam_merge import expressions
from bam_merge.architectures.tables import Architecture, mixture_layouts
from bam_merge.planning.assign import Made
from bam_merge.planning.dtype_check import dtype_of_new_tensors
from bam_merge.recipe.schema import Ffn, Recipe
from bam_merge.sources.dense import DenseModel, Site

SHARED = "ffn.shared."


def has_shared(layout: Architecture) -> bool:
    """Whether a layout has a shared expert."""
    return any(role.startswith(SHARED) for row in layout.rows for role in row.roles)


def is_gated(layout: Architecture) -> bool:
    """Whether a layout weighs its shared expert, by a router of one row."""
    return any(f"{SHARED}router" in row.roles for row in layout.rows)


def shared_expert(recipe: Recipe, layout: Architecture, models: Mapping[str, DenseModel], problems: list[str]) -> dict[Site, Made]:
    """How the tensors of a shared expert are made that is a source's FFN; none where the layout's table fills them, or has none.

    Its gate, a router of one row in layouts that have one, starts as the other routers do; where these are zeros, as the table fills it.
    """
    if recipe.shared_expert is None:
        return {}
    if not has_shared(layout):
        known = ", ".join(table.name for table in mixture_layouts() if has_shared(table))
        problems.append(f"{recipe.file}: ffn.shared_expert: layout {layout.name} has no shared expert. Layouts that have one: {known}.")
        return {}
    source = recipe.shared_source
    if source is None:
        return {}
    model, by = models[source], "ffn.shared_expert"
    made = {
        (f"{SHARED}{role.removeprefix('ffn.')}", layer): Made(by, (expr,))
        for (role, layer), expr in model.tensors.items()
        if role.startswith("ffn.")
    }
    init = recipe.router_init("router.ffn")
    if not is_gated(layout):
        return made
    if isinstance(init, expressions.Initialiser) and not isinstance(init, expressions.Zeros):  # of zeros, where texts make the routers
        shape = (1, model.facts["hidden_size"])
        new = expressions.Init(init, "", recipe.random_seed, dtype_of_new_tensors(model), shape)
        made |= {(f"{SHARED}router", layer): Made(by, (new,)) for layer in range(model.facts["num_hidden_layers"])}
    return made


def shared_notes(recipe: Recipe, layout: Architecture) -> Iterator[str]:
    """What a plan says of a source's FFN that every token goes through, where nothing weighs it: what becomes of step 0."""
    name = recipe.shared_source
    if name is None or is_gated(layout) or not has_shared(layout):
        return
    if "$shared_expert_mix" in layout.config.values():
        yield (
            f"ffn.shared_expert: every token gets half of what its experts give and half of what {name}'s FFN gives. Copies of {name} stay "
            f"what {name} is; other experts are at step 0 half way between themselves and {name}."
        )
        return
    scale = (recipe.ffn or Ffn()).gate_scale
    yield (
        f"ffn.shared_expert: {name}'s FFN is added to every token's, and nothing weighs it: an FFN that equals it counts "
        f"{scale + 1:g} times (gate_scale {scale:g} for the chosen experts, and 1), so step 0 is not the dense models'. shared_expert: "
        "zeros keeps them; a smaller gate_scale weighs the chosen experts less; training makes up for either."
    )
