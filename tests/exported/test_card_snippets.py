"""What a model card shows is carried out: loading, with a chat template, without one, without a tokenizer; the rest is `make test-ecosystem`."""

from pathlib import Path

import pytest
import torch
from card_snippets import KINDS, about, merged, snippets

pytest.importorskip("transformers")


@pytest.mark.parametrize(("tokenizer", "chat"), [(True, True), (True, False), (False, False)], ids=["chat", "plain", "ids"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_snippet_generates(kind: str, tokenizer: bool, chat: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = about(merged(tmp_path, kind, tokenizer, chat), "With transformers")
    assert ("apply_chat_template" in text) == chat
    assert ("AutoTokenizer" in text) == tokenizer
    assert ("trust_remote_code" in text) == kind.startswith("bam")
    made: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), made)
    assert capsys.readouterr().out.strip()
    if tokenizer:
        inputs, output = made["inputs"], made["output"]
        assert isinstance(output, torch.Tensor)
        prompt = inputs["input_ids"]  # type: ignore[index]
        assert prompt.shape[1] > 0
        assert torch.equal(output[:, : prompt.shape[1]], prompt)
        assert prompt.shape[1] < output.shape[1] <= prompt.shape[1] + 40


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("bam")])
def test_the_reference_model_loads_as_shown(kind: str, tmp_path: Path) -> None:
    made: dict[str, object] = {}
    exec(compile(about(merged(tmp_path, kind), "Without transformers"), "README.md", "exec"), made)
    assert made["model"](torch.tensor([[1, 2, 3]])).shape == (1, 3, 64)  # type: ignore[operator]


def test_every_snippet_is_known_to_a_test(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = merged(tmp_path / kind, kind)
        titles = [above.split()[0] for language in ("python", "console") for above in snippets(folder, language)]
        assert set(titles) <= {"With", "Without", "LoRA", "ONNX", "vLLM", "GGUF,"}, titles
        assert {"With", "LoRA", "ONNX"} <= set(titles)
