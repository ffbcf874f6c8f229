"""What `dualtoken verify`, `show` and `stats` do with a dual-code data set."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.code_shards import CodeSample, DatasetManifest, iterate_shard, verify_dataset
from launchers.errors import UserError
from launchers.use import free_names, with_progress


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
    """Recompute all that `dataset.json` says; with a tokenizer also whether the codes are its own.

    Raises:
        DatasetError: one line on the first thing that is wrong.
        FileNotFoundError: there is no tokenizer in the folder.
    """
    fingerprint = None
    if visual_tokenizer is not None:
        from eval.inputs import load_visual_tokenizer

        fingerprint = load_visual_tokenizer(visual_tokenizer).fingerprint()
    manifest = verify_dataset(folder, fingerprint)
    geometry = manifest.geometry
    yield (
        f"{folder}: {len(manifest.shards)} shards, {manifest.samples_out} samples, {manifest.images} images "
        f"of {geometry.positions} positions x 2 codebooks x {geometry.num_quantizers} depths, "
        f"codes below {geometry.codebook_size}"
    )
    yield "hashes, counts, keys, shapes and code ranges are right"
    whose = "those of this tokenizer" if fingerprint else "not compared (--visual-tokenizer)"
    yield f"codes of tokenizer {manifest.fingerprint[:12]}: {whose}"


def show(folder: Path, key: str, visual_tokenizer: Path, output: Path) -> Iterator[str]:
    """Print a sample's parts in order and write its images, decoded from the codes, as PNG.

    Raises:
        UserError: no sample has this key.
        ValueError: the codes are not the tokenizer's.
    """
    import torch

    from eval.inputs import load_visual_tokenizer, to_picture

    tokenizer = load_visual_tokenizer(visual_tokenizer)
    manifest = DatasetManifest.load(folder)
    manifest.require(folder, manifest.geometry, tokenizer.fingerprint())
    examples = []
    for sample in samples_of(folder):
        if sample.key == key:
            break
        if len(examples) < 3:
            examples.append(sample.key)
    else:
        raise UserError(f"{folder} has no sample {key!r}; its keys look like {', '.join(examples)}")
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


def stats(folder: Path) -> Iterator[str]:
    """Sizes of a data set and the use of its codes, as lines.

    Raises:
        UserError: the data set is empty.
    """
    import torch

    manifest = DatasetManifest.load(folder)
    geometry = manifest.geometry
    shape = (2, geometry.num_quantizers, geometry.codebook_size)
    counts = torch.zeros(shape, dtype=torch.int64)
    parts: Counter[str] = Counter()
    images_each: Counter[int] = Counter()
    letters: list[int] = []
    for sample in samples_of(folder):
        parts.update("image" if "image" in part else "text" for part in sample.parts)
        images_each[len(sample.codes)] += 1
        letters.append(sum(len(part["text"]) for part in sample.parts if "text" in part))
        codes = torch.from_numpy(sample.codes.astype("int64"))
        for q in range(2):
            for d in range(geometry.num_quantizers):
                flat = codes[:, :, q, d].flatten()
                counts[q, d] += torch.bincount(flat, minlength=geometry.codebook_size)
    if not letters:
        raise UserError(f"{folder} holds no samples")
    total = sum(images_each[n] * n for n in images_each)
    size = sum((folder / name).stat().st_size for name, entry in manifest.shards.items() if entry.samples)
    letters.sort()
    yield f"{len(letters)} samples, {total} images, {size / max(total, 1):,.0f} bytes an image on disk"
    yield "images a sample: " + ", ".join(f"{n}: {count}" for n, count in sorted(images_each.items()))
    yield f"parts: {parts['image']} images, {parts['text']} texts"
    yield f"letters of text a sample: median {letters[len(letters) // 2]}, longest {letters[-1]}"
    if total:
        yield f"{'codebook':<10}{'depth':>6}{'used':>8}{'perplexity':>12}   of {geometry.codebook_size} codes"
        for q, name in enumerate(("pixel", "semantic")):
            for d in range(geometry.num_quantizers):
                share = counts[q, d].double() / counts[q, d].sum()
                used, perplexity = (share > 0).double().mean(), (-torch.xlogy(share, share).sum()).exp()
                yield f"{name:<10}{d + 1:>6}{float(used):>8.1%}{float(perplexity):>12.1f}"
