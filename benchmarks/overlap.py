"""How long the accelerator waits while pictures are read, decoded, encoded and written, against the limit.

The accelerator is a stand-in that sleeps, as a GPU would be busy, `r` times as long as decoding its batch
takes here. Pretokenize is run as it is, on shards of photographs; training is its loader, decoding and a step
that sleeps. What nothing can beat is the longest of reading, decoding and encoding, the first two measured
alone in the same round; beside it, one after the other as a plain loop does. Figures are of the time from the
first batch's start at the accelerator to the last one's; median (range) of the rounds. With
`--decoding-seconds` the pictures are small and decoding sleeps too: what is measured is the overlap alone,
also where other programs take the cores. Run:
``python -m benchmarks.overlap [--rounds 3] [--batch-size 32 --batches 12] [--decoding-seconds 0.3]``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import webdataset

from benchmarks.decoding import photographs
from data_pipeline.images.decoding import DecodedImages, ImageDecoder, build_image_decoder
from data_pipeline.pretokenize.command import pretokenize
from data_pipeline.pretokenize.shard_tokenizer import Settings, ShardTokenizer
from data_pipeline.shards.code_shards import CodeSample, ShardWriter
from data_pipeline.streams import (
    ImageStreamConfig,
    ImageTextBatch,
    StreamLoader,
    image_loader,
    prepare_dataset,
)
from pretrain.image_input import ImageInput, ImageInputConfig
from pretrain.timing import StepClock

SHARDS = 3


class Accelerator:
    """Sleeps for a batch, and notes when it was at work."""

    config = SimpleNamespace(positions=4, num_codebooks=2, num_quantizers=2, codebook_size=16, image_size=384)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.spans: list[tuple[float, float]] = []

    def fingerprint(self) -> str:
        """Stand for that of a visual tokenizer."""
        return "0" * 64

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Be busy; return codes [N, P, Q, D]."""
        begin = time.perf_counter()
        time.sleep(self.seconds)
        self.spans.append((begin, time.perf_counter()))
        return torch.zeros(len(images), 4, 2, 2, dtype=torch.long)

    def shares(self, limit: float) -> tuple[float, float]:
        """Return shares of the limit's speed and of busy time; `limit` of the rest, in seconds a batch."""
        *spans, last = self.spans
        took = last[0] - spans[0][0]
        busy = sum(end - begin for begin, end in spans)
        return max(busy, len(spans) * limit) / took, busy / took


class SlowDecoder:
    """Decodes and sleeps."""

    def __init__(self, decoder: ImageDecoder, seconds: float) -> None:
        self.decoder, self.seconds = decoder, seconds

    def __call__(self, encoded: Sequence[bytes]) -> DecodedImages:
        """Decode as the decoder does, and be busy for a while."""
        time.sleep(self.seconds)
        return self.decoder(encoded)


def absurd_size() -> bytes:
    """Return a JPEG header of 60,000 x 60,000 pixels."""
    size = (60_000).to_bytes(2, "big")
    return b"\xff\xd8\xff\xc0\x00\x11\x08" + size + size + b"\x03" + bytes(9) + b"\xff\xd9"


def broken(data: bytes, kind: int) -> bytes:
    """Return a picture broken in one of six ways."""
    table = data.index(b"\xff\xc4") + 5
    kinds = [
        data[: len(data) // 2],
        data[:table] + b"\xff" * 16 + data[table + 16 :],  # a table that no decoder takes
        b"%PDF-1.7" + bytes(2000),
        b"",
        b"<!DOCTYPE html><html>404</html>",
        absurd_size(),
    ]
    return kinds[kind % len(kinds)]


def write_shards(folder: Path, files: list[bytes], with_broken: bool) -> None:
    """Write the pictures as a prepared data set; of each 50 one is broken where asked for."""
    folder.mkdir()
    each = -(-len(files) // SHARDS)
    kinds = itertools.count()
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:06d}.tar"), encoder=False) as writer:
            for index in range(shard * each, min((shard + 1) * each, len(files))):
                data = files[index]
                if with_broken and index % 50 == 25:
                    data = broken(data, next(kinds))
                writer.write({"__key__": f"{index:08d}", "jpg": data, "txt": b"a photograph"})
    prepare_dataset(folder)


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Pretokenize:
    """The shards of a folder to codes."""

    name = "pretokenize"

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.shards = sorted(folder.glob("*.tar"))
        self.settings = Settings(batch_size=options.batch_size)
        decoder = build_image_decoder(options.image_size, options.backend)
        self.decoder = SlowDecoder(decoder, options.decoding_seconds)

    def alone(self) -> tuple[float, float]:
        """Return seconds a batch of reading and of decoding."""
        tokenizer = ShardTokenizer(Accelerator(0), self.decoder, self.settings)
        batches = []
        reading = seconds_of(lambda: batches.extend(b for s in self.shards for b in tokenizer.read(str(s))))
        decoding = seconds_of(lambda: [tokenizer.decode(batch) for batch in batches])
        return reading / len(batches), decoding / len(batches)

    def overlapped(self, accelerator: Accelerator) -> None:
        """Run the real thing."""
        with tempfile.TemporaryDirectory() as output:
            inputs = [str(shard) for shard in self.shards]
            pretokenize(inputs, accelerator, self.decoder, output, self.settings, report=lambda line: None)

    def one_by_one(self, accelerator: Accelerator) -> None:
        """Read, decode, encode and write one after the other."""
        tokenizer = ShardTokenizer(accelerator, self.decoder, self.settings)
        with tempfile.TemporaryDirectory() as output:
            for shard in self.shards:
                with ShardWriter(Path(output) / shard.name, tokenizer.geometry) as writer:
                    for batch in tokenizer.read(str(shard)):
                        for item in tokenizer.collect(tokenizer.encode(tokenizer.decode(batch))):
                            if isinstance(item, CodeSample):
                                writer.write(item)


class Training:
    """Steps on micro-batches of a folder's pictures, which a process reads."""

    name = "training"

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.config = ImageStreamConfig(str(folder), num_workers=1)
        self.size, self.steps = options.batch_size, options.batches
        device = torch.device("cpu")
        runtime = SimpleNamespace(device=device, run_dir=folder.parent, step=0, clock=StepClock(device))
        self.images = ImageInput(ImageInputConfig(options.backend), options.image_size, runtime)  # type: ignore[arg-type]
        self.images._decode.decoder = SlowDecoder(self.images.decoder, options.decoding_seconds)

    def opened(self) -> StreamLoader[ImageTextBatch]:
        """Open the stream and wait until its process reads."""
        loader = image_loader(self.config, self.size)
        next(loader)
        return loader

    def alone(self) -> tuple[float, float]:
        """Return seconds a batch of reading and of decoding."""
        loader = self.opened()
        batches: list[ImageTextBatch] = []
        reading = seconds_of(lambda: batches.extend(next(loader) for _ in range(self.steps)))
        loader.close()
        decoding = seconds_of(lambda: [self.images(batch) for batch in batches])
        return reading / self.steps, decoding / self.steps

    def _train(self, batches: Iterator[ImageTextBatch], accelerator: Accelerator) -> None:
        for _ in range(self.steps):
            images, _ = self.images(next(batches))
            accelerator.encode(images)

    def overlapped(self, accelerator: Accelerator) -> None:
        """As the jobs do."""
        loader = self.images.ahead(self.opened())
        self._train(loader, accelerator)
        loader.close()

    def one_by_one(self, accelerator: Accelerator) -> None:
        """Decode in the step."""
        loader = self.opened()
        self._train(loader, accelerator)
        loader.close()


def in_words(shares: list[float]) -> str:
    """Median and range in per cent."""
    return f"{statistics.median(shares):6.1%} ({min(shares):.1%} to {max(shares):.1%})"


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1, 2, 4], help="of the lengths, r")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=12, help="of pretokenize in 3 shards, and steps")
    parser.add_argument("--image-size", type=int, default=384)
    parser.add_argument("--backend", default="auto", help="auto, dali or torchvision")
    parser.add_argument("--jobs", nargs="+", default=["pretokenize", "training"])
    parser.add_argument("--decoding-seconds", type=float, default=0.0, help="sleep for each batch decoded")
    parser.add_argument("--output", type=Path, help="file for the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = photographs(options.batch_size * options.batches, 64 if options.decoding_seconds else 512)
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        for kind, with_broken in (("sound", False), ("2 % broken", True)):
            folder = Path(temporary) / kind.replace(" % ", "-")
            write_shards(folder, files, with_broken)
            for job in (Pretokenize(folder, options), Training(folder, options)):
                if job.name not in options.jobs:
                    continue
                job.alone()  # warms up
                for _, ratio in itertools.product(range(options.rounds), options.ratios):
                    reading, decoding = job.alone()
                    for way in (job.overlapped, job.one_by_one):
                        accelerator = Accelerator(ratio * decoding)
                        way(accelerator)
                        speed, busy = accelerator.shares(max(reading, decoding))
                        name = f"{job.name:<11} {kind:<10} r = {ratio:<4g} {way.__name__}"
                        found[f"{name} speed"].append(speed)
                        found[f"{name} busy"].append(busy)
                for ratio in options.ratios:
                    for way in ("overlapped", "one_by_one"):
                        name = f"{job.name:<11} {kind:<10} r = {ratio:<4g} {way}"
                        speed, busy = in_words(found[f"{name} speed"]), in_words(found[f"{name} busy"])
                        print(f"{name:<42}: {speed} of the limit, busy {busy}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
