"""The engines as the tests run them: each in the Python of its own environment, many models in one process, and transformers beside them."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bam_merge.planning.plan import Plan

HERE = Path(__file__).parent
PROMPTS = ("def read_file(path):\n    ", "This licence is granted to any person", "Let x be a real number such that", "The")
TOKENS = 24


@dataclass(frozen=True)
class Said:
    """What an engine says to all prompts: for each its greedy `tokens` with their log-probabilities (`scores`), those of the prompt's own
    tokens after the first (`before`), and the ids of the prompt where the engine has cut it by itself."""

    tokens: list[list[int]]
    scores: list[list[float]]
    before: list[list[float]]
    ids: list[list[int]]


@dataclass(frozen=True)
class Made:
    """A row, merged: its folder, its plan, and what transformers says."""

    folder: Path
    plan: Plan
    reference: Said


def environment(name: str) -> Path | None:
    """The Python that has an engine: what the variable names, or the one that `make test-serving` made."""
    named = os.environ.get(f"BAM_MERGE_{name.upper()}_PYTHON")
    made = HERE.parents[1] / f".venv-serving-{name}" / "bin" / "python"
    return Path(named) if named else made if made.exists() else None


def run_engine(python: Path, script: str, jobs: Sequence[Sequence[Any]], scratch: Path) -> dict[str, dict[str, Any]]:
    """The script's line for each job, by its first entry. A job that ends the process fails alone: the next ones get a new process."""
    given, answered, log = scratch / f"{script}.in", scratch / f"{script}.out", scratch / f"{script}.log"
    answered.touch()
    left = list(jobs)
    while left:
        given.write_text(json.dumps(left))
        with open(log, "a") as stream:
            settings = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_MODULES_CACHE")}
            subprocess.run([python, HERE / script, given, answered], stdout=stream, stderr=stream, env=settings, timeout=3600)
        done = {json.loads(line)["folder"] for line in answered.read_text().splitlines()}
        rest = [job for job in left if job[0] not in done]
        if len(rest) == len(left):
            with open(answered, "a") as stream:
                stream.write(json.dumps({"folder": rest[0][0], "failed": f"the process ended: {log.read_text()[-2000:]}"}) + "\n")
            rest = rest[1:]
        left = rest
    return {line["folder"]: line for line in map(json.loads, answered.read_text().splitlines())}


def said(line: dict[str, Any]) -> Said | None:
    """The answers of a line; None where the engine failed."""
    if "failed" in line:
        return None
    answers = line["answers"]
    return Said(*([answer.get(key, []) for answer in answers] for key in ("tokens", "scores", "before", "ids")))


def transformers_says(folder: Path, remote_code: bool) -> Said:
    """The reference: transformers in float32, token by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote_code, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    found = Said([], [], [], [])
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        tokens: list[int] = []
        scores: list[float] = []
        with torch.no_grad():
            done = model(torch.tensor([ids]), use_cache=True)
            first = done.logits[0].double().log_softmax(-1)
            while True:
                last = done.logits[0, -1].double().log_softmax(-1)
                tokens.append(int(last.argmax()))
                scores.append(float(last.max()))
                if len(tokens) == TOKENS:
                    break
                done = model(torch.tensor([tokens[-1:]]), past_key_values=done.past_key_values, use_cache=True)
        found.tokens.append(tokens)
        found.scores.append(scores)
        found.before.append([float(first[place, token]) for place, token in enumerate(ids[1:])])
        found.ids.append(ids)
    return found


def compared(found: Said, reference: Said) -> tuple[int, float]:
    """Greedy tokens that are the same, up to the first that is not, of all prompts; and the largest difference of a log-probability."""
    same, worst = 0, 0.0
    for mine, theirs, scores, expected in zip(found.tokens, reference.tokens, found.scores, reference.scores, strict=True):
        alike = next((place for place, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other), len(theirs))
        same += alike
        worst = max([worst, *(_apart(one, other) for one, other in zip(scores[:alike], expected[:alike], strict=True))])
    for mine, theirs in zip(found.before, reference.before, strict=True):
        worst = max([worst, *(_apart(one, other) for one, other in zip(mine, theirs, strict=True))])
    return same, worst


def _apart(one: float, other: float) -> float:
    """How far apart; what is no number is infinitely far."""
    far = abs(one - other)
    return far if far == far else float("inf")
