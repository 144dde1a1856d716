"""Files for images beside a mixture in a wrapper: those of the source whose towers it has, as far as they run no code, and proved so."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SOURCES, write_recipe
from proofs import UNPROVED, Forger, failed
from test_wrapped_mixtures import LAYOUT, ROUTED
from test_wrapped_mixtures import wrapped as wrapped  # a fixture
from vocabularies import tokenizer_json

from bam_merge import MergeOptions, extract
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

transformers = pytest.importorskip("transformers")

IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor", "patch_size": 4, "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096}, "do_resize": True, "image_mean": [0.5, 0.4, 0.3], "resample": 3,
}  # fmt: skip
VIDEOS = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2, "patch_size": 4}
FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def put(folder: Path, *sources: str, **changes: Any) -> None:
    for source in sources:
        (folder / source / FILES[0]).write_text(json.dumps({**IMAGES, **changes}))
        (folder / source / FILES[1]).write_text(json.dumps(VIDEOS))


def planned(folder: Path, output: str = LAYOUT) -> Any:
    return plan_file(write_recipe(folder, ROUTED, "btx", output=output))


def test_they_are_the_seeds_and_transformers_reads_them(wrapped: Path) -> None:
    put(wrapped, *SOURCES)
    for source in SOURCES:
        (wrapped / source / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
        (wrapped / source / "chat_template.jinja").write_text("{{ messages }}")
    plan = planned(wrapped)
    assert [note for note in plan.notes if "for images" in note] == [f"{FILES[0]}, {FILES[1]} copied from seed, for images."]
    folder = publish(plan, None, MergeOptions())
    assert all((folder / name).read_bytes() == (wrapped / "seed" / name).read_bytes() for name in (*FILES[:2], "chat_template.jinja"))
    assert not (folder / FILES[2]).exists()
    found = verify(folder)
    assert found.ok
    assert next(check for check in found.checks if check.name == "processors").detail == f"{FILES[0]}, {FILES[1]} as in sources.seed"
    pytest.importorskip("PIL")
    images = [transformers.AutoImageProcessor.from_pretrained(at).to_dict() for at in (folder, wrapped / "seed")]
    assert images[0] == images[1]
    assert (images[0]["patch_size"], list(images[0]["image_mean"])) == (4, [0.5, 0.4, 0.3])


def test_a_processor_as_newer_versions_save_it_loads(wrapped: Path) -> None:
    """All in processor_config.json, but for what would run or fetch something."""
    settings = {
        "image_processor": {**IMAGES, "auto_map": {"AutoImageProcessor": "x.X"}},
        "video_processor": VIDEOS,
        "processor_class": "Qwen3VLProcessor",
    }
    text = json.dumps({**settings, "audio_tokenizer": {"audio_tokenizer_name_or_path": "org/name"}})
    (wrapped / "seed" / FILES[2]).write_text(text)
    plan = planned(wrapped)
    assert any(
        f"sources.seed: {FILES[2]}: image_processor.auto_map, audio_tokenizer not copied: only keys that are known to be harmless" in note
        for note in plan.notes
    )
    folder = publish(plan, None, UNPROVED)
    written = json.loads((folder / FILES[2]).read_text())
    assert written == {"image_processor": IMAGES, "video_processor": VIDEOS, "processor_class": "Qwen3VLProcessor"}
    assert verify(folder).ok


def test_sources_that_have_others_are_named(wrapped: Path) -> None:
    put(wrapped, "seed", "law")
    put(wrapped, "code", image_mean=[0.1, 0.2, 0.3])
    notes = [note for note in planned(wrapped).notes if "preprocessor" in note]
    assert notes == [
        f"{FILES[0]}, {FILES[1]} copied from seed, for images.",
        f"sources.code: {FILES[0]} is not seed's, which the result takes: its towers are the seed's, too.",
    ]


def test_the_first_that_has_them_gives_them_where_the_seed_has_none(wrapped: Path) -> None:
    put(wrapped, "law")
    plan = planned(wrapped)
    assert f"{FILES[0]}, {FILES[1]} copied from law, for images, since seed, whose towers the result has, has none." in plan.notes
    folder = publish(plan, None, UNPROVED)
    assert (folder / FILES[0]).read_bytes() == (wrapped / "law" / FILES[0]).read_bytes()
    assert verify(folder).ok


@pytest.mark.parametrize("output", ["{path: out}", LAYOUT])
def test_a_text_model_alone_gets_none(output: str, wrapped: Path, run: Any) -> None:
    """In layout bam, and where one expert is taken out of a mixture that has them."""
    put(wrapped, "seed", "law")
    plan = planned(wrapped, output)
    folder = publish(plan, None, UNPROVED)
    if output == LAYOUT:
        result = run("extract", f"{folder}#experts.code", wrapped / "back")
        assert result.status == 0, result.err
        assert f"{FILES[0]}, {FILES[1]} of code not copied: the result is the text model alone." in result.err.replace("\n", " ")
        folder = wrapped / "back"
    else:
        assert f"{FILES[0]}, {FILES[1]} of seed and law not copied: the result is the text model alone." in plan.notes
    assert not any((folder / name).exists() for name in FILES)
    assert not any(check.name == "processors" for check in verify(folder).checks)


def test_an_expert_taken_out_has_no_towers_either(wrapped: Path) -> None:
    put(wrapped, *SOURCES)
    folder = publish(planned(wrapped), None, UNPROVED)
    back = extract(f"{folder}#experts.law", wrapped / "back")
    assert json.loads((back / "config.json").read_text())["model_type"] == "qwen3_5_text"
    assert not (back / FILES[0]).exists()


@pytest.mark.parametrize("how", ["another source's", "gone", "with code", "of nobody"])
def test_verify_finds_what_is_not_the_sources(how: str, wrapped: Path) -> None:
    put(wrapped, "seed", "law")
    put(wrapped, "code", image_mean=[0.1, 0.2, 0.3])
    folder = publish(planned(wrapped, "{path: out}" if how == "of nobody" else LAYOUT), None, UNPROVED)
    forger = Forger(folder)
    if how == "gone":
        (folder / FILES[0]).unlink()
        forger.record(lambda manifest: manifest["files"].pop(FILES[0]))
    else:
        text = json.dumps({**IMAGES, "auto_map": {"AutoProcessor": "x.X"}})
        forger.file(FILES[0], (wrapped / "code" / FILES[0]).read_text() if how == "another source's" else text)
    said = {
        "another source's": f"{FILES[0]} is not that of sources.seed", "with code": f"{FILES[0]} is not that of sources.seed",
        "gone": f"{FILES[0]} is not there, though sources.seed has one",
        "of nobody": f"{FILES[0]} is for images, and no source in the wrapper of this model has such a file",
    }  # fmt: skip
    assert said[how] in failed(verify(folder))["processors"]


def test_what_changed_since_is_no_fault_of_the_result(wrapped: Path) -> None:
    """A source that has another one now, and one that got one."""
    put(wrapped, "seed")
    folder = publish(planned(wrapped), None, UNPROVED)
    put(wrapped, "seed", image_mean=[0.1, 0.2, 0.3])
    (wrapped / "seed" / FILES[2]).write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    found = verify(folder)
    assert failed(found) == {}
    (check,) = (check for check in found.checks if check.name == "processors")
    assert check.ok is None
    assert FILES[0] in check.detail and FILES[2] in check.detail


@pytest.mark.parametrize(
    ("content", "said"), [("{", "not JSON"), ("[]", "not a JSON object"), (None, "a link that leads out of the model's folder")]
)
def test_what_cannot_be_copied_is_a_problem_of_the_plan(content: str | None, said: str, wrapped: Path, run: Any) -> None:
    (wrapped / "other.json").write_text("{}")
    path = wrapped / "seed" / FILES[0]
    path.symlink_to(wrapped / "other.json") if content is None else path.write_text(content)
    result = run("plan", write_recipe(wrapped, ROUTED, "btx", output=LAYOUT))
    assert result.status == 2
    assert "sources.seed: " in result.err
    assert FILES[0] in result.err
    assert said in result.err
    assert run("plan", write_recipe(wrapped, ROUTED, "btx", output="{path: out}")).status == 0


def test_a_finished_merge_is_made_again_where_they_changed(wrapped: Path, run: Any) -> None:
    put(wrapped, "seed")
    recipe = write_recipe(wrapped, ROUTED, "btx", output=LAYOUT)
    assert run("merge", recipe).status == 0
    assert "already" in run("merge", recipe, "--resume").err
    put(wrapped, "seed", image_mean=[0.1, 0.2, 0.3])
    result = run("merge", recipe, "--resume", "--force")
    assert result.status == 0, result.err
    assert json.loads((wrapped / "out" / FILES[0]).read_text())["image_mean"] == [0.1, 0.2, 0.3]
