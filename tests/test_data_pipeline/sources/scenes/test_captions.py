from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sources.scenes.captions import WORDS, captions, plural, read_caption
from tests.support.any_scene import ALL_SCENES, any_scene, scene

LANGUAGES = ("en", "de", "es")


def test_the_grammar_knows_three_languages():
    assert set(WORDS) == set(LANGUAGES)
    with pytest.raises(KeyError, match="fr"):
        captions(ALL_SCENES[0], "fr")


@settings(deadline=None)  # the first call makes the patterns
@given(any_scene)
def test_every_caption_reads_back_to_its_scene(one):
    for language in LANGUAGES:
        for text in captions(one, language):
            assert read_caption(text, language) == one


def test_a_scene_can_be_said_in_several_ways_and_no_two_scenes_in_the_same():
    for language in LANGUAGES:
        said = Counter(text for one in ALL_SCENES for text in captions(one, language))
        assert max(said.values()) == 1
        fewest = min(ALL_SCENES, key=lambda one: len(captions(one, language)))
        assert len(captions(fewest, language)) == 2
        assert len(said) > 2 * len(ALL_SCENES)


@settings(deadline=None)
@given(any_scene, st.data())
def test_a_caption_with_a_word_too_many_too_few_or_twice_is_foreign(one, data):
    language = data.draw(st.sampled_from(LANGUAGES))
    words = data.draw(st.sampled_from(captions(one, language))).split()
    place = data.draw(st.integers(0, len(words) - 1))
    changed = data.draw(
        st.sampled_from(
            [
                [*words[:place], words[place], *words[place:]],
                [*words[:place], "orange", *words[place:]],
                [*words[:place], words[place] + "x", *words[place + 1 :]],
            ]
        )
    )
    assert read_caption(" ".join(changed), language) is None
    assert read_caption(" ".join([*words[:place], *words[place + 1 :]]), language) is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", "en"),
        ("a red", "en"),
        ("A red car in the middle", "en"),  # the grammar writes it small
        ("a red car in the middle.", "en"),
        ("two red car", "en"),
        ("a red cars in the middle", "en"),
        ("a orange car in the middle", "en"),
        ("a red car", "en"),  # where?
        ("five red cars", "en"),
        ("a red car left of a blue bell left of a red car", "en"),
        ("ein roter Auto in der Mitte", "de"),
        ("eine rotes Auto in der Mitte", "de"),
        ("zwei roten Autos", "de"),
        ("ein rotes auto in der Mitte", "de"),
        ("un rana roja en el centro", "es"),
        ("una rana rojo en el centro", "es"),
        ("dos ranas roja", "es"),
        ("dos peces azul", "es"),
        ("a red car in the middle", "de"),
        ("ein rotes Auto in der Mitte", "es"),
        ("un coche rojo en el centro", "en"),
        ("a red car in the middle on grey\n", "en"),
    ],
)
def test_foreign_text_is_no_scene(text, language):
    assert read_caption(text, language) is None


# Written out by hand: every caption of a scene.
BY_HAND = [
    (
        scene("top left", "red car"),
        {
            "en": [
                "a red car at the top left",
                "at the top left, a red car",
                "a picture: a red car at the top left",
                "a picture: at the top left, a red car",
            ],
            "de": [
                "ein rotes Auto oben links",
                "oben links ein rotes Auto",
                "ein Bild: ein rotes Auto oben links",
                "ein Bild: oben links ein rotes Auto",
            ],
            "es": [
                "un coche rojo arriba a la izquierda",
                "arriba a la izquierda, un coche rojo",
                "un dibujo: un coche rojo arriba a la izquierda",
                "un dibujo: arriba a la izquierda, un coche rojo",
            ],
        },
    ),
    (
        scene("three", "purple frog", background="grey"),
        {
            "en": ["three purple frogs on grey", "a picture: three purple frogs on grey"],
            "de": ["drei violette Frösche auf Grau", "ein Bild: drei violette Frösche auf Grau"],
            "es": ["tres ranas moradas sobre gris", "un dibujo: tres ranas moradas sobre gris"],
        },
    ),
    (
        scene("side by side", "yellow umbrella", "green bell", background="pink"),
        {
            "en": [
                "a yellow umbrella left of a green bell on pink",
                "on the left a yellow umbrella, on the right a green bell on pink",
                "a picture: a yellow umbrella left of a green bell on pink",
                "a picture: on the left a yellow umbrella, on the right a green bell on pink",
            ],
            "de": [
                "links ein gelber Regenschirm, rechts eine grüne Glocke auf Rosa",
                "ein gelber Regenschirm links, eine grüne Glocke rechts auf Rosa",
                "ein Bild: links ein gelber Regenschirm, rechts eine grüne Glocke auf Rosa",
                "ein Bild: ein gelber Regenschirm links, eine grüne Glocke rechts auf Rosa",
            ],
            "es": [
                "un paraguas amarillo a la izquierda de una campana verde sobre rosa",
                "a la izquierda un paraguas amarillo, a la derecha una campana verde sobre rosa",
                "un dibujo: un paraguas amarillo a la izquierda de una campana verde sobre rosa",
                "un dibujo: a la izquierda un paraguas amarillo, a la derecha una campana verde sobre rosa",
            ],
        },
    ),
    (
        scene("one above the other", "blue fish", "red heart"),
        {
            "en": [
                "a blue fish above a red heart",
                "at the top a blue fish, at the bottom a red heart",
                "a picture: a blue fish above a red heart",
                "a picture: at the top a blue fish, at the bottom a red heart",
            ],
            "de": [
                "oben ein blauer Fisch, unten ein rotes Herz",
                "ein blauer Fisch oben, ein rotes Herz unten",
                "ein Bild: oben ein blauer Fisch, unten ein rotes Herz",
                "ein Bild: ein blauer Fisch oben, ein rotes Herz unten",
            ],
            "es": [
                "un pez azul encima de un corazón rojo",
                "arriba un pez azul, abajo un corazón rojo",
                "un dibujo: un pez azul encima de un corazón rojo",
                "un dibujo: arriba un pez azul, abajo un corazón rojo",
            ],
        },
    ),
]


@pytest.mark.parametrize(("one", "texts"), BY_HAND)
def test_captions_are_as_written_by_hand(one, texts):
    for language, expected in texts.items():
        assert sorted(captions(one, language)) == sorted(expected)


# Gender, number and article of every thing: one, and several, in a colour that shows it.
PHRASES = {
    "de": {
        "car": "ein rotes Auto, zwei rote Autos",
        "balloon": "ein roter Ballon, zwei rote Ballons",
        "fish": "ein roter Fisch, zwei rote Fische",
        "umbrella": "ein roter Regenschirm, zwei rote Regenschirme",
        "book": "ein rotes Buch, zwei rote Bücher",
        "shirt": "ein rotes Hemd, zwei rote Hemden",
        "frog": "ein roter Frosch, zwei rote Frösche",
        "bell": "eine rote Glocke, zwei rote Glocken",
        "star": "ein roter Stern, zwei rote Sterne",
        "heart": "ein rotes Herz, zwei rote Herzen",
        "circle": "ein roter Kreis, zwei rote Kreise",
        "triangle": "ein rotes Dreieck, zwei rote Dreiecke",
    },
    "es": {
        "car": "un coche rojo, dos coches rojos",
        "balloon": "un globo rojo, dos globos rojos",
        "fish": "un pez rojo, dos peces rojos",
        "umbrella": "un paraguas rojo, dos paraguas rojos",
        "book": "un libro rojo, dos libros rojos",
        "shirt": "una camisa roja, dos camisas rojas",
        "frog": "una rana roja, dos ranas rojas",
        "bell": "una campana roja, dos campanas rojas",
        "star": "una estrella roja, dos estrellas rojas",
        "heart": "un corazón rojo, dos corazones rojos",
        "circle": "un círculo rojo, dos círculos rojos",
        "triangle": "un triángulo rojo, dos triángulos rojos",
    },
    "en": {
        "car": "a red car, two red cars",
        "balloon": "a red balloon, two red balloons",
        "fish": "a red fish, two red fish",
        "umbrella": "a red umbrella, two red umbrellas",
        "book": "a red book, two red books",
        "shirt": "a red shirt, two red shirts",
        "frog": "a red frog, two red frogs",
        "bell": "a red bell, two red bells",
        "star": "a red star, two red stars",
        "heart": "a red heart, two red hearts",
        "circle": "a red circle, two red circles",
        "triangle": "a red triangle, two red triangles",
    },
}
IN_THE_MIDDLE = {"en": "in the middle", "de": "in der Mitte", "es": "en el centro"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_thing_alone_and_several(language):
    for thing, phrases in PHRASES[language].items():
        one, several = phrases.split(", ")
        assert f"{one} {IN_THE_MIDDLE[language]}" in captions(scene("middle", f"red {thing}"), language)
        assert several in captions(scene("two", f"red {thing}"), language)
        assert several.split()[-1 if language != "es" else 1] == plural(language, thing)


@pytest.mark.parametrize(
    ("language", "colour", "forms"),
    [
        ("de", "purple", "ein violettes Buch, ein violetter Frosch, eine violette Glocke, vier violette"),
        ("de", "green", "ein grünes Buch, ein grüner Frosch, eine grüne Glocke, vier grüne Bücher"),
        ("es", "purple", "un libro morado, una rana morada, una campana morada, cuatro libros morados"),
        ("es", "yellow", "un libro amarillo, una rana amarilla, una campana amarilla, libros amarillos"),
        ("es", "green", "un libro verde, una rana verde, una campana verde, cuatro libros verdes"),
        ("es", "blue", "un libro azul, una rana azul, una campana azul, cuatro libros azules"),
    ],
)
def test_colours_agree_with_their_things(language, colour, forms):
    *alone, several = forms.split(", ")
    for thing, form in zip(("book", "frog", "bell"), alone, strict=True):
        assert any(form in text for text in captions(scene("middle", f"{colour} {thing}"), language))
    assert any(several in text for text in captions(scene("four", f"{colour} book"), language))
