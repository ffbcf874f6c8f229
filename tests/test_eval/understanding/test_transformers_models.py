"""A tiny real LLaVA, asked through transformers' pipeline: the same as by hand, in batches or not."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from eval.understanding.benchmark import BenchmarkError, Question
from eval.understanding.models import load_answerer
from tests.support.convert_support import write_base
from tests.support.tiny_llava import make_tiny_llava
from tests.support.tiny_run import picture

TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    make_tiny_llava(folder / "model")
    for index in range(2):
        picture(index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def questions(folder):
    # Two about each picture, of different lengths; a file and the bytes of one.
    images = [folder / "0.png", folder / "1.png", folder / "0.png", (folder / "1.png").read_bytes()]
    return [Question(str(i), i, "what is it" + " really" * i, image) for i, image in enumerate(images)]


def test_the_answers_are_those_of_the_model_by_hand_one_by_one(folder, questions):
    answerer = load_answerer(folder / "model")
    together = answerer.answer(questions, TOKENS)
    assert together == [answer for question in questions for answer in answerer.answer([question], TOKENS)]
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model")
    for index, question in enumerate(questions):
        inputs = processor(
            images=Image.open(folder / f"{index % 2}.png").convert("RGB"),
            text=f"USER: <image>\n{question.prompt} ASSISTANT:",
            return_tensors="pt",
        )
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = written[0, inputs["input_ids"].shape[1] :]
        assert together[index] == processor.decode(new, skip_special_tokens=True).strip() != ""
    assert len(set(together)) == len(questions)  # it reads both the picture and the words


def test_what_it_cannot_do_is_said(folder, questions, tmp_path, capsys):
    answerer = load_answerer(folder / "model", folder / "a-visual-tokenizer")
    with pytest.raises(ValueError, match="likelihoods of answers are not offered for it; ask it by text"):
        answerer.choose(questions)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = Question("x", 17, "what", tmp_path / "bad.png")
    with pytest.raises(BenchmarkError, match="question 17: its picture .*bad.png cannot be used"):
        answerer.answer([*questions, bad], TOKENS)
    with pytest.raises(ValueError, match="has a chat template of its own: leave the template 'qwen' out"):
        load_answerer(folder / "model", template="qwen")
    with pytest.raises(ValueError, match="its processor has no chat template, so how to ask it is not known"):
        load_answerer(make_tiny_llava(tmp_path / "mute", chat_template=None))
    write_base(tmp_path / "text_only", "llama")
    with pytest.raises(ValueError, match="transformers cannot load it for pictures with text") as caught:
        load_answerer(tmp_path / "text_only")
    assert len(str(caught.value)) < 600  # not the classes of a hundred models
    with pytest.raises(ValueError, match="nobody/nothing: transformers cannot load it"):
        load_answerer("nobody/nothing")
