"""Pretokenization: every sample in the output or rejected, same bytes after any kill, no shard done twice."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import threading
import time
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import DatasetError
from data_pipeline.images.decoding import build_image_decoder
from data_pipeline.pretokenize.claims import Claims
from data_pipeline.pretokenize.command import dry_run, main, place_among_workers, pretokenize
from data_pipeline.pretokenize.run import PretokenizeRun, checked_plan, plan_outputs
from data_pipeline.pretokenize.shard_tokenizer import Settings, ShardTokenizer
from data_pipeline.shards.code_shards import CodeSample, DatasetManifest, iterate_shard, verify_dataset
from data_pipeline.shards.image_text_shards import expand_inputs, read_shard, source_address
from data_pipeline.shards.tar_members import iterate_samples, locate_samples
from data_pipeline.streams.views import LeftOut, build_document
from dualtoken.unified_model.sequence import ImagePart, TextPart
from tests.support.command import call
from tests.test_data_pipeline.streams.test_streams import write_tar

SIZE = 16


class StandInTokenizer:
    """Codes that are a hash of each quarter of the image: exact, quick, different for different images."""

    config = SimpleNamespace(
        positions=4, num_codebooks=2, num_quantizers=3, codebook_size=50, image_size=SIZE
    )

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.images = 0

    def fingerprint(self) -> str:
        return "a" * 64

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay)
        self.images += len(images)
        quarters = (
            images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(len(images), 4, -1)
        )
        digests = [[hashlib.sha256(q.numpy().tobytes()).digest()[:6] for q in image] for image in quarters]
        return torch.tensor([[list(d) for d in image] for image in digests]).reshape(-1, 4, 2, 3) % 50


def picture(index: int, kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG, sound otherwise, that says it has 30,000 x 30,000 pixels."""
    data = picture(0)
    header = data[12:16] + (30000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


# What is wrong with an image, and the reason to be found for it.
BROKEN = [
    (lambda: picture(1, "JPEG")[:300], "^cannot be decoded: "),
    (lambda: b"%PDF-1.7" + bytes(40), "^not an image: starts with b'%PDF-1.7'$"),
    (lambda: b"", "^empty file$"),
    (lambda: b"<!DOCTYPE html><html>404</html>", "^text or HTML in place of an image$"),
    (bomb, "^30000 x 30000 pixels, more than the limit"),
]


def write_inputs(
    folder: Path,
    shards: int = 4,
    samples: int = 12,
    broken: Callable[[int], int | None] = lambda index: index // 9 % 5 if index % 9 == 4 else None,
    uncaptioned: Callable[[int], bool] = lambda index: index % 10 == 7,
) -> dict[str, str]:
    """Write shards in which some samples are broken; return key -> reason expected, "" for good ones.

    `broken` gives the place in BROKEN of a sample's fault, `uncaptioned` whether it lacks its caption.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for shard in range(shards):
        members = []
        for index in range(shard * samples, (shard + 1) * samples):
            key, fault = f"k{index:04d}", broken(index)
            image, reason = (picture(index), "") if fault is None else (BROKEN[fault][0](), BROKEN[fault][1])
            members.append((f"{key}.png", image))
            if uncaptioned(index):
                expected[key] = "^no caption$"
            else:
                captions = {"en": f"thing {index}", "de": f"Ding {index}"}
                members.append((f"{key}.json", json.dumps({"captions": captions}).encode()))
                expected[key] = reason
        write_tar(folder / f"in-{shard:03d}.tar", members)
    return expected


def run(inputs: Path, output: Path, **options: object) -> DatasetManifest:
    delay = options.pop("delay", 0.0)
    settings = options.pop("settings", Settings(batch_size=5))
    decoder = build_image_decoder(SIZE, "pil")
    return pretokenize([str(inputs)], StandInTokenizer(delay), decoder, output, settings, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but Energon's index, which holds a random id."""
    assert not list(folder.glob(".*.tmp")) and not (folder / ".pretokenize").exists()
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".idx"
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("pretokenize")
    expected = write_inputs(folder / "in")
    run(folder / "in", folder / "out")
    return folder / "in", expected, contents(folder / "out")


def check_complete(output: Path, expected: dict[str, str]) -> None:
    manifest = verify_dataset(output, "a" * 64)
    samples = [sample for name in manifest.shards for sample in iterate_shard(output / name)]
    assert [sample.key for sample in samples] == [key for key, reason in expected.items() if not reason]
    lines = [
        json.loads(line) for line in (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["key"] for line in lines] == [key for key, reason in expected.items() if reason]
    for line in lines:
        assert re.search(expected[line["key"]], line["reason"]), line
        assert line["shard"] in manifest.shards
    assert manifest.samples_in == len(expected) == manifest.samples_out + manifest.rejected


def test_each_sample_is_out_or_rejected(tmp_path: Path) -> None:
    expected = write_inputs(tmp_path / "in")
    manifest = run(tmp_path / "in", tmp_path / "out")
    check_complete(tmp_path / "out", expected)
    assert list(manifest.shards) == [f"in-{shard:03d}.tar" for shard in range(4)]
    sample = next(iterate_shard(tmp_path / "out" / "in-001.tar"))
    assert sample.captions == {"en": "thing 12", "de": "Ding 12"}
    assert sample.parts == [{"image": 0, "loss": False}, {"text": "thing 12"}]
    images = build_image_decoder(SIZE, "pil")([picture(12)]).images
    assert np.array_equal(sample.codes, StandInTokenizer().encode(images).numpy())


def test_a_conversation_with_captions_beside_it_serves_all_three_views(tmp_path: Path) -> None:
    """As the sample data's scenes: one picture is captioned, generated and asked about."""
    members: list[tuple[str, bytes]] = []
    for index in range(3):
        talk = [
            {"from": "human", "value": "<image>\nHow many?"},
            {"from": "gpt", "value": f"{index}."},
        ]
        captions = {"en": f"thing {index}", "de": f"Ding {index}"}
        record = {"captions": captions, "conversations": talk, "scene": {"layout": "two"}}
        # The last has no captions: it is asked about only.
        record = {"conversations": talk} if index == 2 else record
        members += [(f"k{index}.png", picture(index)), (f"k{index}.json", json.dumps(record).encode())]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "in-000.tar", members)
    manifest = run(tmp_path / "in", tmp_path / "out")
    assert (manifest.samples_out, manifest.rejected) == (3, 0)
    samples = list(iterate_shard(tmp_path / "out" / "in-000.tar"))
    draw = random.Random(0)

    def texts(sample: CodeSample, view: str, language: str) -> list[str]:
        document = build_document(sample, view, draw, [language])
        (image,) = [part for part in document.parts if isinstance(part, ImagePart)]
        assert np.array_equal(image.codes, sample.codes[0]) and image.loss == (view == "generate")
        return [part.text for part in document.parts if isinstance(part, TextPart)]

    for index, sample in enumerate(samples[:2]):
        for language, caption in {"en": f"thing {index}", "de": f"Ding {index}"}.items():
            assert texts(sample, "caption", language)[-1] == f" {caption}"
            assert texts(sample, "generate", language) == [caption]
            asked = texts(sample, "document", language)
            assert "\nHow many?" in asked and f"{index}." in asked and caption not in "".join(asked)
    assert "2." in texts(samples[2], "document", "en")
    for view in ("caption", "generate"):
        with pytest.raises(LeftOut, match="^no caption$"):
            texts(samples[2], view, "en")


def test_a_finished_run_is_left_alone_and_another_refused(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", shards=2)
    run(tmp_path / "in", tmp_path / "out")
    before = contents(tmp_path / "out")
    lines: list[str] = []
    run(tmp_path / "in", tmp_path / "out", report=lines.append)
    assert contents(tmp_path / "out") == before
    assert lines == [f"{tmp_path / 'out'} is finished: 19 samples of 24"]
    write_inputs(tmp_path / "in", shards=3)
    with pytest.raises(DatasetError, match=r"finished data set with inputs that lack .*/in/in-002\.tar"):
        run(tmp_path / "in", tmp_path / "out")


def test_other_inputs_and_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_inputs(tmp_path / name, shards=2)
    output = tmp_path / "out"
    run(tmp_path / "a", output)
    lines: list[str] = []
    monkeypatch.chdir(tmp_path)
    run(Path("a"), output, report=lines.append)  # from wherever it is called
    assert "is finished" in lines[0]
    refused = r"holds a finished data set with input .*/a/in-000\.tar, not .*/b/in-000\.tar; use the same"
    with pytest.raises(DatasetError, match=refused):
        run(tmp_path / "b", output)
    for change in (
        {"default_language": "de"},
        {"generate_images": True},
        {"chat_template": "plain"},
        {"images_first": True},
        {"precision": "bf16"},
    ):
        (name, value), *_ = change.items()
        with pytest.raises(DatasetError, match=rf"finished data set with {name} \w+, not {value};"):
            run(tmp_path / "a", output, settings=Settings(batch_size=5, **change))
    decoder = build_image_decoder(SIZE, "pil", fit="crop")
    with pytest.raises(DatasetError, match="finished data set with fit resize, not crop"):
        pretokenize([str(tmp_path / "a")], StandInTokenizer(), decoder, output, Settings(batch_size=5))
    (tmp_path / "b" / "in-001.tar").unlink()
    (tmp_path / "a" / "in-001.tar").unlink()
    with pytest.raises(DatasetError, match=r"input .*/a/in-001\.tar, which is not given now"):
        run(tmp_path / "a", output)
    # A run on its way, of the same names and settings.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "in-000.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DatasetError, match="cannot be read"):
        run(tmp_path / "c", tmp_path / "out2")
    with pytest.raises(DatasetError, match=r"unfinished run with input .*/c/in-000\.tar, not .*/b/in-000"):
        run(tmp_path / "b", tmp_path / "out2")


def test_a_data_set_without_settings_and_addresses_is_still_one(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", shards=2)
    run(tmp_path / "in", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert content.pop("settings")["batch_size"] == 5
    for name, entry in content["shards"].items():
        assert entry["source"] == str(tmp_path / "in" / name)
        entry["source"] = name
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    assert verify_dataset(tmp_path / "out", "a" * 64).samples_in == 24
    lines: list[str] = []
    run(tmp_path / "in", tmp_path / "out", report=lines.append, settings=Settings(batch_size=6))
    assert "is finished" in lines[0]
    write_inputs(tmp_path / "in", shards=3)
    with pytest.raises(DatasetError, match="holds a finished data set with other input shards"):
        run(tmp_path / "in", tmp_path / "out")


def test_an_unfinished_run_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", shards=2)
    write_tar(tmp_path / "in" / "z.tar", [])
    (tmp_path / "in" / "z.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DatasetError, match=r"z\.tar: cannot be read"):
        run(tmp_path / "in", tmp_path / "out")
    write_tar(tmp_path / "in" / "z.tar", [("z.png", picture(1)), ("z.txt", b"repaired")])
    with pytest.raises(DatasetError, match="unfinished run with batch_size 5, not 6"):
        run(tmp_path / "in", tmp_path / "out", settings=Settings(batch_size=6))
    assert run(tmp_path / "in", tmp_path / "out").samples_in == 25


def test_workers_share_the_shards(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, undisturbed: tuple
) -> None:
    inputs, _, expected = undisturbed
    tokenizers = [StandInTokenizer(delay=0.02) for _ in range(3)]
    decoder = build_image_decoder(SIZE, "pil")

    def work(rank: int) -> None:
        options = {"rank": rank, "world_size": 3}
        pretokenize([str(inputs)], tokenizers[rank], decoder, tmp_path, Settings(batch_size=5), **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(tmp_path) == expected
    alone = StandInTokenizer()
    pretokenize([str(inputs)], alone, decoder, tmp_path_factory.mktemp("alone"), Settings(batch_size=5))
    assert sum(tokenizer.images for tokenizer in tokenizers) == alone.images  # no shard was done twice


def test_results_removed_at_the_end_are_not_made_again(
    tmp_path: Path, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker looks for what is missing just while another one, done, removes the work folder."""
    inputs, _, expected = undisturbed
    late = StandInTokenizer()
    finished = Claims.acquire

    def acquire(claims: Claims, name: str) -> bool:
        monkeypatch.setattr(Claims, "acquire", finished)
        run(inputs, tmp_path)
        claims.folder.mkdir(parents=True)
        return claims.acquire(name)

    monkeypatch.setattr(Claims, "acquire", acquire)
    pretokenize([str(inputs)], late, build_image_decoder(SIZE, "pil"), tmp_path, Settings(batch_size=5))
    assert late.images == 0
    assert contents(tmp_path) == expected


def fork_worker(inputs: Path, output: Path, **options: object) -> int:
    """Start a worker in a forked process, which is quick to start; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        run(inputs, output, **options)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def claims_of(output: Path) -> list[str]:
    """Return what the claims say that are there, while their owners make them and give them back."""
    claims = []
    with contextlib.suppress(FileNotFoundError):  # the folder, before the first and after the last
        for path in sorted((output / ".pretokenize" / "claims").iterdir()):
            if path.suffix == ".claim":
                with contextlib.suppress(FileNotFoundError):  # given back since it was listed
                    claims.append(path.read_text(encoding="utf-8"))
    return claims


def test_a_killed_worker_is_replaced_and_the_bytes_are_the_same(tmp_path: Path, undisturbed: tuple) -> None:
    inputs, keys, expected = undisturbed
    killed = fork_worker(inputs, tmp_path, delay=0.15, rank=0, world_size=2)
    while not list(tmp_path.glob(".pretokenize/claims/*.claim")):
        time.sleep(0.002)
    # Another worker, in this process, is at work when the first is killed at a random moment.
    timer = threading.Timer(random.uniform(0.0, 1.0), os.kill, [killed, signal.SIGKILL])
    timer.start()
    run(inputs, tmp_path, delay=0.1, rank=1, world_size=2)
    timer.join()
    os.waitpid(killed, 0)
    assert contents(tmp_path) == expected
    check_complete(tmp_path, keys)


def test_killed_again_and_again(tmp_path: Path, undisturbed: tuple) -> None:
    """Workers are killed at random until one gets through."""
    inputs, keys, expected = undisturbed
    kills = 0
    while True:
        child = fork_worker(inputs, tmp_path, delay=0.01)
        # The first one is killed before it can be done, however fast the machine.
        deadline = time.monotonic() + random.uniform(0.01, 0.25 if kills else 0.03)
        finished, status = os.waitpid(child, os.WNOHANG)
        while not finished and (time.monotonic() < deadline or kills >= 12):
            time.sleep(0.002)
            finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert status == 0
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert kills
    run(inputs, tmp_path)  # one killed just after the last file leaves its work folder
    assert contents(tmp_path) == expected
    check_complete(tmp_path, keys)


def test_three_workers_one_of_which_is_killed_again_and_again(tmp_path: Path) -> None:
    """2 % of the samples are broken in six ways; the bytes are those of a run that nobody disturbs."""
    kinds = len(BROKEN) + 1
    fault = {index: index // 50 % kinds for index in range(24, 600, 50)}
    keys = write_inputs(
        tmp_path / "in",
        shards=12,
        samples=50,
        broken=lambda index: fault[index] if fault.get(index, kinds) < len(BROKEN) else None,
        uncaptioned=lambda index: fault.get(index) == len(BROKEN),
    )
    assert Counter(keys.values()) == {
        "": 588,
        "^no caption$": 2,
        **{reason: 2 for _, reason in BROKEN},
    }
    run(tmp_path / "in", tmp_path / "undisturbed")
    output = tmp_path / "out"

    def start(rank: int) -> int:
        return fork_worker(tmp_path / "in", output, delay=0.04, rank=rank, world_size=3)

    steady, victim = {start(0), start(1)}, start(2)
    kills = kills_at_work = 0
    while len(steady) == 2:
        time.sleep(random.uniform(0.02, 0.3))
        for child in list(steady):
            ended, status = os.waitpid(child, os.WNOHANG)
            assert status == 0
            steady -= {ended}
        ended, status = os.waitpid(victim, os.WNOHANG)
        assert status == 0
        if not ended:
            claims = claims_of(output)
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            kills, kills_at_work = kills + 1, kills_at_work + any(f'"pid": {victim}' in c for c in claims)
        victim = start(2)
    for child in (*steady, victim):
        assert os.waitpid(child, 0)[1] == 0
    assert kills_at_work >= 2, f"{kills} kills"
    assert contents(output) == contents(tmp_path / "undisturbed")
    check_complete(output, keys)


def test_interleaved_documents_and_odd_shards(tmp_path: Path) -> None:
    parts = [{"text": "before"}, {"image": 1, "loss": True}, {"text": "between"}, {"image": 0}]
    record = json.dumps({"parts": parts}).encode()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a boat"}]
    talk = json.dumps({"conversations": turns}).encode()
    wrong = json.dumps({"parts": parts[:2]}).encode()
    members = [
        *[("a.0.png", picture(1)), ("a.1.jpg", picture(2, "JPEG")), ("a.json", record)],
        *[("b.0.png", picture(1)), ("b.1.png", b"broken"), ("b.json", record)],
        *[("c.0.png", picture(1)), ("c.1.png", picture(2)), ("c.json", wrong)],
        *[("d.json", json.dumps({"parts": [{"text": "no image"}]}).encode()), ("h.txt", b"no image")],
        *[("e.png", picture(3)), ("e.json", b"{"), ("t.jpg", picture(8, "JPEG")), ("t.json", talk)],
        *[("f.png", picture(3)), ("f.txt", b"  "), ("g.png", picture(4)), ("g.txt", "größer".encode())],
        *[("a.png", picture(5)), ("a.txt", b"again")],
    ]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "x.tar", members)
    write_tar(
        tmp_path / "y.tar", [("p.png", picture(6)), ("p.txt", b"p"), ("q.png", picture(7)), ("q.txt", b"q")]
    )
    whole = (tmp_path / "y.tar").read_bytes()
    (tmp_path / "in" / "y.tar").write_bytes(whole[: whole.index(b"q.png") + 100])
    manifest = run(tmp_path / "in", tmp_path / "out", settings=Settings(batch_size=2))
    verify_dataset(tmp_path / "out")
    first, text, chat, pair = iterate_shard(tmp_path / "out" / "x.tar")
    learned = [{"loss": "text" in part, **part} for part in parts]
    assert (first.key, first.parts, first.captions) == ("a", learned, None) and len(first.codes) == 2
    assert (text.key, text.parts, len(text.codes)) == ("d", [{"text": "no image", "loss": True}], 0)
    assert chat.key == "t" and len(chat.codes) == 1 and {"image": 0, "loss": False} in chat.parts
    assert {"text": "a boat", "loss": True} in chat.parts
    assert (pair.key, pair.captions) == ("g", {"en": "größer"})
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    reasons = {f"{line['shard']} {line['key']}": line["reason"] for line in lines}
    assert reasons.keys() == {*(f"x.tar {key}" for key in "bchefa"), "y.tar None"}
    assert [sample.key for sample in iterate_shard(tmp_path / "out" / "y.tar")] == ["p"]
    assert reasons["x.tar b"].startswith("image 1: ")
    assert "names the images [1], but there are 2" in reasons["x.tar c"]
    assert "no image" in reasons["x.tar h"]
    assert "json cannot be read" in reasons["x.tar e"]
    assert reasons["x.tar f"] == "no caption"
    assert "more than once" in reasons["x.tar a"]
    assert "cannot be read further: truncated" in reasons["y.tar None"]
    assert (
        manifest.samples_in == manifest.samples_out + manifest.rejected == len(reasons) + manifest.samples_out
    )


def test_names_and_texts_that_are_no_unicode_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    half = b'{"caption": "half a smile \\ud83d"}'
    turns = b'{"conversations": [{"from": "human", "value": "\\ud83d"}, {"from": "gpt", "value": "no"}]}'
    latin = "gr\udcf6sse"  # the byte of Latin-1, as tarfile and os read it
    members = [
        *[("a.png", picture(1)), ("a.json", half), ("b.json", turns), ("c.png", picture(2)), ("c.txt", b"c")],
        *[(f"{latin}.png", picture(3)), (f"{latin}.txt", b"size"), (f"{latin}2.png", b"")],
    ]
    write_tar(tmp_path / "in" / "x.tar", members)
    run(tmp_path / "in", tmp_path / "out")
    assert verify_dataset(tmp_path / "out").samples_out == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open(encoding="utf-8")]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert "lone surrogate, '\\ud83d'" in reasons["a"] and "lone surrogate" in reasons["b"]
    assert "not in UTF-8" in reasons[latin] and reasons[f"{latin}2"] == "no caption"


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", shards=1)
    whole = (tmp_path / "in" / "in-000.tar").read_bytes()
    zipped = gzip.compress(whole, mtime=0)
    (tmp_path / "in" / "in-000.tar").write_bytes(zipped)
    expected = [key for key, _ in iterate_samples(io.BytesIO(whole))]
    memory = fsspec.filesystem("memory")
    memory.pipe("/zipped/x.tgz?token=1", zipped)
    path = tmp_path / "in" / "in-000.tar"
    for url in (str(path), "memory://zipped/x.tgz?token=1"):
        assert [key for key, _ in read_shard(url)] == expected
    manifest = run(tmp_path / "in", tmp_path / "out")
    assert manifest.samples_in == len(expected)


def test_a_damaged_gzip_or_pax_header_is_a_damaged_shard(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", shards=2)
    first, second = (tmp_path / "in" / f"in-{shard:03d}.tar" for shard in range(2))
    whole, zipper = first.read_bytes(), zlib.compressobj(wbits=31)
    zipped = zipper.compress(whole[: len(whole) // 2]) + zipper.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 99
    with pytest.raises(zlib.error):
        gzip.decompress(zipped)
    first.write_bytes(zipped)
    name = "ä" * 30
    write_tar(second, [("k.png", picture(1)), ("k.txt", b"k"), (f"{name}.png", b""), (f"{name}.txt", b"")])
    whole = second.read_bytes()
    second.write_bytes(re.sub(rb"[0-9]([0-9] path=)", rb"x\1", whole))
    assert second.read_bytes() != whole
    run(tmp_path / "in", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open(encoding="utf-8")]
    damaged = {line["shard"]: line["reason"] for line in lines if "the shard" in line["reason"]}
    assert damaged.keys() == {first.name, second.name}
    assert "cannot be read further: Error -3 while decompressing" in damaged[first.name]
    assert "cannot be read further: damaged pax header: b'x" in damaged[second.name]
    output: list[str] = []
    what = ([str(tmp_path / "in")], StandInTokenizer(), build_image_decoder(SIZE, "pil"), tmp_path / "other")
    dry_run(*what, report=output.append)
    assert "in-000.tar cannot be read further: Error -3" in output[1] and "damaged pax" in output[2]


def test_commands_are_not_run(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", shards=1)
    command = f"pipe:touch {tmp_path}/ran; cat {tmp_path}/in/in-000.tar"
    with pytest.raises(DatasetError, match="pipe:touch .*: commands are not run; give the address itself"):
        expand_inputs([command])
    with pytest.raises(OSError, match="No such file"):
        list(read_shard(command))  # as the name of a file, which it is
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class BreakingFile(io.BufferedReader):
    """A file of which the second half cannot be read, as on a failing network file system."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        if self.tell() + size > os.fstat(self.fileno()).st_size // 2:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def test_a_storage_that_fails_on_the_way_is_not_a_damaged_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_inputs(tmp_path / "in", shards=1)
    with monkeypatch.context() as breaking:
        breaking.setattr("data_pipeline.shards.image_text_shards.open_shard", BreakingFile)
        with pytest.raises(DatasetError, match=r"in-000\.tar: cannot be read further: .*Input/output error"):
            run(tmp_path / "in", tmp_path / "out")
        run(tmp_path / "in", tmp_path / "skipped", settings=Settings(batch_size=5, on_bad_shard="skip"))
    run(tmp_path / "in", tmp_path / "out")  # goes on, with all that is there
    check_complete(tmp_path / "out", expected)
    manifest = verify_dataset(tmp_path / "skipped")
    *_, last = map(json.loads, (tmp_path / "skipped" / "rejected.jsonl").open(encoding="utf-8"))
    assert 0 < manifest.samples_out < 8 and last["key"] is None
    assert "the shard cannot be read further: [Errno 5] Input/output error" in last["reason"]


def test_a_shard_without_a_usable_sample(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    write_tar(inputs / "bad.tar", [("a.png", b"broken"), ("a.txt", b"a")])
    with pytest.raises(DatasetError, match="no sample could be used; see rejected.jsonl"):
        run(inputs, tmp_path / "out1")
    write_tar(inputs / "good.tar", [("b.png", picture(1)), ("b.txt", b"b")])
    manifest = run(inputs, tmp_path / "out2")
    assert (manifest.samples_in, manifest.samples_out, manifest.rejected) == (2, 1, 1)
    assert not (tmp_path / "out2" / "bad.tar").exists()
    verify_dataset(tmp_path / "out2")
    with pytest.raises(DatasetError, match="is in the output folder"):
        run(inputs, inputs)


def test_keys_that_repeat_from_shard_to_shard(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        write_tar(tmp_path / "in" / name / "s.tar", [("k.png", picture(ord(name))), ("k.txt", b"k")])
    with pytest.raises(DatasetError, match="key k occurs more than once.*--prefix-keys"):
        run(tmp_path / "in", tmp_path / "out1")
    manifest = run(tmp_path / "in", tmp_path / "out2", settings=Settings(prefix_keys=True))
    assert list(manifest.shards) == ["000000-s.tar", "000001-s.tar"]
    keys = [sample.key for name in manifest.shards for sample in iterate_shard(tmp_path / "out2" / name)]
    assert keys == ["000000-s/k", "000001-s/k"]


def test_each_shard_has_an_output_of_its_own() -> None:
    names = [
        *["a/s.tar", "b/s.tar", "c/000000-s.tar", "d/000001-s.tar", "e/000001-s.tar", "f/x.tar"],
        *["https://host/y.tgz?at=1/z.tar"],
    ]
    plan = plan_outputs(names)
    assert list(plan.values()) == names
    assert list(plan)[2] == "000000-s.tar" and list(plan)[-2:] == ["x.tar", "y.tar"]


@pytest.mark.parametrize("place", [0, -1])
def test_repeated_keys_are_told_early(tmp_path: Path, place: int) -> None:
    """Of the first key before a second shard is encoded, of the last one after it."""
    inputs, tokenizer = tmp_path / "in", StandInTokenizer()
    inputs.mkdir()
    for name in "abcd":
        keys = [f"{name}{index}" for index in range(6)]
        keys[place] = "same"
        members = [[(f"{key}.png", picture(3)), (f"{key}.txt", b"text")] for key in keys]
        write_tar(inputs / f"{name}.tar", sum(members, []))
    decoder = build_image_decoder(SIZE, "pil")
    what = ([str(inputs)], tokenizer, decoder, tmp_path / "out", Settings(batch_size=2))
    message = r"key same occurs more than once, in a\.tar and b\.tar; .*: use --prefix-keys and another"
    for most in (8 if place == 0 else 12, 20):
        with pytest.raises(DatasetError, match=message):
            pretokenize(*what)
        assert tokenizer.images <= most  # started again, it does not go past the place either
    if place == 0:
        lines: list[str] = []
        dry_run(*what[:3], tmp_path / "other", Settings(batch_size=2), report=lines.append)
        assert re.search(r"/a\.tar and .*/b\.tar both begin with key same; .*--prefix-keys", lines[1])


def test_inputs(tmp_path: Path) -> None:
    for name in ("a-00.tar", "a-01.tar", "b.tar"):
        write_tar(tmp_path / name, [])
    names = [
        Path(shard).name for shard in expand_inputs([f"{tmp_path}/a-{{00..01}}.tar", f"{tmp_path}/*.tar"])
    ]
    assert names == ["a-00.tar", "a-01.tar", "b.tar"]
    assert expand_inputs(["https://host/a-{0..1}.tar"]) == ["https://host/a-0.tar", "https://host/a-1.tar"]
    with pytest.raises(DatasetError, match="no shard found"):
        expand_inputs([f"{tmp_path}/c*.tar"])
    with pytest.raises(DatasetError, match=r"a-02\.tar: no such file; 3 of the shards of .*\.\.04}\.tar are"):
        expand_inputs([f"{tmp_path}/a-{{00..04}}.tar"])
    write_tar(tmp_path / "c[1].tar", [])
    assert expand_inputs([f"{tmp_path}/{{b,c[1]}}.tar"]) == [f"{tmp_path}/b.tar", f"{tmp_path}/c[1].tar"]


def test_addresses_are_kept_without_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_address("a/b.tar") == str(tmp_path / "a" / "b.tar")
    assert source_address("https://me:secret@host/a.tar?token=1/2") == "https://host/a.tar"
    assert source_address("https://host/My pictures/a.tar?token=1") == "https://host/My pictures/a.tar"
    assert source_address("zip://a.tar::https://me:secret@host/b") == "zip://a.tar::https://host/b"


def test_claims(tmp_path: Path) -> None:
    first, second = Claims(tmp_path, timeout=0.5), Claims(tmp_path, timeout=0.5)
    assert first.acquire("s") and first.still_held()
    assert not second.acquire("s") and second.acquire("t")
    time.sleep(0.8)
    assert not second.acquire("s")  # it was touched meanwhile
    path = tmp_path / "s.claim"
    elsewhere = {"place": ["another host", "boot", 1], "pid": 1, "start": "1", "id": "x"}
    first.close()
    path.write_text(json.dumps(elsewhere), encoding="utf-8")
    assert not second.acquire("s")
    os.utime(path, (0, 0))
    assert second.acquire("s") and second.still_held()
    path.write_text(json.dumps(elsewhere), encoding="utf-8")
    assert not second.still_held()
    second.close()
    assert path.exists()  # not ours to remove
    names = [p.name for p in tmp_path.iterdir()]
    assert Counter(name.startswith(".") for name in names)[True] == 0


@pytest.mark.parametrize("finished", [False, True])
def test_a_worker_that_was_taken_for_dead_leaves_the_shard_alone(
    tmp_path: Path, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """It sleeps over its first images; meanwhile its claim is taken, and its temporary file or its work."""
    inputs, keys, expected = undisturbed
    encode, tars = StandInTokenizer.encode, dict[str, int]()

    def slow(tokenizer: StandInTokenizer, images: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(StandInTokenizer, "encode", encode)
        (claim,), (own,) = tmp_path.glob(".pretokenize/claims/*.claim"), tmp_path.glob(".*.tmp")
        claim.unlink()
        kept = own.read_bytes()
        own.unlink()
        if finished:
            run(inputs, tmp_path)
            own.write_bytes(kept)
            tars.update(
                {path: at for path, at in everything_below(tmp_path).items() if path.endswith(".tar")}
            )
        return encode(tokenizer, images)

    monkeypatch.setattr(StandInTokenizer, "encode", slow)
    run(inputs, tmp_path)
    assert contents(tmp_path) == expected
    check_complete(tmp_path, keys)
    assert len(tars) == 4 * finished and tars.items() <= everything_below(tmp_path).items()


def test_a_link_whose_answer_was_lost_is_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS repeats a request whose answer was lost, and then finds the link that it has made itself."""
    first, second = Claims(tmp_path), Claims(tmp_path)
    link = os.link

    def lossy(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists", str(target))

    with monkeypatch.context() as lost:
        lost.setattr(os, "link", lossy)
        assert first.acquire("s") and first.still_held()
    assert not second.acquire("s")
    first.close()
    second.close()


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    write_inputs(tmp_path / "in", shards=1)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        DatasetError, match="makes no hard links .Operation not permitted.*; write to a local"
    ):
        run(tmp_path / "in", tmp_path / "out")


def test_results_are_looked_up_in_proportion_to_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look is a request where the folder is on a network file system."""
    shards = 40
    write_inputs(tmp_path / "in", shards=shards, samples=1, uncaptioned=lambda index: False)
    stat, looks = os.stat, Counter[str]()

    def counting(path: object, *arguments: object, **options: object) -> os.stat_result:
        looks[Path(str(path)).name] += 1
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", counting)
    lines: list[str] = []
    run(tmp_path / "in", tmp_path / "out", report=lines.append)
    assert 1 <= max(looks[f"in-{shard:03d}.tar.json"] for shard in range(shards)) <= 4
    assert "; 40 of 40 shards, " in lines[-2]


def test_of_many_shards_that_others_are_at_some_are_asked_for_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path / "in", shards=50, samples=1)
    tokenizer = ShardTokenizer(StandInTokenizer(), build_image_decoder(SIZE, "pil"), Settings())
    plan = checked_plan([str(tmp_path / "in")], tmp_path / "out")
    late = PretokenizeRun(plan, tokenizer, tmp_path / "out", 2, print)
    other, claims = (Claims(late.work / "claims") for _ in range(2))
    *held, last = plan
    assert all(other.acquire(name) for name in held)
    link, links, found, left = os.link, [], [], deque(plan)
    monkeypatch.setattr(os, "link", lambda *names: links.append(names) or link(*names))
    while not found or found[-1] is None:
        links.clear()
        found.append(late.claim_shard(left, claims))
        assert len(links) <= 16
    assert found == [None, None, None, last] and sorted(left) == sorted(plan)
    for one in (other, claims):
        one.close()


def test_the_command_with_a_real_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from dualtoken.visual_tokenizer.config import preset_config
    from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer

    torch.manual_seed(0)
    tokenizer = DualTokenVisualTokenizer(preset_config("tiny")).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    expected = write_inputs(tmp_path / "in", shards=1, samples=5)
    arguments = ["--inputs", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--local_rank=0"]
    assert main([*arguments, "--visual-tokenizer", str(tmp_path / "tokenizer"), "--batch-size", "3"]) == 0
    verify_dataset(tmp_path / "out", tokenizer.fingerprint())
    samples = list(iterate_shard(tmp_path / "out" / "in-000.tar"))
    assert [sample.key for sample in samples] == [key for key, reason in expected.items() if not reason]
    decoder = build_image_decoder(tokenizer.config.image_size)
    for sample in samples:
        codes = tokenizer.encode(decoder([picture(int(sample.key[1:]))]).images)
        assert (sample.codes == codes.numpy()).mean() > 0.98  # alone or in a batch: up to ties
    assert "5 samples in, 4 out, 1 rejected" in capsys.readouterr().out


def test_bf16_is_of_the_towers_and_the_search_stays_fp32(tmp_path: Path) -> None:
    from dualtoken.visual_tokenizer.config import preset_config
    from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer

    torch.manual_seed(0)
    model = DualTokenVisualTokenizer(preset_config("tiny")).eval()
    model.save_pretrained(tmp_path / "tokenizer")
    write_inputs(tmp_path / "in", shards=1, samples=5)
    arguments = ["--inputs", str(tmp_path / "in"), "--visual-tokenizer", str(tmp_path / "tokenizer")]
    made = {}
    for precision in ("fp32", "bf16"):
        output = tmp_path / precision
        assert main([*arguments, "--output", str(output), "--precision", precision]) == 0
        settings = json.loads((output / "dataset.json").read_text(encoding="utf-8"))["settings"]
        assert settings["precision"] == precision
        made[precision] = np.stack([sample.codes for sample in iterate_shard(output / "in-000.tar")])
    assert 0.6 < (made["fp32"][..., 0] == made["bf16"][..., 0]).mean()
    # Of the towers' latents in bf16 the codes are those that a search in fp32 finds.
    images = build_image_decoder(model.config.image_size)([picture(0), picture(1)]).images
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pixel, semantic = model._latents(images)
        codes = model.encode(images)
    assert pixel is not None
    assert torch.equal(model.quantizer_pixel.encode(pixel.float()), codes[:, :, 0])
    assert torch.equal(model.quantizer_semantic.encode(semantic.float()), codes[:, :, 1])


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert main(["--inputs", str(tmp_path), "--visual-tokenizer", str(tmp_path / "nowhere"), *output]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "no such folder" in lines[0]
    assert main(["--inputs", str(tmp_path), "--visual-tokenizer", str(tmp_path), *output]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "no shard found" in lines[0]


def test_the_place_among_the_workers() -> None:
    srun = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    array = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_COUNT": "4"}
    launcher = {"RANK": "3", "WORLD_SIZE": "6", "LOCAL_RANK": "2"}
    assert place_among_workers({}) == (0, 1, 0)
    assert place_among_workers({}, local_rank=3) == (0, 1, 3)
    assert place_among_workers(srun) == (5, 8, 1)
    assert place_among_workers({**array}) == (0, 4, 0)
    assert place_among_workers({**srun, **array}) == (0, 4, 1)  # several tasks on a machine share its GPUs
    assert place_among_workers({**srun, **array, **launcher}) == (3, 6, 2)


def everything_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_dry_run_tells_the_plan_and_writes_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_inputs(tmp_path / "in")
    before = everything_below(tmp_path)
    decoder, settings = build_image_decoder(SIZE, "pil"), Settings(batch_size=5)

    def plan(output: Path, workers: int = 1, delay: float = 0.0, **options: object) -> str:
        lines: list[str] = []
        what = ([str(tmp_path / "in")], StandInTokenizer(delay), decoder, output, settings)
        dry_run(*what, **{"workers": workers, "report": lines.append, **options})
        return "\n".join(lines)

    text = plan(tmp_path / "out", workers=2, delay=0.2)
    assert everything_below(tmp_path) == before
    assert "input: 4 shards, " in text and "48 samples with 48 images\n" in text
    assert "4 shards, about" in text and "0 of them are done already" in text
    measured = re.search(r"measured: ([\d.]+) images/s by one worker, decoding and encoding (\d+) im", text)
    assert measured and int(measured[2]) >= 10
    assert 0 < float(measured[1]) <= 25  # five images take 0.2 s at least
    seconds = re.search(r"about ([\d.]+) s for 48 images with 2 workers", text)
    assert seconds and float(seconds[1]) == pytest.approx(48 / float(measured[1]) / 2, rel=0.05)
    # What it expects of an image is what a run writes for one; tars are filled up at their ends.
    output = tmp_path_factory.mktemp("out")
    manifest = run(tmp_path / "in", output)
    expected = re.search(r"\(([\d,]+) bytes an image\)", plan(tmp_path / "out"))
    written = 0
    for name in manifest.shards:
        with open(output / name, "rb") as file:
            written += locate_samples(file)[1]
    assert expected and written == manifest.images * int(expected[1].replace(",", ""))
    text = plan(output)
    assert "4 of them are done already\ntime: none, no image is left to encode" in text
    # A run under way: what is done is left out of the time, other settings are refused.
    (output / "dataset.json").unlink()
    (output / ".pretokenize").mkdir()
    (output / ".pretokenize" / "in-001.tar.json").write_text("{}", encoding="utf-8")
    text = plan(output)
    assert "1 of them are done already" in text and " for 36 images with 1 worker," in text
    (output / ".pretokenize" / "plan.json").write_text(json.dumps({"batch_size": 7}), encoding="utf-8")
    with pytest.raises(DatasetError, match="holds an unfinished run"):
        plan(output)


def test_dry_run_of_very_many_shards_looks_into_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.pretokenize.plan.MOST_COUNTED", 4)
    write_inputs(tmp_path / "in", shards=10)
    whole = (tmp_path / "in" / "in-005.tar").read_bytes()
    (tmp_path / "in" / "in-005.tar").write_bytes(whole[: len(whole) // 2])
    lines: list[str] = []
    what = ([str(tmp_path / "in")], StandInTokenizer(), build_image_decoder(SIZE, "pil"), tmp_path / "out")
    dry_run(*what, report=lines.append)
    found = re.search(r"(\d+) samples with (\d+) images \(counted in 4 shards, extrapolated", lines[0])
    assert found and all(abs(int(number) - 114) < 12 for number in found.groups())
    assert "in-005.tar cannot be read further: truncated" in lines[1]


def test_dry_run_from_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualtoken.visual_tokenizer.config import preset_config
    from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer

    DualTokenVisualTokenizer(preset_config("tiny")).save_pretrained(tmp_path / "tokenizer")
    write_inputs(tmp_path / "in", shards=2)
    before = everything_below(tmp_path)

    def run_here(command: list[str], processes: int) -> SimpleNamespace:
        """Stand in for the new process, which would take its time to import torch."""
        assert command[:3] == ["python", "-m", "data_pipeline.pretokenize"] and processes == 3
        return SimpleNamespace(returncode=main(command[3:]))

    monkeypatch.setattr("launchers.processes.run", run_here)
    words = ["pretokenize", tmp_path / "in", "--output", tmp_path / "out", "--dry-run", "--ranks", "3"]
    code, out, _ = call([*words, "--visual-tokenizer", tmp_path / "tokenizer"], capsys)
    assert code == 0 and "for 24 images with 3 workers" in out and "nothing was written" in out
    assert everything_below(tmp_path) == before
    # In this process: --workers alone says nothing.
    arguments = ["--inputs", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "2"]
    assert main([*arguments, "--visual-tokenizer", str(tmp_path / "tokenizer")]) == 2
    assert "--workers 2: expected 1 or more, and --dry-run with it" in capsys.readouterr().err
