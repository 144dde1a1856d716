"""Run by the Python that has llama-cpp-python: IN is a list of [GGUF file, prompts as ids, tokens, prompts as texts], OUT gets a line of JSON
for each, as of in_vllm.py; `ids` are the prompts as the file's own tokenizer cuts them."""

import json
import sys
from typing import Any

import numpy as np


def log_softmax(logits: Any) -> Any:
    wide = np.asarray(logits, np.float64)
    least = wide - wide.max()
    return least - np.log(np.exp(least).sum())


def answers(file: str, prompts: list[list[int]], tokens: int, texts: list[str]) -> list[dict[str, Any]]:
    """What llama.cpp says to each prompt, with a cache in float32 (its default, float16, rounds)."""
    from llama_cpp import Llama

    model = Llama(model_path=file, n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        model.reset()
        model.eval(prompt)
        before = [float(log_softmax(model.scores[place])[token]) for place, token in enumerate(prompt[1:])]
        said: list[int] = []
        scores = []
        for _ in range(tokens):
            last = log_softmax(model.scores[model.n_tokens - 1])
            token = int(last.argmax())
            said.append(token)
            scores.append(float(last[token]))
            model.eval([token])
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
        found.append({"tokens": said, "scores": scores, "before": before, "ids": ids})
    return found


def main() -> None:
    with open(sys.argv[1]) as stream:
        wanted = json.load(stream)
    for file, prompts, tokens, texts in wanted:
        try:
            line: dict[str, Any] = {"folder": file, "answers": answers(file, prompts, tokens, texts)}
        except Exception as error:
            line = {"folder": file, "failed": f"{type(error).__name__}: {error}"}
        with open(sys.argv[2], "a") as stream:
            stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
