"""Routers made of texts: the rule by hand, every family and layout, the same bytes whoever works, and what a run says."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import CONFIGS
from proofs import UNPROVED, failed
from runs import folder_bytes, options
from scenes import SOURCES, recipe, router, texts, write_scene

from bam_merge import load_model, merge, verify
from bam_merge.checkpoints.folder import open_checkpoint
from bam_merge.model.gates import route
from bam_merge.planning.make import make_plan, plan_file
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import load_recipe

ATTENTION, FFN = "model.layers.{}.self_attn.router.weight", "model.layers.{}.mlp.router.weight"


def inputs_of(folder: Path, windows: Any) -> dict[tuple[str, int], list[numpy.ndarray[Any, Any]]]:
    """What the routers of a model would see, window by window, by running all of it at once, in float64."""
    model = load_model(folder, torch.float64)
    seen: dict[tuple[str, int], list[numpy.ndarray[Any, Any]]] = {}
    for layer, block in enumerate(model.model.layers):
        for part, name in ((block.self_attn, "attention"), (block.mlp, "ffn")):
            part.register_forward_pre_hook(
                lambda module, args, key=(name, layer): seen.setdefault(key, []).append(args[0][0, 1:].detach().numpy().copy())
            )
    for ids in windows:
        model(torch.tensor([ids]))
    return seen


def ridge(by_text: list[numpy.ndarray[Any, Any]], scale: float, penalty: float) -> numpy.ndarray[Any, Any]:
    """The formula, word for word."""
    count, width = len(by_text), by_text[0].shape[1]
    second = sum(x.T @ x / len(x) for x in by_text) / count
    means = numpy.stack([x.mean(0) for x in by_text])
    right = (means - means.mean(0)) / count
    return numpy.asarray(scale * right @ numpy.linalg.inv(second + penalty * numpy.trace(second) / width * numpy.eye(width)))


def stored(folder: Path, name: str) -> numpy.ndarray[Any, Any]:
    return dict(load_model(folder, torch.float64).state_dict())[name].numpy()


@pytest.mark.parametrize("tokens", [300, 12], ids=["more tokens than columns", "fewer"])
def test_the_rows_are_those_of_the_formula(tokens: int, tmp_path: Path) -> None:
    plan = plan_file(recipe(write_scene(tmp_path), router(tokens=tokens, scale=2.5, **{"lambda": 0.3})))
    out = publish(plan, None, UNPROVED)
    assert plan.calibration is not None
    read = plan.calibration.corpora["router.ffn"].texts
    for key, name in (("attention", ATTENTION), ("ffn", FFN)):
        for layer in (0, 1):
            by_text = [numpy.concatenate(inputs_of(tmp_path / "seed", read[source].windows)[key, layer]) for source in SOURCES]
            expected = ridge(by_text, 2.5, 0.3)
            assert numpy.allclose(stored(out, name.format(layer)), expected, rtol=0, atol=2e-4 * abs(expected).max())


def test_means_have_one_length_and_the_margin_that_scale_says(tmp_path: Path) -> None:
    prompts = "negative_prompts: {code: [ab cd ef]}"
    plan = plan_file(recipe(write_scene(tmp_path), f"router: {{init: mean, texts: {texts()}, scale: 4, tokens: 300, {prompts}}}"))
    out = publish(plan, None, UNPROVED)
    assert plan.calibration is not None
    corpus = plan.calibration.corpora["router.ffn"]
    of = {name: inputs_of(tmp_path / "seed", text.windows) for name, text in corpus.texts.items()}
    negative = numpy.concatenate(inputs_of(tmp_path / "seed", corpus.negative["code"].windows)["ffn", 1]).mean(0)
    means = numpy.stack([numpy.concatenate(of[name]["ffn", 1]).mean(0) for name in SOURCES])
    typical = means - numpy.stack([negative * (name == "code") for name in SOURCES])
    rows = stored(out, FFN.format(1))
    directions = typical / numpy.linalg.norm(typical, axis=1, keepdims=True)
    differences = rows[0] - rows[1], directions[0] - directions[1]
    assert numpy.dot(*differences) / numpy.prod([numpy.linalg.norm(d) for d in differences]) > 1 - 1e-6
    logits = means @ rows.T
    margins = [logits[j, j] - (logits[j].sum() - logits[j, j]) / 2 for j in range(3)]
    assert numpy.mean(margins) == pytest.approx(4, rel=1e-4)
    assert verify(out).ok


@pytest.mark.parametrize("init", ["ridge", "mean"])
@torch.no_grad()
def test_a_router_from_texts_for_sigmoids_chooses_as_for_a_softmax_with_nearly_its_gates(init: str, tmp_path: Path) -> None:
    """Its rows are the softmax's less one vector, so that every token goes where it goes there. Of the softmax's own rows sigmoids would be
    high for all experts, and gates more alike."""
    scene, found = write_scene(tmp_path), {}
    for gate in ("topk_then_softmax", "topk_then_sigmoid"):
        text = f"{router(init, scale=6)}\nffn: {{top_k: 2, gate: {gate}}}"
        plan = plan_file(recipe(scene, text, output=f"{{path: {gate}}}"))
        found[gate] = load_model(publish(plan, None, UNPROVED)).model.layers[1].mlp
    assert plan.calibration is not None
    windows = [(of, ids) for of, name in enumerate(SOURCES) for ids in plan.calibration.corpora["router.ffn"].texts[name].windows]
    x_MD = torch.from_numpy(numpy.concatenate(inputs_of(scene / "seed", [ids for _, ids in windows])["ffn", 1])).float()
    own_M1 = torch.tensor([of for of, ids in windows for _ in ids[1:]])[:, None]
    softmax, sigmoid = found.values()
    difference_MN = softmax.router(x_MD) - sigmoid.router(x_MD)
    assert float((difference_MN - difference_MN[:, :1]).abs().max()) < 1e-3
    assert float(difference_MN.mean()) == pytest.approx(4, abs=1)  # (1 - 1/3) 6, but for what the ridge takes

    def gate_of_its_own(rows: Any, how: str) -> float:
        return float(route(rows, x_MD, 2, how, None).gather(1, own_M1).mean())

    right = gate_of_its_own(sigmoid.router, "topk_then_sigmoid")
    assert right > 0.7
    assert right > gate_of_its_own(softmax.router, "topk_then_softmax") - 0.05
    assert right > gate_of_its_own(softmax.router, "topk_then_sigmoid") + 0.02


def test_the_router_tells_the_texts_apart_and_the_manifest_says_how_often(tmp_path: Path) -> None:
    how, said = options()
    out = merge(load_recipe(recipe(write_scene(tmp_path))), options=how)
    record = json.loads((out / "bam_merge.json").read_text())["calibration"]
    assert record["accuracy"].keys() == {name.format(layer) for name in (ATTENTION, FFN) for layer in (0, 1)}
    assert all(0.6 < router["tokens"] <= 1 and router["windows"] == 1 for router in record["accuracy"].values())
    text = record["texts"]["router.ffn"]["texts"]["law"]
    assert text["tokens"] == 300 and text["further"] > 0 and text["read"][0]["name"] == "law.txt"
    assert any("of tokens that they were not made of go to the expert whose text it is" in line for line in said)


LAYOUTS = {
    "bam": ("bam", "llama"),
    "btx": ("btx", "llama"),
    "mixtral": ("btx", "llama"),
    "qwen2_moe": ("btx", "qwen2"),
    "qwen3_moe": ("btx", "qwen3"),
    "granitemoe": ("btx", "granite"),
    "ernie4_5_moe": ("btx", "llama"),
    "solar_open": ("btx", "llama"),
    "cohere2_moe": ("btx", "cohere2"),
    "flex_olmo": ("btx", "olmo2"),
}


@pytest.mark.parametrize("inputs", ["seed", "mixture"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_proved(layout: str, inputs: str, tmp_path: Path) -> None:
    method, family = LAYOUTS[layout]
    output = "{path: out}" if layout == "btx" else f"{{path: out, layout: {layout}}}"
    gate = "\nffn: {gate: topk_then_sigmoid}" if layout == "solar_open" else ""
    out = merge(load_recipe(recipe(write_scene(tmp_path, family), router(inputs=inputs) + gate, method=method, output=output)))
    report = verify(out)
    assert report.ok
    checks = {check.name: check for check in report.checks}
    assert checks["calibration"].ok and checks["accuracy"].ok and checks["texts"].ok


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_proved(family: str, tmp_path: Path) -> None:
    out = merge(
        load_recipe(recipe(write_scene(tmp_path, family, names=("seed", "code")), router(names=("seed", "code")), names=("seed", "code")))
    )
    report = verify(out)
    assert {check.name: check.ok for check in report.checks}["calibration"] and not failed(report)


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("inputs", ["seed", "mixture"])
def test_a_parallel_block_with_one_norm_has_one_solution(kv: str, inputs: str, tmp_path: Path) -> None:
    text = f"{router(inputs=inputs)}\nattention: {{kv: {kv}}}"
    out = merge(load_recipe(recipe(write_scene(tmp_path, "cohere"), text)))
    assert (stored(out, ATTENTION.format(1)) == stored(out, FFN.format(1))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_full_verification_and_other_dtypes(dtype: str, tmp_path: Path) -> None:
    out = merge(load_recipe(recipe(write_scene(tmp_path, dtype="BF16"), output=f"{{path: out, dtype: {dtype}}}")))
    from bam_merge import VerifyOptions

    assert verify(out, options=VerifyOptions("full")).ok


@pytest.mark.parametrize("inputs", ["seed", "mixture"])
def test_the_same_bytes_for_any_number_of_workers(inputs: str, tmp_path: Path) -> None:
    config = {**CONFIGS["llama"], "hidden_size": 160, "intermediate_size": 200}
    path = recipe(write_scene(tmp_path, config), router(inputs=inputs))
    one, three = (merge(load_recipe(path), tmp_path / f"out{n}", options(workers=n)[0]) for n in (1, 3))
    assert folder_bytes(one) == folder_bytes(three)


def test_an_expert_twice_has_one_row_twice(tmp_path: Path) -> None:
    out = merge(load_recipe(recipe(write_scene(tmp_path), f"{router()}\nexperts: [seed, code, law, code]")))
    rows = stored(out, FFN.format(0))
    assert rows.shape[0] == 4 and (rows[1] == rows[3]).all() and not (rows[1] == rows[0]).all()


def test_rules_and_sections_of_each_router(tmp_path: Path) -> None:
    text = (
        f"router: {{attention: {{init: mean, texts: {texts()}}}, ffn: {{init: normal}}}}\n"
        f"rules: [{{roles: [router.ffn], layers: 1, make: ridge, texts: {texts()}, tokens: 200}}]"
    )
    plan = plan_file(recipe(write_scene(tmp_path), text))
    made = {step.name: step.expression for step in plan.steps if step.role.startswith("router")}
    assert made[ATTENTION.format(0)] == "mean(seed, code, law; tokens=8192, scale=6)"
    assert made[FFN.format(0)] == "normal(std=0.02)"
    assert made[FFN.format(1)] == "ridge(seed, code, law; tokens=200, scale=6, lambda=0.1)"
    assert verify(publish(plan, None, options(verify=True)[0])).ok


def test_an_adapter_as_the_seed(tmp_path: Path) -> None:
    """The texts go through what the recipe calls seed, with its updates."""
    write_scene(tmp_path)
    plain = merge(load_recipe(recipe(tmp_path)), tmp_path / "plain", UNPROVED)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    from safetensors.torch import save_file

    pairs = {
        f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{side}.weight": torch.randn(
            shape, generator=torch.Generator().manual_seed(layer)
        )
        for layer in (0, 1)
        for side, shape in (("A", (4, 32)), ("B", (40, 4)))
    }
    save_file(pairs, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "base_model_name_or_path": "x"})
    )
    path = tmp_path / "adapted.yaml"
    path.write_text(
        "method: bam\nsources: {base: seed, seed: {base: base, adapter: adapter}, code: code, law: law}\nexperts: [seed, code, law]\n"
        f"{router()}\noutput: {{path: adapted}}\n"
    )
    out = merge(load_recipe(path))
    assert verify(out).ok
    assert not numpy.allclose(stored(out, FFN.format(1)), stored(plain, FFN.format(1)), rtol=1e-2)


def test_without_the_new_keys_nothing_is_new(tmp_path: Path) -> None:
    out = merge(load_recipe(recipe(write_scene(tmp_path), "router: {init: normal}")), options=UNPROVED)
    assert "calibration" not in json.loads((out / "bam_merge.json").read_text())
    assert "calibration" not in make_plan(load_recipe(recipe(tmp_path, ""))).document()
    assert open_checkpoint(out).config["num_experts_per_tok"] == 1
