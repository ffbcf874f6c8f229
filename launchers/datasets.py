"""What `dualtoken verify`, `show` and `stats` do with a dual-code data set."""

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipeline.errors import DatasetError
from data_pipeline.pretokenize.run import REJECTED
from data_pipeline.shards.code_shards import (
    CODES_PART,
    JSON_PART,
    CodeGeometry,
    CodeSample,
    DatasetManifest,
    decode_sample,
    iterate_shard,
    verify_dataset,
)
from data_pipeline.shards.index import META_FOLDER, check_index
from eval.progress import with_progress
from launchers.errors import UserError
from launchers.use import free_names

_CODES_AT_A_TIME = 1 << 20


def samples_of(folder: Path) -> Iterator[CodeSample]:
    """Every sample of a data set, shard after shard, with a progress bar.

    Raises:
        DatasetError: the folder holds no finished dual-code data set, or a shard is damaged.
    """
    manifest = DatasetManifest.load(folder)
    names = [name for name, entry in manifest.shards.items() if entry.samples]
    for name in with_progress(names, "reading shards"):
        yield from iterate_shard(folder / name)


def verify(folder: Path, visual_tokenizer: Path | None) -> Iterator[str]:
    """Recompute all that `dataset.json` says and check the index; with a tokenizer also whose the codes are.

    Raises:
        DatasetError: one line on the first thing that is wrong.
        FileNotFoundError: there is no tokenizer in the folder.
    """
    fingerprint = None
    if visual_tokenizer is not None:
        from eval.inputs import load_visual_tokenizer

        fingerprint = load_visual_tokenizer(visual_tokenizer).fingerprint()
    manifest = verify_dataset(folder, fingerprint)
    if (indexed := check_index(folder)) != manifest.samples_out:
        raise DatasetError(
            f"{folder}: {indexed} samples in the index, {manifest.samples_out} in dataset.json; "
            "prepare the data set again"
        )
    listed = folder / REJECTED
    lines = listed.read_bytes().count(b"\n") if listed.is_file() else 0
    if lines != manifest.rejected:
        raise DatasetError(
            f"{listed}: {lines} lines, dataset.json counts {manifest.rejected} rejected samples"
        )
    geometry = manifest.geometry
    yield (
        f"{folder}: {len(manifest.shards)} shards, {manifest.samples_out} samples, {manifest.images} images "
        f"of {geometry.positions} positions x {geometry.num_codebooks} codebooks "
        f"x {geometry.num_quantizers} depths, codes below {geometry.codebook_size}"
    )
    yield "hashes, counts, keys, shapes, code ranges and the index are right"
    whose = "those of this tokenizer" if fingerprint else "not compared (--visual-tokenizer)"
    yield f"codes of tokenizer {manifest.fingerprint[:12]}: {whose}"


def show(folder: Path, key: str, visual_tokenizer: Path, output: Path) -> Iterator[str]:
    """Print a sample's parts in order and write its images, decoded from the codes, as PNG.

    Raises:
        UserError: no sample has this key.
        DatasetError: the index is missing, or the sample cannot be read.
        ValueError: the codes are not the tokenizer's.
    """
    import torch

    from eval.inputs import load_visual_tokenizer, to_picture

    tokenizer = load_visual_tokenizer(visual_tokenizer)
    manifest = DatasetManifest.load(folder)
    manifest.require(folder, manifest.geometry, tokenizer.fingerprint())
    sample = _find(folder, key)
    codes = torch.from_numpy(sample.codes.astype("int64")).to(tokenizer.device)
    targets = free_names(output, [f"{key}-{index}" for index in range(len(codes))])
    pictures = tokenizer.decode(codes).float().cpu() if targets else ()
    for picture, target in zip(pictures, targets, strict=True):
        to_picture(picture).save(target)
    for part in sample.parts:
        learned = "learned" if part.get("loss", "text" in part) else "given"
        yield f"[{learned}] " + (f"image {targets[part['image']]}" if "image" in part else part["text"])
    for language, caption in (sample.captions or {}).items():
        yield f"caption, {language}: {caption}"


def _find(folder: Path, key: str) -> CodeSample:
    """Read the sample of a key by Energon's index, which knows where it lies."""
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.itar_reader import SqliteITarEntryReader

    check_index(folder)
    if not (folder / META_FOLDER / "index.sqlite").is_file():
        raise DatasetError(f"{folder}: {META_FOLDER}/index.sqlite is missing; prepare the data set again")
    reader = SqliteITarEntryReader(EPath(folder.absolute()))
    try:
        reader.sqlite_reader.get_sample_pointer_by_key(key)
    except KeyError:
        examples = ", ".join(found for found, *_ in islice(reader.list_all_samples(), 3))
        raise UserError(f"{folder} has no sample {key!r}; its keys look like {examples}") from None
    try:
        parts = reader[key]
        return decode_sample(key, parts[CODES_PART], parts[JSON_PART])
    except (tarfile.TarError, ValueError, KeyError) as error:
        raise DatasetError(f"{folder}: sample {key!r} cannot be read: {error}") from error
    finally:
        reader.close()


def _count_codes(samples: Iterable[np.ndarray], geometry: CodeGeometry) -> np.ndarray:
    """Count each code of each codebook and depth: [Q, D, K]; `samples` are [I, P, Q, D]."""
    shape = (*geometry.shape[1:], geometry.codebook_size)
    books = shape[0] * shape[1]
    offsets = np.arange(books) * geometry.codebook_size
    flat = np.concatenate([codes.reshape(-1, books) for codes in samples]) + offsets
    counts = np.bincount(flat.ravel(), minlength=books * geometry.codebook_size)
    return counts.reshape(shape)


def stats(folder: Path) -> Iterator[str]:
    """Sizes of a data set and the use of its codes, as lines.

    Raises:
        UserError: the data set is empty.
    """
    from dualtoken.unified_model.visual_embedder import CODEBOOKS

    manifest = DatasetManifest.load(folder)
    geometry = manifest.geometry
    counts = np.zeros((*geometry.shape[1:], geometry.codebook_size), dtype=np.int64)
    waiting, size = list[np.ndarray](), 0  # codes that are not counted yet
    parts: Counter[str] = Counter()
    images_each: Counter[int] = Counter()
    letters: Counter[int] = Counter()  # samples by the letters they have: there may be very many samples
    for sample in samples_of(folder):
        parts.update("image" if "image" in part else "text" for part in sample.parts)
        images_each[len(sample.codes)] += 1
        letters[sum(len(part["text"]) for part in sample.parts if "text" in part)] += 1
        waiting.append(sample.codes)
        size += sample.codes.size
        if size >= _CODES_AT_A_TIME:
            counts += _count_codes(waiting, geometry)
            waiting, size = [], 0
    if not letters:
        raise UserError(f"{folder} holds no samples")
    if waiting:
        counts += _count_codes(waiting, geometry)
    total = sum(images_each[n] * n for n in images_each)
    on_disk = sum((folder / name).stat().st_size for name, entry in manifest.shards.items() if entry.samples)
    samples, below = letters.total(), 0
    for median in sorted(letters):
        below += letters[median]
        if below > samples // 2:
            break
    yield f"{samples} samples, {total} images, {on_disk / max(total, 1):,.0f} bytes an image on disk"
    yield "images a sample: " + ", ".join(f"{n}: {count}" for n, count in sorted(images_each.items()))
    yield f"parts: {parts['image']} images, {parts['text']} texts"
    yield f"letters of text a sample: median {median}, longest {max(letters)}"
    if total:
        yield f"{'codebook':<10}{'depth':>6}{'used':>8}{'perplexity':>12}   of {geometry.codebook_size} codes"
        for q, name in enumerate(CODEBOOKS[: geometry.num_codebooks]):
            for d in range(geometry.num_quantizers):
                found = counts[q, d][counts[q, d] > 0]
                share = found / found.sum()
                used, perplexity = found.size / geometry.codebook_size, np.exp(-(share * np.log(share)).sum())
                yield f"{name:<10}{d + 1:>6}{used:>8.1%}{perplexity:>12.1f}"
