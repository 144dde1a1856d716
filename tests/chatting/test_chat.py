"""Talking with a model: its template as transformers renders it, both engines, terminals and pipes, Ctrl-C, and what is missing in words."""

import builtins
import io
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from card_snippets import KINDS, TEMPLATE, merged
from damage import as_in_a_terminal
from vocabularies import SETTINGS, put, tokenizer_json

from bam_merge import CheckpointError
from bam_merge.chatting.conversation import Conversation, end_tokens
from bam_merge.chatting.speaker import Speaker, open_speaker
from bam_merge.chatting.template import Template, read_template
from bam_merge.model.tokens import open_tokenizer
from bam_merge.process import print_piece

CPU = torch.device("cpu")


def say(run: Any, monkeypatch: pytest.MonkeyPatch, text: str | bytes, *arguments: object) -> Any:
    """Run chat with this on standard input."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    return run("chat", *arguments)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with a chat template."""
    return merged(tmp_path_factory.mktemp("talking"), "bam", chat=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with a tokenizer and no template."""
    return merged(tmp_path_factory.mktemp("plain"), "bam")


# ---- replies


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_say_the_same(kind: str, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    folder = merged(tmp_path, kind, chat=True)
    results = [
        say(run, monkeypatch, "abcd\nefgh\n", folder, "--max-tokens", 8, "--engine", engine) for engine in ("reference", "transformers")
    ]
    assert [result.status for result in results] == [0, 0], results
    assert results[0].out == results[1].out
    assert "the reference model on cpu; each line goes to the model by its chat template" in results[0].err
    assert "transformers 5" in results[1].err


def test_a_reply_is_what_generate_gives(talking: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_merge import load_model

    ids = open_tokenizer(talking).encode("abcd<s>", add_special_tokens=False).ids
    wanted = load_model(talking).generate(torch.tensor([ids]), 6)[0, len(ids) :].tolist()
    stop = next((at for at, token in enumerate(wanted) if token == 2), len(wanted))
    result = say(run, monkeypatch, "abcd\n", talking, "--max-tokens", 6, "--engine", "reference")
    assert result.out == open_tokenizer(talking).decode(wanted[:stop]) + "\n"


def test_without_a_template_a_line_is_gone_on_with(plain: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = say(run, monkeypatch, "abcd\n\n   \nabcd\n", plain, "--max-tokens", 5, "--engine", "reference")
    assert result.status == 0
    one, two = result.out.removesuffix("\n").split("\n")
    assert one == two, "nothing is remembered, and empty lines are no prompts"
    assert "as a text to go on with" in result.err


def test_plain_passes_over_the_template(talking: Path, plain: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--max-tokens", 5, "--engine", "reference")
    assert say(run, monkeypatch, "abcd\n", talking, "--plain", *options).out == say(run, monkeypatch, "abcd\n", plain, *options).out


def test_drawing_depends_on_the_seed_alone(plain: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int) -> str:
        result = say(run, monkeypatch, "abcd\n", plain, "--max-tokens", 12, "--temperature", 2, "--seed", seed, "--engine", "reference")
        assert result.status == 0, result.err
        return str(result.out)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("data", [b"", b"\n", b"abcd", b"\xff\xfe abcd\n", b"abcd\r\n"])
def test_whatever_is_piped_in(data: bytes, plain: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = say(run, monkeypatch, data, plain, "--max-tokens", 3, "--engine", "reference")
    assert result.status == 0, result.err
    assert bool(result.out) == (b"abcd" in data)


# ---- the conversation


def fake(tokens: list[int], context: int | None = None) -> tuple[Speaker, list[list[int]]]:
    """A model that says `tokens` over and over, and what it was given."""
    given: list[list[int]] = []

    def begin() -> Any:
        count = iter(tokens)
        given.append([])

        def step(new: Any) -> torch.Tensor:
            given[-1] += list(new)
            return torch.nn.functional.one_hot(torch.tensor(next(count)), 64).float()

        return step

    return Speaker("a fake", begin, 64, context, CPU), given


def conversation(folder: Path, speaker: Speaker, **more: Any) -> Conversation:
    tokenizer, template = open_tokenizer(folder), read_template(folder)
    return Conversation(speaker, tokenizer, template, end_tokens(folder, tokenizer, template), more.pop("max_tokens", 4), **more)


def test_turns_are_remembered_and_a_reply_ends_where_it_should(talking: Path) -> None:
    speaker, given = fake([3, 4, 1, 5])  # b c </s>
    talk = conversation(talking, speaker, system="ab")
    assert list(talk.reply("cd")) == ["b", "c"]
    assert list(talk.reply("h")) == ["b", "c"]
    decode = talk.tokenizer.decode
    assert [decode(ids, skip_special_tokens=False) for ids in given] == [
        "abcdbc",
        "abcdbchbc",
    ]  # in which <s> is text that it has no piece for
    assert [message["content"] for message in talk.said] == ["cd", "bc", "h", "bc"]


def test_what_is_too_long_loses_its_oldest_turn_or_is_refused(talking: Path) -> None:
    said: list[str] = []
    speaker, given = fake([3, 4, 5, 6], context=12)
    talk = conversation(talking, speaker, notify=said.append)
    for prompt in ("efgh", "efgh"):
        assert "".join(talk.reply(prompt)) == "bcde"
    assert said == ["the conversation is longer than the model was made for: its oldest turn is left out."]
    assert len(given[1]) == 4 + 3
    with pytest.raises(CheckpointError, match="9 tokens and a reply of 4 are more than the 12"):
        list(talk.reply("efghefghe"))


def test_a_character_of_several_tokens_is_not_shown_in_halves(tmp_path: Path) -> None:
    pieces = ["<s>", "</s>", "Ã", "¤", "a"]  # the bytes of an umlaut, in the byte-level alphabet
    put(tmp_path, {"tokenizer.json": tokenizer_json(pieces=pieces, merges=[])})
    speaker, _ = fake([2, 3, 4])
    talk = Conversation(speaker, open_tokenizer(tmp_path), None, frozenset(), 3)
    assert list(talk.reply("a")) == ["ä", "a"]


def test_a_token_that_the_model_lacks(talking: Path) -> None:
    small = Speaker("small", lambda: lambda new: torch.zeros(2), 2, None, CPU)
    with pytest.raises(CheckpointError, match=r"the tokenizer gives token \d+, and the model has 2 tokens"):
        list(conversation(talking, small).reply("abcd"))


def test_end_tokens_of_every_file(tmp_path: Path) -> None:
    put(tmp_path, {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": SETTINGS, "config.json": {"eos_token_id": 7}})
    put(tmp_path, {"generation_config.json": {"eos_token_id": [8, 9]}})
    tokenizer = open_tokenizer(tmp_path)
    assert end_tokens(tmp_path, tokenizer, None) == {7, 8, 9}
    assert end_tokens(tmp_path, tokenizer, Template("", {"eos_token": "</s>"})) == {1, 7, 8, 9}
    (tmp_path / "generation_config.json").write_text("{")
    assert end_tokens(tmp_path, tokenizer, None) == {7}


# ---- templates


TEMPLATES = {
    "plain": TEMPLATE,
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]\n    {% elif m.role == 'assistant' %}\n{{ m.content }}{{ eos_token }}\n    {% endif %}\n{% endfor %}",
    "loops": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{% break %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ loop.index0 }}{{ m.content }}{% endfor %}{{ ns.n }}",
    "unicode": "{{ messages | tojson }} ä {{ messages[0]['content'] | upper }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_transformers_does(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    put(tmp_path, {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": {**SETTINGS, "chat_template": TEMPLATES[name]}})
    messages = [
        {"role": "system", "content": "Sei nett, ä<>&'"},
        {"role": "user", "content": " a\nb "},
        {"role": "assistant", "content": "c"},
    ]
    messages.append({"role": "user", "content": "d"})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    found = read_template(tmp_path)
    assert found is not None
    assert found.render(messages) == theirs


@pytest.mark.parametrize(("files", "expected"), [
    ({"chat_template.jinja": "one", "tokenizer_config.json": {"chat_template": "two"}}, "one"),
    ({"chat_template.json": {"chat_template": "three"}}, "three"),
    ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "four"}]}}, "four"),
    ({"tokenizer_config.json": {"chat_template": {"default": "five"}}}, "five"),
    ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "x"}]}}, None),
    ({"tokenizer_config.json": {"chat_template": ""}}, None),
    ({"tokenizer_config.json": [1]}, None),
    ({}, None),
])  # fmt: skip
def test_where_a_template_is(files: dict[str, Any], expected: str | None, tmp_path: Path) -> None:
    put(tmp_path, files)
    found = read_template(tmp_path)
    assert (found.text if found else None) == expected


@pytest.mark.parametrize(("text", "words"), [
    ("{{ raise_exception('no system here') }}", "no system here"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{% for", "does not take this conversation"),
    ("{{ messages[9].content.x }}", "does not take this conversation"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe|not safely callable"),
])  # fmt: skip
def test_a_template_that_refuses_is_words_and_none_gets_out(text: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        Template(text).render([{"role": "user", "content": "a"}])


def test_the_way_out_of_a_template_that_refuses_is_one_that_there_is() -> None:
    refusing, asked = Template("{{ raise_exception('no') }}"), {"role": "user", "content": "a"}
    with pytest.raises(CheckpointError, match=r"conversation: no\. Use --plain\."):
        refusing.render([asked])
    with pytest.raises(CheckpointError, match=r"conversation: no\. Leave --system out, or use --plain\."):
        refusing.render([{"role": "system", "content": "b"}, asked])


# ---- what is missing, in words


@pytest.mark.parametrize(("name", "words"), [
    ("nowhere", "nowhere: no such folder."),
    ("recipe.yaml", "recipe.yaml: not a folder. It is a YAML file."),
    ("empty", "empty: no tokenizer.json, so a text cannot be read."),
])  # fmt: skip
def test_no_folder_to_talk_with(name: str, words: str, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "recipe.yaml").write_text("method: bam\n")
    result = say(run, monkeypatch, "abcd\n", tmp_path / name)
    assert (result.status, words in result.err) == (2, True), result.err


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As where a package is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def refuse(name: str, *more: Any, **others: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *more, **others)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_jinja(talking: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "jinja2")
    result = say(run, monkeypatch, "abcd\n", talking, "--engine", "reference")
    assert result.status == 2
    assert "jinja2, which is not installed: pip install 'bam-merge[chat]'; or use --plain" in result.err
    assert say(run, monkeypatch, "abcd\n", talking, "--plain", "--engine", "reference", "--max-tokens", 2).status == 0


def test_without_tokenizers(talking: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "tokenizers")
    result = say(run, monkeypatch, "abcd\n", talking, "--engine", "reference")
    assert (result.status, "pip install tokenizers" in result.err) == (2, True)


def test_without_transformers_the_reference_model_speaks(talking: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_merge.chatting.speaker.find_spec", lambda name: None)
    result = say(run, monkeypatch, "abcd\n", talking, "--max-tokens", 2)
    assert (result.status, "the reference model on cpu" in result.err) == (0, True)
    refused = say(run, monkeypatch, "abcd\n", talking, "--engine", "transformers")
    assert (refused.status, "it is not installed: pip install 'bam-merge[hf]'" in refused.err) == (2, True)


def test_where_transformers_fails_the_reference_model_speaks(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("nothing is as it should be")

    monkeypatch.setattr("bam_merge.exported.modeling_bam.BamForCausalLM.from_pretrained", fail)
    said: list[str] = []
    assert open_speaker(talking, "auto", CPU, said.append).name == "the reference model"
    assert said == ["transformers does not load it (ValueError: nothing is as it should be), so the reference model does."]
    with pytest.raises(CheckpointError, match="--engine reference may"):
        open_speaker(talking, "transformers", CPU, said.append)


def test_no_code_of_the_folder_is_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = merged(tmp_path, "bam", chat=True)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('run')")
    assert open_speaker(folder, "transformers", CPU, print).name.startswith("transformers")


@pytest.mark.parametrize(("options", "words"), [
    (("--system", "x", "--plain"), "--system needs a chat template, and --plain uses none"),
    (("--device", "toaster"), "device 'toaster' cannot be used"),
    (("--temperature", "-1"), "temperature"),
    (("--temperature", "nan"), "no finite number"),
    (("--max-tokens", "0"), "max-tokens"),
    (("--max-tokens", "1000"), "more than the 128 that the model was made for"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options: tuple[str, ...], words: str, talking: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = say(run, monkeypatch, "abcd\n", talking, "--engine", "reference", *options)
    assert result.status == 2, result.err
    assert words in result.err


def test_a_system_prompt_needs_a_template(plain: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = say(run, monkeypatch, "abcd\n", plain, "--system", "x")
    assert (result.status, "this model has none" in result.err) == (2, True)


def test_a_folder_without_a_tokenizer(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = say(run, monkeypatch, "abcd\n", merged(tmp_path, "bam", tokenizer=False))
    assert (result.status, "no tokenizer.json" in result.err) == (2, True)


# ---- terminals


def test_what_moves_a_cursor_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_piece("a\x1b[2J\r\n\tä\u200d\x07")
    assert capsys.readouterr().out == "a\\x1b[2J\\r\n\tä\u200d\\x07"


def child(folder: Path, *options: str, **more: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "bam_merge", "chat", str(folder), "--engine", "reference", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=as_in_a_terminal, **more)


def test_in_a_terminal(talking: Path) -> None:
    """It asks, answers, and ends at Ctrl-D with status 0."""
    outside, inside = pty.openpty()
    process = child(talking, "--max-tokens", "4", stdin=inside, stdout=inside)
    os.close(inside)
    shown = wait_for(outside, b"> ")
    os.write(outside, b"abcd\n")
    shown += wait_for(outside, b"\r\n> ")
    os.write(outside, b"\x04")
    _, error = process.communicate(timeout=60)
    os.close(outside)
    assert (process.returncode, b"Traceback" in error) == (0, False)
    assert b"abcd\r\n" in shown


def test_ctrl_c_ends_it_in_the_middle_of_a_reply(plain: Path) -> None:
    outside, inside = pty.openpty()
    process = child(plain, "--max-tokens", "120", "--temperature", "1", stdin=inside, stdout=inside)
    os.close(inside)
    try:
        wait_for(outside, b"> ")
        os.write(outside, b"abcd\n")
        wait_for(outside, b"abcd\r\n")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:  # one that goes on would be another test's failure
        process.kill()
        process.wait()
        os.close(outside)
    assert process.returncode == 130
    assert b"interrupted." in error and b"Traceback" not in error


def wait_for(terminal: int, text: bytes) -> bytes:
    """What the terminal shows, until it has shown `text`."""
    shown, end = b"", time.monotonic() + 120
    while text not in shown:
        assert time.monotonic() < end, shown
        shown += os.read(terminal, 1000)
    return shown


def test_a_reader_that_has_seen_enough_ends_it(plain: Path) -> None:
    process = child(plain, "--max-tokens", "4", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(b"abcd\n")
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    with suppress(BrokenPipeError):
        process.stdin.write(b"abcd\n" * 10)
        process.stdin.close()
    with process.stderr:
        error = process.stderr.read()
    assert process.wait(60) == 0
    assert b"Traceback" not in error
