"""Dual-code shards: pictures as codes with their text, in WebDataset tars, and `dataset.json` beside them.

A sample is `KEY.codes.npy`, uint16 [I, P, Q, D], and `KEY.json`,
`{"parts": [{"image": 0, "loss": false}, {"text": "..."}], "captions": {"en": "..."}}`. For models that read
continuous features there is `KEY.features.npy` too: [I, N, C] in float16, or in bfloat16 as the uint16 of its
bits; or, for a vision tower in the model, the images themselves, uint8 [I, 3, S, S]. Of images in tiles it is
[m, C] or uint8 [F, 3, S, S], of all images after each other, and `KEY.json` has `sizes`, [height, width] of
each image, and `features`, how many of the m or F are its own.
Shapes: I images of the sample, P positions per image, Q codebooks (pixel, and semantic if any), D quantizers;
codes are below K; N features per image, C their width, S pixels a side; of images in tiles m features that
are read (`tiles.in_order`) of F crops. The same samples give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import DatasetError
from data_pipeline.names import is_below
from data_pipeline.shards.remote_files import is_remote, read_remote
from data_pipeline.shards.tar_members import TarError, iterate_samples
from dualtoken.unified_model.tiles import Tiles

if TYPE_CHECKING:  # shards are read and checked without torch
    from dualtoken.unified_model.config import DualTokenConfig

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
CODES_PART, JSON_PART, FEATURES_PART = "codes.npy", "json", "features.npy"
_MAX_CODEBOOK_SIZE = 1 << 16


@dataclass(frozen=True)
class CodeGeometry:
    """Shape and range of an image's codes: [positions, num_codebooks, num_quantizers] below codebook_size."""

    positions: int
    num_quantizers: int
    codebook_size: int
    num_codebooks: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.codebook_size <= _MAX_CODEBOOK_SIZE:
            raise ValueError(
                f"codebook_size is {self.codebook_size}, expected 1 to {_MAX_CODEBOOK_SIZE}: "
                "codes are stored as uint16"
            )

    @classmethod
    def of(cls, visual_tokenizer_config: Any) -> CodeGeometry:
        """Return that of the codes that a visual tokenizer makes."""
        return cls(**{one.name: getattr(visual_tokenizer_config, one.name) for one in fields(cls)})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape [P, Q, D] of the codes of one image."""
        return (self.positions, self.num_codebooks, self.num_quantizers)

    def check(self, codes: np.ndarray) -> None:
        """Raise ValueError unless `codes` [I, P, Q, D] fit."""
        if codes.ndim != 4 or codes.shape[1:] != self.shape:
            raise ValueError(
                f"codes have shape {codes.shape}, expected [images, {', '.join(map(str, self.shape))}]"
            )
        if codes.size and (largest := int(codes.max())) >= self.codebook_size:
            raise ValueError(f"a code is {largest}, expected codes below {self.codebook_size}")


FEATURE_TYPES = {"float16": "float16", "bfloat16": "uint16", "pixels": "uint8"}
"""What shards keep of images for continuous features, and the numpy type that holds it."""


@dataclass(frozen=True)
class FeatureGeometry:
    """What is kept of each image for continuous features, besides its codes."""

    kind: str
    """One of `FEATURE_TYPES`."""
    shape: tuple[int, ...]
    """Of one image, or of one of its crops: [N, C], or [3, S, S] of pixels."""
    fingerprint: str = ""
    """Of the vision tower the features come from; "" for pixels."""
    tiles: Tiles | None = None
    """How images were cut; None, and not in `dataset.json`, for whole images."""

    def __post_init__(self) -> None:
        if self.kind not in FEATURE_TYPES:
            raise ValueError(f"features are {self.kind!r}, expected one of {', '.join(FEATURE_TYPES)}")
        object.__setattr__(self, "shape", tuple(self.shape))  # a list in JSON
        if isinstance(self.tiles, dict):  # in JSON
            object.__setattr__(self, "tiles", Tiles(**self.tiles))

    @property
    def entry_shape(self) -> tuple[int, ...]:
        """Shape of what the first dimension of `KEY.features.npy` counts."""
        return self.shape if self.tiles is None or self.kind == "pixels" else self.shape[1:]

    def count(self, size: tuple[int, int]) -> int:
        """Return how many crops, or features of them that are read, are kept of an image in tiles."""
        assert self.tiles is not None
        if self.kind == "pixels":
            return self.tiles.crops(size)
        return int((self.tiles.order(size, self.shape[0])[:, 0] >= 0).sum())

    def check(self, sample: CodeSample) -> None:
        """Raise ValueError unless a sample has these features of each of its images."""
        images, features = len(sample.codes), sample.features
        number = images
        if self.tiles is not None:
            sizes, counts = sample.sizes, sample.feature_counts
            if sizes is None or len(sizes) != images or counts != [self.count(size) for size in sizes]:
                raise ValueError(
                    f"sizes are {sizes} with features {counts}, expected a size of each of {images} images, "
                    f"and as many features as tiles of {self.tiles.grids} give"
                )
            number = sum(counts)
        expected = (number, *self.entry_shape)
        found = None if features is None else (features.shape, str(features.dtype))
        if found != (expected, FEATURE_TYPES[self.kind]):
            raise ValueError(f"features are {found}, expected {(expected, FEATURE_TYPES[self.kind])}")

    def serves(self, other: FeatureGeometry) -> bool:
        """Whether a model that expects `other` can read these; how exactly they are kept is left open."""
        pixels = (self.kind == "pixels", other.kind == "pixels")
        return pixels[0] == pixels[1] and all(
            getattr(self, name) == getattr(other, name) for name in ("shape", "fingerprint", "tiles")
        )


def expected_features(config: DualTokenConfig) -> FeatureGeometry | None:
    """Return what a unified model takes of images for continuous features; None without."""
    if not config.reads_features:
        return None
    tiles = config.image_layout.tiles
    if config.vision_config is not None:
        return FeatureGeometry("pixels", (3, config.image_size, config.image_size), tiles=tiles)
    shape = (config.features_per_image, config.feature_dim or 0)
    return FeatureGeometry("bfloat16", shape, config.feature_fingerprint, tiles)


@dataclass
class CodeSample:
    """One sample: images as codes uint16 [I, P, Q, D], ordered parts, captions of an image-text pair.

    `features` are as of `FeatureGeometry`, [I, ...]; of images in tiles those of all images after each other,
    and `sizes` and `feature_counts` say the height and width of each image, and how many are its own.

    A part is `{"text": str}` or `{"image": index}`, with `"loss": bool` (default: true for text, false for
    images) and for text `"markup": bool` (default false).
    """

    key: str
    codes: np.ndarray
    parts: list[dict[str, Any]]
    captions: dict[str, str] | None = None
    features: np.ndarray | None = None
    sizes: list[tuple[int, int]] | None = None
    feature_counts: list[int] | None = None

    def features_of(self, image: int) -> np.ndarray | None:
        """Return what is kept of an image for continuous features, None where nothing is."""
        if self.features is None or self.feature_counts is None:
            return None if self.features is None else self.features[image]
        start = sum(self.feature_counts[:image])
        return self.features[start : start + self.feature_counts[image]]

    def size_of(self, image: int) -> tuple[int, int] | None:
        """Return the height and width of an image in tiles, None for a whole one."""
        return None if self.sizes is None else self.sizes[image]


def check_parts(parts: Any, images: int) -> None:
    """Raise ValueError unless `parts` is a list of text and image parts that names each image once."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"parts are {parts!r:.80}, expected a list of objects")
    for part in parts:
        if isinstance(part.get("text"), str) == ("image" in part):
            raise ValueError(f'part {part!r:.80} is neither {{"text": ...}} nor {{"image": index}}')
    named = sorted(part["image"] for part in parts if "image" in part)
    if named != list(range(images)):
        raise ValueError(
            f"parts name the images {named}, expected each of {images} exactly once, counted from 0"
        )


def encode_sample(sample: CodeSample) -> list[tuple[str, bytes]]:
    """Return the members (name in the tar, content) of a sample."""
    record: dict[str, Any] = {"parts": sample.parts}
    if sample.captions is not None:
        record["captions"] = sample.captions
    if sample.sizes is not None:
        record |= {"sizes": sample.sizes, "features": sample.feature_counts}
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    members = [(CODES_PART, _npy(sample.codes, "<u2")), (JSON_PART, text.encode())]
    if sample.features is not None:
        members.append((FEATURES_PART, _npy(sample.features, sample.features.dtype.newbyteorder("<"))))
    return [(f"{sample.key}.{part}", data) for part, data in members]


def _npy(array: np.ndarray, dtype: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array, dtype=dtype), version=(1, 0))
    return buffer.getvalue()


_HEADERS: dict[bytes, tuple[np.dtype, str, tuple[int, ...]]] = {}


def _read_npy(data: bytes, what: str, *types: str) -> np.ndarray:
    """Read an npy; the header, parsed once per type and shape, is the slow part of numpy's own reader."""
    length = 10 + int.from_bytes(data[8:10], "little")
    header = data[:length]
    if header not in _HEADERS:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if not array.flags.c_contiguous or header[6:8] != b"\x01\x00" or array.dtype.byteorder == ">":
            raise ValueError(f"{what} are {array.dtype} in npy {header[6]}.{header[7]}, expected npy 1.0")
        _HEADERS[header] = array.dtype, str(array.dtype), array.shape
    dtype, name, shape = _HEADERS[header]
    if name not in types:
        raise ValueError(f"{what} are {name}, expected {' or '.join(types)} in npy 1.0")
    return np.frombuffer(data, dtype=dtype, offset=length).reshape(shape).copy()  # writable, for torch


def decode_sample(key: str, codes: bytes, record: bytes, features: bytes | None = None) -> CodeSample:
    """Read a sample from the contents of its members; ValueError if one cannot be read."""
    content = json.loads(record)
    kept = None if features is None else _read_npy(features, "features", *FEATURE_TYPES.values())
    sample = CodeSample(
        key, _read_npy(codes, "codes", "uint16"), content["parts"], content.get("captions"), kept
    )
    if "sizes" in content:
        sample.sizes = [(height, width) for height, width in content["sizes"]]
        sample.feature_counts = [int(count) for count in content["features"]]
    return sample


@dataclass
class ShardEntry:
    """What `dataset.json` keeps of one shard; in = samples + rejected. Without samples there is no tar."""

    sha256: str
    samples: int
    images: int
    samples_in: int = 0
    rejected: int = 0
    source: str = ""
    """Address or path of the shard it was made from; in older data sets its name."""


class ShardWriter:
    """Writes one shard: under a temporary name, flushed to disk, renamed on success, removed on failure.

    Used as a context manager, or by `open`, `commit` and `discard`; `entry` is set after a successful exit.
    Members carry no time, owner or rights of their own, so that the bytes depend on the samples alone.
    """

    def __init__(
        self,
        path: str | Path,
        geometry: CodeGeometry,
        still_wanted: Callable[[], bool] = lambda: True,
        features: FeatureGeometry | None = None,
    ) -> None:
        """Write to `path`; if not `still_wanted` at the end, that is left alone and `entry` stays None.

        `features` says what samples have of them; None for nothing.
        """
        self.path = Path(path)
        self.geometry = geometry
        self.features = features
        self.still_wanted = still_wanted
        self.entry: ShardEntry | None = None
        self._temporary = temporary_name(self.path)
        self._samples = self._images = 0

    def __enter__(self) -> ShardWriter:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def open(self) -> None:
        """Begin, under a temporary name."""
        self._file = open(self._temporary, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)

    def write(self, sample: CodeSample) -> None:
        """Add a sample; ValueError if its key, codes, features or parts do not fit the data set."""
        if not sample.key or "." in sample.key.rpartition("/")[2]:
            raise ValueError(f"key is {sample.key!r}, expected a name without dots")
        check_sample(sample, self.geometry, self.features)
        for name, data in encode_sample(sample):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._samples += 1
        self._images += len(sample.codes)

    def commit(self) -> None:
        """End the shard, give it its name and set `entry`, if it is still wanted."""
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            entry = ShardEntry(file_sha256(self._temporary), self._samples, self._images)
            if self.still_wanted():
                os.replace(self._temporary, self.path)
                self.entry = entry
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was written under the temporary name, if it is there."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def check_sample(sample: CodeSample, geometry: CodeGeometry, features: FeatureGeometry | None) -> None:
    """Raise ValueError unless a sample's codes, features and parts fit the data set and each other."""
    geometry.check(sample.codes)
    if features is not None:
        features.check(sample)
    elif sample.features is not None:
        raise ValueError("the sample has features, the data set none")
    check_parts(sample.parts, len(sample.codes))


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def iterate_shard(path: str | Path) -> Iterator[CodeSample]:
    """Read the samples of a local shard in order.

    Raises:
        DatasetError: The tar is truncated or damaged, or a sample lacks a member or cannot be read.
    """
    key: str | None = None
    try:
        with open(path, "rb") as file:
            for key, parts in iterate_samples(file):
                if missing := {CODES_PART, JSON_PART} - parts.keys():
                    raise DatasetError(f"{path}: sample {key!r} lacks {', '.join(sorted(missing))}")
                try:
                    yield decode_sample(key, parts[CODES_PART], parts[JSON_PART], parts.get(FEATURES_PART))
                except (ValueError, KeyError, TypeError) as error:
                    raise DatasetError(f"{path}: sample {key!r} cannot be read: {error}") from error
    except (TarError, OSError) as error:
        raise DatasetError(f"{path}: {error} (after sample {key!r})") from error


@dataclass
class DatasetManifest:
    """`dataset.json`: what made the codes, their geometry, what came in, went out and was rejected."""

    fingerprint: str
    codebook_size: int
    num_quantizers: int
    positions: int
    image_size: int
    num_codebooks: int = 2
    """Not in the file of older data sets."""
    samples_in: int = 0
    samples_out: int = 0
    rejected: int = 0
    images: int = 0
    shards: dict[str, ShardEntry] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the run that made it; {} where it was made otherwise, or is older than this field."""
    features: FeatureGeometry | None = None
    """What samples have for continuous features; None, and not in the file, where nothing."""
    format_version: int = FORMAT_VERSION

    @property
    def geometry(self) -> CodeGeometry:
        """Shape and range of the codes."""
        return CodeGeometry(self.positions, self.num_quantizers, self.codebook_size, self.num_codebooks)

    def add(self, name: str, entry: ShardEntry) -> None:
        """Count a shard in."""
        self.shards[name] = entry
        self.samples_in += entry.samples_in
        self.samples_out += entry.samples
        self.rejected += entry.rejected
        self.images += entry.images

    def save(self, folder: str | Path) -> None:
        """Write `dataset.json` into `folder`, whole or not at all."""
        content = asdict(self)
        if self.features is None:
            del content["features"]
        elif self.features.tiles is None:
            del content["features"]["tiles"]
        write_atomically(Path(folder) / MANIFEST, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> DatasetManifest:
        """Read `dataset.json` of a folder or address; DatasetError if it is missing or of another format."""
        path = f"{str(folder).rstrip('/')}/{MANIFEST}"
        try:
            data = read_remote(path) if is_remote(folder) else Path(path).read_bytes()
        except FileNotFoundError as error:
            raise DatasetError(f"{path}: missing; {folder} is not a finished dual-code data set") from error
        try:
            content = json.loads(data)
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise DatasetError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}")
            shards = {name: ShardEntry(**entry) for name, entry in content.pop("shards").items()}
            if "features" in content:
                content["features"] = FeatureGeometry(**content["features"])
            if outside := [name for name in shards if not is_below(name)]:
                raise DatasetError(f"{path}: {outside[0]!r} is not the name of a shard below {folder}")
            return cls(**content, shards=shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{path}: not a dual-code manifest: {error}") from error

    def require(
        self,
        folder: str | Path,
        geometry: CodeGeometry,
        fingerprint: str | None = None,
        features: FeatureGeometry | None = None,
    ) -> None:
        """Raise DatasetError unless the data set has the model's geometry and, where given, the others."""
        for item in fields(CodeGeometry):
            found, expected = getattr(self, item.name), getattr(geometry, item.name)
            if found != expected:
                raise DatasetError(f"{folder}: codes have {item.name} {found}, the model expects {expected}")
        if fingerprint:
            require_same_codes(folder, self.fingerprint, fingerprint)
        if features is not None and (self.features is None or not self.features.serves(features)):
            found = "nothing" if self.features is None else _named(self.features)
            raise DatasetError(
                f"{folder}: has {found} for continuous features, the model expects {_named(features)}; "
                "pretokenize with the --features, --vision-tower, --feature-layer and --tiles that it was "
                "built for"
            )


def _named(features: FeatureGeometry) -> str:
    shape = " x ".join(map(str, features.shape))
    what = f"features {shape} of the vision tower {features.fingerprint[:12]}"
    if features.kind == "pixels":
        what = f"pixels {shape}"
    if features.tiles is None:
        return what
    return f"{what} in tiles of {','.join(f'{rows}x{columns}' for rows, columns in features.tiles.grids)}"


def require_same_codes(
    source: str | Path, fingerprint: str, expected: str, expected_by: str | Path = "the model"
) -> None:
    """Raise DatasetError unless codes are those of the visual tokenizer that is expected.

    Args:
        source: what holds the codes, or the visual tokenizer that makes them.
        fingerprint: of the visual tokenizer behind `source`.
        expected: the fingerprint it has to be.
        expected_by: who reads the codes, for the message.
    """
    if fingerprint != expected:
        raise DatasetError(
            f"{source}: codes were made by the visual tokenizer {fingerprint[:12]}, {expected_by} expects "
            f"{expected[:12]}: codes of one mean nothing to the other; take the visual tokenizer that the "
            "model was trained with, or pretokenize again with it"
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk and rename it."""
    temporary = temporary_name(path)
    # A name that is not in UTF-8 has lone surrogates here; in json they become the escapes they stand for.
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process, on whatever machine, uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def verify_dataset(folder: str | Path, fingerprint: str | None = None) -> DatasetManifest:
    """Recompute what `dataset.json` says: hashes, counts, shapes, code ranges; optionally the fingerprint.

    Raises:
        DatasetError: One line on the first thing that is wrong.
    """
    folder = Path(folder)
    manifest = DatasetManifest.load(folder)
    manifest.require(folder, manifest.geometry, fingerprint)
    on_disk = {path.name for path in folder.glob("*.tar")}
    listed = {name for name, entry in manifest.shards.items() if entry.samples}
    if difference := on_disk ^ listed:
        name = sorted(difference)[0]
        state = "is not in dataset.json" if name in on_disk else "is missing"
        raise DatasetError(f"{folder / name}: {state}")
    keys: set[str] = set()
    for name, entry in manifest.shards.items():
        path = folder / name
        if not entry.samples:
            continue
        samples = images = 0
        for sample in iterate_shard(path):
            try:
                check_sample(sample, manifest.geometry, manifest.features)
            except ValueError as error:
                raise DatasetError(f"{path}: sample {sample.key!r}: {error}") from error
            if sample.key in keys:
                raise DatasetError(f"{path}: key {sample.key!r} occurs more than once")
            keys.add(sample.key)
            samples, images = samples + 1, images + len(sample.codes)
        if (samples, images) != (entry.samples, entry.images):
            raise DatasetError(
                f"{path}: holds {samples} samples with {images} images, "
                f"dataset.json says {entry.samples} with {entry.images}"
            )
        if file_sha256(path) != entry.sha256:
            raise DatasetError(f"{path}: its sha256 is not the one in dataset.json; the shard was changed")
        if entry.samples_in != entry.samples + entry.rejected:
            raise DatasetError(
                f"{path}: {entry.samples_in} in, but {entry.samples} out + {entry.rejected} rejected"
            )
    entries = manifest.shards.values()
    totals = {
        "samples_in": sum(entry.samples_in for entry in entries),
        "samples_out": sum(entry.samples for entry in entries),
        "rejected": sum(entry.rejected for entry in entries),
        "images": sum(entry.images for entry in entries),
    }
    for name, total in totals.items():
        if total != getattr(manifest, name):
            said = getattr(manifest, name)
            raise DatasetError(f"{folder}: dataset.json says {name} {said}, its shards add up to {total}")
    return manifest
