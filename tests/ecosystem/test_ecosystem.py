"""The exported model in the hands of its users' tools: Trainer, TRL, PEFT, FSDP2, lm-eval, and recipes/train. `make test-ecosystem`.

Opt-in: pytest leaves the mark `ecosystem` out. Third-party packages are imported inside the tests, so that nobody else needs them.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources

import bam_merge
from bam_merge import MergeOptions, load_recipe, merge

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default")]  # warnings of six projects are theirs to mend

ROOT = Path(__file__).parent.parent.parent
WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))]
VARIANTS = {
    "expert_kv": ("llama", "bam", ""),
    "shared_kv_tied": ("llama_tied", "bam", "attention: {kv: shared, routing: soft}"),
    "top2_parallel": ("cohere", "bam", "attention: {kv: expert, routing: top_k, top_k: 2}\nffn: {top_k: 2, gate: topk_then_softmax}"),
    "btx": ("qwen3", "btx", ""),
}
"""Family, method, and further sections of the recipe."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A merged folder of each variant, with a tokenizer of 64 words."""
    return merged(tmp_path, request.param)


@pytest.fixture
def simple(tmp_path: Path) -> Path:
    """One merged folder: Expert-KV of llamas."""
    return merged(tmp_path, "expert_kv")


def merged(where: Path, variant: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    family, method, sections = VARIANTS[variant]
    write_sources(where, CONFIGS[family])
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>")
    tokenizer.save_pretrained(where / "seed")
    return merge(load_recipe(write_recipe(where, sections, method)), where / "out", MergeOptions(verify=False))


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


def texts(count: int = 64) -> list[str]:
    """Words that count up, from anywhere: soon learnt."""
    return [" ".join(f"w{3 + (start + i) % 61}" for i in range(24)) for start in range(count)]


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def options(output: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output), "max_steps": 80, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 10,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def spy() -> Any:
    """A callback that keeps each router's gradient of the first step, and the losses."""
    from transformers import TrainerCallback

    class Spy(TrainerCallback):
        def __init__(self) -> None:
            self.gradients: dict[str, float] = {}
            self.losses: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name, parameter in model.named_parameters() if not self.gradients else ():
                if ".router." in name and parameter.requires_grad:
                    self.gradients[name] = float(parameter.grad.norm())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.losses += [float(logs["loss"])] if "loss" in logs else []

    return Spy()


def check_learnt(seen: Any, model: Any) -> None:
    """The loss has fallen, and every router had a gradient."""
    assert seen.losses[-1] < 0.8 * seen.losses[0]
    attention = 1 if model.config.num_attention_experts else 0
    assert len(seen.gradients) == model.config.num_hidden_layers * (1 + attention)
    assert all(norm > 0 for norm in seen.gradients.values())


def test_trainer(folder: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, seen = load(folder), spy()
    rows = [{"input_ids": torch.tensor(ids(text)), "labels": torch.tensor(ids(text))} for text in texts()]
    trainer = Trainer(
        model=model, args=TrainingArguments(**options(tmp_path / "run")), train_dataset=rows, eval_dataset=rows, callbacks=[seen]
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    check_learnt(seen, model)
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    trainer.save_model()
    reference = bam_merge.load_model(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(reference(rows[0]["input_ids"][None]), model(rows[0]["input_ids"][None]).logits, atol=1e-4, rtol=1e-4)


def test_accumulated_gradients_are_those_of_one_batch(simple: Path, tmp_path: Path) -> None:
    """Two halves with unequal padding, accumulated, give the NLL gradients of the whole: the routers' losses are not linear in batches."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": torch.tensor(ids(text)), "labels": torch.tensor(ids(text))} for text in texts(8)]
    for row, kept in zip(rows, range(4, 24, 3), strict=False):
        row["labels"] = row["labels"].clone()
        row["labels"][kept:] = -100
    moved = []
    for size, accumulated in ((8, 1), (4, 2)):
        model = load(simple)
        model.config.output_router_logits = False
        sizes = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        arguments = TrainingArguments(**{**options(tmp_path / "run"), **sizes}, optim="sgd", max_grad_norm=0.0)
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        moved.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    for name, parameter in moved[0].items():
        torch.testing.assert_close(parameter, moved[1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_trl(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model, seen = load(folder), spy()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options(tmp_path / "run"), max_length=32, packing=False, bf16=False),
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
        callbacks=[seen],
    )
    trainer.train()
    check_learnt(seen, model)


@pytest.mark.parametrize("experts", [False, True], ids=["attention", "attention_and_ffn"])
def test_peft(simple: Path, tmp_path: Path, experts: bool) -> None:
    """LoRA on the fused projections, and on the FFN experts' parameters: trains, reloads, merges, and the merged folder is a BAM folder."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Trainer, TrainingArguments

    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(load(simple), LoraConfig(r=4, target_modules=projections, target_parameters=parameters, task_type="CAUSAL_LM"))
    rows = [{"input_ids": torch.tensor(ids(text)), "labels": torch.tensor(ids(text))} for text in texts()]
    seen = spy()
    arguments = TrainingArguments(**{**options(tmp_path / "run"), "learning_rate": 3e-2})
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[seen]).train()
    assert seen.losses[-1] < 0.95 * seen.losses[0]
    model.eval()
    batch = rows[0]["input_ids"][None]
    with torch.no_grad():
        trained = model(batch).logits
        assert not torch.allclose(trained, load(simple)(batch).logits, atol=1e-2)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(simple), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(batch).logits, trained, atol=1e-5, rtol=1e-5)
        whole = again.merge_and_unload()
        torch.testing.assert_close(whole(batch).logits, trained, atol=1e-4, rtol=1e-4)
        whole.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(bam_merge.load_model(tmp_path / "merged")(batch), trained, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(load(tmp_path / "merged")(batch).logits, trained, atol=1e-4, rtol=1e-4)


def test_fsdp2(folder: Path, tmp_path: Path) -> None:
    """Two gloo processes, each with half the rows: the mean of the halves' gradients, as one process finds it."""
    batch = torch.tensor([ids(text) for text in texts(4)])
    torch.save(batch, tmp_path / "batch.pt")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(Path(__file__).with_name("fsdp2.py")),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(folder), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "gradients.pt")
    model = load(folder).train()
    for half in batch.chunk(2):
        (model(input_ids=half, labels=half).loss / 2).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(found) == set(expected)
    assert all(float(gradient.norm()) > 0 for name, gradient in found.items() if ".router." in name)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_lm_eval(folder: Path) -> None:
    """Log-likelihoods and greedy continuations are the reference model's."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=2, dtype="float32", max_length=64)
    pairs = [("w3 w4 w5", " w6 w7"), ("w9", " w10"), ("w30 w31", " w40 w41 w42")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    reference = bam_merge.load_model(folder)
    for (context, continuation), (found, greedy) in zip(pairs, model.loglikelihood(requests), strict=True):
        given, wanted = ids(context), ids(continuation)
        with torch.no_grad():
            logs = reference(torch.tensor([given + wanted]))[0, len(given) - 1 : -1].log_softmax(-1)
        expected = logs.gather(-1, torch.tensor(wanted)[:, None]).sum()
        assert found == pytest.approx(float(expected), abs=1e-3)
        assert greedy == (logs.argmax(-1).tolist() == wanted)
    until = Instance("generate_until", {}, ("w3 w4 w5", {"until": ["</s>"], "max_gen_toks": 5, "do_sample": False}), 0)
    made = reference.generate(torch.tensor([ids("w3 w4 w5")]), 5)[0, 3:].tolist()
    shown = [WORDS[token] for token in made[: made.index(2) if 2 in made else None]]
    assert [word for word in model.generate_until([until])[0].split() if word in WORDS[3:]] == [word for word in shown if word in WORDS[3:]]


# ---- recipes/train ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe() -> ModuleType:
    """recipes/train/train.py."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "recipes" / "train" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training_config(folder: Path, where: Path, **replaced: Any) -> Path:
    """A config that trains `folder` on two domains: words that count up, and words that count down."""
    import json

    (where / "up.txt").write_text("\n".join(texts()))
    (where / "down.txt").write_text("\n".join(" ".join(reversed(text.split())) for text in texts()))
    training = {key: value for key, value in options(where).items() if key != "output_dir"}
    both = {"up": "up.txt", "down": "down.txt"}
    config = {
        "model": str(folder), "output": "trained", "text": both, "heldout": both, "heldout_windows": 8, "window": 16, "training": training,
        "losses": {"router_aux_loss_coef": 0.02}, **replaced,
    }  # fmt: skip
    path = where / "train.yaml"
    path.write_text(json.dumps(config))
    return path


def test_training_recipe(simple: Path, tmp_path: Path, recipe: ModuleType) -> None:
    measured = recipe.train(recipe.load_config(training_config(simple, tmp_path)))
    assert set(measured) == {"up", "down"}
    assert all(after < 0.8 * before for before, after in measured.values())
    model, reference = load(tmp_path / "trained"), bam_merge.load_model(tmp_path / "trained")
    assert model.config.use_cache and model.config.router_aux_loss_coef == 0.02
    up = recipe.windows(recipe.AutoTokenizer.from_pretrained(simple, trust_remote_code=True), tmp_path / "up.txt", 16)[:8]
    with torch.no_grad():
        logits = reference(up)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), up[:, 1:].flatten())
    assert float(nll.exp()) == pytest.approx(measured["up"][1], rel=1e-3)  # plain: without the routers' losses


def test_the_mix_has_its_shares(recipe: ModuleType) -> None:
    domains = {name: torch.full((5, 4), value) for value, name in enumerate(("a", "b", "c"))}
    for name, windows in domains.items():
        windows[:, 0] = torch.arange(5)
        assert name in domains
    rows = recipe.mix(domains, {"a": 2.0, "b": 1.0, "c": 1.0}, 24, seed=0)
    kinds = [int(row["input_ids"][1]) for row in rows]
    assert [kinds.count(kind) for kind in range(3)] == [12, 6, 6]
    used = [int(row["input_ids"][0]) for row in rows if int(row["input_ids"][1]) == 0]
    assert all(2 <= used.count(window) <= 3 for window in range(5))  # 12 rows of 5 windows: each twice, two of them three times
    assert kinds != sorted(kinds)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"windw": 16}, "windw: unknown key; did you mean 'window'?"),
        ({"shares": {"up": 1}}, "they must name the same domains"),
        ({"training": {"max_step": 2, "max_steps": 2}}, "training.max_step: not among TrainingArguments; did you mean 'max_steps'?"),
        ({"training": {}}, "max_steps: must be a number of steps above 0"),
        ({"text": {"up": "nowhere.txt"}, "heldout": {}}, "nowhere.txt: cannot be read"),
        ({"window": 100_000}, "fewer than one window of 100000"),
        ({"model": "nowhere"}, "nowhere"),
        ({"output": "seed"}, "exists and is not empty"),
    ],
)
def test_mistakes_of_a_config(simple: Path, tmp_path: Path, recipe: ModuleType, replaced: dict[str, Any], message: str) -> None:
    with pytest.raises(bam_merge.BamMergeError) as caught:
        recipe.train(recipe.load_config(training_config(simple, tmp_path, **replaced)))
    assert message in "\n".join(caught.value.problems)
