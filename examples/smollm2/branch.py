"""Three experts branched from the dense seed: the seed's own training continued for a few steps, once per domain.

Each domain's text is on any Debian machine:

    code   the Python standard library's sources
    law    licences: /usr/share/common-licenses and /usr/share/doc/*/copyright
    math   formal proofs: set.mm of the Debian package metamath-databases

OUT/code, OUT/law and OUT/math get the experts, each with a branch.json that says how it was made; OUT/heldout/*.txt gets text of each
domain no paragraph of which was trained on, and OUT/text/*.txt what was, for recipes/train. The result is the same for the same text,
torch build and number of threads.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from staged import staged
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DOMAINS = ("code", "law", "math")
RECORD = "branch.json"
TRAINING_CHARACTERS = 1_500_000
"""At most so much text of a domain is trained on."""
HELDOUT_CHARACTERS = 60_000
CONTEXT = 128
"""Tokens in a row of a batch."""
BATCH = 2
"""Rows in a batch."""
TESTED = 16
"""Batches of held-out text that a perplexity is measured on."""
LEARNING_RATE = 1e-4
WARM_UP = 5
"""Steps in which the learning rate rises to its full value."""


@dataclass(frozen=True, slots=True)
class Text:
    """One domain's text, in two parts that share no paragraph."""

    training: str
    heldout: str


# ---- the text --------------------------------------------------------------------------------------------------------------


def domain_text(domain: str) -> Text:
    """The text of `domain`; ends the program with one line where this machine does not have it."""
    documents = {"code": python_sources, "law": licences, "math": proofs}[domain]()
    joined = "\n\n".join(distinct(documents))[: TRAINING_CHARACTERS + HELDOUT_CHARACTERS]
    if len(joined) < 3 * HELDOUT_CHARACTERS:
        sys.exit(f"branch.py: {domain}: this machine has only {len(joined):,} characters of it, too few. Leave it out with --domains.")
    border = joined.rindex("\n\n", 0, len(joined) - HELDOUT_CHARACTERS)
    return Text(training=joined[:border], heldout=joined[border:].strip())


def paragraphs(document: str) -> list[str]:
    return re.split(r"\n(?:[ \t]*\.?[ \t]*\n)+", document)  # in Debian's copyright files a lone dot makes an empty line


def distinct(documents: Iterable[str]) -> Iterable[str]:
    """Every paragraph once, however wrapped: licences repeat each other, and held-out text must not stand elsewhere too."""
    seen: dict[str, str] = {}
    for document in documents:
        for paragraph in paragraphs(document):
            seen.setdefault(" ".join(paragraph.split()), paragraph)
    return seen.values()


def shuffled(files: Iterable[Path]) -> list[str]:
    """The contents of `files` in an order of no meaning, the same every time."""
    paths = sorted(files)
    random.Random(0).shuffle(paths)
    return [path.read_text(errors="replace") for path in paths]


def python_sources() -> list[str]:
    return shuffled(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def licences() -> list[str]:
    """Licences, without the lists of files and holders that copyright files mostly consist of."""
    files = [*Path("/usr/share/common-licenses").glob("*"), *Path("/usr/share/doc").glob("*/copyright")]
    lists = re.compile(r"^(Files|Copyright):|^\s*(copyright|\(c\)|©)", re.IGNORECASE | re.MULTILINE)
    return [paragraph for document in shuffled(files) for paragraph in paragraphs(document) if not lists.search(paragraph)]


def proofs() -> list[str]:
    """Part of set.mm. Its first four million characters are passed over: preamble and propositional logic, proofs all alike."""
    package, database = "metamath-databases", "usr/share/metamath/databases/set.mm"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path("/")
        if not (root / database).exists():
            print(f"math: Debian's package {package} is not installed; unpacking it (13 MB) in a temporary folder", flush=True)
            root = Path(scratch)
            fetch = f"apt-get download -qq {package} && dpkg-deb -x {package}_*.deb ."
            if subprocess.run(fetch, shell=True, cwd=root, stderr=subprocess.DEVNULL).returncode:
                sys.exit(f"branch.py: math needs {package}, which apt-get cannot download here: apt-get update; apt-get install {package}")
        return [(root / database).read_text(errors="replace")[4_000_000:8_000_000]]


# ---- the training ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """The perplexity of `model` on the first of `tokens`."""
    batches = tokens[: TESTED * BATCH * CONTEXT].view(TESTED, BATCH, CONTEXT)
    losses = [model(input_ids=batch, labels=batch).loss for batch in batches]
    return torch.stack(losses).mean().exp().item()


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int, rate: float = 1.0) -> None:
    """`steps` of AdamW on rows that begin anywhere in `tokens`, at `rate` times the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate * LEARNING_RATE, weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    torch.manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()


def branch(seed: Path, text: Text, steps: int, out: Path, domain: str) -> None:
    """Train one expert; publish its texts, then itself: where the folder is, they are whole."""
    started = time.monotonic()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(seed)
    training, heldout = (torch.tensor(tokenizer(part, verbose=False)["input_ids"]) for part in (text.training, text.heldout))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    before = perplexity(model, heldout)
    train(model, training, steps)
    after = perplexity(model, heldout)
    with staged(out / domain) as folder:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps({"steps": steps, "perplexity": {"seed": before, "expert": after}}, indent=2) + "\n")
        for part, content in (("text", text.training), ("heldout", text.heldout)):
            (out / part).mkdir(exist_ok=True)
            (out / part / f"{domain}.txt").write_text(content)
    print(f"{out / domain}: held-out perplexity {before:.2f} -> {after:.2f}, {time.monotonic() - started:.0f} s", flush=True)


def kept(record: Path, steps: int) -> bool:
    """Whether an earlier run has made the folder that `record` stands in; ends the program if it was made otherwise than asked now."""
    folder = record.parent
    if not folder.exists():
        return False
    found = json.loads(record.read_text()) if record.exists() else {}
    if found.get("steps") != steps:
        sys.exit(f"{Path(sys.argv[0]).name}: {folder} was made otherwise than with {steps} steps: remove it to have it made anew")
    before, after = found["perplexity"].values()
    print(f"{folder}: there already, kept (held-out perplexity {before:.2f} -> {after:.2f})")
    return True


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks for."""

    seed: Path
    out: Path
    domains: list[str]
    steps: int


def asked(description: str, out: str, made: str) -> Asked:
    """The command line of a program that makes one thing a domain, `made`, in the folder OUT; ends the program where it is wrong."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("seed", type=Path, metavar="SEED", help="the seed's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help=out)
    parser.add_argument("--domains", default=",".join(DOMAINS), metavar="LIST", help=f"which {made}s to make (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help=f"training steps per {made} (default: %(default)s)")
    args = parser.parse_args()
    domains = args.domains.split(",")
    if unknown := set(domains) - set(DOMAINS):
        parser.error(f"--domains: {', '.join(sorted(unknown))}: not among {', '.join(DOMAINS)}")
    if not (args.seed / "config.json").exists():
        parser.error(f"{args.seed}: no checkpoint there; get_seed.py makes one")
    return Asked(args.seed, args.out, domains, args.steps)


def main() -> None:
    args = asked("Branch a dense seed into experts on code, law and math.", "the folder to make code, law, math and heldout in", "expert")
    # All text is read before anything is trained: what is missing shows at once, not after minutes.
    texts = {domain: domain_text(domain) for domain in args.domains if not kept(args.out / domain / RECORD, args.steps)}
    for domain, text in texts.items():
        branch(args.seed, text, args.steps, args.out, domain)


if __name__ == "__main__":
    main()
