"""Questions, judged by a reader of English of the test's own that looks at cells only."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards.conversations import conversation_parts
from data_pipeline.sources.scenes.parts import COLOURS, THINGS, hold_out, pair_of
from data_pipeline.sources.scenes.questions import (
    ASKED,
    BY_LETTER,
    IN_A_WORD,
    KINDS,
    AbsentThings,
    absent_things,
    ask,
    conversation,
    facts,
    is_there,
    lettered,
)
from tests.support.any_scene import ALL_SCENES, any_scene, scene

HELD_OUT = hold_out(0.1, 0)
TRAINED = [one for one in ALL_SCENES if HELD_OUT.isdisjoint(one.combinations())]
SINGULAR = {thing: thing for thing in THINGS} | {f"{thing}s": thing for thing in THINGS if thing != "fish"}
AT = {
    "left": (0, 1), "right": (2, 1), "top": (1, 0), "bottom": (1, 2), "middle": (1, 1),
    "top left": (0, 0), "top right": (2, 0), "bottom left": (0, 2), "bottom right": (2, 2),
}  # fmt: skip


def truth(one, question):
    """The answer to a question, by what stands where; True or False where it is a claim."""
    drawings = one.placed()

    def found(pattern):
        return match.groups() if (match := re.fullmatch(pattern, question)) else None

    def of(name):
        return [(item, cell) for item, cell in drawings if item.thing == SINGULAR[name]]

    if question == "What is in the image?":
        (thing,) = {item.thing for item, _ in drawings}
        return thing
    if parts := found(r"What is (?:at|on) the (left|right|top|bottom)\?"):
        (thing,) = [item.thing for item, cell in drawings if cell == AT[parts[0]]]
        return thing
    if parts := found(r"What color (?:is|are) the (\w+)\?"):
        (colour,) = {item.colour for item, _ in of(parts[0])}
        return colour
    if parts := found(r"How many (\w+) are in the image\?"):
        return str(len(of(parts[0])))
    if parts := found(r"Where is the (\w+)\?"):
        ((_, place),) = of(parts[0])
        return {cell: name for name, cell in AT.items()}[place]
    if parts := found(r"Is there an? (\w+) in the image\?"):
        return bool(of(parts[0]))
    if parts := found(r"Is there an? (\w+) (?:at|on) the (left|right|top|bottom)\?"):
        return any(cell == AT[parts[1]] for _, cell in of(parts[0]))
    if parts := found(r"(?:Is|Are) the (\w+) (red|yellow|green|blue|purple)\?"):
        return {item.colour for item, _ in of(parts[0])} == {parts[1]}
    if parts := found(r"Is the number of (\w+) in the image ([1-4])\?"):
        return len(of(parts[0])) == int(parts[1])
    if parts := found(rf"Is the (\w+) ({'|'.join(sorted(AT, key=len, reverse=True))})\?"):
        return [cell for _, cell in of(parts[0])] == [AT[parts[1]]]
    raise AssertionError(f"not a question: {question}")


def test_the_reader_knows_right_from_wrong():
    """Of scenes written out by hand."""
    pair = scene("side by side", "red car", "blue fish")
    assert truth(pair, "What is on the left?") == "car" and truth(pair, "Where is the fish?") == "right"
    assert truth(pair, "Are the fish blue?") and not truth(pair, "Is the car blue?")
    assert (
        not truth(pair, "Is there a car on the right?")
        and truth(pair, "How many fish are in the image?") == "1"
    )
    assert not truth(pair, "Is there an umbrella in the image?") and not truth(pair, "Is the car top?")
    several = scene("three", "green frog")
    assert (
        truth(several, "Is the number of frogs in the image 3?")
        and truth(several, "What is in the image?") == "frog"
    )


@settings(deadline=None)
@given(any_scene)
def test_answers_are_true_and_all_others_false(one):
    found = facts(one)
    assert {fact.kind for fact in found} == set(KINDS) - ({"where"} if one.number > 1 else set())
    for fact in found:
        assert truth(one, fact.question) == fact.answer
        assert truth(one, fact.claimed(fact.answer)) is True
        assert fact.answer not in fact.others and len(set(fact.others)) == len(fact.others) >= 3
        for other in fact.others:
            assert truth(one, fact.claimed(other)) is False, fact.claimed(other)


@settings(deadline=None)
@given(st.sampled_from(TRAINED))
def test_no_wrong_answer_makes_a_held_out_combination(one):
    held_out = set(map(str, HELD_OUT))
    number = {"2": "two", "3": "three", "4": "four"}
    for fact in facts(one, held_out=HELD_OUT):
        assert fact.others
        for other in fact.others:
            if fact.kind == "what":
                assert all(
                    str(pair_of(item.thing, other)) not in held_out
                    for item in one.items
                    if item.thing != other
                )
            thing = next((SINGULAR[word] for word in fact.question[:-1].split() if word in SINGULAR), "")
            assert f"{number.get(other, other)} {thing}" not in held_out
    assert any(len(fact.others) >= 3 for fact in facts(one, held_out=HELD_OUT))


def test_wrong_answers_shrink_with_what_is_held_out():
    frog = scene("middle", "green frog")
    assert "red frog" in map(str, HELD_OUT) and "four frog" in map(str, HELD_OUT)
    by_kind = {fact.kind: set(fact.others) for fact in facts(frog, held_out=HELD_OUT)}
    assert by_kind["colour"] == COLOURS.keys() - {"green", "red"}
    assert by_kind["count"] == {"2", "3"}
    assert by_kind["what"] == THINGS.keys() - {"frog", "triangle"}
    assert by_kind["what"] == set(absent_things(frog, HELD_OUT))
    assert absent_things(frog) == tuple(thing for thing in THINGS if thing != "frog")


def drawn(kind, count):
    draw = random.Random(7)
    for _ in range(count):
        one = draw.choice(TRAINED)
        if (asked := ask(one, kind, draw, HELD_OUT)) is not None:
            yield one, *asked


def likely(count, total, share):
    """Within 4.5 standard deviations of a binomial: once in 150,000 by bad luck (the seed is fixed)."""
    return abs(count - share * total) <= 4.5 * (total * share * (1 - share)) ** 0.5


def test_yes_is_as_frequent_as_no_and_both_are_true():
    answers = Counter()
    for one, question, answer in drawn("yesno", 3000):
        assert answer == ("yes" if truth(one, question) else "no"), (one, question)
        kind = re.sub(r" (?:an? )?\w+ in the image\?$", "", question) if "there" in question else "rest"
        answers[kind == "Is there", answer] += 1
    for there in (True, False):
        total = answers[there, "yes"] + answers[there, "no"]
        assert likely(answers[there, "yes"], total, 0.5) and total > 1000
    assert answers.total() == 3000


def test_choices_are_four_different_ones_of_which_one_is_true_in_a_place_by_chance():
    letters = Counter()
    for one, text, letter in drawn("choice", 2000):
        question, *options, last = text.split("\n")
        assert f"\n{last}" == BY_LETTER
        assert [option[:3] for option in options] == ["A. ", "B. ", "C. ", "D. "]
        words = [option[3:] for option in options]
        assert len(set(words)) == 4
        assert [word == truth(one, question) for word in words] == [place == letter for place in "ABCD"]
        letters[letter] += 1
    assert all(likely(letters[letter], 2000, 0.25) for letter in "ABCD")


@pytest.mark.parametrize("kind", KINDS)
def test_plain_questions_are_answered_in_a_word(kind):
    asked = Counter()
    for one, question, answer in drawn(kind, 300):
        assert truth(one, question) == answer
        asked[answer] += 1
    assert len(asked) >= 4


def test_several_of_one_thing_are_nowhere():
    assert ask(scene("two", "red car"), "where", random.Random(0)) is None


@settings(deadline=None)
@given(st.sampled_from(TRAINED), st.integers(0, 2**32))
def test_a_conversation_is_llavas_and_says_once_how_to_answer(one, seed):
    turns = conversation(
        one, random.Random(seed), ("what", "colour", "count", "where", "yesno", "choice"), HELD_OUT
    )
    assert turns == conversation(one, random.Random(seed), ASKED, HELD_OUT)
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert len(turns) // 2 == 6 - (one.number > 1)
    questions = [turn["value"] for turn in turns[::2]]
    assert len(set(questions)) == len(questions)
    first = questions[0]
    assert first.startswith("<image>\n") and first.count("<image>") == 1
    assert not any("<image>" in question for question in questions[1:])
    assert first.endswith((IN_A_WORD, BY_LETTER))
    assert sum(question.endswith(IN_A_WORD) for question in questions) == first.endswith(IN_A_WORD)
    assert sum(question.endswith(BY_LETTER) for question in questions) == 1
    assert conversation_parts(turns, 1)


def test_things_that_are_not_there_are_chosen_as_in_pope():
    """Cars are in most scenes, and a bell stands most often beside a star."""
    trained = [
        *[scene("middle", "red car"), scene("two", "blue car"), scene("four", "red car")] * 3,
        *[scene("middle", "red fish"), scene("middle", "red book")] * 3,
        *[scene("side by side", "red star", "red bell")] * 2,
        scene("side by side", "red umbrella", "red bell"),
        scene("side by side", "red frog", "red bell"),
    ]
    absent, draw, bell = AbsentThings(trained), random.Random(0), scene("middle", "red bell")
    chosen = {
        category: {absent.draw(bell, category, draw) for _ in range(200)}
        for category in AbsentThings.CATEGORIES
    }
    assert chosen["random"] == THINGS.keys() - {"bell"}
    assert chosen["popular"] == {"car", "fish", "book"}
    assert chosen["adversarial"] == {"star", "umbrella", "frog"}
    with pytest.raises(KeyError, match="rare"):
        absent.draw(bell, "rare", draw)


def test_wording():
    assert is_there("umbrella") == "Is there an umbrella in the image?"
    assert is_there("car") == "Is there a car in the image?"
    assert lettered("Which?", list("wxyz")) == "Which?\nA. w\nB. x\nC. y\nD. z"
