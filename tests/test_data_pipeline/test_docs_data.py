"""docs/data.md: its examples, read from the page, through pretokenize and the document stream."""

import errno
import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.pretokenize.command import main
from data_pipeline.shards.code_shards import (
    CodeGeometry,
    CodeSample,
    encode_sample,
    iterate_shard,
    verify_dataset,
)
from data_pipeline.shards.image_text_shards import is_image_part, read_sample, read_shard
from data_pipeline.shards.tar_members import split_name
from data_pipeline.sources.llava import import_llava, iterate_records
from data_pipeline.streams import BlendEntry, DatasetError, document_loader, prepare_dataset
from dualtoken.visual_tokenizer.config import PRESETS, preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from tests.support.command import call
from tests.test_data_pipeline.streams.test_document_streams import (
    SPECIAL,
    TOKENIZER,
    config,
    documents_of,
    text_of,
)
from tests.test_data_pipeline.streams.test_streams import write_tar

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^<!-- example: ([\w-]+) -->\n```\w+\n(.*?)^```$", PAGE, re.M | re.S))
SAMPLES = ["pair-txt", "pair-json", "img2dataset", "conversation", "interleaved"]
IMAGE_TYPES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def picture(seed: int, extension: str = "jpg") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((32, 24)).save(buffer, IMAGE_TYPES[extension])
    return buffer.getvalue()


def files(name: str) -> dict[str, str]:
    """File name -> content of an example, "(picture)" for pictures; indented lines go on."""
    found: dict[str, str] = {}
    for line in EXAMPLES[name].splitlines():
        if line.startswith(" "):
            found[list(found)[-1]] += line.strip()
        else:
            file, content = line.split(maxsplit=1)
            found[file] = content
    return found


def write_example(path: Path, name: str) -> dict[str, str]:
    """Write a shard of an example; return its files."""
    members = []
    for number, (file, content) in enumerate(files(name).items()):
        extension = file.rpartition(".")[2]
        assert (content == "(picture)") == is_image_part(extension)
        data = picture(number, extension) if content == "(picture)" else content.encode()
        members.append((file, data))
    write_tar(path, members)
    return files(name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.manual_seed(0)
    model = DualTokenVisualTokenizer(preset_config("tiny")).eval()
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save_pretrained(folder)
    sizes = model.config.positions, model.config.num_quantizers, model.config.codebook_size
    return SimpleNamespace(folder=folder, fingerprint=model.fingerprint(), geometry=CodeGeometry(*sizes))


def codes_of(tokenizer: SimpleNamespace, inputs: Path, *options: str) -> tuple[Path, dict[str, CodeSample]]:
    """Pretokenize with the command; return the folder and its samples by key."""
    output = inputs.with_name(f"{inputs.name}-codes")
    words = ["--inputs", str(inputs), "--visual-tokenizer", str(tokenizer.folder), "--output", str(output)]
    assert main([*words, *options]) == 0
    manifest = verify_dataset(output, tokenizer.fingerprint)
    shards = [output / name for name, entry in manifest.shards.items() if entry.samples]
    return output, {sample.key: sample for shard in shards for sample in iterate_shard(shard)}


def read_stream(tokenizer: SimpleNamespace, folder: Path, view: str) -> dict[str, tuple[str, int]]:
    """Text and number of image positions by key, of one pass of the document stream."""
    settings = config(BlendEntry(str(folder), view), context_length=600)
    arguments = (settings, TOKENIZER, tokenizer.geometry, tokenizer.fingerprint)
    found = {}
    for batch in document_loader(*arguments, split="val"):
        for key, (ids, _) in zip(batch.keys, documents_of(batch), strict=True):
            found[key] = text_of(ids), ids.count(SPECIAL.image_pad)
    return found


@pytest.fixture(scope="module")
def dataset(tokenizer: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("data") / "in"
    folder.mkdir()
    written = {
        file: text for name in SAMPLES for file, text in write_example(folder / f"{name}.tar", name).items()
    }
    codes, samples = codes_of(tokenizer, folder)
    return SimpleNamespace(files=written, folder=codes, samples=samples)


def test_every_example_of_samples_is_used(tokenizer: SimpleNamespace, dataset: SimpleNamespace) -> None:
    assert set(EXAMPLES) == {*SAMPLES, "text", "output", "llava", "obelics", "journeydb"}
    assert (dataset.folder / "rejected.jsonl").read_text(encoding="utf-8") == ""
    images: dict[str, int] = {}
    for file in dataset.files:
        key, part = split_name(file) or ("", "")
        images[key] = images.get(key, 0) + is_image_part(part)
    assert {key: len(sample.codes) for key, sample in dataset.samples.items()} == images
    assert len(images) == 9 and max(images.values()) == 2
    stream = read_stream(tokenizer, dataset.folder, "document")
    positions = tokenizer.geometry.positions
    assert {key: count for key, (_, count) in stream.items()} == {
        key: count * positions for key, count in images.items()
    }
    for key, words in {
        "apple": "a red apple on a table",
        "boat": "a boat without a sail",
        "000000012": "two dogs on a beach",
        "own": "Before the stormand after it",
        "obelics": "First a text.Then another.",
        "mmc4": "One sentence. A second one.",
    }.items():
        assert stream[key][0] == words
    assert "Which colour?" in stream["talk"][0] and "Pear." in stream["chat"][0]


def test_output_is_as_the_page_says(dataset: SimpleNamespace) -> None:
    expected = files("output")
    assert len(expected) == 2
    for file, content in expected.items():
        sample = dataset.samples[file.removesuffix(".json")]
        members = dict(encode_sample(sample))
        assert json.loads(members[f"{sample.key}.json"]) == json.loads(content)


def test_pairs_in_the_views_of_the_page(tokenizer: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in SAMPLES[:3]:
        write_example(tmp_path / "in" / f"{name}.tar", name)
    folder, _ = codes_of(tokenizer, tmp_path / "in")
    captions = read_stream(tokenizer, folder, "caption")
    assert captions["apple"][0] == "English: a red apple on a table"
    assert captions["tree"][0] in (
        "English: an old tree",
        "German: ein alter Baum",
        "Spanish: un árbol viejo",
    )
    assert read_stream(tokenizer, folder, "generate")["boat"][0] == "a boat without a sail"
    view = re.compile(r"view: (\w+)")
    assert set(view.findall(PAGE[PAGE.index("```yaml") :])) == {"caption", "generate", "document", "text"}


def test_text_shards(tokenizer: SimpleNamespace, tmp_path: Path) -> None:
    write_example(tmp_path / "text.tar", "text")
    prepare_dataset(tmp_path)
    found = read_stream(tokenizer, tmp_path, "text")
    assert found == {
        "page1": ("Plain text, one document a file.", 0),
        "page2": ("Another document.", 0),
    }


def test_sizes_are_those_of_the_presets() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) \| (\d) \| (\d) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) GB \|$", PAGE, re.M
    )
    assert {row[0] for row in rows} == set(PRESETS) - {"tiny"}
    for name, positions, books, depths, codes, stored, million in rows:
        preset = preset_config(name)
        assert (preset.positions, 2, preset.num_quantizers) == (int(positions), int(books), int(depths))
        assert int(codes.replace(",", "")) == preset.positions * 2 * preset.num_quantizers * 2
        zeros = np.zeros((1, preset.positions, 2, preset.num_quantizers), np.uint16)
        caption = "a red apple on a table"
        sample = CodeSample("000000000", zeros, [{"image": 0}, {"text": caption}], {"en": caption})
        size = sum(512 + len(data) + -len(data) % 512 for _, data in encode_sample(sample))
        assert int(stored.replace(",", "")) == size
        assert float(million) == round(size / 1000, 1)


def llava_files(folder: Path) -> Path:
    (folder / "pictures" / "coco").mkdir(parents=True)
    (folder / "pictures" / "coco" / "0001.jpg").write_bytes(picture(1))
    (folder / "llava.json").write_text(EXAMPLES["llava"], encoding="utf-8")
    return folder / "llava.json"


def test_llava(tokenizer: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, shards = llava_files(tmp_path), tmp_path / "shards"
    words = ["--json", source, "--images", tmp_path / "pictures", "--out", shards]
    code, out, _ = call(["import", "llava", *words, "--samples-per-shard", "1"], capsys)
    assert code == 0 and "2 samples with 1 images in 2 shards" in out and "1 samples left out" in out
    (line,) = map(json.loads, (shards / "rejected.jsonl").read_text(encoding="utf-8").splitlines())
    assert line == {"number": 1, "id": "0001", "reason": "coco/gone.jpg: No such file or directory"}
    ((key, parts),) = read_shard(str(shards / "shard-000000.tar"))
    assert key == "000000000" and parts["0.jpg"] == picture(1) and json.loads(parts["json"])["id"] == "0001"
    folder, samples = codes_of(tokenizer, shards, "--images-first")
    assert {key: len(sample.codes) for key, sample in samples.items()} == {"000000000": 1, "000000002": 0}
    stream = read_stream(tokenizer, folder, "document")
    assert "A cat." in stream["000000000"][0] and "Hello!" in stream["000000002"][0]
    code, _, err = call(["import", "llava", *words], capsys)
    assert code == 2 and "is there already; choose another folder or remove it" in err


def test_llava_with_lines_lists_of_pictures_and_mistakes(tmp_path: Path) -> None:
    source, images = llava_files(tmp_path), tmp_path / "pictures"
    records = json.loads(source.read_text(encoding="utf-8"))
    two = {**records[0], "image": ["coco/0001.jpg", "coco/0001.jpg"]}
    wrong = [{**records[0], "image": image} for image in ("a.txt", 7, "long" * 99 + ".jpg")]
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        "\n".join(map(json.dumps, [two, {"id": "x"}, *wrong])) + "\n\n",
        encoding="utf-8",
    )
    made = import_llava(lines, images, tmp_path / "lines")
    assert (made.samples, made.images, made.shards, made.rejected) == (1, 2, 1, 4)
    reasons = [
        json.loads(line)["reason"] for line in (tmp_path / "lines" / "rejected.jsonl").open(encoding="utf-8")
    ]
    assert reasons == [
        "no conversations",
        "a.txt: not the name of a picture",
        "image is 7, expected the name of a picture or a list of names",
        f"{'long' * 20}: File name too long",
    ]
    source.write_text(json.dumps(records)[:-20], encoding="utf-8")
    with pytest.raises(DatasetError, match=r"llava\.json: cannot be read as json"):
        import_llava(source, images, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []  # nothing half done
    with pytest.raises(DatasetError, match="nowhere: not found; expected LLaVA's json and the folder"):
        import_llava(source, tmp_path / "nowhere", tmp_path / "out")
    source.write_text(json.dumps(records[1:2]), encoding="utf-8")
    with pytest.raises(DatasetError, match="none of its 1 samples can be used"):
        import_llava(source, images, tmp_path / "out")


def talk(*values: str) -> list[dict[str, str]]:
    """Turns by human and gpt in turn."""
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def test_llava_turns_that_are_not_learned(tmp_path: Path) -> None:
    source, images = llava_files(tmp_path), tmp_path / "pictures"
    picture_of = {"image": "coco/0001.jpg"}
    records = [
        {"id": "words", "conversations": talk("Write <image> in HTML.", "<img>")},
        {"id": "gpt first", "conversations": [{"from": "gpt", "value": "Welcome"}, *talk("Hi", "Hello")]},
        {"id": "empty", **picture_of, "conversations": talk("<image>\nWhat?", " ", "Colour?", "Red.")},
        {"id": "all empty", **picture_of, "conversations": talk("<image>\nWhat?", "")},
        {"id": "no place", **picture_of, "conversations": talk("Hi", "Hello", "<image>\nWhat?", "")},
    ]
    source.write_text(json.dumps(records), encoding="utf-8")
    made = import_llava(source, images, tmp_path / "out")
    assert (made.samples, made.rejected, made.turns_left_out) == (3, 2, 3)
    reasons = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open(encoding="utf-8")]
    assert [(line["id"], line["reason"]) for line in reasons] == [
        ("all empty", "no answer to learn"), ("no place", "no answer to learn"),
    ]  # fmt: skip
    left_out = [
        json.loads(line) for line in (tmp_path / "out" / "turns_left_out.jsonl").open(encoding="utf-8")
    ]
    assert [[turn["value"] for turn in line["turns"]] for line in left_out] == [
        ["Welcome"], ["<image>\nWhat?", " "],
    ]  # fmt: skip
    read = [read_sample(*sample) for sample in read_shard(str(tmp_path / "out" / "shard-000000.tar"))]
    said = [
        [part.get("text", "(picture)") for part in sample.parts if not part.get("markup")] for sample in read
    ]
    assert [texts[1:] for texts in said] == [
        ["Write <image> in HTML.", "<img>"], ["Hi", "Hello"], ["(picture)", "\nColour?", "Red."],
    ]  # fmt: skip


def test_llava_stops_where_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llava_files(tmp_path)

    def broken(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(OSError, match="Input/output error.*0001.jpg"):
        import_llava(source, tmp_path / "pictures", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_lists_and_lines_are_the_same_records(tmp_path: Path) -> None:
    records = [{"id": index, "text": 'a "quoted" ] } ü' * (index % 7), "score": 0.5} for index in range(200)]
    path = tmp_path / "list.json"
    for text in (
        json.dumps(records), " \n" + json.dumps(records, indent=2), "\n".join(map(json.dumps, records))
    ):  # fmt: skip
        path.write_text(text, encoding="utf-8")
        assert list(iterate_records(path)) == records
    path.write_text(r'[{"half": "a\ud83d b", "whole": "\ud83d\ude00"}]', encoding="utf-8")
    assert list(iterate_records(path)) == [{"half": "a? b", "whole": "\N{GRINNING FACE}"}]


def run_block(name: str) -> SimpleNamespace:
    """Execute a block of Python of the page."""
    names: dict = {}
    exec(compile(EXAMPLES[name], f"docs/data.md: {name}", "exec"), names)
    return SimpleNamespace(**names)


def test_obelics(tokenizer: SimpleNamespace, tmp_path: Path) -> None:
    script = run_block("obelics")
    fetched, documents = tmp_path / "fetched", tmp_path / "documents"
    fetched.mkdir()
    documents.mkdir()
    members = []
    for index in range(3):
        record = {"url": f"https://example.org/{index}.jpg", "caption": None, "key": f"{index:09d}"}
        members += [(f"{index:09d}.jpg", picture(index)), (f"{index:09d}.json", json.dumps(record).encode())]
    write_tar(fetched / "00000.tar", members)
    address = "https://example.org/{}.jpg".format
    rows = [
        {"texts": ["One", None, "two", None], "images": [None, address(2), None, address(0)]},
        {"texts": [None, "alone"], "images": [address(7), None]},
    ]
    script.write_documents(rows, script.fetched_pictures(fetched), documents / "00000.tar")
    found = dict(read_shard(str(documents / "00000.tar")))
    assert found["00000-000000"]["0.jpg"] == picture(2) and found["00000-000000"]["1.jpg"] == picture(0)
    folder, samples = codes_of(tokenizer, documents)
    assert [len(sample.codes) for sample in samples.values()] == [2, 0]
    stream = read_stream(tokenizer, folder, "document")
    assert [text for text, _ in stream.values()] == ["Onetwo", "alone"]


def test_journeydb(tokenizer: SimpleNamespace, tmp_path: Path) -> None:
    script = run_block("journeydb")
    (tmp_path / "000").mkdir()
    for index in range(3):
        (tmp_path / "000" / f"ab-{index}.jpg").write_bytes(picture(index))
    with tarfile.open(tmp_path / "000.tgz", "w:gz") as archive:
        archive.add(tmp_path / "000", "000")
    shutil.rmtree(tmp_path / "000")
    lines = [
        json.dumps({"img_path": f"./000/ab-{index}.jpg", "prompt": f"a fox, {index}"}) for index in (0, 2)
    ]
    (tmp_path / "train_anno.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "in").mkdir()
    prompts = script.read_prompts(tmp_path / "train_anno.jsonl")
    script.write_shard(prompts, tmp_path / "000.tgz", tmp_path / "in" / "000.tar")
    folder, _ = codes_of(tokenizer, tmp_path / "in")
    assert {key: text for key, (text, _) in read_stream(tokenizer, folder, "generate").items()} == {
        "ab-0": "a fox, 0",
        "ab-2": "a fox, 2",
    }
