"""Experts that a recipe makes differ: units drawn anew, noise, low rank. What the papers say, hand-computed; and what verification must catch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import Forger, failed
from runs import folder_bytes
from safetensors.torch import load_file, save_file
from test_stored_dtypes import stored_as

from bam_merge import MergeOptions, expressions, verify
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import NonFiniteError, RecipeError
from bam_merge.merging.kernels import Chunk, combine, survey
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import load_recipe
from bam_merge.values.streams import normals, uniforms

DROP = "experts: {count: 3, make: drop, ratio: 0.3}"
F, RATIO, DROPPED = 40, 0.3, 12


def upcycled(
    folder: Path, config: dict[str, Any], text: str = DROP, dtype: str = "F32", **options: Any
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A sparse upcycling of one model, and its tensors."""
    write_sources(folder, config, names=("seed",), dtype=dtype)
    plan = plan_file(write_recipe(folder, text, "sparse_upcycling", ("seed",)))
    path = publish(plan, None, MergeOptions(**options))
    return path, load_file(path / "model.safetensors")


def ffn(tensors: dict[str, torch.Tensor], expert: int, part: str, layer: int = 0, kind: str = "weight") -> torch.Tensor:
    return tensors[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.{kind}"]


def changed(found: torch.Tensor, own: torch.Tensor, axis: int) -> list[int]:
    """The units, along the axis, of which every entry is another; the others must be the same bit for bit."""
    differs = found != own
    whole = differs.all(1 - axis) if differs.dim() == 2 else differs
    assert torch.equal(whole, differs.any(1 - axis) if differs.dim() == 2 else differs)
    return whole.nonzero().flatten().tolist()


# ---- drop --------------------------------------------------------------------------------------------------------------------


def test_the_same_units_are_dropped_in_gate_up_and_down(tmp_path: Path) -> None:
    """One set for the three tensors, as the paper says; another one for each expert and layer."""
    _, found = upcycled(tmp_path, CONFIGS["llama"])
    own = load_file(tmp_path / "seed" / "model.safetensors")
    sets = []
    for layer in (0, 1):
        for expert in range(3):
            units = [
                changed(ffn(found, expert, part, layer), own[f"model.layers.{layer}.mlp.{part}_proj.weight"], axis)
                for part, axis in (("gate", 0), ("up", 0), ("down", 1))
            ]
            assert units[0] == units[1] == units[2]
            assert len(units[0]) == DROPPED
            sets.append(tuple(units[0]))
    assert len(set(sets)) == 6


def test_new_numbers_have_the_mean_and_deviation_of_what_they_replace(tmp_path: Path) -> None:
    """With n - 1, of this tensor's dropped entries alone: a mean that is far from 0 shows whether it is taken."""
    config = CONFIGS["llama"]
    values = random_values(7)
    write_checkpoint(tmp_path / "seed", config, lambda name, shape: values(name, shape) + (3.0 if "up_proj" in name else 0.0), "F32")
    path = publish(plan_file(write_recipe(tmp_path, DROP, "sparse_upcycling", ("seed",))), None, MergeOptions())
    found, own = load_file(path / "model.safetensors"), load_file(tmp_path / "seed" / "model.safetensors")
    for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
        for expert in range(3):
            mine, old = ffn(found, expert, part), own[f"model.layers.0.mlp.{part}_proj.weight"]
            units = changed(mine, old, axis)
            new, replaced = (x.index_select(axis, torch.tensor(units)).double() for x in (mine, old))
            drawn = torch.from_numpy(normals(0, f"drop:ffn.{part}:0:{expert}", 0, new.numel())).view(new.shape)
            torch.testing.assert_close(new, replaced.mean() + replaced.std() * drawn, rtol=1e-6, atol=1e-7)


def test_the_units_are_those_of_their_stream(tmp_path: Path) -> None:
    _, found = upcycled(tmp_path, CONFIGS["llama"])
    own = load_file(tmp_path / "seed" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    numbers = uniforms(0, "drop:units:1:2", 0, F)
    assert changed(ffn(found, 2, "up", 1), own, 0) == sorted(np.argsort(numbers)[:DROPPED].tolist())


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "llama_biased", "starcoder2"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_drop_of_fused_and_ungated_and_biased_ffns(family: str, dtype: str, tmp_path: Path) -> None:
    """A unit's entries of the biases of gate and up go with it; the last bias has no units, and is the source's."""
    path, found = upcycled(tmp_path, CONFIGS[family], dtype=dtype, verify="full")
    assert verify(path).ok
    plan = plan_file(tmp_path / "recipe.yaml")
    sources = plan.models["seed"].tensors
    units = set()
    for step in plan.steps:
        if step.expert == 1 and step.layer == 0:
            kept = isinstance(step.expr, expressions.Merge)
            assert kept == (step.role != "ffn.down.bias")
            assert step.expr == sources[step.role, 0] or kept
            if kept:
                units.add(step.expr.method.streams[0])
    assert len(units) == 1
    assert found


def test_the_deviation_of_one_entry_is_nothing() -> None:
    """One unit of a bias: its new number is its mean, which is itself."""
    method = expressions.Drop(0.25, "rows", 0, ("units", "numbers"))
    chunk = Chunk(0, [torch.tensor([1.0, 5.0, 3.0, 7.0])])
    known = survey(method, lambda: iter([chunk]), 4)
    assert combine(method, chunk, known).tolist() == [1.0, 5.0, 3.0, 7.0]


@pytest.mark.parametrize("units", ["rows", "columns"])
def test_drop_does_not_depend_on_chunks(units: Any) -> None:
    method = expressions.Drop(0.4, units, 3, ("units", "numbers"))
    x_RC = torch.randn(23, 17, generator=torch.Generator().manual_seed(0))

    def merged(size: int) -> torch.Tensor:
        flat = x_RC.flatten()
        chunks = [Chunk(start, [flat[start : start + size]], None, 17) for start in range(0, flat.numel(), size)]
        known = survey(method, lambda: iter(chunks), flat.numel())
        return torch.cat([combine(method, chunk, known) for chunk in chunks])

    whole = merged(23 * 17)
    assert (whole.view(23, 17) != x_RC).sum() == (math.floor(0.4 * 23) * 17 if units == "rows" else math.floor(0.4 * 17) * 23)
    assert all(torch.equal(merged(size), whole) for size in (1, 5, 17, 40, 101))


def test_the_ratio_is_read_as_a_decimal() -> None:
    """0.29 x 100 is 28.999999999999996 in binary fractions, and means 29."""
    assert expressions.Drop(0.29, "rows", 0, ("", "")).dropped(100) == 29
    assert expressions.Drop(1.0, "rows", 0, ("", "")).dropped(7) == 7


def test_what_is_rounded_to_sixteen_bits_by_way_of_float32_is_proved(tmp_path: Path) -> None:
    """Of 300,000 new numbers a few are halfway between two of bfloat16 once they are float32: either is right, and isolation must not tell."""
    wide = {**CONFIGS["llama"], "hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 1}
    path, _ = upcycled(tmp_path, wide, "experts: {count: 3, make: drop}", dtype="BF16")
    assert verify(path).ok


@pytest.mark.parametrize("ratio", [0, 0.02])
def test_drop_of_no_unit_is_a_copy(ratio: float, tmp_path: Path) -> None:
    """Ratio 0, or so small that no unit is left: every tensor is that of plain Sparse Upcycling, and proved as a copy."""
    path, found = upcycled(tmp_path / "a", CONFIGS["llama"], f"experts: {{count: 3, make: drop, ratio: {ratio}}}")
    _, plain = upcycled(tmp_path / "b", CONFIGS["llama"], "experts: [seed, seed, seed]")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    (copies,) = [check for check in verify(path).checks if check.name == "copies"]
    assert copies.detail == "33 tensors are a source's bytes"


def test_the_same_bytes_by_any_workers_and_shards(tmp_path: Path) -> None:
    """Streams are named by role, layer and expert: neither threads, nor files, nor the order of the layers can matter."""
    write_sources(tmp_path, CONFIGS["llama"])
    text = (
        "experts: [seed, code, law]\nrules: [{roles: [ffn.*], layers: 0, make: drop}, {roles: [ffn.*], layers: 1, make: noise, share: 0.7}]"
    )
    found = []
    for workers, size in ((1, "5GB"), (4, "20kB")):
        output = f"{{path: out{workers}, max_shard_size: {size}}}"
        path = publish(plan_file(write_recipe(tmp_path, text, "btx", output=output)), None, MergeOptions(workers=workers, verify=False))
        found.append({name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_same_folder_twice_and_another_seed(tmp_path: Path) -> None:
    first, _ = upcycled(tmp_path / "a", CONFIGS["llama"], verify=False)
    second, _ = upcycled(tmp_path / "b", CONFIGS["llama"], verify=False)
    other, _ = upcycled(tmp_path / "c", CONFIGS["llama"], f"{DROP}\nrandom_seed: 1", verify=False)
    assert folder_bytes(first) == folder_bytes(second)
    assert folder_bytes(first)["model.safetensors"] != folder_bytes(other)["model.safetensors"]


@pytest.mark.parametrize("make", ["drop", "low_rank, base: seed, rank: 2"])
def test_what_is_not_finite_in_a_source_is_said_to_be_the_source_s(make: str, llamas: Path) -> None:
    """One number that is not, anywhere in the tensor, is in the mean, or in every vector."""
    own = load_file(llamas / "code" / "model.safetensors")
    own["model.layers.1.mlp.up_proj.weight"][7] = torch.inf
    save_file(own, llamas / "code" / "model.safetensors")
    plan = plan_file(
        write_recipe(
            llamas, f"experts: [code, law]\nrules: [{{roles: [ffn.*], make: {make}}}]", "btx", ("seed", "code", "law")[make == "drop" :]
        )
    )
    with pytest.raises(NonFiniteError, match=r"experts\.0\.up_proj\.weight: .* values .* are NaN or infinite .*: it comes from a source"):
        publish(plan, None, MergeOptions())


# ---- noise -------------------------------------------------------------------------------------------------------------------


def test_noise_is_on_a_share_of_the_entries_and_other_ones_in_every_expert(tmp_path: Path) -> None:
    _, found = upcycled(tmp_path, CONFIGS["llama"], "experts: {count: 2, make: noise, std: 0.5, share: 0.25}")
    own = load_file(tmp_path / "seed" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    parts = [ffn(found, expert, "up") - own for expert in (0, 1)]
    for part in parts:
        assert float((part != 0).double().mean()) == pytest.approx(0.25, abs=0.05)
        assert float(part[part != 0].std()) == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(parts[0], parts[1])


def test_noise_of_no_share_is_a_copy(tmp_path: Path) -> None:
    _, found = upcycled(tmp_path, CONFIGS["llama"], "experts: {count: 2, make: noise, share: 0}")
    own = load_file(tmp_path / "seed" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(ffn(found, 1, "up"), own)


# ---- low rank ----------------------------------------------------------------------------------------------------------------

LOW = "experts: [seed, code, law]\nrules: [{roles: [ffn.*], make: low_rank, base: seed, rank: RANK}]"


def approximated(x_RC: list[list[float]], base_RC: list[list[float]], rank: int, size: int = 2) -> torch.Tensor:
    """The kernel's answer, in chunks of `size` elements."""
    x, base = torch.tensor(x_RC), torch.tensor(base_RC)
    columns = x.shape[1]
    cuts = [slice(start, start + size) for start in range(0, x.numel(), size)]
    chunks = [Chunk(cut.start, [x.flatten()[cut]], base.flatten()[cut], columns) for cut in cuts]
    known = survey(expressions.LowRank(rank), lambda: iter(chunks), x.numel())
    return torch.cat([combine(expressions.LowRank(rank), chunk, known) for chunk in chunks]).view(x.shape)


@pytest.mark.parametrize("turned", [False, True])
def test_low_rank_by_hand(turned: bool) -> None:
    """The difference is 6 u v' + 2 w z' with u = (3, 4)/5, v = (1, 2, 2)/3, w = (-4, 3)/5, z = (2, 1, -2)/3: rank 1 keeps the first."""
    u, v, w, z = np.array([3, 4]) / 5, np.array([1, 2, 2]) / 3, np.array([-4, 3]) / 5, np.array([2, 1, -2]) / 3
    first, both = 6 * np.outer(u, v), 6 * np.outer(u, v) + 2 * np.outer(w, z)
    base = np.ones((2, 3))
    first, both, base = (x.T if turned else x for x in (first, both, base))
    found = approximated((both + base).tolist(), base.tolist(), 1)
    np.testing.assert_allclose(found.numpy(), first + base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5)])
def test_low_rank_at_full_rank_is_the_expert(shape: tuple[int, int]) -> None:
    """Of the kernel itself to a rounding of float32; a plan makes it a copy, below."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    x = base + 0.01 * torch.randn(shape, generator=generator)
    torch.testing.assert_close(approximated(x.tolist(), base.tolist(), min(shape), 6), x, rtol=2**-23, atol=2**-40)


def test_low_rank_is_as_near_as_its_rank_allows() -> None:
    """Eckart and Young: what is left out is what the smaller singular values say, and no more."""
    generator = torch.Generator().manual_seed(0)
    base, x = (torch.randn(9, 14, generator=generator) for _ in range(2))
    values = torch.linalg.svdvals((x - base).double())
    for rank in range(1, 9):
        found = approximated(x.tolist(), base.tolist(), rank, 14).double()
        assert float((x.double() - found).norm()) == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-6)
        assert int((torch.linalg.svdvals(found - base.double()) > 1e-5).sum()) == rank


@pytest.mark.parametrize("rank", [32, 1000])
def test_low_rank_of_full_rank_is_planned_as_a_copy(rank: int, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama_biased"])
    plan = plan_file(write_recipe(tmp_path, LOW.replace("RANK", str(rank)), "btx"))
    assert all(isinstance(step.expr, expressions.Read) for step in plan.steps if step.expert is not None)
    assert verify(publish(plan, None, MergeOptions())).ok


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
@pytest.mark.parametrize("rank", [1, 5, 31])
def test_low_rank_experts_are_proved(rank: int, dtype: str, tmp_path: Path) -> None:
    """The base's own expert is a copy: its difference is nothing."""
    write_sources(tmp_path, CONFIGS["llama"], dtype=dtype)
    plan = plan_file(write_recipe(tmp_path, LOW.replace("RANK", str(rank)), "btx"))
    made = {(step.expert, isinstance(step.expr, expressions.Merge)) for step in plan.steps if step.expert is not None}
    assert made == {(0, False), (1, True), (2, True)}
    assert verify(publish(plan, None, MergeOptions())).ok


def test_low_rank_of_branches_that_differ_by_less_than_the_rank(tmp_path: Path) -> None:
    """A branch that was trained at rank 2: at rank 5 all is there, though the singular values beyond are nothing but rounding."""
    config = CONFIGS["llama"]
    values = random_values(7)
    write_checkpoint(tmp_path / "seed", config, values, "F32")

    def tuned(name: str, shape: tuple[int, ...]) -> Any:
        rng = np.random.default_rng(len(name))
        change = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1])) * 0.01 if len(shape) == 2 else 0.0
        return (values(name, shape) + change).astype(np.float32)

    write_checkpoint(tmp_path / "code", config, tuned, "F32")
    text = "rules: [{roles: [ffn.*], make: low_rank, base: seed, rank: 5}]"
    path = publish(plan_file(write_recipe(tmp_path, text, "btx", ("seed", "code"))), None, MergeOptions())
    found, own = load_file(path / "model.safetensors"), load_file(tmp_path / "code" / "model.safetensors")
    torch.testing.assert_close(ffn(found, 1, "up"), own["model.layers.0.mlp.up_proj.weight"], rtol=1e-5, atol=1e-6)
    assert verify(path).ok


def test_the_plan_counts_what_a_whole_difference_takes(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    low = plan_file(write_recipe(tmp_path, LOW.replace("RANK", "4"), "btx")).peak_memory(2)
    plain = plan_file(write_recipe(tmp_path, "experts: [seed, code, law]", "btx")).peak_memory(2)
    assert low - plain >= 2 * (16 * 40 * 32 + 48 * 32 * 32)


# ---- what verification must catch -----------------------------------------------------------------------------------------------


def forged(folder: Path, text: str, method: str = "btx") -> Forger:
    write_sources(folder, CONFIGS["llama"])
    return Forger(publish(plan_file(write_recipe(folder, text, method)), None, MergeOptions(verify=False)))


GATE = "model.layers.1.mlp.experts.1.gate_proj.weight"
UP, DOWN = GATE.replace("gate", "up"), GATE.replace("gate", "down")
BY_DROP = "rules: [{roles: [ffn.*], make: drop}]"


def other_units(forge: Forger) -> None:
    """Units drawn for each tensor by itself, as the authors' code does: every tensor is plausible alone."""
    value, own = forge.read(UP), load_file(forge.folder.parent / "code" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    there = (value != own).any(1)
    forge.write(UP, torch.where(there.roll(1)[:, None], value.roll(1, 0), own))


def one_old_unit(forge: Forger) -> None:
    value, own = forge.read(UP), load_file(forge.folder.parent / "code" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    unit = int((value != own).any(1).nonzero()[0])
    value[unit] = own[unit]
    forge.write(UP, value)


def wider(forge: Forger) -> None:
    """A deviation that is a thousandth larger."""
    value, own = forge.read(DOWN), load_file(forge.folder.parent / "code" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    forge.write(DOWN, torch.where(value != own, value * 1.001, value))


def swapped_experts(forge: Forger) -> None:
    for part in ("gate", "up", "down"):
        forge.swap(*(f"model.layers.1.mlp.experts.{e}.{part}_proj.weight" for e in (1, 2)))


def one_entry(forge: Forger) -> None:
    value = forge.read(GATE)
    value[3, 4] = torch.nextafter(torch.nextafter(value[3, 4], torch.tensor(9.0)), torch.tensor(9.0))
    forge.write(GATE, value)


@pytest.mark.parametrize("harm", [other_units, one_old_unit, wider, swapped_experts, one_entry])
def test_what_is_not_the_drop_of_its_source_is_found(harm: Any, tmp_path: Path) -> None:
    forge = forged(tmp_path, BY_DROP)
    assert verify(forge.folder).ok
    harm(forge)
    assert {"merges", "expert isolation"} <= failed(verify(forge.folder)).keys()


def test_noise_that_is_another_expert_s_is_found(tmp_path: Path) -> None:
    forge = forged(tmp_path, "experts: [seed, seed, code, law]\nrules: [{roles: [ffn.*], make: noise}]")
    forge.swap(*(f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in (0, 1)))
    assert {"merges", "expert isolation"} <= failed(verify(forge.folder)).keys()


def the_expert_itself(forge: Forger) -> None:
    """All of the difference in the place of a part of it."""
    forge.write(GATE, load_file(forge.folder.parent / "code" / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"])


def the_wrong_vectors(forge: Forger) -> None:
    """A difference of the same rank, that leaves out the largest singular value instead of a smaller one."""
    own, base = (
        load_file(forge.folder.parent / name / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"].double()
        for name in ("code", "seed")
    )
    u, s, v = torch.linalg.svd(own - base, full_matrices=False)
    forge.write(GATE, (base + (u[:, 1:5] * s[1:5]) @ v[1:5]).float())


@pytest.mark.parametrize("harm", [the_expert_itself, the_wrong_vectors, swapped_experts, one_entry])
def test_what_is_not_the_best_of_its_rank_is_found(harm: Any, tmp_path: Path) -> None:
    forge = forged(tmp_path, LOW.replace("RANK", "4"))
    assert verify(forge.folder).ok
    harm(forge)
    assert {"merges", "expert isolation"} <= failed(verify(forge.folder)).keys()


# ---- what is refused -------------------------------------------------------------------------------------------------------------

REFUSED = [
    ("btx", "experts: {count: 3, make: drop}", "experts: so many experts of one model are method sparse_upcycling; with btx list their sources."),
    ("sparse_upcycling", "experts: {count: 3}", "experts.make: is required and missing"),
    ("sparse_upcycling", "experts: {count: 3, make: dorp}", "experts.make: 'dorp' is none of expert, drop, noise"),
    ("sparse_upcycling", "experts: {count: 1, make: drop}", "experts.count: found 1, expected"),
    ("sparse_upcycling", "experts: {count: 3, make: drop, ratio: 1.5}", "experts.ratio: found 1.5, expected"),
    ("sparse_upcycling", "experts: {count: 3, make: drop, rate: 0.5}", "experts.rate: unknown key; did you mean 'ratio'?"),
    ("sparse_upcycling", "experts: {count: 3, make: drop, from: cod}", "experts: names the source 'cod', which is not among the sources"),
    ("btx", "rules: [{roles: [attn.*], make: drop}]", "rules[0].roles[0]: drop makes tensors of experts (ffn.*), 'attn.*' covers others."),
    ("btx", "rules: [{roles: ['*'], make: noise}]", "'*' covers routers, which no source has."),
    ("btx", "rules: [{roles: ['norm.*'], make: noise}]", "noise makes tensors of experts (attn.*, ffn.*), 'norm.*' covers others."),
    ("btx", "rules: [{roles: [ffn.up], make: drop}]", "a dropped unit has its entries in gate, up and down"),
    ("btx", "rules: [{roles: [ffn.*], make: noise, std: 1.0e-40}]", "rules[0].std: found 1e-40, expected a magnitude"),
    ("btx", "rules: [{roles: [ffn.*], make: low_rank, base: seed, rank: 0}]", "rules[0].rank: found 0, expected"),
    ("btx", "rules: [{roles: [ffn.*], make: low_rank, base: sed, rank: 2}]", "names the source 'sed', which is not among the sources"),
    ("btx", "rules: [{roles: [ffn.*], make: low_rank, from: seed, base: seed, rank: 2}]", "rules[0].from: is the base too"),
    ("btx", "rules: [{roles: [attn.*], make: noise}]", "asks for one tensor per expert, but layout 'mixtral' stores it shared"),
    ("merge", "rules: [{roles: [ffn.*], make: drop}]", "rules[0].make: method merge gives a dense model, which has no experts."),
]  # fmt: skip


@pytest.mark.parametrize(("method", "text", "said"), REFUSED)
def test_refused(method: str, text: str, said: str, llamas: Path) -> None:
    layout = ", layout: mixtral" if "mixtral" in said else ""
    names = ("seed",) if method == "sparse_upcycling" else ("seed", "code", "law")
    with pytest.raises(RecipeError) as error:
        plan_file(write_recipe(llamas, text, method, names, output=f"{{path: out{layout}}}"))
    assert said in str(error.value)


def test_what_is_only_copied_cannot_be_varied(llamas: Path) -> None:
    stored_as(llamas / "seed" / "model.safetensors", "F8_E4M3", lambda name: "mlp" in name)
    with pytest.raises(RecipeError) as error:
        plan_file(write_recipe(llamas, DROP, "sparse_upcycling", ("seed",)))
    assert "is F8_E4M3, and drop computes with" in str(error.value)


def test_a_recipe_of_copies_is_recorded_as_it_is_written(tmp_path: Path) -> None:
    path, _ = upcycled(tmp_path, CONFIGS["llama"])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.expert_names == ("seed",) * 3
    assert recipe.resolved()["experts"] == {"count": 3, "make": "drop", "ratio": 0.3}
    assert verify(path).experts == ("seed",) * 3
