"""Phase 3 of BAM: train the merged mixture on all domains at once, with the routers' losses.

    python recipes/train/train.py CONFIG.yaml        # or: accelerate launch, torchrun

CONFIG.yaml is as smollm2.yaml beside this file. Text is packed into windows of one length, documents one after the other with the
tokenizer's end-of-text token between them; a step's rows hold the domains in their shares. The model itself adds the load-balancing
and z-losses to its loss, with the coefficients of its config.json, which `losses` overrides. What is reported of held-out text is
the language model's loss alone. The output is a BAM folder again: bam_merge.load_model and transformers both read it.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from bam_merge.documents import YamlError, load_yaml
from bam_merge.errors import BamMergeError, CheckpointError, OutputError, RecipeError
from bam_merge.model.loading import open_model
from bam_merge.recipe.explain import explain
from bam_merge.text import nearest, printable

Files = Path | list[Path]
Rows = list[dict[str, Tensor]]
"""What the Trainer takes as a data set: a row's tokens [window] as `input_ids`, and the same as `labels`."""


class Losses(BaseModel):
    """Coefficients that take the place of config.json's."""

    model_config = ConfigDict(extra="forbid")
    router_aux_loss_coef: float | None = Field(None, ge=0)
    router_z_loss_coef: float | None = Field(None, ge=0)
    attention_router_aux_loss_coef: float | None = Field(None, ge=0)


class Config(BaseModel):
    """CONFIG.yaml; see smollm2.yaml for what the keys mean."""

    model_config = ConfigDict(extra="forbid")
    model: Path
    output: Path
    text: Annotated[dict[str, Files], Field(min_length=1)]
    shares: dict[str, Annotated[float, Field(gt=0)]] | None = None
    heldout: dict[str, Files] = {}
    heldout_windows: int = Field(64, gt=0)
    window: int = Field(2048, gt=1)
    losses: Losses = Losses()
    training: dict[str, Any]


def load_config(file: Path) -> Config:
    """Read and check `file`; its paths become relative to the working directory. Raises RecipeError."""
    try:
        document, marks = load_yaml(file.read_text(encoding="utf-8"))
        config = Config.model_validate(document)
    except OSError as error:
        raise RecipeError(f"{file}: {error.strerror}.") from None
    except YamlError as error:
        raise RecipeError(f"{file}:{error.line}:{error.column}: {error}.") from None
    except ValidationError as error:
        places = {key: f":{mark.line + 1}:{mark.column + 1}" for key, mark in marks.items()}
        raise RecipeError(*explain(error, document, str(file), places, Config)) from None
    shares = config.shares or dict.fromkeys(config.text, 1.0)
    if set(shares) != set(config.text):
        raise RecipeError(f"{file}: shares names {', '.join(shares)}, text {', '.join(config.text)}: they must name the same domains.")
    own = set(TrainingArguments.__dataclass_fields__) - {"output_dir"}
    unknown = [f"{file}: training.{printable(key)}: not among TrainingArguments{nearest(key, own)}" for key in set(config.training) - own]
    unknown += [f"{file}: training.max_steps: must be a number of steps above 0."] * (not positive(config.training.get("max_steps")))
    if unknown:
        raise RecipeError(*unknown)

    def place(files: Files) -> Files:
        return [file.parent / path for path in files] if isinstance(files, list) else file.parent / files

    placed = {key: {name: place(files) for name, files in getattr(config, key).items()} for key in ("text", "heldout")}
    return config.model_copy(
        update={"model": file.parent / config.model, "output": file.parent / config.output, "shares": shares, **placed}
    )


def positive(value: object) -> bool:
    return isinstance(value, int) and value > 0


# ---- the data --------------------------------------------------------------------------------------------------------------


def windows(tokenizer: PreTrainedTokenizerBase, files: Files, window: int) -> Tensor:
    """Tokens [windows, window] of the documents in `files`, one after the other; the last few that fill no window are left out."""
    tokens: list[int] = []
    for file in files if isinstance(files, list) else [files]:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{printable(str(file))}: cannot be read as UTF-8 text: {error}.") from None
        tokens += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    count = len(tokens) // window
    if count == 0:
        raise RecipeError(f"{printable(str(files))}: {len(tokens)} tokens, fewer than one window of {window}.")
    return torch.tensor(tokens[: count * window]).view(count, window)


def mix(domains: Mapping[str, Tensor], shares: Mapping[str, float], count: int, seed: int) -> Rows:
    """`count` rows, of each domain its share, in random order. A domain that is too short is gone through again in another order."""
    generator = torch.Generator().manual_seed(seed)
    total, rows, given = sum(shares.values()), [], 0.0
    for name, windows_WT in domains.items():
        first, given = round(count * given / total), given + shares[name]
        wanted = round(count * given / total) - first
        passes = math.ceil(wanted / len(windows_WT))
        order = torch.cat([torch.randperm(len(windows_WT), generator=generator) for _ in range(passes)] or [torch.empty(0).long()])
        rows += [windows_WT[index] for index in order[:wanted]]
    return [{"input_ids": rows[i], "labels": rows[i]} for i in torch.randperm(count, generator=generator)]


# ---- the training ----------------------------------------------------------------------------------------------------------


class MixtureTrainer(Trainer):
    """A Trainer whose evaluation leaves the routers' losses out, so that exp(loss) is a perplexity."""

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, {**inputs, "output_router_logits": False}, *args, **kwargs)

    def perplexities(self) -> dict[str, float]:
        """Held-out perplexity of each domain."""
        assert isinstance(self.eval_dataset, dict)
        measured = {name: self.evaluate(rows, metric_key_prefix=name) for name, rows in self.eval_dataset.items()}
        return {name: math.exp(metrics[f"{name}_loss"]) for name, metrics in measured.items()}


def load(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, with the coefficients of `losses`. Raises CheckpointError where it is no sound BAM folder."""
    if open_model(config.model).checkpoint.config["model_type"] != "bam":
        raise CheckpointError(f"{config.model}: not of layout bam; public layouts train by transformers' own means.")
    model = AutoModelForCausalLM.from_pretrained(config.model, trust_remote_code=True, dtype=torch.float32)
    for name, value in config.losses.model_dump(exclude_none=True).items():
        setattr(model.config, name, value)
    return model, AutoTokenizer.from_pretrained(config.model, trust_remote_code=True)


def train(config: Config) -> dict[str, tuple[float, float]]:
    """Train, save, and return each held-out text's perplexity before and after."""
    if config.output.exists() and any(config.output.iterdir()):
        raise OutputError(f"{config.output}: exists and is not empty. Choose another output, or remove it.")
    defaults = {"report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    arguments = TrainingArguments(output_dir=str(config.output), **{**defaults, **config.training})
    model, tokenizer = load(config)
    rows = arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    domains = {name: windows(tokenizer, files, config.window) for name, files in config.text.items()}
    heldout = {name: windows(tokenizer, files, config.window)[: config.heldout_windows] for name, files in config.heldout.items()}
    trainer = MixtureTrainer(
        model=model,
        args=arguments,
        train_dataset=mix(domains, config.shares or {}, rows, arguments.seed),
        eval_dataset={name: [{"input_ids": row, "labels": row} for row in part] for name, part in heldout.items()},
        processing_class=tokenizer,
        data_collator=default_data_collator,  # rows are of one length, so nothing is padded, and the tokenizer needs no token for it
    )
    before = trainer.perplexities()
    trainer.train()
    after = trainer.perplexities()
    model.config.use_cache = True  # the Trainer has switched it off, and would save that
    trainer.save_model()
    return {name: (before[name], after[name]) for name in heldout}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a merged mixture on all domains at once (BAM's phase 3).")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    try:
        measured = train(load_config(parser.parse_args().config))
    except BamMergeError as error:
        sys.exit("\n".join(f"error: {problem}" for problem in error.problems))
    for name, (before, after) in measured.items():
        print(f"{name}: held-out perplexity {before:.2f} -> {after:.2f}")


if __name__ == "__main__":
    main()
