"""The sentences of `diff --seed`: models that are made to earn each of them, and the whole of what is then said."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONFIGS, Result, write_recipe
from safetensors.numpy import load_file, save_file

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.comparing.branches import drift
from bam_merge.comparing.drift import Drift
from bam_merge.demo.synthetic import write_checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.showing.drift import drift_text
from bam_merge.showing.page import page_of
from bam_merge.showing.terminal import Terminal

CONFIG: dict[str, Any] = {
    **CONFIGS["llama"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}  # fmt: skip

Change = Callable[[str, np.ndarray], np.ndarray]


def drawn(seed: int, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([1000 + seed, *tensor.encode()]).standard_normal(shape)


def original(tensor: str, shape: tuple[int, ...]) -> np.ndarray:
    return 0.1 * drawn(0, tensor, shape) + (len(shape) == 1)


def write(folder: Path, name: str, change: Change, dtype: str = "F32") -> Path:
    write_checkpoint(folder / name, CONFIG, lambda tensor, shape: change(tensor, original(tensor, shape)), dtype=dtype)
    return folder / name


def same(tensor: str, x: np.ndarray) -> np.ndarray:
    return x


def noise(size: float, seed: int, *only: str) -> Change:
    """Noise of `size` times the norm, a direction for each seed, on the tensors that any of the words stand in."""

    def change(tensor: str, x: np.ndarray) -> np.ndarray:
        if only and not any(word in tensor for word in only):
            return x
        d = drawn(seed, tensor, x.shape)
        return x + size * d * np.linalg.norm(x) / np.linalg.norm(d)

    return change


def times(factor: float, *only: str) -> Change:
    return lambda tensor, x: factor * x if not only or any(word in tensor for word in only) else x


def random(*only: str) -> Change:
    return lambda tensor, x: original("another " + tensor, x.shape) if not only or any(word in tensor for word in only) else x


def chain(*changes: Change) -> Change:
    def change(tensor: str, x: np.ndarray) -> np.ndarray:
        for one in changes:
            x = one(tensor, x)
        return x

    return change


def parts(attention: float, ffn: float, seed: int) -> Change:
    return chain(noise(attention, seed, "self_attn"), noise(ffn, seed, "mlp"))


LORA = ("q_proj", "v_proj")
BRANCH, LEFT, TWINS, KEEP, LOSS = (
    "branches of this seed?",
    "did each leave it?",
    "two the same model?",
    "BAM or BTX?",
    "what averaging loses",
)
TIMES = "times as far as the FFN, each relative to its weights (noise of one size: 1)"
EQUALS = "attention experts (BAM) keep as much of it as FFN experts do; BTX would average it away."
DESTROY = "unrelated matrices have 0. Averaging them would destroy both."
SCALED = "scaled, not trained. Find out what scaled it, and undo that before a merge."

SITUATIONS: dict[str, tuple[dict[str, Change], dict[str, str | list[str]]]] = {
    "a LoRA on q and v": ({"code": noise(0.01, 1, *LORA)}, {
        BRANCH: "yes, it has cosine >0.9999 with it (unrelated models: 0), and 81.3% of its weights bit for bit (unrelated models: 0%).",
        LEFT: "yes, code by 0.446% of the matrices' norm, in attn.q and attn.v alone.",
        KEEP: "only attention drifted (by 0.705% of its weights' norm), the FFN is the seed's: attention experts (BAM) keep all that was "
        "learned; BTX's average with the seed would halve it, and FFN experts would be equal copies.",
    }),
    "three such LoRAs": ({name: noise(0.01, i, *LORA) for i, name in enumerate(("code", "law", "math"), 1)}, {
        LEFT: "yes, code by 0.446%, law by 0.446%, math by 0.446% of the matrices' norm, each in attn.q and attn.v alone.",
        TWINS: "no: at most 81.3% of the weights are bit-equal, those of code and law.",
        KEEP: "only attention drifted (by 0.705% of its weights' norm), the FFN is the seed's: attention experts (BAM) keep all that was "
        "learned; BTX would average it away, and FFN experts would be equal copies.",
        LOSS: "42% of a drift's norm (noise: 42%). The drifts are no more alike than noise: mean cosine 0.001 (noise: 0.006).",
    }),
    "one such LoRA among others": ({"code": noise(0.01, 1, *LORA), "law": noise(0.01, 2), "math": noise(0.01, 3)}, {
        LEFT: "yes, code by 0.446%, law by 1%, math by 1% of the matrices' norm; code in attn.q and attn.v alone.",
        KEEP: [
            "code: only attention drifted (by 0.705% of its weights' norm), the FFN is the seed's: attention experts (BAM) keep all that "
            "was learned; BTX would average it away, and FFN experts would be equal copies.",
            f"law and math: attention drifted 1.00 {TIMES}: {EQUALS}",
        ],
    }),
    "only the FFN": ({"a": noise(0.1, 1, "mlp"), "b": noise(0.1, 2, "mlp")}, {
        LEFT: "yes, a by 7.75%, b by 7.75% of the matrices' norm, each in ffn.gate, ffn.up and ffn.down alone.",
        KEEP: "only the FFN drifted (by 10% of its weights' norm), attention is the seed's: attention experts (BAM) would be equal copies, "
        "and BTX loses nothing.",
        LOSS: "29% of a drift's norm (noise: 29%). The drifts are no more alike than noise: cosine -0.005 (noise: 0.004).",
    }),
    "only the embeddings": ({"a": noise(0.1, 1, "embed"), "b": noise(0.1, 2, "embed")}, {
        BRANCH: "yes, each has the matrices of the seed's layers, and 96.9% of its weights bit for bit (unrelated models: 0%).",
        LEFT: "yes, a in embed alone, by 10% of what stands there; b in embed alone, by 10% of what stands there.",
        KEEP: "neither attention nor the FFN left the seed, experts of either would be equal copies. What moved, embed, is averaged by both.",
        LOSS: "28% of a drift's norm (noise: 29%). The drifts are no more alike than noise: cosine 0.035 (noise: 0.02).",
    }),
    "only the norms": ({"a": noise(0.1, 1, "norm")}, {
        LEFT: "yes, a in norm.attn, norm.ffn and norm.final alone, by 10% of what stands there.",
        KEEP: "neither attention nor the FFN left the seed, experts of either would be equal copies. What moved, norm.attn, norm.ffn and "
        "norm.final, is averaged by both.",
    }),
    "one layer": ({"a": noise(0.1, 1, "layers.2.")}, {
        LEFT: "yes, a by 5.02% of the matrices' norm, in layer 2 alone.",
        KEEP: f"attention drifted 1.00 {TIMES}: attention experts (BAM) keep as much of it as FFN experts do; BTX's average with the seed "
        "would halve it.",
    }),
    "one tensor": ({"a": noise(0.1, 1, "layers.2.mlp.up")}, {LEFT: "yes, a by 2.22% of the matrices' norm, in ffn.up of layer 2 alone."}),
    "mostly attention": ({"a": parts(0.1, 0.001, 1), "b": parts(0.1, 0.001, 2)}, {
        KEEP: f"attention drifted 100 {TIMES}: most of what was learned is there, attention experts (BAM) keep it, and FFN experts hardly "
        "differ; BTX would average it away.",
    }),
    "attention half as far": ({"a": parts(0.05, 0.1, 1), "b": parts(0.05, 0.1, 2)}, {
        KEEP: f"attention drifted 0.50 {TIMES}: attention experts (BAM) keep less than FFN experts do, but not nothing.",
    }),
    "attention hardly": ({"a": parts(0.0001, 0.1, 1), "b": parts(0.0004, 0.1, 2)}, {
        KEEP: f"attention drifted 0.001 to 0.004 {TIMES}: it hardly specialised, and attention experts (BAM) buy little over BTX.",
    }),
    "attention alike in all": ({name: chain(noise(0.1, 9, "self_attn"), noise(0.1, i, "mlp")) for i, name in enumerate("ab", 1)}, {
        KEEP: f"attention drifted 1.00 {TIMES}: attention went the same way in all, BTX's average keeps 100% of it, and attention experts "
        "(BAM) buy little.",
    }),
    "a multiple of the seed": ({"double": times(2)}, {
        BRANCH: f"STOP: double is 2 times the seed in all its matrices: {SCALED}",
        LEFT: "yes, double by 100% of the matrices' norm, being 2 times the seed.",
    }),
    "its negative": ({"a": times(-1)}, {BRANCH: f"STOP: a is -1 times the seed in all its matrices: {SCALED}"}),
    "attention doubled": ({"a": chain(noise(0.01, 1), times(2, "self_attn"))}, {
        BRANCH: f"STOP: a is 2 times the seed in attn.q, attn.k, attn.v and attn.o: {SCALED}",
    }),
    "what decay does": ({"a": times(0.9)}, {
        BRANCH: "yes, it has cosine >0.9999 with it (unrelated models: 0).",
        LEFT: "yes, a by 10% of the matrices' norm, being 0.9 times the seed.",
        KEEP: "all that moved is the seed's times a factor: nothing was learned that experts of attention or of the FFN could keep.",
    }),
    "all zero": ({"a": times(0)}, {BRANCH: "STOP: a is all zero in all its matrices, where the seed is not. Was it saved whole?"}),
    "attention zero": ({"a": chain(noise(0.01, 1), times(0, "self_attn"))}, {
        BRANCH: "STOP: a is all zero in attn.q, attn.k, attn.v and attn.o, where the seed is not. Was it saved whole?",
    }),
    "a stranger": ({"a": random(), "b": noise(0.01, 1)}, {
        BRANCH: "STOP: a is no branch of this seed. Its matrices have cosine 0.00 with the seed's and drifted by 1.42 of their norm; unrelated "
        "models have 0 and about 1.41. Averaging them would destroy both.",
    }),
    "strange attention": ({"a": random("self_attn"), "b": noise(0.01, 1)}, {
        BRANCH: "STOP: a is no branch of this seed in attn.q, attn.k, attn.v and attn.o: the cosine with the seed's is 0.00 there, >0.9999 in "
        f"its other matrices; {DESTROY}",
        LEFT: "yes, a by 89.4%, b by 1% of the matrices' norm; a in attn.q, attn.k, attn.v and attn.o alone.",
    }),
    "strange layers": ({"a": chain(noise(0.01, 1), random("layers.0.", "layers.1."))}, {
        BRANCH: "STOP: a is no branch of this seed in layers {0-1}: the cosine with the seed's is 0.00 there, >0.9999 in its other matrices; "
        f"{DESTROY}",
    }),
    "three strange layers of four": ({"a": chain(noise(0.01, 1), random("layers.0.", "layers.1.", "layers.3."))}, {
        BRANCH: "STOP: a is no branch of this seed in layers {0-1,3}: the cosine with the seed's is 0.00 there, >0.9999 in its other "
        f"matrices; {DESTROY}",
    }),
    "a strange tensor": ({"a": random("layers.2.mlp.up")}, {
        BRANCH: "STOP: a is no branch of this seed in ffn.up of layer 2: the cosine with the seed's is -0.02 there, >0.9999 in its other "
        f"matrices; {DESTROY}",
    }),
    "strange embeddings": ({"a": chain(noise(0.01, 1), random("embed"))}, {
        BRANCH: f"STOP: a is no branch of this seed in embed: the cosine with the seed's is -0.01 there, >0.9999 in its other matrices; {DESTROY}",
    }),
    "attention too far": ({"a": chain(noise(0.01, 1, "mlp"), noise(2.5, 1, "self_attn"))}, {
        BRANCH: "STOP: a is no branch of this seed in attn.q, attn.k, attn.v and attn.o: the cosine with the seed's is 0.37 there, >0.9999 in "
        f"its other matrices; {DESTROY}",
    }),
    "far": ({"a": noise(1, 1)}, {
        BRANCH: "yes, but from afar: it has cosine 0.7082 with it (unrelated models: 0).",
        LEFT: "yes, a by 100% of the matrices' norm.",
    }),
    "the seed": ({"a": same}, {BRANCH: "yes: it is the seed itself.", LEFT: "no: a never left it, every weight is equal."}),
    "the seed and a branch": ({"a": same, "b": noise(0.1, 1)}, {
        BRANCH: "yes, each has cosine 0.9950 or more with it (unrelated models: 0).",
        LEFT: "no: a never left it, every weight is equal. The other did: b by 10% of the matrices' norm.",
        TWINS: "no: no weight of one is bit-equal to another's.",
        LOSS: "50% of b's drift: the other stayed with the seed.",
    }),
    "the seed and two branches": ({"a": same, "b": noise(0.1, 1), "c": noise(0.1, 2)}, {
        LOSS: "53% of a drift's norm (noise: 53%), counting 1 that never moved. The drifts are no more alike than noise: cosine 0.002 "
        "(noise: 0.003).",
    }),
    "three that are one": ({name: noise(0.1, 1) for name in "abc"}, {
        TWINS: "yes: a, b and c, every weight is equal.",
        LOSS: "0% of a drift's norm (noise: 42%). The drifts are all but the same: mean cosine 1.000 (noise: 0.003).",
    }),
    "opposites": ({"a": noise(0.1, 1), "b": noise(-0.1, 1)}, {
        KEEP: f"attention drifted 1.00 {TIMES}: {EQUALS}",
        LOSS: "all: the drifts cancel, and their average is the seed. The drifts are all but opposite: cosine -1.000 (noise: 0.003).",
    }),
    "two alike and their opposite": ({"a": noise(0.1, 1), "b": noise(0.1, 1), "c": noise(-0.1, 1)}, {
        TWINS: "yes: a and b, every weight is equal.",
        LOSS: "67% of a drift's norm (noise: 42%). The drifts are not of one kind: cosine -1.000 of a and c, 1.000 of a and b (noise: 0.003).",
    }),
    "unlike sizes": ({"a": noise(0.1, 1), "b": noise(0.001, 2)}, {
        KEEP: f"attention drifted 1.00 {TIMES}: {EQUALS}",
        LOSS: "the drifts are of unlike size (b 0.1%, a 10%): the average is little but a's divided by 2, and lies 50 times as far from b as "
        "that went from the seed. The drifts are no more alike than noise: cosine 0.002 (noise: 0.003).",
    }),
    "partly alike": ({"a": chain(noise(0.1, 5), noise(0.1, 1)), "b": chain(noise(0.1, 5), noise(0.1, 2))}, {
        LOSS: "13% of a drift's norm (noise: 29%). The drifts are partly alike: cosine 0.499 (noise: 0.003).",
    }),
}  # fmt: skip


def compared(folder: Path, experts: Mapping[str, Change], dtype: str = "F32") -> Drift:
    seed = write(folder, "seed", same)
    return drift(seed, [write(folder, name, change, dtype) for name, change in experts.items()])


def answers(found: Drift) -> dict[str, list[str]]:
    said: dict[str, list[str]] = {}
    for reading in found.readings:
        assert reading.stop == reading.text.startswith("STOP: ")
        said.setdefault(reading.question, []).append(reading.text)
    return said


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_a_careful_engineer_would_say(name: str, tmp_path: Path) -> None:
    experts, expected = SITUATIONS[name]
    said = answers(compared(tmp_path, experts))
    assert {question: said.get(question) for question in expected} == {
        question: [text] if isinstance(text, str) else text for question, text in expected.items()
    }
    stopped = any(text.startswith("STOP") for text in said[BRANCH])
    assert not (stopped and (KEEP in said or LOSS in said))
    assert (TWINS in said) == (len(experts) > 1)


def test_more_than_the_weights_that_all_have(tmp_path: Path, run: Any) -> None:
    """A head that only one of the two has: all that was compared is equal, and that is what is said."""
    for name, tied in (("tied", True), ("untied", False)):
        write_checkpoint(tmp_path / name, {**CONFIG, "tie_word_embeddings": tied}, original, dtype="F32")
    said = answers(drift(tmp_path / "tied", [tmp_path / "untied"]))
    assert said == {
        BRANCH: ["yes: every weight that all have is the seed's."],
        LEFT: ["no: untied never left it, every weight that all have is equal."],
    }
    assert (
        run("diff", "--seed", tmp_path / "tied", tmp_path / "untied").status
        == 1
        == run("diff", tmp_path / "tied", tmp_path / "untied").status
    )


def test_shards_are_no_drift(tmp_path: Path, run: Any) -> None:
    seed = write(tmp_path, "seed", same)
    write_checkpoint(tmp_path / "sharded", CONFIG, original, dtype="F32", shards=3)
    assert run("diff", "--seed", seed, tmp_path / "sharded").status == 0
    assert answers(drift(seed, [tmp_path / "sharded"]))[LEFT] == ["no: sharded never left it, every weight is equal."]


def test_a_multiple_with_noise_is_one(tmp_path: Path) -> None:
    said = answers(compared(tmp_path, {"half": chain(times(0.5), noise(0.3, 1))}))
    assert said[BRANCH] == [f"STOP: half is 0.495 to 0.504 times the seed in all its matrices: {SCALED}"]


def test_a_cast_is_no_training(tmp_path: Path) -> None:
    said = answers(compared(tmp_path, {"cast": same}, "BF16"))
    assert said[LEFT] == ["hardly, cast by 0.166% of the matrices' norm, no further than rounding to BF16 takes it."] and KEEP not in said
    said = answers(compared(tmp_path / "more", {"cast": same, "code": noise(0.01, 1)}, "BF16"))
    assert said[LEFT] == [
        "yes, cast by 0.166%, code by 1.01% of the matrices' norm; cast no further than rounding to BF16 takes it."
    ]  # fmt: skip
    assert said[LOSS] == ["50% of code's drift: the other stayed with the seed."]


def test_signs_of_zeros_are_no_drift(tmp_path: Path) -> None:
    folders = [write(tmp_path, name, times(zero, "norm")) for name, zero in (("seed", 0.0), ("signs", -0.0))]
    said = answers(drift(folders[0], folders[1:]))
    assert said[LEFT] == ["yes, signs in the signs of zeros alone."] and said[BRANCH][0].startswith(
        "yes, it has the matrices of the seed's"
    )
    assert KEEP not in said


def test_a_seed_of_zeros_has_no_angles(tmp_path: Path) -> None:
    seed, code = write(tmp_path, "seed", times(0)), write(tmp_path, "code", noise(0.1, 1))
    said = answers(drift(seed, [code]))
    assert said[BRANCH] == ["not known: the seed's matrices are all zero."]
    assert said[LEFT] == ["yes, code by an unknown share of the matrices' norm."]
    assert said[KEEP] == ["not known: the seed's attention or FFN is all zero, so that no drift is relative to it."]


def test_mixtures_are_neither_bam_nor_btx_yet(tmp_path: Path) -> None:
    for name, change in {"seed": same, "code": noise(0.1, 1), "law": noise(0.1, 2)}.items():
        write(tmp_path, name, change)
    for out in ("one", "two"):
        seed = 5 if out == "two" else 0
        merge(
            load_recipe(write_recipe(tmp_path, f"random_seed: {seed}\nrouter: {{init: normal, std: 0.02}}", output=f"{{path: {out}}}")),
            options=MergeOptions(verify=False),
        )
    (path,) = (tmp_path / "two").glob("*.safetensors")
    tensors = {name: noise(0.01, 7, "experts")(name, x).astype(x.dtype) for name, x in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    said = answers(drift(tmp_path / "one", [tmp_path / "two"]))
    assert said[BRANCH][0].startswith("yes, it has cosine 0.99")  # routers of another random seed are no other ancestor
    assert said[KEEP] == ["neither yet: these are mixtures. Both are made of dense models, such as one expert of each (PATH#EXPERT)."]
    strange = {name: random("mlp.experts.1.")(name, x).astype(x.dtype) for name, x in load_file(path).items()}
    save_file(strange, path, metadata={"format": "pt"})
    (stop,) = answers(drift(tmp_path / "one", [tmp_path / "two"]))[BRANCH]
    assert stop.startswith("STOP: two is no branch of this seed in model.layers.{0-3}.mlp.experts.1.gate_proj.weight, ")
    save_file({name: random("experts")(name, x).astype(x.dtype) for name, x in strange.items()}, path, metadata={"format": "pt"})
    (stop,) = answers(drift(tmp_path / "one", [tmp_path / "two"]))[BRANCH]
    assert stop.startswith("STOP: two is no branch of this seed. Its matrices have cosine 0.00 with the seed's")
    said = answers(drift(tmp_path / "seed", [tmp_path / "one#code", tmp_path / "one#law"]))
    assert said[KEEP] == [f"attention drifted 1.00 {TIMES}: {EQUALS}"]


def test_tensors_without_arithmetic_count_too(tmp_path: Path, run: Any) -> None:
    """By their bytes: a comparison that cannot compute with them does not pass over them."""
    for name, value in (("a", 1 + 2j), ("b", 1 + 3j)):
        save_file({"x": np.ones((8, 8), np.float32), "c": np.array([value], np.complex64)}, tmp_path / f"{name}.safetensors")
    a, b = (tmp_path / f"{name}.safetensors" for name in "ab")
    done: Result = run("diff", "--seed", a, b)
    assert done.status == 1 and "1 tensor of a dtype that no arithmetic is done with differ, c" in " ".join(done.out.split())
    assert run("diff", "--seed", a, a).status == 0
    save_file({"c": np.array([1j], np.complex64)}, a)
    with pytest.raises(CheckpointError, match="no tensor that all of the models have holds numbers"):
        drift(a, [a])


def test_the_page_and_the_terminal_say_who_drifted(tmp_path: Path) -> None:
    """One expert of two that moved has no cosine with the other: that is not "no drift"."""
    found = compared(tmp_path, {"code": noise(0.01, 1, *LORA), "law": noise(0.1, 2, "mlp")})
    page = page_of(found)
    assert (
        "only code drifted" in page and "only law drifted" in page and page.count("no drift<") == 7
    )  # embed, head, the norms, keys and attention's output
    assert "only attention drifted" in drift_text(found, Terminal(width=200))


@pytest.mark.parametrize("size", [1e300, 1e-310])
def test_huge_and_tiny_models_have_the_figures_of_others(size: float, tmp_path: Path, run: Any) -> None:
    folders = [write(tmp_path, name, change) for name, change in (("seed", same), ("code", noise(0.1, 1)), ("law", noise(0.1, 2)))]
    plain = json.loads(run("diff", "--seed", *folders, "--json").out)
    for folder in folders:
        (path,) = folder.glob("*.safetensors")
        save_file({tensor: size * x.astype(np.float64) for tensor, x in load_file(path).items()}, path)
    done: Result = run("diff", "--seed", *folders, "--json")
    scaled = json.loads(done.out, parse_constant=lambda text: pytest.fail(text))
    assert scaled["readings"] == plain["readings"] and not scaled["stop"]
    for figure in ("relative_drift", "seed_cosine"):
        assert scaled["overall"][figure] == pytest.approx(plain["overall"][figure], rel=1e-5)
    assert scaled["overall"]["cosine"][0] == pytest.approx(plain["overall"]["cosine"][0], abs=1e-6)
    assert scaled["overall"]["kept_by_averaging"] == pytest.approx(plain["overall"]["kept_by_averaging"], rel=1e-5)


def test_figures_beyond_float64_are_said_as_such(tmp_path: Path) -> None:
    x = original("x", (64, 64))
    beside = x.copy()
    beside[0, :2] = 1e200, 1e-200
    moved = beside.copy()
    moved[0, 1] = 2e-200
    for name, values in {"tiny": x * 1e-200, "huge": x * 1e200, "beside": beside, "moved": moved}.items():
        save_file({"x": values}, tmp_path / f"{name}.safetensors")
    tiny, huge, seed, least = (tmp_path / f"{name}.safetensors" for name in ("tiny", "huge", "beside", "moved"))
    said = answers(drift(tiny, [huge]))
    assert said[BRANCH] == [f"STOP: huge.safetensors is more than 1.8e308 times the seed in all its matrices: {SCALED}"]
    assert said[LEFT] == ["yes, huge.safetensors by >1.8e310% of the matrices' norm, being more than 1.8e308 times the seed."]
    found = drift(seed, [least])
    assert answers(found)[LEFT] == ["yes, moved.safetensors by <4.9e-322% of the matrices' norm."] and not found.equal
