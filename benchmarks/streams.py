"""Streams of codes against loops of WebDataset, and against reading and decoding the pictures; packing.

Run: python -m benchmarks.streams [--positions 729 --num-quantizers 8] [--samples 8000]
All rates are samples per second of CPU time of this one process. What is compared takes turns; a ratio is the
median of the rounds, in brackets the least and the largest.
"""

import argparse
import io
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
import webdataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_pipeline.images.decoding import build_image_decoder
from data_pipeline.shards.code_shards import (
    CodeGeometry,
    CodeSample,
    DatasetManifest,
    ShardWriter,
    decode_sample,
)
from data_pipeline.shards.reader import LocalShardReader, PreparedShards
from data_pipeline.streams import (
    BlendEntry,
    DocumentStreamConfig,
    ImageStreamConfig,
    document_loader,
    image_loader,
    prepare_dataset,
)
from data_pipeline.streams.packing import pack_lengths
from data_pipeline.streams.reader import worker_config
from dualtoken.unified_model.sequence import SpecialTokens, add_special_tokens

SHARDS = 4
PROMPT_DROPOUT = 0.1
CAPTION = (
    "a small wooden boat with a red sail on a calm lake in front of snow-covered mountains, seen from above"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: more tokens than a real one, the same work around it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    add_special_tokens(fast)
    return fast


def write_codes(folder: Path, geometry: CodeGeometry, samples: int, fingerprint: str = "0" * 64) -> None:
    """Write random codes with captions, as of the tokenizer of a fingerprint, as a prepared data set."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    manifest = DatasetManifest(
        fingerprint, geometry.codebook_size, geometry.num_quantizers, geometry.positions, 0
    )
    for shard in range(SHARDS):
        with ShardWriter(folder / f"{shard:06d}.tar", geometry) as writer:
            for index in range(shard, samples, SHARDS):
                codes = rng.integers(0, geometry.codebook_size, (1, *geometry.shape)).astype(np.uint16)
                captions = {"en": f"{CAPTION} {index}"}
                writer.write(
                    CodeSample(f"{index:08d}", codes, [{"image": 0}, {"text": captions["en"]}], captions)
                )
        manifest.add(f"{shard:06d}.tar", writer.entry)
    manifest.save(folder)
    prepare_dataset(folder)


def write_pictures(folder: Path, side: int, samples: int) -> None:
    """Write smooth JPEG pictures with captions as a prepared data set."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "000000.tar"), encoder=False) as writer:
        for index in range(samples):
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            writer.write({"__key__": f"{index:08d}", "jpg": buffer.getvalue(), "txt": CAPTION.encode()})
    prepare_dataset(folder)


def tars(folder: Path) -> str:
    """The shards, as WebDataset names them."""
    return str(folder / f"{{000000..{SHARDS - 1:06d}}}.tar")


def plain_codes(folder: Path) -> Iterator[np.ndarray]:
    """Read codes as one would without this project: WebDataset, numpy, json; for ever."""
    while True:
        for sample in webdataset.WebDataset(tars(folder), shardshuffle=False):
            json.loads(sample["json"])
            yield np.load(io.BytesIO(sample["codes.npy"])).astype(np.int64)


def plain_packs(
    folder: Path, encode: Callable[[str], list[int]], special: SpecialTokens, context: int, buffer: int
) -> Iterator[int]:
    """Make packs of pictures to be drawn, as the stream does, without this project; for ever.

    WebDataset reads and shuffles, json and numpy do the rest; documents are packed in the order they come.
    Yields the number of documents of each pack.
    """
    end, pad = special.end_of_text, special.image_pad
    start, stop = special.image_gen_start, special.image_gen_end
    draw = random.Random(0)
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    codes: list[np.ndarray] = []
    while True:
        for sample in webdataset.WebDataset(tars(folder), shardshuffle=SHARDS).shuffle(buffer):
            record = json.loads(sample["json"])
            image = np.load(io.BytesIO(sample["codes.npy"]))[0]
            prompt = "" if draw.random() < PROMPT_DROPOUT else draw.choice(list(record["captions"].values()))
            text = encode(prompt)
            length = len(text) + len(image) + 4
            if len(ids) + length > context:
                as_tensors(ids, labels, lengths, codes, context)
                yield len(lengths)
                ids, labels, lengths, codes = [], [], [], []
            ids += [end, *text, start, *[pad] * len(image), stop, end]
            labels += [-100] * (len(text) + 1) + [start] + [-100] * (len(image) + 1) + [end]
            lengths.append(length)
            codes.append(image)


def as_tensors(
    ids: list[int], labels: list[int], lengths: list[int], codes: list[np.ndarray], context: int
) -> tuple[torch.Tensor, ...]:
    """Return what a model takes: ids, positions, borders of documents, labels, codes and where they count."""
    padding = context - len(ids)
    positions = [np.arange(length) for length in [*lengths, padding]]
    joined = np.concatenate(codes).astype(np.int64)
    return (
        torch.from_numpy(np.array(ids + [ids[0]] * padding))[None],
        torch.from_numpy(np.concatenate(positions))[None],
        torch.from_numpy(np.cumsum([0, *lengths, padding], dtype=np.int32)),
        torch.from_numpy(np.array(labels + [-100] * padding))[None],
        torch.from_numpy(joined),
        torch.ones(len(joined), dtype=torch.bool),
    )


def own_codes(folder: Path) -> Iterator[np.ndarray]:
    """Read codes as the streams do, before shuffling, tokenizing and packing, as `plain_codes`; for ever."""
    shards = PreparedShards(str(folder), worker_config(0, 1, 0, 0), training=False, slice_length=1).shards
    reader = LocalShardReader(shards)
    while True:
        for index in range(sum(shard.count for shard in shards)):
            sample = reader[index]
            parts = sample["parts"]
            codes = decode_sample(sample["key"], parts["codes.npy"], parts["json"]).codes
            yield codes.astype(np.int64)


def in_turns(contenders: dict[str, Callable[[], int]], samples: int, rounds: int) -> dict[str, list[float]]:
    """Samples per second of CPU time of each contender in each round of so many samples."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            count, start = 0, time.process_time()
            while count < samples:
                count += step()
            rates[name].append(count / (time.process_time() - start))
    return rates


def times(first: list[float], second: list[float]) -> str:
    """How many times as fast the first is: the median of the rounds, the least and the largest."""
    ratios = [a / b for a, b in zip(first, second)]
    return f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def rate(step: Callable[[], int], seconds: float) -> float:
    """Samples per second of CPU time; `step` returns how many samples it took."""
    step()
    count, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        count += step()
    return count / (time.process_time() - start)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Print all figures."""
    geometry = CodeGeometry(options.positions, options.num_quantizers, options.codebook_size)
    write_codes(folder / "codes", geometry, options.samples)
    write_pictures(folder / "pictures", options.picture_side, min(options.samples, 200))
    size = sum(path.stat().st_size for path in (folder / "codes").glob("*.tar")) / options.samples
    print(f"bytes per image on disk: {size:,.0f}, of which codes {2 * np.prod(geometry.shape):,}")

    entry = BlendEntry(str(folder / "codes"), "generate")
    context = max(1024, 5 * (options.positions + 150))
    config = DocumentStreamConfig(
        [entry],
        context_length=context,
        shuffle_buffer_size=options.buffer,
        prompt_dropout=PROMPT_DROPOUT,
    )
    tokenizer = byte_tokenizer()
    start = time.perf_counter()
    stream = document_loader(config, tokenizer, geometry)
    next(stream)
    print(f"first pack of {context} tokens after {time.perf_counter() - start:.2f} s")

    special = SpecialTokens.from_tokenizer(tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def loop(encode: Callable[[str], list[int]]) -> Callable[[], int]:
        packs = plain_packs(folder / "codes", encode, special, context, options.buffer)
        return lambda: next(packs)

    packing = {
        "stream": lambda: len(next(stream).keys),
        "loop": loop(encode),
        "remembering": loop(lru_cache(maxsize=1 << 16)(encode)),
    }
    in_turns(packing, options.samples // 8, 1)  # to warm up
    a_round = options.samples // (2 * options.rounds)
    for captions in ("new", "seen before"):
        rates = in_turns(packing, a_round, options.rounds)
        streamed = median(rates["stream"])
        print(
            f"documents shuffled, tokenized and packed, captions {captions}: {streamed:,.0f} documents/s; ",
            end="",
        )
        print(f"{times(rates['stream'], rates['loop'])} a loop of WebDataset; ", end="")
        print(f"{times(rates['stream'], rates['remembering'])} one that remembers the tokens of captions")
        in_turns(packing, options.samples, 1)  # the rest of the epoch, and some of the next
    print(f"padding: {stream.statistics.padding_share:.2%}")
    start = time.perf_counter()
    state = stream.save_state()
    saved = time.perf_counter() - start
    stream.restore_states([state])
    next(stream)
    print(f"save {saved:.3f} s, restore to the next pack {time.perf_counter() - start - saved:.2f} s")

    plain, own = plain_codes(folder / "codes"), own_codes(folder / "codes")
    reading = {"plain": lambda: len(next(plain)[:1]), "own": lambda: len(next(own)[:1])}
    rates = in_turns(reading, options.samples, options.rounds)
    print(f"reading codes to int64: WebDataset + numpy: {median(rates['plain']):,.0f} samples/s; ", end="")
    print(f"our reader alone: {times(rates['own'], rates['plain'])}")

    pictures = ImageStreamConfig(str(folder / "pictures"), shuffle_buffer_size=50)
    batches = image_loader(pictures, 16)
    read = rate(lambda: len(next(batches)), options.seconds)
    print(f"image stream, not decoded: {read:,.0f} pictures/s")
    decoder = build_image_decoder(options.image_size)
    decoded = rate(lambda: len(decoder(next(batches).image_bytes).kept), options.seconds)
    print(f"image stream, decoded to {options.image_size} px: {decoded:,.0f} pictures/s")
    print(f"codes over decoded pictures: {streamed / decoded:.1f}x")


def measure_packing() -> None:
    """Print how full contexts of 4096 are: half pairs, a quarter interleaved documents, a quarter text."""
    rng = np.random.default_rng(0)
    kinds = rng.random(20_000)
    pairs = 740 + rng.integers(10, 60, kinds.size)
    interleaved = rng.integers(1, 5, kinds.size) * 731 + rng.integers(50, 600, kinds.size)
    text = np.clip(rng.lognormal(6, 1, kinds.size), 20, 4000).astype(int)
    lengths = np.where(kinds < 0.5, pairs, np.where(kinds < 0.75, interleaved, text))
    start = time.process_time()
    bins = pack_lengths(lengths.tolist(), 4096)
    seconds = time.process_time() - start
    packed = lengths.sum() / (4096 * len(bins))
    longest = lengths.sum() / (8 * lengths.reshape(-1, 8).max(axis=1)).sum()
    print(f"packing: {packed:.2%} of 4096 used, {seconds / len(lengths) * 1e6:.0f} us a document; ", end="")
    print(f"padding to the longest of 8: {longest:.2%} used; {packed / longest:.2f}x")


def main() -> None:
    """Parse the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--num-quantizers", type=int, default=4)
    parser.add_argument("--codebook-size", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--buffer", type=int, default=1000, help="samples in the shuffle buffer")
    parser.add_argument("--picture-side", type=int, default=512, help="of the JPEG pictures, in pixels")
    parser.add_argument("--image-size", type=int, default=384, help="to which they are decoded")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU time per figure of pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))
    measure_packing()


if __name__ == "__main__":
    main()
