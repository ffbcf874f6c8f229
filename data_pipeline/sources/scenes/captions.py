"""A small grammar of captions in three languages: every scene in words, and words back to the scene."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from data_pipeline.sources.scenes.parts import COLOURS, LAYOUTS, NUMBERS, SIDES, THINGS, Item, Scene


@dataclass(frozen=True)
class Words:
    """The words of a language."""

    things: Mapping[str, tuple[str, str, str]]  # gender (where it matters), singular, plural
    colours: Mapping[str, str]
    numbers: Mapping[str, str]
    backgrounds: Mapping[str, Sequence[str]]  # what ends a caption
    # By layout; {one} and {other} are things in colours, the left or upper one first, as pictures are read.
    templates: Mapping[str, Sequence[str]]
    openings: Sequence[str]


def _places(*forms: str, **names: str) -> dict[str, Sequence[str]]:
    return {
        place: [form.format(place=names[place.replace(" ", "_")], one="{one}") for form in forms]
        for place in ("top left", "top right", "bottom left", "bottom right", "middle")
    }


_NUMBERED = dict.fromkeys(NUMBERS, ("{one}",))

WORDS: Mapping[str, Words] = MappingProxyType(
    {
        "en": Words(
            things={
                "car": ("", "car", "cars"),
                "balloon": ("", "balloon", "balloons"),
                "fish": ("", "fish", "fish"),
                "umbrella": ("", "umbrella", "umbrellas"),
                "book": ("", "book", "books"),
                "shirt": ("", "shirt", "shirts"),
                "frog": ("", "frog", "frogs"),
                "bell": ("", "bell", "bells"),
                "star": ("", "star", "stars"),
                "heart": ("", "heart", "hearts"),
                "circle": ("", "circle", "circles"),
                "triangle": ("", "triangle", "triangles"),
            },
            colours={colour: colour for colour in COLOURS},
            numbers={number: number for number in NUMBERS},
            backgrounds={"white": ("",), "grey": (" on grey",), "pink": (" on pink",)},
            templates={
                **_places(
                    "{one} {place}",
                    "{place}, {one}",
                    top_left="at the top left",
                    top_right="at the top right",
                    bottom_left="at the bottom left",
                    bottom_right="at the bottom right",
                    middle="in the middle",
                ),
                **_NUMBERED,
                "side by side": ("{one} left of {other}", "on the left {one}, on the right {other}"),
                "one above the other": ("{one} above {other}", "at the top {one}, at the bottom {other}"),
            },
            openings=("", "a picture: "),
        ),
        "de": Words(
            things={
                "car": ("n", "Auto", "Autos"),
                "balloon": ("m", "Ballon", "Ballons"),
                "fish": ("m", "Fisch", "Fische"),
                "umbrella": ("m", "Regenschirm", "Regenschirme"),
                "book": ("n", "Buch", "Bücher"),
                "shirt": ("n", "Hemd", "Hemden"),
                "frog": ("m", "Frosch", "Frösche"),
                "bell": ("f", "Glocke", "Glocken"),
                "star": ("m", "Stern", "Sterne"),
                "heart": ("n", "Herz", "Herzen"),
                "circle": ("m", "Kreis", "Kreise"),
                "triangle": ("n", "Dreieck", "Dreiecke"),
            },
            colours={
                "red": "rot",
                "yellow": "gelb",
                "green": "grün",
                "blue": "blau",
                "purple": "violett",
            },
            numbers={"two": "zwei", "three": "drei", "four": "vier"},
            backgrounds={"white": ("",), "grey": (" auf Grau",), "pink": (" auf Rosa",)},
            templates={
                **_places(
                    "{one} {place}",
                    "{place} {one}",
                    top_left="oben links",
                    top_right="oben rechts",
                    bottom_left="unten links",
                    bottom_right="unten rechts",
                    middle="in der Mitte",
                ),
                **_NUMBERED,
                "side by side": ("links {one}, rechts {other}", "{one} links, {other} rechts"),
                "one above the other": ("oben {one}, unten {other}", "{one} oben, {other} unten"),
            },
            openings=("", "ein Bild: "),
        ),
        "es": Words(
            things={
                "car": ("m", "coche", "coches"),
                "balloon": ("m", "globo", "globos"),
                "fish": ("m", "pez", "peces"),
                "umbrella": ("m", "paraguas", "paraguas"),
                "book": ("m", "libro", "libros"),
                "shirt": ("f", "camisa", "camisas"),
                "frog": ("f", "rana", "ranas"),
                "bell": ("f", "campana", "campanas"),
                "star": ("f", "estrella", "estrellas"),
                "heart": ("m", "corazón", "corazones"),
                "circle": ("m", "círculo", "círculos"),
                "triangle": ("m", "triángulo", "triángulos"),
            },
            colours={
                "red": "rojo",
                "yellow": "amarillo",
                "green": "verde",
                "blue": "azul",
                "purple": "morado",
            },
            numbers={"two": "dos", "three": "tres", "four": "cuatro"},
            backgrounds={"white": ("",), "grey": (" sobre gris",), "pink": (" sobre rosa",)},
            templates={
                **_places(
                    "{one} {place}",
                    "{place}, {one}",
                    top_left="arriba a la izquierda",
                    top_right="arriba a la derecha",
                    bottom_left="abajo a la izquierda",
                    bottom_right="abajo a la derecha",
                    middle="en el centro",
                ),
                **_NUMBERED,
                "side by side": (
                    "{one} a la izquierda de {other}",
                    "a la izquierda {one}, a la derecha {other}",
                ),
                "one above the other": ("{one} encima de {other}", "arriba {one}, abajo {other}"),
            },
            openings=("", "un dibujo: "),
        ),
    }
)


def plural(language: str, thing: str) -> str:
    """The word for several of a thing."""
    return WORDS[language].things[thing][2]


@cache
def noun_phrase(language: str, item: Item, number: str = "") -> str:
    """A thing in its colour with an article (`a red car`), or several with their number (`two red cars`)."""
    words = WORDS[language]
    gender, one, several = words.things[item.thing]
    colour = words.colours[item.colour]
    noun = several if number else one
    if language == "en":
        article = "an" if colour[0] in "aeiou" else "a"
        return f"{words.numbers[number] if number else article} {colour} {noun}"
    if language == "de":
        ending = "e" if number or gender == "f" else {"m": "er", "n": "es"}[gender]
        article = "eine" if gender == "f" else "ein"
        return f"{words.numbers[number] if number else article} {colour}{ending} {noun}"
    if gender == "f" and colour.endswith("o"):
        colour = f"{colour[:-1]}a"
    if number:
        colour = f"{colour}{'s' if colour[-1] in 'aeo' else 'es'}"
    article = "una" if gender == "f" else "un"
    return f"{words.numbers[number] if number else article} {noun} {colour}"


def captions(scene: Scene, language: str) -> list[str]:
    """Every caption the grammar has for a scene.

    Raises:
        KeyError: a language the grammar does not know.
    """
    words = WORDS[language]
    number = scene.layout if scene.layout in NUMBERS else ""
    phrases = [noun_phrase(language, item, number) for item in scene.items]
    filled = dict(zip(("one", "other"), phrases))
    return [
        f"{opening}{template.format(**filled)}{background}"
        for opening in words.openings
        for template in words.templates[scene.layout]
        for background in words.backgrounds[scene.background]
    ]


def read_caption(text: str, language: str) -> Scene | None:
    """The scene that a caption says; None of what the grammar cannot have said."""
    for layout, background, pattern in _patterns(language):
        if match := pattern.fullmatch(text):
            number = layout if layout in NUMBERS else ""
            phrases = _phrases(language, number)
            names = ("one", "other") if layout in SIDES else ("one",)
            return Scene(layout, tuple(phrases[match[name]] for name in names), background)
    return None


@cache
def _phrases(language: str, number: str) -> dict[str, Item]:
    items = (Item(thing, colour) for thing in THINGS for colour in COLOURS)
    return {noun_phrase(language, item, number): item for item in items}


@cache
def _patterns(language: str) -> list[tuple[str, str, re.Pattern[str]]]:
    return list(_make_patterns(language))


def _make_patterns(language: str) -> Iterator[tuple[str, str, re.Pattern[str]]]:
    words = WORDS[language]
    opening = "|".join(map(re.escape, words.openings))
    for layout in LAYOUTS:
        phrases = "|".join(map(re.escape, _phrases(language, layout if layout in NUMBERS else "")))
        slots = {name: f"(?P<{name}>{phrases})" for name in ("one", "other")}
        for template in words.templates[layout]:
            # Escaped piece by piece: the slots are patterns already.
            pieces = re.split(r"\{(one|other)\}", template)
            body = "".join(
                slots[piece] if place % 2 else re.escape(piece) for place, piece in enumerate(pieces)
            )
            for background, endings in words.backgrounds.items():
                ending = "|".join(map(re.escape, endings))
                yield layout, background, re.compile(f"(?:{opening}){body}(?:{ending})")
