"""The output tensors in file order, their dtypes, and their places in the files."""

from collections.abc import Mapping
from dataclasses import replace

from bam_merge import expressions
from bam_merge.architectures.locate import is_named_here, pieces_of
from bam_merge.architectures.tables import Architecture, at_layer, evaluate, load_architecture, natural_order
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_BITS, DTYPE_NAMES
from bam_merge.checkpoints.header import encode_header
from bam_merge.checkpoints.pieces import whole
from bam_merge.planning.assign import Made
from bam_merge.planning.fill import filling
from bam_merge.planning.fuse import apart, fuse, stack
from bam_merge.planning.output_config import NO_SHARED_EXPERT
from bam_merge.planning.plan import Shard, Step
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.dense import DenseModel, Site
from bam_merge.text import some


def make_steps(recipe: Recipe, layout: Architecture, seed: DenseModel, made: Mapping[Site, Made], problems: list[str]) -> list[Step]:
    """The output tensors in file order, by the layout's rows; whatever is made and stored nowhere is a problem."""
    steps: list[Step] = []
    stored: set[Site] = set()
    sizes = {
        **seed.facts, "num_experts": len(recipe.expert_names), "intermediate_size": seed.facts["intermediate_size"] // recipe.shards,
        "shared_expert_intermediate_size": NO_SHARED_EXPERT,
    }  # fmt: skip
    for row, layer in natural_order(layout, seed.facts["num_hidden_layers"]):
        if not is_named_here(row, layout, seed.facts):
            continue
        filled = filling(row, layer, sizes, made, recipe.random_seed)
        if filled is not None:
            steps.append(Step(row.name(layer), row.roles[0], layer, None, filled.dtype, filled.shape, filled, f"layout {layout.name}"))
            continue
        sites = [made.get((role, layer)) for role in row.roles]
        parts = [item for item in sites if item is not None and item.per_expert == row.per_expert]
        if len(parts) < len(row.roles):
            continue
        stored.update((role, layer) for role in row.roles)
        role = row.roles[0] if len(row.roles) == 1 else "+".join(row.roles)
        spelling = next((s for s in range(len(row.names)) if row.name(layer, spelling=s) in seed.naming.names), 0)
        groups = evaluate(row.groups, at_layer(seed.facts, layer))
        fused = [fuse(exprs, groups) if len(exprs) > 1 else exprs[0] for exprs in zip(*(part.exprs for part in parts), strict=True)]
        if row.stacked:
            all_experts = stack(tuple(fused))
            shape = (len(fused), *fused[0].shape)
            steps.append(Step(row.name(layer, spelling=spelling), role, layer, None, all_experts.dtype, shape, all_experts, parts[0].by))
            continue
        for index, expr in enumerate(fused):
            expert = index if row.per_expert else None
            if isinstance(expr, expressions.Init):
                expr = replace(expr, name=row.name(layer, expert, spelling))
            names = pieces_of(row, row.name(layer, expert, spelling), at_layer(seed.facts, layer))
            for name, part in zip(names, apart(expr, len(names)), strict=True):
                steps.append(Step(name, role, layer, expert, part.dtype, part.shape, part, parts[0].by))
    problems += _homeless(recipe, layout, made, stored)
    return steps


def _homeless(recipe: Recipe, layout: Architecture, made: Mapping[Site, Made], stored: set[Site]) -> list[str]:
    """A message per role that is made in a form for which the layout has no row."""
    rows, bam = ({(role, row.per_expert) for row in table.rows for role in row.roles} for table in (layout, load_architecture("bam")))
    problems = []
    for role, by in dict.fromkeys((site[0], item.by) for site, item in made.items() if site not in stored):
        where = f"{recipe.file}: {by}: {role!r}"
        if (role, False) in rows and (role, True) not in rows:
            remedy = ", or layout: bam" if (role, True) in bam else ""
            problems.append(f"{where} asks for one tensor per expert, but layout {layout.name!r} stores it shared. Use make: mean{remedy}.")
        elif (role, True) in rows:
            problems.append(f"{where} is made once for all, but layout {layout.name!r} stores one per expert. Use make: expert.")
        else:
            remedy = " Use layout: bam." if layout.name != "bam" else ""
            problems.append(f"{where} is a tensor of the sources that layout {layout.name!r} has no place for.{remedy}")
    return problems


def dtype_problems(recipe: Recipe, steps: list[Step]) -> list[str]:
    """dtype: source needs sources that agree; a conversion needs dtypes that can be converted."""
    target = DTYPE_NAMES.get(recipe.output.dtype)
    mixed: dict[tuple[str, ...], str] = {}
    per_site: dict[tuple[str, int | None], dict[str, str]] = {}
    unfit: dict[str, str] = {}
    for step in steps:
        for leaf in expressions.leaves(step.expr):
            read = whole(leaf)
            per_site.setdefault((step.role, step.layer), {}).setdefault(read.dtype, str(read))
            if target and read.dtype != target and read.dtype not in ARITHMETIC_DTYPES:
                unfit.setdefault(read.dtype, str(read))
    for dtypes in per_site.values():
        if len(dtypes) > 1:
            mixed.setdefault(tuple(sorted(dtypes)), "; ".join(f"{name} is {dtype}" for dtype, name in dtypes.items()))
    problems = [
        f"{recipe.file}: output.dtype: {name} is {dtype}, which cannot be converted to {target}. Convert that source first, or use its "
        "full-precision model."
        for dtype, name in unfit.items()
    ]
    if target is None:
        problems += [
            f"{recipe.file}: output.dtype: source keeps what is stored, but the sources disagree: {text}. {_dtype_advice(dtypes)}"
            for dtypes, text in mixed.items()
        ]
    return problems


def _dtype_advice(dtypes: tuple[str, ...]) -> str:
    """The way out of sources stored in several dtypes, which is a conversion only where all of them can be converted."""
    fixed = [dtype for dtype in dtypes if dtype not in ARITHMETIC_DTYPES]
    if not fixed:
        return "Set dtype: bfloat16 (or another)."
    return f"{some(fixed)} cannot be converted here: convert those sources to bfloat16 first, or use their full-precision models."


def place(steps: list[Step], limit: int) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
    """Distribute tensors over files of at most `limit` bytes (a larger tensor has a file to itself), and fix every offset."""
    groups: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if groups[-1] and size + step.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(step)
        size += step.nbytes
    placed: list[Step] = []
    shards: list[Shard] = []
    for index, group in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        group = sorted(group, key=lambda step: -DTYPE_BITS[step.dtype])  # wide dtypes first keeps every tensor aligned
        header, spans = encode_header((step.name, step.dtype, step.shape) for step in group)
        placed += [replace(step, file=file, offset=offset) for step, (offset, _) in zip(group, spans, strict=True)]
        shards.append(Shard(file, header, len(header) + sum(step.nbytes for step in group)))
    return tuple(placed), tuple(shards)
