"""What a pretokenize run would do: inputs, outputs and time from a measured sample; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

from data_pipeline.errors import DatasetError
from data_pipeline.pretokenize.shard_tokenizer import ShardTokenizer
from data_pipeline.shards.code_shards import CodeSample, encode_sample
from data_pipeline.shards.image_text_shards import is_image_part, open_shard
from data_pipeline.shards.remote_files import is_remote
from data_pipeline.shards.tar_members import BLOCK, DAMAGED_GZIP, TarError, iterate_members, skip, split_name

MOST_COUNTED = 64
_MOST_COUNTED_REMOTE = 2  # every byte of a remote shard may have to come over the network
_MEASURED_BATCHES = 4  # the first one waits for reading and decoding, as the others do not


@dataclass
class ShardCount:
    """What the headers of a tar tell."""

    size: int = 0
    """Bytes up to the end of the last file."""
    samples: int = 0
    images: int = 0
    first_key: str = ""
    trouble: str = ""
    """Why it cannot be read to its end."""


@dataclass
class MeasuredSample:
    """Decoding and encoding as they went on this device with this visual tokenizer."""

    images: int
    seconds: float
    image_bytes: float
    """Output bytes for each image, its texts and the tar's own headers included."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds


def plan_lines(
    plan: Mapping[str, str], done: set[str], tokenizer: ShardTokenizer, workers: int = 1
) -> Iterator[str]:
    """Count the input, measure a few batches, and tell what a run would do, line by line.

    Args:
        plan: Name of the output shard -> input shard.
        done: Output shards that are there already.
        tokenizer: Decodes and encodes; on the device that is to be measured.
        workers: How many are to share the work.

    Raises:
        DatasetError: None of the shards that were looked at holds an image that can be used.
    """
    counts = {name: count_shard(plan[name]) for name in _names_to_count(list(plan), plan)}
    sizes = _estimated_sizes(plan, counts)
    counted = sum(sizes[name] for name in counts)
    scale = sum(sizes.values()) / max(counted, 1)
    images = round(scale * sum(count.images for count in counts.values()))
    samples = round(scale * sum(count.samples for count in counts.values()))
    origin = f" (counted in {len(counts)} shards, extrapolated by bytes)" if len(counts) < len(plan) else ""
    yield (
        f"input: {len(plan)} shards, {bytes_in_words(sum(sizes.values()))}, "
        f"{samples} samples with {images} images{origin}"
    )
    for name, count in counts.items():
        if count.trouble:
            yield f"input: {plan[name]} {count.trouble}"
    begins: dict[str, str] = {}
    for name, count in counts.items():
        other = begins.setdefault(count.first_key, name)
        if count.first_key and other != name and not tokenizer.settings.prefix_keys:
            yield (
                f"input: {plan[other]} and {plan[name]} both begin with key {count.first_key}; "
                "keys must be unique in a data set: use --prefix-keys"
            )
            break
    left = {name for name in plan if name not in done}
    images_left = sum(counts[name].images for name in counts if name in left)
    if origin:
        images_left = round(images * sum(sizes[name] for name in left) / max(sum(sizes.values()), 1))
    measured = None
    if images_left:
        with_images = [name for name in counts if counts[name].images]
        measured = measure(tokenizer, [plan[name] for name in sorted(with_images, key=done.__contains__)])
    image_bytes = measured.image_bytes if measured else 2.0 * prod(tokenizer.geometry.shape)
    yield (
        f"output: {len(plan)} shards, about {bytes_in_words(images * image_bytes)} "
        f"({image_bytes:,.0f} bytes an image); {len(done)} of them are done already"
    )
    if measured is None:
        yield "time: none, no image is left to encode"
        return
    yield (
        f"measured: {measured.rate:.1f} images/s by one worker, decoding and encoding "
        f"{measured.images} images here"
    )
    yield (
        f"time: about {time_in_words(images_left / measured.rate / workers)} for {images_left} images "
        f"with {workers} worker{'s' * (workers > 1)}, each as fast as this one"
    )


def _names_to_count(names: Sequence[str], plan: Mapping[str, str]) -> list[str]:
    """Choose the shards to look into: all of a few, else some at even distances."""
    chosen = []
    for remote, most in ((False, MOST_COUNTED), (True, _MOST_COUNTED_REMOTE)):
        group = [name for name in names if is_remote(plan[name]) == remote]
        most = min(most, len(group))
        chosen += [group[len(group) * index // most] for index in range(most)]
    return chosen


def _estimated_sizes(plan: Mapping[str, str], counts: Mapping[str, ShardCount]) -> dict[str, float]:
    """Return the bytes of every shard: of local files as they are, of remote ones as those looked into."""
    remote = [count.size for name, count in counts.items() if is_remote(plan[name])]
    mean = sum(remote) / max(len(remote), 1)
    sizes = {}
    for name, shard in plan.items():
        if is_remote(shard):
            sizes[name] = counts[name].size if name in counts else mean
        else:
            sizes[name] = Path(shard).stat().st_size
    return sizes


def count_shard(url: str) -> ShardCount:
    """Count the samples and images of a shard by the headers of its tar; it may break off."""
    count = ShardCount()
    key: str | None = None
    try:
        with closing(open_shard(url)) as stream:
            for member in iterate_members(stream):
                split = split_name(member.name)
                if split is not None:
                    count.samples += split[0] != key
                    count.images += is_image_part(split[1])
                    key = split[0]
                    count.first_key = count.first_key or key
                skip(stream, member.size)
                count.size = member.data_offset + member.size
    except (TarError, OSError, *DAMAGED_GZIP) as error:
        count.trouble = f"cannot be read {'further' if count.samples else 'at all'}: {error}"
    return count


def measure(tokenizer: ShardTokenizer, shards: Sequence[str]) -> MeasuredSample:
    """Decode and encode a few batches of the first shard that has a usable image.

    Raises:
        DatasetError: None has.
    """
    wanted = _MEASURED_BATCHES * tokenizer.settings.batch_size
    for shard in shards:
        next(tokenizer(shard), None)  # warms up: threads, kernels, DALI's pipeline
        before, started = tokenizer.images, time.perf_counter()
        images, written = 0, 0
        for item in tokenizer(shard):
            if isinstance(item, CodeSample):
                images += len(item.codes)
                written += sum(_size_in_tar(len(data)) for _, data in encode_sample(item))
            seconds, sent = time.perf_counter() - started, tokenizer.images - before
            if images and sent >= wanted:
                break
        if images:
            return MeasuredSample(sent, seconds, written / images)
    raise DatasetError("no image that can be used in the shards that were looked into; nothing to measure")


def _size_in_tar(size: int) -> int:
    return BLOCK + size + -size % BLOCK


def bytes_in_words(count: float) -> str:
    """Return a number of bytes with a unit of thousands, such as `23.3 GB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"


def time_in_words(seconds: float) -> str:
    """Return a time in the unit that suits it, such as `3.2 h`."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
