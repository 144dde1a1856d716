"""What each kind of stage makes in its folder, from its parameters and the folders of its inputs. See stages.py and settings.py."""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import texts
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "train"))
import train as phase3  # recipes/train/train.py: the windows, the mixing and the Trainer are the recipe's

from bam_merge import MergeOptions, inspect, load_recipe, merge, verify

disable_progress_bar()
END = "<|endoftext|>"
Inputs = Mapping[str, Path]


def write_json(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, indent=1) + "\n")


# ---- data ------------------------------------------------------------------------------------------------------------------


def data(out: Path, parameters: dict[str, Any], inputs: Inputs) -> None:
    """text/ and heldout/ DOMAIN.txt, the tokenizer, tokens.pt with windows [windows, window] of both parts, sizes.json."""
    characters = parameters["characters"]
    parts = {
        name: texts.split(documents(), characters["training"], characters["heldout"])
        for name, documents in texts.SETS[parameters["texts"]].items()
    }
    files: dict[str, dict[str, Path]] = {"text": {}, "heldout": {}}
    for name, text in parts.items():
        for part, content in (("text", text.training), ("heldout", text.heldout)):
            file = files[part][name] = out / part / f"{name}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(content, encoding="utf-8")
    tokenizer = make_tokenizer([text.training[: parameters["tokenizer_characters"]] for text in parts.values()], parameters["vocabulary"])
    tokenizer.save_pretrained(out / "tokenizer")
    tokens = {part: {name: phase3.windows(tokenizer, one, parameters["window"]) for name, one in files[part].items()} for part in files}
    torch.save(tokens, out / "tokens.pt")
    sizes = {
        name: {part: {**digest(file), "tokens": tokens[part][name].numel()} for part, file in ((p, files[p][name]) for p in files)}
        for name in parts
    }
    write_json(out / "sizes.json", {"texts": parameters["texts"], "vocabulary": len(tokenizer), "domains": sizes})
    for name, both in sizes.items():
        for part, size in both.items():
            print(f"{part:8} {name:10} {size['bytes']:>9,} bytes {size['tokens']:>9,} tokens  sha256 {size['sha256'][:16]}", flush=True)


def digest(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def make_tokenizer(parts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on as much of every domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(parts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


# ---- training --------------------------------------------------------------------------------------------------------------


class History(phase3.MixtureTrainer):
    """A Trainer that keeps what was measured on the way."""

    def history(self) -> list[dict[str, float]]:
        """Step, and each domain's held-out perplexity, in the order of the steps; the first before training."""
        points: dict[int, dict[str, float]] = {}
        for entry in self.state.log_history:
            for key, value in entry.items():
                if key.startswith("eval_") and key.endswith("_loss"):
                    points.setdefault(entry["step"], {})[key.removeprefix("eval_").removesuffix("_loss")] = math.exp(value)
        return [{"step": step, **perplexities} for step, perplexities in sorted(points.items())]

    def losses(self) -> list[list[float]]:
        """Step and mean training loss since the step before, routers' losses included."""
        return [[entry["step"], entry["loss"]] for entry in self.state.log_history if "loss" in entry]


def run_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, Mapping[str, Tensor]],
    out: Path,
    parameters: dict[str, Any],
) -> None:
    """Train on `shares` of the domains and save: a Hugging Face folder, with history.json."""
    gpu = torch.cuda.is_available()
    steps, batch = parameters["steps"], parameters["batch"]
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=parameters["learning_rate"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=gpu,
        seed=parameters["random_seed"],
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=max(1, steps // parameters["evaluations"]),
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=gpu,
    )
    shares = parameters["shares"]
    heldout = {name: windows[: parameters["heldout_windows"]] for name, windows in tokens["heldout"].items()}
    trainer = History(
        model=model,
        args=arguments,
        train_dataset=phase3.mix({name: tokens["text"][name] for name in shares}, shares, steps * batch, parameters["random_seed"]),
        eval_dataset={name: [{"input_ids": row, "labels": row} for row in rows] for name, rows in heldout.items()},
        data_collator=default_data_collator,  # rows are of one length: nothing to pad, no mask
    )
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    model.config.use_cache = True
    trainer.save_model(str(out))
    tokenizer.save_pretrained(out)
    shutil.rmtree(out / "trainer", ignore_errors=True)
    window = next(iter(tokens["text"].values())).shape[1]
    write_json(
        out / "history.json",
        {
            "steps": steps,
            "tokens": steps * batch * window,
            "seconds": round(result.metrics["train_runtime"], 1),
            "perplexity": trainer.history(),
            "loss": trainer.losses(),
        },
    )


def seed(out: Path, parameters: dict[str, Any], inputs: Inputs) -> None:
    """Phase 1: a dense model of Cohere's architecture, from scratch."""
    tokenizer = AutoTokenizer.from_pretrained(inputs["data"] / "tokenizer")
    set_seed(parameters["training"]["random_seed"])
    config = CohereConfig(
        **parameters["model"],
        vocab_size=len(tokenizer),
        logit_scale=1.0,
        tie_word_embeddings=False,
        layer_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    run_training(CohereForCausalLM(config), tokenizer, load_tokens(inputs), out, parameters["training"])


def dense(out: Path, parameters: dict[str, Any], inputs: Inputs) -> None:
    """Train a dense model further: phase 2, and the trained average."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(inputs), dtype=torch.float32)
    run_training(model, AutoTokenizer.from_pretrained(model_folder(inputs)), load_tokens(inputs), out, parameters)


def mixture(out: Path, parameters: dict[str, Any], inputs: Inputs) -> None:
    """Phase 3, by the recipe's means: the exported model, with the routers' losses in its own loss.

    With `reference`, a merge: as many steps as cost what `steps` of that model cost, by bam_merge.cost's FLOPs per token.
    """
    if "reference" in inputs:
        own, other = (json.loads((inputs[name] / "cost.json").read_text())["flops_per_token"]["total"] for name in ("model", "reference"))
        parameters = {**parameters, "steps": round(parameters["steps"] * other / own)}
    settings = {"model": model_folder(inputs), "output": out, "text": {"": []}, "losses": parameters["losses"], "training": {}}
    model, tokenizer = phase3.load(phase3.Config.model_validate(settings))
    run_training(model, tokenizer, load_tokens(inputs), out, parameters)


def model_folder(inputs: Inputs) -> Path:
    """The model of the stage given as `model`: a merge has it in a folder of its own, beside its recipe."""
    inside = inputs["model"] / "model"
    return inside if inside.exists() else inputs["model"]


def load_tokens(inputs: Inputs) -> dict[str, dict[str, Tensor]]:
    tokens: dict[str, dict[str, Tensor]] = torch.load(inputs["data"] / "tokens.pt")
    return tokens


# ---- merging ---------------------------------------------------------------------------------------------------------------


def merged(out: Path, parameters: dict[str, Any], inputs: Inputs) -> None:
    """model/, as `bam-merge recipe.yaml` makes it, verify.json and cost.json (FLOPs per token of a window)."""
    recipe = {**parameters["recipe"], "sources": {name: str(inputs[name]) for name in parameters["sources"]}}
    recipe["output"] = {"path": "model", **parameters["recipe"].get("output", {})}
    if "texts" in parameters:
        texts = {source: str(inputs["data"] / "text" / f"{domain}.txt") for source, domain in parameters["texts"].items()}
        recipe["router"] = {**recipe["router"], "texts": texts}
    (out / "recipe.yaml").write_text(json.dumps(recipe, indent=2) + "\n")
    merge(load_recipe(out / "recipe.yaml"), options=MergeOptions(verify=False))
    report = verify(out / "model", texts=[])
    write_json(out / "verify.json", report.document())
    if not report.ok:
        raise SystemExit(f"{out}: " + "; ".join(f"{check.name}: {check.detail}" for check in report.failures))
    write_json(out / "cost.json", inspect(out / "model", context=parameters["window"]).cost.document(parameters["window"]))


# ---- measuring -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(out: Path, parameters: dict[str, Any], inputs: Inputs) -> None:
    """measured.json: each domain's held-out perplexity; of a mixture also the experts' load and the gates' entropy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_folder(inputs), trust_remote_code=True, dtype=torch.float32).to(device).eval()
    is_mixture = model.config.model_type == "bam"
    result: dict[str, Any] = {"perplexity": {}, "routing": {}}
    for name, windows in load_tokens(inputs)["heldout"].items():
        rows = windows[: parameters["windows"]].to(device)
        losses, logits = [], []
        for batch in rows.split(parameters["batch"]):
            output = model(input_ids=batch, **({"output_router_logits": True} if is_mixture else {}))
            predicted = output.logits[:, :-1].flatten(0, 1).float()
            losses.append(torch.nn.functional.cross_entropy(predicted, batch[:, 1:].flatten(), reduction="none"))
            if is_mixture:
                logits.append({"ffn": output.router_logits, "attention": output.attention_router_logits})
        result["perplexity"][name] = torch.cat(losses).double().mean().exp().item()
        if is_mixture:
            result["routing"][name] = {router: routing([one[router] for one in logits], router, model.config) for router in logits[0]}
    result["tokens"] = rows.numel()
    write_json(out / "measured.json", result)


def routing(batches: list[tuple[Tensor, ...]], router: str, config: Any) -> list[dict[str, Any]]:
    """Of each layer: mean gate and share of the tokens' choices of every expert, and the mean entropy of a token's gates in nats."""
    k = config.num_experts_per_tok if router == "ffn" else config.num_attention_experts_per_tok or config.num_attention_experts
    layers = []
    for parts in zip(*batches, strict=True):
        p_XN = torch.cat(parts).double().softmax(-1)
        chosen = torch.zeros_like(p_XN).scatter(-1, p_XN.topk(k, -1).indices, 1.0 / k)
        entropy = -(p_XN * p_XN.clamp(min=1e-300).log()).sum(-1).mean()
        layers.append({"gate": p_XN.mean(0).tolist(), "load": chosen.mean(0).tolist(), "entropy": entropy.item()})
    return layers


KINDS: dict[str, Callable[[Path, dict[str, Any], Inputs], None]] = {
    "data": data,
    "seed": seed,
    "dense": dense,
    "merged": merged,
    "mixture": mixture,
    "measured": measured,
}
