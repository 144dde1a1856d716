"""Do transformers and the reference model agree on a real checkpoint? Exits 1 where they do not.

    python benchmarks/transformers_parity.py FOLDER ... --text FILE [--tokens T] [--new N] [--tolerance X]

FOLDER is whatever `bam_merge.load_model` reads: a merged mixture of layout bam (transformers then runs the model code in it), a dense
model or a public mixture. Transformers computes in float32, the reference model in float64, so that what is measured is the error of
the former alone: in the logits of the first T tokens of the text, at most the tolerance times their standard deviation, and in a greedy
continuation by N tokens of the first of them, which must be equal. Give a dense model too: its error, by code that is transformers' own,
says what float32 can do.
"""

import argparse
import sys
from pathlib import Path

import torch
from common import markdown_table
from transformers import AutoModelForCausalLM

import bam_merge
from bam_merge.model.tokens import encode, open_tokenizer

PROMPT = 16
"""Tokens of the text that are continued."""


@torch.no_grad()
def compare(folder: Path, text: str, tokens: int, new: int) -> tuple[float, float, int]:
    """(largest difference of a logit, the logits' standard deviation, how many tokens the continuations have in common)."""
    ids_xT = torch.tensor([encode(open_tokenizer(folder), text)[:tokens]])
    prompt_xT = ids_xT[:, :PROMPT]
    reference = bam_merge.load_model(folder, torch.float64)
    expected, continued = reference(ids_xT), reference.generate(prompt_xT, new)
    del reference
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    made = model.generate(
        prompt_xT, attention_mask=torch.ones_like(prompt_xT), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    common = int((made == continued)[0, prompt_xT.shape[1] :].long().cumprod(0).sum())
    return float((model(ids_xT).logits - expected).abs().max()), float(expected.std()), common


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=256, metavar="T", help="of the text (default 256)")
    parser.add_argument("--new", type=int, default=20, metavar="N", help="tokens of the continuation (default 20)")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="of a logit, in standard deviations (default 1e-4)")
    options = parser.parse_args()
    text, rows, failed = options.text.read_text(encoding="utf-8"), [], False
    for folder in options.folders:
        difference, deviation, common = compare(folder, text, options.tokens, options.new)
        rows.append([str(folder), f"{difference:.1e}", f"{deviation:.1f}", f"{common} of {options.new}"])
        failed |= not difference <= options.tolerance * deviation or common < options.new
    print(markdown_table(["folder", "largest difference of a logit", "their standard deviation", "greedy tokens equal"], rows))
    if failed:
        sys.exit(f"not within {options.tolerance:g} standard deviations, or continued otherwise")


if __name__ == "__main__":
    main()
