"""Three LoRA adapters on the dense seed, one a domain: the cheapest experts. The text is branch.py's, and so is the training.

OUT/adapters/code, law and math get the adapters, each with an adapter.json that says how it was made. They hold 2 % of the seed's
parameters; recipes/bam_adapters.yaml makes a mixture of them and the seed, without a merged copy of any.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from branch import DOMAINS, Text, domain_text, perplexity, train
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


def kept(folder: Path, steps: int) -> bool:
    """Whether an earlier run has made the adapter in `folder`; ends the program if it was made otherwise than asked now."""
    if not folder.exists():
        return False
    record = json.loads((folder / RECORD).read_text()) if (folder / RECORD).exists() else {}
    if record.get("steps") != steps:
        sys.exit(f"adapters.py: {folder} was made otherwise than with {steps} steps: remove it to have it made anew")
    print(f"{folder}: there already, kept")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Train LoRA adapters on a dense seed, on code, law and math.")
    parser.add_argument("seed", type=Path, metavar="SEED", help="the seed's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make adapters/code, adapters/law and adapters/math in")
    parser.add_argument("--domains", default=",".join(DOMAINS), metavar="LIST", help="which adapters to make (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="training steps per adapter (default: %(default)s)")
    args = parser.parse_args()
    domains = args.domains.split(",")
    if unknown := set(domains) - set(DOMAINS):
        parser.error(f"--domains: {', '.join(sorted(unknown))}: not among {', '.join(DOMAINS)}")
    if not (args.seed / "config.json").exists():
        parser.error(f"{args.seed}: no checkpoint there; get_seed.py makes one")
    folder = args.out / "adapters"
    texts = {domain: domain_text(domain) for domain in domains if not kept(folder / domain, args.steps)}
    for domain, text in texts.items():
        folder.mkdir(parents=True, exist_ok=True)
        adapter(args.seed, text, args.steps, folder / domain)


if __name__ == "__main__":
    main()
