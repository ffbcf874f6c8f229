"""Document streams: views, packing, blends, exact resume in mid-pack, the same order on another split."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import PreTrainedTokenizerFast

from data_pipeline.shards.code_shards import CodeGeometry, CodeSample, DatasetManifest, ShardWriter
from data_pipeline.streams import (
    BlendEntry,
    DocumentStreamConfig,
    document_loader,
    documents,
    prepare_dataset,
)
from data_pipeline.streams.packing_dataset import Pack
from dualtoken.unified_model.sequence import IGNORE_INDEX, PackedBatch, SpecialTokens, add_special_tokens
from tests.support.distributed import run_code
from tests.test_data_pipeline.streams.test_streams import write_tar

GEOMETRY = CodeGeometry(positions=4, num_quantizers=3, codebook_size=50)
FINGERPRINT = "f" * 64
SAMPLES = 30


def build_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    add_special_tokens(fast)
    return fast


TOKENIZER = build_tokenizer()
SPECIAL = SpecialTokens.from_tokenizer(TOKENIZER)


def codes_of(index: int, images: int = 1) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 50, (images, *GEOMETRY.shape)).astype(np.uint16)


def write_code_shards(folder: Path, samples: list[CodeSample], shards: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = DatasetManifest(FINGERPRINT, 50, 3, 4, image_size=16)
    for shard in range(shards):
        with ShardWriter(folder / f"shard-{shard:06d}.tar", GEOMETRY) as writer:
            for sample in samples[shard::shards]:
                writer.write(sample)
        assert writer.entry is not None
        manifest.add(f"shard-{shard:06d}.tar", writer.entry)
    manifest.save(folder)
    prepare_dataset(folder)
    return folder


def pair(index: int) -> CodeSample:
    captions = {"en": f"thing {index}", "de": f"Ding {index}"}
    return CodeSample(f"k{index:04d}", codes_of(index), [{"image": 0}, {"text": captions["en"]}], captions)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_code_shards(tmp_path_factory.mktemp("codes"), [pair(index) for index in range(SAMPLES)])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_tar(folder / "a.tar", [(f"t{index}.txt", b"w" * (3 + index)) for index in range(20)])
    prepare_dataset(folder)
    return folder


def config(*blend: BlendEntry, **changes: object) -> DocumentStreamConfig:
    settings = {"context_length": 64, "contexts_held": 2, "shuffle_buffer_size": 8, "slice_length": 5}
    return DocumentStreamConfig(blend=list(blend), **{**settings, **changes})


def loader(settings: DocumentStreamConfig, *arguments: object, split: str = "train", **options: object):
    return document_loader(settings, TOKENIZER, GEOMETRY, FINGERPRINT, *arguments, split=split, **options)


def documents_of(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    borders = batch.cu_seqlens.tolist()
    rows = [
        (batch.input_ids[0, a:b].tolist(), batch.labels[0, a:b].tolist())
        for a, b in zip(borders, borders[1:])
    ]
    return rows[: len(batch.keys)]


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode([token for token in ids if token not in SPECIAL.ids()])


def same(a: PackedBatch, b: PackedBatch) -> bool:
    return a.keys == b.keys and all(
        torch.equal(value, getattr(b, name))
        for name, value in vars(a).items()
        if isinstance(value, torch.Tensor)
    )


def take(stream, count: int) -> list[PackedBatch]:
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_holds_each_document_once_over_ranks_with_its_codes(pairs: Path, num_workers: int) -> None:
    entries = [BlendEntry(str(pairs), "caption"), BlendEntry(str(pairs), "generate")]
    settings = config(*entries, num_workers=num_workers)
    keys, captions = [], set()
    for rank in range(2):
        stream = loader(settings, rank, 2, split="val")
        for batch in stream:
            assert batch.input_ids.shape == (1, 64)
            keys += batch.keys
            at = 0
            for key, (ids, labels) in zip(batch.keys, documents_of(batch), strict=True):
                index = int(key[1:])
                assert np.array_equal(batch.codes[at : at + 4], codes_of(index)[0])
                supervised = text_of([label for label in labels if label != IGNORE_INDEX])
                if SPECIAL.image_gen_start in ids:
                    assert text_of(ids) in (f"thing {index}", f"Ding {index}")
                    assert supervised == "" and batch.visual_loss_mask[at : at + 4].all()
                else:
                    assert text_of(ids) in (f"English: thing {index}", f"German: Ding {index}")
                    assert supervised == text_of(ids).partition(":")[2]
                    assert not batch.visual_loss_mask[at : at + 4].any()
                    captions.add(text_of(ids)[:6])
                at += 4
            assert at == len(batch.codes)
        assert stream.statistics.padding_share < 0.5
        stream.close()
    assert sorted(keys) == sorted([f"k{index:04d}" for index in range(SAMPLES)] * 2)
    assert captions == {"Englis", "German"}


def test_validation_is_the_same_each_time_and_for_any_number_of_ranks(pairs: Path) -> None:
    settings = config(BlendEntry(str(pairs), "generate"), prompt_dropout=1.0)
    texts = []
    for world_size in (1, 3):
        streams = [loader(settings, rank, world_size, split="val") for rank in range(world_size)]
        for _ in range(2):
            rows = [row for stream in streams for batch in stream for row in documents_of(batch)]
            texts.append(sorted(text_of(ids) for ids, _ in rows))
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert "" not in texts[0]  # no prompt is dropped


def test_share_of_prompts_that_are_dropped(pairs: Path) -> None:
    settings = config(BlendEntry(str(pairs), "generate"), prompt_dropout=0.25)
    texts = [text_of(ids) for batch in take(loader(settings), 200) for ids, _ in documents_of(batch)]
    assert len(texts) > 600
    share = texts.count("") / len(texts)
    assert abs(share - 0.25) < 0.06  # more than three standard deviations
    dropped = [text == "" for text in texts]
    assert any(a != b for a, b in zip(dropped, dropped[SAMPLES:]))  # another epoch, other prompts
    settings = config(BlendEntry(str(pairs), "generate"), prompt_dropout=0.0)
    assert all(text_of(ids) for batch in take(loader(settings), 20) for ids, _ in documents_of(batch))


def test_languages_are_chosen_among_those_asked_for(pairs: Path) -> None:
    german = loader(config(BlendEntry(str(pairs), "caption", languages=["de"])))
    assert all(
        text_of(ids).startswith("German: Ding")
        for batch in take(german, 20)
        for ids, _ in documents_of(batch)
    )
    stream = loader(config(BlendEntry(str(pairs), "caption", languages=["fr"])), split="val")
    assert list(stream) == []
    assert stream.statistics.left_out == {"no caption in the languages asked for": SAMPLES}


def test_blend_weights(pairs: Path, texts: Path) -> None:
    entries = [
        BlendEntry(str(pairs), "caption", 3.0),
        BlendEntry("nowhere", weight=0),
        BlendEntry(str(texts), "text", 1.0),
    ]
    stream = loader(config(*entries))
    take(stream, 250)
    captions, plain = stream.statistics.documents
    assert captions + plain > 600
    assert abs(captions / (captions + plain) - 0.75) < 0.06  # more than three standard deviations


RESUME = """
import pickle, sys
from tests.test_data_pipeline.streams.test_document_streams import loader, take
settings, state = pickle.load(sys.stdin.buffer)
stream = loader(settings, 1, 2)
stream.restore_states([state])
sys.stdout.buffer.write(pickle.dumps((take(stream, 9), stream.statistics)))
"""


def test_state_restored_in_a_new_process_in_mid_pack(pairs: Path, texts: Path) -> None:
    entries = [BlendEntry(str(pairs), "generate"), BlendEntry(str(texts), "text")]
    for num_workers in (0, 2):
        settings = config(*entries, prompt_dropout=0.3, num_workers=num_workers)
        stream = loader(settings, 1, 2)
        take(stream, 5)
        state = stream.save_state()
        expected = take(stream, 9)
        if num_workers == 0:
            batches, statistics = pickle.loads(run_code(RESUME, (settings, state)))
        else:
            restored = loader(settings, 1, 2)
            restored.restore_states([state])
            batches, statistics = take(restored, 9), restored.statistics
            restored.close()
        assert all(same(a, b) for a, b in zip(expected, batches, strict=True))
        assert statistics == stream.statistics
        stream.close()


def test_resume_at_every_pack(pairs: Path) -> None:
    settings = config(BlendEntry(str(pairs), "generate"), prompt_dropout=0.5, context_length=30)
    stream = loader(settings)
    states, batches = [], []
    for _ in range(12):
        states.append(stream.save_state())
        batches.append(next(stream))
    for step in (0, 1, 2, 5, 11):
        stream.restore_states([states[step]])
        assert all(same(a, b) for a, b in zip(batches[step:], take(stream, 12 - step), strict=True))


def test_resume_between_the_pieces_of_a_document_and_behind_bad_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [{"image": index} for index in range(8)] + [{"text": "x" * 30}]
    samples = [CodeSample(f"long{index}", codes_of(index, 8), parts) for index in range(3)]
    folder = write_code_shards(tmp_path / "a", [*samples, *(pair(index) for index in range(4))], 1)
    entries = [BlendEntry(str(folder), "document"), BlendEntry(str(folder), "caption")]
    stream = loader(config(*entries, context_length=20, on_bad_sample="skip"))
    states, batches = [], []
    for _ in range(40):
        states.append(stream.save_state())
        batches.append(next(stream))
    assert any("#" in key for batch in batches for key in batch.keys)
    assert "8 images, the view caption takes one" in caplog.text
    for step in (1, 2, 3, 7, 19, 39):
        stream.restore_states([json.loads(json.dumps(states[step]))])
        assert all(same(a, b) for a, b in zip(batches[step:], take(stream, 40 - step), strict=True))


def test_a_long_document_is_made_once_where_its_pieces_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", [("long.txt", b"w" * 2000), ("other.txt", b"v" * 2000)])
    prepare_dataset(tmp_path)
    stream = loader(config(BlendEntry(str(tmp_path), "text"), context_length=20))
    take(stream, 3)
    state, expected = stream.save_state(), take(stream, 300)
    made: list[str] = []
    split = documents.split_document
    monkeypatch.setattr(documents, "split_document", lambda *of: made.append(of[0].key) or split(*of))
    stream.restore_states([json.loads(json.dumps(state))])
    assert same(expected[0], next(stream))
    assert len(made) < 5 + 2 * 64  # each of the two that wait, and what is read ahead
    assert all(same(a, b) for a, b in zip(expected[1:], take(stream, 299), strict=True))


def test_packs_of_processes_are_page_locked_by_torchs_loader(
    pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedBatch, "pin_memory", lambda batch: replace(batch, keys=["locked"]))
    batch = next(loader(config(BlendEntry(str(pairs), "caption"))))
    _, _, whole = pin_memory((0, 1, Pack(batch, [0], [("k", "why")])))
    assert whole.batch.keys == ["locked"] and (whole.entries, whole.left_out) == ([0], [("k", "why")])
    assert pin_memory(Pack(None, [], [])) == Pack(None, [], [])


def test_packs_of_so_many_documents_hold_the_same_ones_however_long_they_are(
    pairs: Path, tmp_path: Path
) -> None:
    longer = [pair(index) for index in range(SAMPLES)]
    for index, sample in enumerate(longer):
        sample.captions = {name: text + " and more" * (index % 3) for name, text in sample.captions.items()}
    others = write_code_shards(tmp_path / "longer", longer)

    def packs(folder: Path, *arguments: object, **changes: object) -> list[PackedBatch]:
        return take(loader(config(BlendEntry(str(folder), "generate"), **changes), *arguments), 9)

    for ranks in ((0, 1), (1, 2)):
        short, long = (packs(folder, *ranks, documents_per_pack=3) for folder in (pairs, others))
        assert [pack.keys for pack in short] == [pack.keys for pack in long]
        assert all(len(pack.keys) == 3 for pack in short)
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(short, long, strict=True))
        for pack in (*short, *long):
            assert pack.padding == 0 and pack.input_ids.shape == (1, int(pack.cu_seqlens[-1]))
    filled = [[pack.keys for pack in packs(folder)] for folder in (pairs, others)]
    assert filled[0] != filled[1]
    with pytest.raises(ValueError, match="documents_per_pack is -1, expected 1 or more, or 0"):
        packs(pairs, documents_per_pack=-1)
    # A pass ends with what is left, and goes on where it was.
    settings = config(BlendEntry(str(pairs), "generate"), documents_per_pack=7)
    ends = [len(pack.keys) for pack in loader(settings, split="val")]
    assert sum(ends) == SAMPLES and ends[:-1] == [7] * (SAMPLES // 7)
    stream = loader(settings)
    take(stream, 2)
    state, expected = stream.save_state(), take(stream, 4)
    stream.restore_states([state])
    assert all(same(a, b) for a, b in zip(expected, take(stream, 4), strict=True))


def test_two_workers_read_what_two_ranks_read(pairs: Path, texts: Path) -> None:
    entries = [BlendEntry(str(pairs), "generate"), BlendEntry(str(texts), "text")]
    one_rank = loader(config(*entries, num_workers=2, prompt_dropout=0.5))
    expected = take(one_rank, 20)
    one_rank.close()
    ranks = [loader(config(*entries, num_workers=0, prompt_dropout=0.5), rank, 2) for rank in range(2)]
    assert all(same(batch, next(ranks[step % 2])) for step, batch in enumerate(expected))


def test_long_documents_are_split_or_counted_never_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = 8
    parts = [{"image": index, "loss": index % 2 == 1} for index in range(images)] + [{"text": "x" * 30}]
    long_caption = CodeSample("long", codes_of(1), [{"image": 0}, {"text": "y" * 90}])
    folder = write_code_shards(
        tmp_path / "a", [CodeSample("many", codes_of(7, images), parts), long_caption], 1
    )
    settings = config(BlendEntry(str(folder), "document"), context_length=20)
    batches = list(loader(settings, split="val"))
    codes = torch.cat([batch.codes for batch in batches if len(batch.codes)])
    everything = np.concatenate([codes_of(7, images), codes_of(1)])
    assert sorted(codes.tolist()) == sorted(everything.reshape(-1, 2, 3).tolist())
    ids = [row for batch in batches for row, _ in documents_of(batch)]
    assert sum(text_of(row).count("x") for row in ids) == 30
    assert all(row.count(SPECIAL.image_pad) % 4 == 0 for row in ids)
    for batch in batches:
        assert batch.visual_loss_mask.sum() % 4 == 0
    stream = loader(
        config(BlendEntry(str(folder), "caption"), context_length=64, on_bad_sample="skip"), split="val"
    )
    assert list(stream) == []
    assert stream.statistics.left_out == {"longer than 64 tokens": 1}
    assert "left out 'long': longer than 64 tokens" in caplog.text
    assert "8 images, the view caption takes one" in caplog.text
    stream = loader(config(BlendEntry(str(folder), "document"), context_length=6), split="val")
    assert all(len(batch.codes) == 0 for batch in stream)
    assert stream.statistics.left_out == {"an image longer than 6 tokens": images + 1}
    assert stream.statistics.figures() == {"left_out": images + 1}
    assert loader(config(BlendEntry(str(folder), "document"))).statistics.figures() == {"left_out": 0}


def test_an_empty_batch_has_no_targets(pairs: Path) -> None:
    batch = loader(config(BlendEntry(str(pairs), "caption"))).empty_batch()
    assert batch.input_ids.shape == (1, 64) and len(batch.codes) == 0
    assert (batch.labels == IGNORE_INDEX).all()


def refused(
    message: str, settings: DocumentStreamConfig, geometry: CodeGeometry = GEOMETRY, **options: object
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        next(document_loader(settings, TOKENIZER, geometry, **{"fingerprint": FINGERPRINT, **options}))
    assert "\n" not in str(caught.value)


def test_bad_data_sets_are_refused_in_one_line(tmp_path: Path, pairs: Path, texts: Path) -> None:
    good = config(BlendEntry(str(pairs), "caption"))
    refused("made by the visual tokenizer ffffffffffff, the model expects 0000", good, fingerprint="0" * 64)
    refused("num_quantizers 3, the model expects 4", good, CodeGeometry(4, 4, 50))
    refused("positions 4, the model expects 9", good, CodeGeometry(9, 3, 50))
    refused("codebook_size 50, the model expects 64", good, CodeGeometry(4, 3, 64))
    refused(r"dataset\.json: missing", config(BlendEntry(str(texts), "caption")))
    refused("lacks|no txt among its parts", config(BlendEntry(str(pairs), "text")))
    refused("30 samples for 31 readers", good, world_size=31)
    refused("view is 'picture', expected one of", config(BlendEntry(str(pairs), "picture")))
    refused("the blend is empty", config(BlendEntry(str(pairs), weight=0.0)))
    folder = write_code_shards(tmp_path / "a", [pair(index) for index in range(4)])
    shard = folder / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1500])
    refused(r"shard-000001\.tar: truncated", config(BlendEntry(str(folder), "caption")))
    shard.write_bytes(whole)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps({**content, "codebook_size": 40}), encoding="utf-8")
    smaller = CodeGeometry(4, 3, 40)
    refused(
        r"sample 'k\d+': a code is 4\d, expected codes below 40",
        config(BlendEntry(str(folder), "caption")),
        smaller,
    )
    (folder / ".nv-meta" / "split.yaml").unlink()
    refused("index .* is missing", config(BlendEntry(str(folder), "caption")), smaller)


def test_an_empty_text_is_left_out_and_a_mark_of_utf_8_no_part_of_one(tmp_path: Path) -> None:
    members = [
        ("a.txt", b"\xef\xbb\xbfwords"),
        ("b.txt", b""),
        ("c.txt", b" \r\n"),
        ("d.txt", b"\xef\xbb\xbf"),
    ]
    write_tar(tmp_path / "a.tar", members)
    prepare_dataset(tmp_path)
    stream = loader(config(BlendEntry(str(tmp_path), "text")), split="val")
    (batch,) = stream
    assert [text_of(ids) for ids, _ in documents_of(batch)] == ["words"]
    assert stream.statistics.left_out == {"an empty text": 3}


def test_a_state_with_empty_texts_that_wait_is_gone_on_from(tmp_path: Path) -> None:
    """As versions saved it that made documents of them."""
    write_tar(tmp_path / "a.tar", [(f"k{number:02d}.txt", b"words") for number in range(20)])
    prepare_dataset(tmp_path)
    stream = loader(config(BlendEntry(str(tmp_path), "text"), context_length=20))
    take(stream, 3)
    state = stream.save_state()
    write_tar(tmp_path / "a.tar", [(f"k{n:02d}.txt", b"words" if n % 2 else b"     ") for n in range(20)])
    stream.restore_states([json.loads(json.dumps(state))])
    assert {text_of(ids) for batch in take(stream, 20) for ids, _ in documents_of(batch)} == {"words"}
