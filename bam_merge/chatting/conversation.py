"""A conversation with the model in a folder: prompts in, replies out as text, piece by piece while they are made."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge.chatting.speaker import Speaker
from bam_merge.chatting.template import Message, Template
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.model.tokens import encode
from bam_merge.text import count, printable


@dataclass
class Conversation:
    """What was said so far. Without a template nothing is remembered: every prompt is a text that the model goes on with."""

    speaker: Speaker
    tokenizer: Any
    template: Template | None
    ends: frozenset[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None
    notify: Callable[[str], None] = lambda text: None
    said: list[Message] = field(default_factory=list)
    replies: int = 0

    def reply(self, prompt: str) -> Iterator[str]:
        """The model's reply in pieces. Raises CheckpointError where the prompt cannot be put to it."""
        ids = self._ids(prompt)
        made: list[str] = []
        for piece in self._pieces(ids):
            made.append(piece)
            yield piece
        self.replies += 1
        if self.template is not None:
            self.said += [{"role": "user", "content": prompt}, {"role": "assistant", "content": "".join(made)}]

    def _ids(self, prompt: str) -> list[int]:
        """The tokens that the model is given. The oldest turns are left out where it was made for fewer tokens."""
        if self.template is None:
            ids = encode(self.tokenizer, prompt)
            if not ids:
                raise CheckpointError(f"the tokenizer makes no token of {printable(repr(prompt), 60)}.")
            return self._fitting(ids)
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        while True:
            text = self.template.render([*system, *self.said, {"role": "user", "content": prompt}])
            ids = encode(self.tokenizer, text, special=False)
            if not ids:
                raise CheckpointError(f"{self.template.where} makes no text of this conversation. Use --plain.")
            if self._fits(ids) or not self.said:
                return self._fitting(ids)
            del self.said[:2]
            self.notify("the conversation is longer than the model was made for: its oldest turn is left out.")

    def _fits(self, ids: list[int]) -> bool:
        return self.speaker.context is None or len(ids) + self.max_tokens <= self.speaker.context

    def _fitting(self, ids: list[int]) -> list[int]:
        if self._fits(ids):
            return ids
        most = self.speaker.context
        raise CheckpointError(
            f"{count(len(ids), 'token')} and a reply of {self.max_tokens} are more than the {most} that the model was made for. "
            "Shorten the prompt, or set a smaller --max-tokens."
        )

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        """Text as soon as its characters are whole."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        for token in self.speaker.stream(ids, self.max_tokens, self.temperature, self.seed + self.replies, self.ends):
            try:
                piece = stream.step(self.tokenizer, token)
            except (KeyboardInterrupt, SystemExit, MemoryError):
                raise
            except BaseException as error:  # of the package's Rust code, whose panics are no Exception
                raise CheckpointError(f"the model's tokenizer.json cannot decode token {token}: {printable(str(error))}.") from None
            if piece:
                yield piece


def end_tokens(folder: Path, tokenizer: Any, template: Template | None) -> frozenset[int]:
    """The tokens after which a reply is over: by generation_config.json, config.json and the tokenizer."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        with suppress(OSError, ValueError):
            document = load_json((folder / name).read_bytes())
            value = document.get("eos_token_id") if isinstance(document, dict) else None
            found |= {item for item in (value if isinstance(value, list) else [value]) if type(item) is int}
    if template is not None and "eos_token" in template.tokens:
        found |= {number for number in [tokenizer.token_to_id(template.tokens["eos_token"])] if number is not None}
    return frozenset(found)
