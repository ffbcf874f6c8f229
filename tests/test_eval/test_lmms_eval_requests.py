"""What lmms-eval asks is honoured, refused or named in a log line; messages become the runner's documents."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.shards.conversations import TEMPLATES, ConversationError, conversation_parts
from dualtoken.generation.sampling import Sampling
from eval.lmms_eval_requests import Conversation, Generation, picture_file
from eval.templates import NO_TEMPLATE, with_images_first
from tests.support.tiny_run import picture

QWEN = TEMPLATES["qwen"]


def test_what_a_task_wants_is_honoured():
    pope = {"max_new_tokens": 128, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert Generation.of(pope, "pope") == Generation(128, Sampling(0.0))
    assert Generation.of({**pope, "max_new_tokens": 16, "top_p": 0}, "mme") == Generation(16, Sampling(0.0))
    assert Generation.of({"until": None}, "t") == Generation(128)
    drawn = {"max_gen_toks": 9, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "until": "x"}
    assert Generation.of(drawn, "t") == Generation(9, Sampling(0.5, 3, 0.9), ("x",))
    vllm = {"temperature": 0.7, "top_p": None, "top_k": -1}  # without do_sample a temperature decides
    assert Generation.of(vllm, "t").sampling == Sampling(0.7)


def test_what_is_not_used_is_named(caplog):
    wanted = {"image_aspect_ratio": "pad", "until": ["\n\n", "ASSISTANT:"], "temperature": 0.7}
    found = Generation.of({**wanted, "do_sample": False}, "a task")
    assert found.sampling == Sampling(0.0) and found.until == ("ASSISTANT:",)
    assert [record.getMessage() for record in caplog.records] == [
        "task a task: image_aspect_ratio 'pad' is not used",
        "task a task: temperature 0.7 is not used",
        "task a task: until '\\n\\n' is not used",
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_beams": 5}, "task t: num_beams is 5, expected 1: .*--gen_kwargs num_beams=1"),
        ({"repetition_penalty": 1.05}, "task t: repetition_penalty is 1.05, expected 1"),
        ({"do_sample": True}, "task t: do_sample without a temperature; give one with --gen_kwargs"),
        ({"temperature": 1.0, "top_p": 0}, "top_p=0; expected more than 0"),
    ],
)
def test_what_would_change_answers_is_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        Generation.of(wanted, "t")


def test_answers_end_at_the_first_of_the_strings():
    generation = Generation(until=("###", "\nUSER"))
    assert generation.cut(" a cat\nUSER: more ### x") == "a cat"
    assert generation.cut("a ###\nUSER") == "a" and generation.cut(" a cat ") == "a cat"


def text(words):
    return {"type": "text", "text": words}


def image(name):
    return {"type": "image", "url": name}


def user(*content):
    return {"role": "user", "content": list(content)}


@pytest.mark.parametrize("template", [QWEN, TEMPLATES["vicuna"], NO_TEMPLATE])
def test_a_picture_before_a_question_stands_as_in_our_runner(template):
    found = Conversation.of([user(image("a.png"), text("Red?"))], template, "t")
    assert found == Conversation.of_text("Red?", ["a.png"], template, "t")
    ours = [{"from": "human", "value": with_images_first("Red?", 1, template)}]
    parts = [conversation_parts(turns, 1, template, answered=False) for turns in (found.turns, ours)]
    assert parts[0] == parts[1]


def test_pictures_stand_where_messages_have_them():
    messages = [
        {"role": "system", "content": [text("Be short.")]},
        user(image("a"), image("b"), text("Which of "), image("c"), text(" is it?")),
        {"role": "assistant", "content": [text("b")]},
        user(text("And "), image("d")),
    ]
    found = Conversation.of(messages, QWEN, "t")
    assert found.pictures == ["a", "b", "c", "d"]
    parts = conversation_parts(found.turns, 4, QWEN, answered=False)
    assert "".join(part.get("text", f"({part.get('image')})") for part in parts) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n(0)\n(1)\nWhich of (2) is it?<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nAnd (3)<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_text_with_tags_says_itself_where_its_pictures_stand():
    found = Conversation.of_text("From <image> to <image>?", ["a.jpg", picture(0)], QWEN, "t")
    assert found.turns == [{"from": "user", "value": "From <image> to <image>?"}]
    assert len(found.pictures) == 2
    one_too_few = Conversation.of([user(image("a"), text("From <image> to <image>?"))], QWEN, "task t, doc 3")
    with pytest.raises(ConversationError, match="task t, doc 3: 2 <image> tags for 1 images"):
        conversation_parts(one_too_few.turns, 1, QWEN, name=one_too_few.name, answered=False)


@pytest.mark.parametrize("visual", ["clip.mp4", {"array": [0.0], "sampling_rate": 16000}])
def test_videos_and_sounds_are_refused(visual):
    with pytest.raises(ValueError, match="task t has video or sound; the model reads text and pictures"):
        Conversation.of_text("What?", [visual], QWEN, "task t")
    with pytest.raises(ValueError, match="task t has audio and video; the model reads text and pictures"):
        Conversation.of([user({"type": "video"}, {"type": "audio"}, text("?"))], QWEN, "task t")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
def test_pictures_keep_their_pixels(mode, tmp_path):
    original = picture(3).convert(mode)
    with Image.open(io.BytesIO(picture_file(original))) as written:
        assert np.array_equal(np.asarray(written.convert("RGB")), np.asarray(original.convert("RGB")))
    picture(3).save(tmp_path / "a.jpg")
    assert picture_file(str(tmp_path / "a.jpg")) == (tmp_path / "a.jpg").read_bytes()


def test_a_turned_picture_is_put_upright_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees
    picture(3).save(tmp_path / "turned.png", exif=exif)
    with (
        Image.open(tmp_path / "turned.png") as turned,
        Image.open(io.BytesIO(picture_file(turned))) as upright,
    ):
        assert upright.size == (20, 24) and upright.getexif().get(0x0112, 1) == 1
