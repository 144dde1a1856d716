"""What goes wrong with models of the hub: words with the way out, nothing half-made, and no token anywhere."""

import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import SOURCES
from hub_models import TOKEN, write_hub_recipe
from hub_models import acme as acme  # a fixture
from hub_models import hub as hub
from hub_server import Content, FakeHub, Fault, Repo, serving
from test_hub import commits

import bam_merge
from bam_merge.checkpoints.header import encode_header
from bam_merge.hub_id import HubId, address_problem, hub_id
from bam_merge.sources.hub import cache as hub_cache
from bam_merge.sources.hub import client as hub_client
from bam_merge.sources.hub.words import shown_endpoint

STORE = r"\?X-Signature"

# ---- names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("meta-llama/Llama-3.1-8B", HubId("meta-llama/Llama-3.1-8B")),
        ("01-ai/Yi-1.5_9B", HubId("01-ai/Yi-1.5_9B")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("hf://org/name", HubId("org/name", None, True)),
        ("hf://org/name@" + "0a" * 20, HubId("org/name", "0a" * 20, True)),
        ("hf://models/org/name@main", HubId("org/name", "main", True)),
        *((text, None) for text in ("name", "./org/name", "../name", "~/name", "/org/name", "org/name/", "a/b/c", "org/", "/name", "")),
        *(
            (text, None)
            for text in ("org/.name", "org/name.", "org/na--me", "org/a..b", "org/name.git", "org/na me", "org/ñame", "-o/name")
        ),
        *(
            (text, None)
            for text in ("org/name@", "org/name@a b", "org/name@../x", "org/name@-x", "org/name@a\nb", "org@x/name", "o\\g/name")
        ),
    ],
)
def test_names(text: str, expected: HubId | None) -> None:
    assert hub_id(text) == expected
    assert expected is None or hub_id(str(expected)) == HubId(expected.repo, expected.revision)


def test_commits() -> None:
    assert HubId("o/n", "0a" * 20).commit == "0a" * 20
    assert [HubId("o/n", revision).commit for revision in (None, "main", "0a" * 19, "0A" * 20)] == [None] * 4
    assert str(HubId("o/n", "main").at("0a" * 20)) == f"o/n@{'0a' * 20}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://", "hf://: no name of a model on the hub. Write hf://org/name, or hf://org/name@revision."),
        ("hf://gpt2", "no name of a model on the hub"),
        ("hf://org/name/model.safetensors", "no name of a model on the hub"),
        ("hf://datasets/org/name", "datasets of the hub hold no model that can be merged"),
        ("hf://org/name@", "'' is no revision. Write a branch, a tag or a commit after the @, or leave it out."),
        ("hf://org/name@../../x", "'../../x' is no revision"),
        ("https://huggingface.co/org/name", "an address of the web; for this model of the hub write org/name."),
        ("https://huggingface.co/org/name/tree/v2", "for this model of the hub write org/name@v2."),
        ("HTTPS://HF.co/org/name?download=true", "for this model of the hub write org/name."),
        ("https://huggingface.co/datasets/org/name", "Download the model and give its folder"),
        ("https://example.com/model.safetensors", "Download the model and give its folder"),
    ],
)
def test_names_that_are_none(text: str, message: str, run: Any) -> None:
    assert message in (address_problem(text) or "")
    result = run("inspect", text)
    assert result.status == 2 and message in result.err and result.err.count("error:") == 1


def test_an_address_with_a_token_is_not_repeated(run: Any, tmp_path: Path) -> None:
    for host in ("huggingface.co/org/name", "example.com/org/name"):
        address = f"https://user:{TOKEN}@{host}"
        recipe = write_hub_recipe(tmp_path, f"{{seed: '{address}', code: code}}")
        for result in (run("inspect", address), run("diff", address, address), run("verify", address), run("plan", recipe)):
            assert result.status == 2 and "an address of the web" in result.err and TOKEN not in result.err + result.out


# ---- refusals --------------------------------------------------------------------------------------------------------------

TWICE = {"seed": "acme/seed", "code": "acme/code"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("acme/sede", "acme/sede: no such folder, and acme/sede: the hub has no such model, or it is private and nobody is logged in here (hf auth login, or set HF_TOKEN). Did you mean 'acme/seed'?"),
        ("hf://acme/sede", "error: acme/sede: the hub has no such model, or it is private"),
        ("other/thing", "the hub has no such model, or it is private and nobody is logged in here (hf auth login, or set HF_TOKEN).\n"),
        ("acme/seed@mian", "acme/seed@mian: the hub has no revision 'mian' of acme/seed. Did you mean 'main'?"),
        ("acme/seed@" + "0" * 40, "the hub has no revision '0000000000000000000000000000000000000000' of acme/seed."),
    ],
)  # fmt: skip
def test_nothing_of_that_name(acme: FakeHub, run: Any, place: str, message: str) -> None:
    result = run("inspect", place)
    assert result.status == 2 and message in result.err and result.err.count("\n") == 1


def test_a_folder_that_was_mistyped(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever meant a folder gets its words first, with or without hub, library and network."""
    recipe = write_hub_recipe(tmp_path, "{seed: models/sede, code: models/code}")
    where = f"sources.seed: {tmp_path}/models/sede: no such folder; did you mean 'seed', "
    assert f"{where}and models/sede: the hub has no such model" in run("plan", recipe).err
    could_not = f"{where}and whether it is a model of the hub could not be seen: "
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        assert f"{could_not}models/sede: http://127.0.0.1:9 could not be reached." in run("plan", recipe).err
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert f"{could_not}the Hugging Face hub is not asked, for HF_HUB_OFFLINE is set." in run("plan", recipe).err
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert (
        f"{could_not}models of the Hugging Face hub need the package huggingface_hub: pip install 'bam-merge[hub]'."
        in run("plan", recipe).err
    )


def test_a_machine_without_network_is_not_kept_waiting(acme: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no connection at all, one more try is made; where the hub has faults, three."""

    def waits(message: str) -> list[float]:
        found: list[float] = []
        connection = hub_client.hub()
        monkeypatch.setattr(connection.stop, "wait", found.append)
        with pytest.raises(hub_client.HubUnreachable, match=message):
            connection.document("models/acme/seed", HubId("acme/seed"))
        return found

    monkeypatch.setattr(hub_client, "WAITS", (0.1, 0.2, 0.3))
    acme.faults.append(Fault("/models/", status=500))
    assert waits("it answers 500") == [0.1, 0.2, 0.3]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert waits("could not be reached") == [0.1]


@pytest.mark.parametrize("logged_in", [False, True])
def test_private_and_gated(acme: FakeHub, run: Any, logged_in: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    acme.token = TOKEN
    if logged_in:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    acme.repos["acme/law"].private = acme.repos["acme/code"].gated = True
    gated = run("inspect", "acme/code")
    whose = "with the account of the token in use." if logged_in else "then log in here: hf auth login, or set HF_TOKEN."
    assert gated.status == 2
    assert f"access to this model is granted on request. Ask for it on https://huggingface.co/acme/code, {whose}" in gated.err
    private = run("inspect", "acme/law")
    assert private.status == (0 if logged_in else 2)
    assert logged_in or "or it is private and nobody is logged in here" in private.err
    missing = run("inspect", "acme/lew")
    assert ("or the token in use may not see it." if logged_in else "nobody is logged in here") in missing.err


def test_a_token_that_is_not_accepted(acme: FakeHub, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    acme.token = "hf_another"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = run("inspect", "acme/seed")
    assert (
        result.status == 2
        and "the hub does not accept the token that was sent. Log in again (hf auth login, or set HF_TOKEN)." in result.err
    )


@pytest.mark.parametrize("token", [f"{TOKEN}\x01", f"{TOKEN} x", f"{TOKEN}é"])
def test_a_token_that_no_request_can_carry(acme: FakeHub, run: Any, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    result = run("inspect", "acme/seed")
    assert result.status == 2 and "holds characters that no request can carry" in result.err and TOKEN not in result.err


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (
            403,
            {},
            "the hub refuses (403): log in (hf auth login, or set HF_TOKEN), with access granted on https://huggingface.co/acme/seed.",
        ),
        (429, {}, "the hub has had too many requests from here (429). Run again later"),
        (429, {"retry-after": "3600"}, "too many requests from here (429), and asks to wait 3600 seconds. Run again later"),
        (500, {}, "the hub has a fault of its own (it answers 500). Run again later; what was downloaded is kept."),
        (502, {}, "(it answers 502)"),
        (504, {}, "(it answers 504)"),
        (418, {}, "the hub refuses the request (it answers 418)"),
        (400, {}, "the hub refuses the request (it answers 400)"),
        (404, {"x-error-code": "EntryNotFound"}, "the hub has no file"),
    ],
)
@pytest.mark.parametrize("asked", ["/revision/", "/tree/", "resolve/.*/config.json", "resolve/.*/model.safetensors", STORE])
def test_answers(acme: FakeHub, tmp_path: Path, run: Any, asked: str, status: int, headers: dict[str, str], message: str) -> None:
    """Whatever request gets it, for as long as it is made."""
    acme.faults.append(Fault(asked, status=status, headers=headers))
    result = run("merge", write_hub_recipe(tmp_path, "{seed: acme/seed, code: acme/code}"))
    assert result.status == 2 and message in result.err and "a fault that a test ordered" not in result.err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert "X-Signature" not in result.err and "secret" not in result.err
    tries = len([request for request in acme.requests if __import__("re").search(asked, request.path)])
    assert tries <= 2 * 4


@pytest.mark.parametrize("asked", ["/revision/", "/tree/", "resolve/.*/config.json", "resolve/.*/model.safetensors", STORE])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_answers_that_pass(acme: FakeHub, run: Any, asked: str, status: int) -> None:
    """Three failures in a row are forgiven."""
    acme.faults.append(Fault(asked, times=3, status=status))
    assert run("inspect", "acme/seed", "--stats").status == 0


def test_the_hub_asks_to_wait(acme: FakeHub, run: Any) -> None:
    acme.faults.append(Fault("/tree/", times=1, status=429, headers={"retry-after": "1"}))
    began = time.monotonic()
    result = run("inspect", "acme/seed")
    assert result.status == 0 and time.monotonic() - began >= 1
    assert "acme/seed@" in result.err and "the hub asks to wait 1 seconds." in result.err


# ---- bodies ----------------------------------------------------------------------------------------------------------------


def blobs(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.parent.name == "blobs"]


def test_a_digest_that_differs(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """Once is forgiven, twice is told; nothing of it is kept, or has the file's name."""
    flipped = Fault(STORE, spoil=lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    acme.faults.append(flipped)
    result = run("inspect", "acme/seed", "--stats")
    assert result.status == 2 and "model.safetensors: what was downloaded is not what the hub lists (another digest), twice." in result.err
    assert not list((tmp_path / "cache").rglob("model.safetensors")) and not [
        path for path in blobs(tmp_path) if path.stat().st_size > 10**4
    ]
    flipped.times = 1
    assert run("inspect", "acme/seed", "--stats").status == 0


def test_a_small_file_whose_digest_differs(acme: FakeHub, run: Any) -> None:
    acme.faults.append(Fault("config.json", spoil=lambda data: data.replace(b"llama", b"lxama")))
    result = run("inspect", "acme/seed")
    assert result.status == 2 and "config.json: what was downloaded is not what the hub lists" in result.err


def test_a_partial_of_something_else(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """What another program left under our name is noticed by its digest, and downloaded anew."""
    assert run("plan", write_hub_recipe(tmp_path)).status == 0
    content = acme.repos["acme/seed"].commits[commits(acme)["seed"]]["model.safetensors"]
    folder = tmp_path / "cache" / "hub" / "models--acme--seed" / "blobs"
    for left in (bytes(5000), bytes(content.length), bytes(content.length + 5)):
        (folder / f"{content.digest}.bam-merge.incomplete").write_bytes(left)
        assert run("inspect", "acme/seed", "--stats").status == 0
        (folder / content.digest).unlink()


@pytest.mark.parametrize("length", [10, 80_000])
def test_a_wrong_content_length(acme: FakeHub, run: Any, length: int) -> None:
    acme.faults.append(Fault(STORE, length=length))
    result = run("inspect", "acme/seed", "--stats")
    assert result.status == 2
    assert f"model.safetensors: the hub lists 74,416 bytes and sends {length}".replace("80000", "80,000") in result.err


def test_a_store_that_knows_no_ranges(acme: FakeHub, run: Any) -> None:
    """Headers are read from the beginning of the whole, which is then left; a partial is begun again."""
    acme.faults += [Fault(STORE, whole=True)]
    assert run("inspect", "acme/seed").status == 0
    acme.faults[:0] = [Fault(STORE, times=1, whole=True, cut=20_000)]
    assert run("inspect", "acme/seed", "--stats").status == 0


@pytest.mark.parametrize(
    "spoil", [lambda data: b"<html>log in</html>", lambda data: b"[]", lambda data: b'{"sha": "main"}', lambda data: b"null"]
)
@pytest.mark.parametrize("asked", ["/revision/", "/tree/"])
def test_something_that_is_no_hub(acme: FakeHub, run: Any, asked: str, spoil: Any) -> None:
    acme.faults.append(Fault(asked, spoil=spoil))
    result = run("inspect", "acme/seed")
    assert result.status == 2
    assert (
        "does not answer as the Hugging Face hub does" in result.err
        or "no weights on the hub" in result.err
        or "config.json is missing" in result.err
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("model.safetensors", b"\x80\x04pickle" * 20, "this is a Python pickle"),
        ("model.safetensors", b"", "0 bytes, too short for a safetensors header"),
        ("model.safetensors", (10**9).to_bytes(8, "little") + b"{}" * 50, "promise a header of 1,000,000,000 bytes"),
        ("config.json", b"[]", "not a JSON object"),
        ("config.json", b"{", "config.json"),
    ],
)
def test_files_that_are_damaged_there(acme: FakeHub, tmp_path: Path, run: Any, name: str, data: bytes, message: str) -> None:
    acme.add("acme/seed", tmp_path / "models" / "seed", **{name: data})  # type: ignore[arg-type]
    result = run("inspect", "acme/seed")
    assert result.status == 2 and message in result.err


def test_a_header_of_many_tensors(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """One that is longer than what is read first is read on, and no further."""
    header, spans = encode_header([(f"tensor.{index:05d}", "F32", (2,)) for index in range(2000)])
    acme.add("acme/seed", tmp_path / "models" / "seed", **{"model.safetensors": Content(header, spans[-1][0] + spans[-1][1])})  # type: ignore[arg-type]
    run("inspect", "acme/seed")
    assert [request.span for request in acme.requests if request.store] == ["bytes=0-16383", f"bytes=16384-{len(header) - 1}"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b"\x80"}, "only pytorch_model.bin on the hub. Pickled weights are never downloaded"),
        ({"model-q4.gguf": b"GGUF"}, "no model.safetensors or model.safetensors.index.json on the hub, but model-q4.gguf"),
        ({}, "no weights on the hub; expected model.safetensors or model.safetensors.index.json."),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'}, "names ../x, which the hub does not have"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'}, "names x.safetensors, which the hub does not have"),
        ({"model.safetensors.index.json": b'{"weight_map": {}}'}, "which the hub does not have"),
        ({"model.safetensors.index.json": b"[]"}, "model.safetensors.index.json has no weight_map"),
        ({"model.safetensors": b"x", "x.safetensors": b"x", "model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'}, "one is stale"),
    ],
)  # fmt: skip
def test_repositories_without_usable_weights(hub: FakeHub, run: Any, files: dict[str, bytes | Content], message: str) -> None:
    hub.repos["acme/odd"] = Repo()
    hub.repos["acme/odd"].commit({"config.json": b'{"model_type": "llama"}', **files})
    for options in ([], ["--stats"]):
        result = run("inspect", "acme/odd", *options)
        assert result.status == 2 and message in result.err, result.err


@pytest.mark.parametrize("change", [{"oid": "../../../evil"}, {"size": -1}, {"lfs": {"oid": "../x", "size": 3, "pointerSize": 1}}])
def test_a_listing_that_leads_out_of_the_cache(
    acme: FakeHub, tmp_path: Path, run: Any, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_server import Handler

    honest = Handler.entry
    monkeypatch.setattr(Handler, "entry", lambda self, path, item: {**honest(self, path, item), **change})
    result = run("inspect", "acme/seed")
    assert result.status == 2 and "does not answer as the Hugging Face hub does" in result.err
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*evil*"))


def test_a_listing_of_several_pages(acme: FakeHub, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the same hub, wherever the link to the next page leads: the token goes with it."""
    acme.page, acme.token = 1, TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as other:
        acme.links = other.url
        assert run("inspect", "acme/seed").status == 0
        assert len(acme.asked("/tree/")) == 5 and not other.requests


def test_documents_that_are_too_large(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    large = Content(b"{", 100_000_001)
    commit = acme.add("acme/code", tmp_path / "models" / "code", **{"config.json": large})  # type: ignore[arg-type]
    result = run("inspect", "acme/code")
    assert result.status == 2 and f"acme/code@{commit}: config.json is larger than 100,000,000 bytes." in result.err
    assert not acme.asked("acme/code/resolve")
    monkeypatch.setattr(hub_client, "MOST_DOCUMENT", 10)
    assert "does not answer as the Hugging Face hub does" in run("inspect", "acme/seed").err


def test_a_cache_that_cannot_be_written(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hub").write_text("a file")
    result = run("inspect", "acme/seed")
    assert result.status == 2 and "where models of the hub are kept: Not a directory." in result.err and "set HF_HUB_CACHE" in result.err


def test_an_endpoint_that_is_none(acme: FakeHub, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("hub.example", "http://[::1", "http://127.0.0.1:port"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        result = run("inspect", "acme/seed")
        assert result.status == 2 and (
            "HF_ENDPOINT is no address" in result.err or "HF_ENDPOINT right" in result.err or "broke off" in result.err
        )
    assert shown_endpoint(f"https://me:{TOKEN}@hub.example:8443/x?y") == "https://hub.example:8443"


# ---- the token -------------------------------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_and_nowhere_else(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of private models: the token is sent to the hub, not to the store that the hub leads to, and is in no output and no file."""
    acme.token = TOKEN
    for repo in acme.repos.values():
        repo.private = True
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "token").write_text(TOKEN)
    recipe = write_hub_recipe(tmp_path)
    said = [run(*command) for command in (("plan", recipe), ("plan", recipe, "--json"), ("inspect", "acme/seed"), ("merge", recipe))]
    acme.faults.append(Fault("/revision/", status=500))
    said += [run("plan", recipe), run("inspect", "acme/other"), run("verify", tmp_path / "out"), run("diff", "acme/seed", "acme/nope")]
    assert [result.status for result in said] == [0, 0, 0, 0, 0, 2, 0, 2]
    assert TOKEN not in "".join(result.out + result.err for result in said)
    assert {request.token for request in acme.requests if not request.store} == {f"Bearer {TOKEN}"}
    assert {request.token for request in acme.requests if request.store} == {None}
    (tmp_path / "cache" / "token").unlink()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_an_error_carries_no_token(acme: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything that a traceback would show: the errors of the library are not behind it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    acme.token = TOKEN
    acme.faults.append(Fault("/tree/", status=500))
    with pytest.raises(bam_merge.CheckpointError) as caught:
        bam_merge.inspect("acme/seed")
    error: BaseException | None = caught.value
    while error is not None:
        assert TOKEN not in repr(error) + str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert TOKEN not in repr(hub_client.hub())


def test_no_token_where_none_is_wanted(acme: FakeHub, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert run("inspect", "acme/seed").status == 0 and {request.token for request in acme.requests} == {None}


def test_the_same_model_twice(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    result = run("plan", write_hub_recipe(tmp_path, "{seed: acme/seed, code: hf://acme/seed@main}"))
    assert result.status == 2 and "sources.code: the same folder as sources.seed." in result.err


def test_all_problems_come_together(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    result = run("plan", write_hub_recipe(tmp_path, "{seed: acme/seed@nope, code: acme/cde, law: nowhere}"))
    assert result.status == 2 and [f"sources.{name}: " in result.err for name in SOURCES] == [True] * 3 and "3 problems" in result.err
    assert hub_cache.resolve(HubId("acme/law")).id.revision == commits(acme)["law"]
