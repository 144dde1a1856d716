"""Times one model's forward passes, in a process of its own, and prints them as JSON on the last line.

    python one_forward.py FOLDER (exported | loop) DTYPE PROMPT_TOKENS NEW_TOKENS REPEATS

exported: as transformers loads it, attention by sdpa. loop: bam-merge's reference model, a loop over the experts.
Prints forward and generate (seconds, one value a repeat, after one untimed pass of each), parameters (counted on the model that runs)
and cache_bytes (of exported). Logits that are not all finite are an error.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def exported(folder: str, dtype: torch.dtype) -> tuple[Any, Callable[..., Any]]:
    """The model, and how it continues a prompt [B, T]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model, lambda ids_BT, count: model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=count, **greedy)


def loop(folder: str, dtype: torch.dtype) -> tuple[Any, Callable[..., Any]]:
    """The model, and how it continues a prompt [B, T]."""
    from bam_merge import load_model

    model = load_model(folder, dtype)
    return model, model.generate


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.inference_mode()
def main(folder: str, kind: str, dtype: str, prompt: str, new: str, repeats: str) -> None:
    model, generate = {"exported": exported, "loop": loop}[kind](folder, getattr(torch, dtype))
    ids_BT = torch.randint(model.config.vocab_size, (1, int(prompt)), generator=torch.Generator().manual_seed(0))
    made = generate(ids_BT, int(new))
    if made.shape != (1, int(prompt) + int(new)):
        raise SystemExit(f"{folder}: {tuple(made.shape)} tokens came back, not {new} more than {prompt}")
    outputs = model(ids_BT)
    if not bool(getattr(outputs, "logits", outputs).isfinite().all()):
        raise SystemExit(f"{folder}: logits are NaN or infinite")
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward": timed(lambda: model(ids_BT), int(repeats)),
        "generate": timed(lambda: generate(ids_BT, int(new)), int(repeats)),
    }
    if kind == "exported":
        layers = model(ids_BT, use_cache=True).past_key_values.layers
        result["cache_bytes"] = sum(part.nbytes for layer in layers for part in (layer.keys, layer.values))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
