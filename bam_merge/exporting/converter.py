"""llama.cpp's converter: where it is, and what it says where it fails, in words.

It is run and not written anew, because it knows what only llama.cpp can know: how each tokenizer cuts text is one of a hundred names in its
list, found by a digest of what the tokenizer makes of a text.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from bam_merge.errors import OutputError
from bam_merge.text import listed, printable

SCRIPT = "convert_hf_to_gguf.py"


NEEDED = {"gguf": "gguf", "transformers": "transformers", "sentencepiece": "sentencepiece"}
"""What the converter imports, beside torch: by the module, the package."""


GET = f"It is {SCRIPT}, which comes with llama.cpp: git clone --depth 1 https://github.com/ggml-org/llama.cpp, then --converter llama.cpp"


OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


WORDS = {
    "pre-tokenizer was not recognized": "llama.cpp's converter does not know this tokenizer: it has a list of those whose rules it has "
    "built in. A merge with the tokenizer of a model that llama.cpp runs (output of one source, without tokenizer: union) has one of them",
    "No space left on device": "there is no room for the file that llama.cpp's converter writes. Free some space, or choose another FILE",
    "is not supported": "this converter does not know the architecture. Use a newer llama.cpp",
}
"""What is meant by what the converter says."""


def missing_packages() -> list[str]:
    """Why the converter cannot run here: the packages that it imports and that are not installed."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    are = "is" if len(missing) == 1 else "are"
    return (
        [f"{listed(missing)} {are} not installed, which llama.cpp's converter imports: pip install 'bam-merge[gguf]'."] if missing else []
    )


def find_converter(given: str | None) -> tuple[Path | None, str]:
    """The converter: the file that was `given`, or is in the folder that was, or is on the PATH. Without one, None and the reason."""
    if given is not None:
        path = Path(given) / SCRIPT if Path(given).is_dir() else Path(given)
        return (path, "") if path.is_file() else (None, f"--converter {printable(given)}: there is no {SCRIPT}. {GET}.")
    found = shutil.which(SCRIPT)
    return (Path(found), "") if found else (None, f"llama.cpp's converter is not on the PATH. {GET}.")


def convert(converter: Path, folder: Path, file: Path, kind: str) -> None:
    """Have `folder` written to `file`, a new one, in the dtype that the converter calls `kind`. Raises OutputError with what it says."""
    command = [sys.executable, str(converter), str(folder), "--outtype", kind, "--outfile", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, **OFFLINE}, stdin=subprocess.DEVNULL
    )
    if done.returncode == 0 and file.is_file():
        return
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = printable(said[-1] if said else f"exit status {done.returncode}", 300)
    meant = next((f"{text}. " for word, text in WORDS.items() if any(word in line for line in said)), "")
    raise OutputError(f"{printable(str(folder))}: {meant}{printable(str(converter))} says: {last}")
