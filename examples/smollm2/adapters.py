"""Three LoRA adapters on the dense seed, one a domain: the cheapest experts. The text is branch.py's, and so is the training.

OUT/adapters/code, law and math get the adapters, each with an adapter.json that says how it was made. They hold 2 % of the seed's
parameters; recipes/bam_adapters.yaml makes a mixture of them and the seed, without a merged copy of any.
"""

import json
import time
from pathlib import Path

import torch
from branch import Text, asked, domain_text, kept, perplexity, train
from peft import LoraConfig, get_peft_model
from staged import staged
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

RECORD = "adapter.json"
RANK, ALPHA = 8, 16
RATE = 10
"""Times branch.py's learning rate: an adapter's B begins at zero, and full fine-tuning's would hardly move it."""


def adapter(seed: Path, text: Text, steps: int, folder: Path) -> None:
    """Train one adapter on all linear layers; where the folder is, it is whole."""
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(seed)
    training, heldout = (torch.tensor(tokenizer(part, verbose=False)["input_ids"]) for part in (text.training, text.heldout))
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    before = perplexity(base, heldout)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    train(model, training, steps, RATE)
    after = perplexity(model, heldout)
    with staged(folder) as new:
        model.peft_config["default"].base_model_name_or_path = seed.name
        model.save_pretrained(new, save_embedding_layers=False)
        (new / RECORD).write_text(json.dumps({"steps": steps, "perplexity": {"seed": before, "adapter": after}}, indent=2) + "\n")
    print(f"{folder}: held-out perplexity {before:.2f} -> {after:.2f}, {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    args = asked(
        "Train LoRA adapters on a dense seed, on code, law and math.",
        "the folder to make adapters/code, adapters/law and adapters/math in",
        "adapter",
    )
    folder = args.out / "adapters"
    texts = {domain: domain_text(domain) for domain in args.domains if not kept(folder / domain / RECORD, args.steps)}
    for domain, text in texts.items():
        folder.mkdir(parents=True, exist_ok=True)
        adapter(args.seed, text, args.steps, folder / domain)


if __name__ == "__main__":
    main()
