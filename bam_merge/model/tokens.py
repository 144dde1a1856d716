"""Texts as token ids, by a folder's own tokenizer.json and the optional package tokenizers."""

from pathlib import Path
from typing import Any

from bam_merge.errors import CheckpointError
from bam_merge.text import printable


def open_tokenizer(folder: Path) -> Any:
    """The folder's tokenizers.Tokenizer. Raises CheckpointError when the file, or the package that reads it, is missing or unusable."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{printable(str(folder))}: no tokenizer.json, so a text cannot be read. Copy one there.")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CheckpointError("reading a text needs the package tokenizers: pip install tokenizers.") from None
    try:
        return Tokenizer.from_buffer(path.read_bytes())  # from_file takes no name that is not UTF-8
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the package raises no narrower one, and a panic of its Rust code is no Exception
        raise CheckpointError(f"{printable(str(path))}: {printable(str(error))}.") from None


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """The token ids of `text`, with whatever the tokenizer puts around it where `special`. Raises CheckpointError when it cannot."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        why = printable(str(error))
        raise CheckpointError(f"the model's tokenizer.json cannot encode a text: {why}. Mend it, or use token ids.") from None
    return ids
