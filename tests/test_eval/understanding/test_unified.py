"""A unified model is asked as LLaVA's scripts ask and as it was trained; its files tell who answered."""

import dataclasses
import json
import shutil

import pytest
import torch

from data_pipeline.shards.code_shards import CodeSample
from data_pipeline.shards.conversations import ConversationError, conversation_parts
from data_pipeline.streams.views import parts_document
from dualtoken.generation.generators import generate_text
from dualtoken.generation.likelihood import document_nll
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart, tokenize_document
from eval.inputs import load_pictures
from eval.model_files import fingerprint_of_files
from eval.understanding.benchmark import BenchmarkError, Question
from eval.understanding.models import load_answerer
from eval.understanding.unified import written_out
from tests.support.tiny_pope import sharpen
from tests.support.tiny_run import make_tiny_run, picture
from tests.test_house import ROOT

CASES = json.loads((ROOT / "tests/data/benchmarks/prompts/llava_prompts.json").read_text(encoding="utf-8"))
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("run"))
    sharpen(run / "mllm" / "export")
    return run


def load(run, **settings):
    return load_answerer(run / "mllm" / "export", run / "tokenizer" / "export", **settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures 12 and 13, which are also the first two held out."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in (12, 13):
        picture(index).save(folder / f"{index}.png")
    return [folder / "12.png", folder / "13.png"]


def test_vicuna_prompts_are_those_of_llavas_scripts(run, files):
    answerer = load(run, template="vicuna")
    asked = [
        (case["question"]["text"] if "question" in case else case["answer_row"]["prompt"] + LETTER, case)
        for group in CASES.values()
        if isinstance(group, list)
        for case in group
    ]
    assert len(asked) > 80
    questions = [Question(str(i), i, text, files[0]) for i, (text, _) in enumerate(asked)]
    found = [written_out(prompt) for prompt in answerer.prompts(questions)]
    assert found == [case["prompt"] for _, case in asked]


@pytest.mark.parametrize("template", ["qwen", "vicuna"])
def test_prompts_begin_the_documents_of_training(run, files, template):
    answerer = load(run, template=template)
    pictures = load_pictures(
        run / "sample_data" / "images" / "val" / "drawings", answerer.visual_tokenizer.config.image_size
    )
    codes = answerer.visual_tokenizer.encode(pictures.images[:2]).numpy()
    asked = [files[0], files[1].read_bytes(), files[0]]
    prompts = answerer.prompts([Question(str(i), i, f"red {i}", image) for i, image in enumerate(asked)])
    for index, (prompt, place) in enumerate(zip(prompts, (0, 1, 0), strict=True)):
        said = [{"from": "human", "value": f"<image>\nred {index}"}, {"from": "gpt", "value": "yes"}]
        parts = conversation_parts(said, 1, template)
        trained = parts_document(CodeSample("key", codes[place][None], parts))
        assert len(trained.parts) > len(prompt.parts)
        for found, expected in zip(prompt.parts, trained.parts):
            if isinstance(found, ImagePart):
                assert torch.equal(torch.as_tensor(found.codes), torch.as_tensor(expected.codes))
            else:
                assert found == expected and not found.loss


def test_an_answer_ends_at_the_mark_of_its_template(run, files):
    answerer = load(run)
    assert (answerer.settings["template"], answerer.settings["precision"]) == ("qwen", "fp32")
    question = Question("0", 0, "red", files[0])
    (prompt,) = answerer.prompts([question])
    (written,) = generate_text(answerer.model, answerer.text_tokenizer, [prompt], 10, temperature=0.0)
    assert answerer.answer([question], 10) == [written.strip()] and len(set(written.split())) > 2
    before, mark = answerer.template.assistant[0], list(dict.fromkeys(written.split()))[2]
    answerer.template = dataclasses.replace(answerer.template, assistant=(before, mark))
    assert answerer.answer([question], 10) == [written[: written.index(mark)].strip()]


@pytest.mark.parametrize("template, space", [("qwen", ""), ("none", " ")])
def test_options_are_as_likely_as_documents_that_end_with_them(run, files, template, space):
    answerer = load(run, template=template)
    questions = [
        Question("0", 0, "red", files[0], options=("red", "blue green", "black")),
        Question("1", 1, "is it red ?", files[1], options=("rot", "gelb")),
    ]
    for question, prompt, found in zip(
        questions, answerer.prompts(questions), answerer.choose(questions), strict=True
    ):
        as_it_stands = [TextPart(question.prompt, loss=False)]  # after the picture
        assert (prompt.parts[1:] == as_it_stands) == (template == "none")
        documents = [
            tokenize_document(
                Document([*prompt.parts, TextPart(space + option)]),
                answerer.text_tokenizer,
                answerer.model.config.special,
                end=False,
            )
            for option in question.options
        ]
        alone = [-one.text_nll for one in document_nll(answerer.model, documents, 1)]
        assert found == pytest.approx(alone, abs=1e-3) and len(set(found)) == len(found)


def test_bf16_rounds_the_model_and_not_the_codes(run, files):
    exact, rounded = load(run), load(run, precision="bf16")
    assert next(rounded.model.decoder.parameters()).dtype == torch.bfloat16
    assert rounded.model.codebooks.vectors.dtype == torch.float32
    questions = [Question("0", 0, "red", files[0], options=("red", "blue green"))]
    codes = [
        torch.as_tensor(part.codes)
        for answerer in (exact, rounded)
        for part in answerer.prompts(questions)[0].parts
        if isinstance(part, ImagePart)
    ]
    assert len(codes) == 2 and torch.equal(*codes)
    ours, theirs = exact.choose(questions)[0], rounded.choose(questions)[0]
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.1, abs=0.5)


def test_a_question_that_cannot_be_asked_is_named(run, files, tmp_path):
    answerer = load(run)
    good = Question("g", 1, "red", files[0])
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(BenchmarkError, match="question 7: its picture .*/bad.jpg cannot be used: "):
        answerer.answer([good, Question("b", 7, "red", tmp_path / "bad.jpg")], 4)
    with pytest.raises(BenchmarkError, match="question 8: its picture .*/gone.jpg cannot be used: No such"):
        answerer.answer([good, Question("b", 8, "red", tmp_path / "gone.jpg")], 4)
    with pytest.raises(ConversationError, match="question 9: 2 <image> tags for 1 images"):
        answerer.answer([good, Question("b", 9, "red <image>", files[0])], 4)


def test_what_does_not_fit_a_model_is_refused(run, tmp_path):
    export, tokenizer = run / "mllm" / "export", run / "tokenizer" / "export"
    with pytest.raises(ValueError, match="is a unified model: name the visual tokenizer"):
        load_answerer(export)
    with pytest.raises(ValueError, match="template is 'plain', expected one of qwen, vicuna, none"):
        load_answerer(export, tokenizer, "plain")
    with pytest.raises(ValueError, match="precision is 'fp16', expected fp32 or bf16"):
        load_answerer(export, tokenizer, precision="fp16")
    with pytest.raises(FileNotFoundError, match="no model in .*: expected a folder with config.json"):
        load_answerer(tmp_path, tokenizer)
    with pytest.raises(FileNotFoundError, match="no model in runs/mine/export: expected a folder"):
        load_answerer("runs/mine/export", tokenizer)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="config.json is no model's config: expected a JSON object"):
        load_answerer(tmp_path, tokenizer)


def test_a_model_is_known_by_its_files(run, tmp_path):
    export = run / "mllm" / "export"
    shutil.copytree(export, tmp_path / "copy")
    assert fingerprint_of_files(tmp_path / "copy") == fingerprint_of_files(export)
    model = DualTokenForCausalLM.from_pretrained(export)
    for index, parameter in enumerate((model.get_input_embeddings().weight, next(model.parameters()))):
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        model.save_pretrained(tmp_path / "trained")
        for file in export.iterdir():
            if not (tmp_path / "trained" / file.name).exists():
                shutil.copyfile(file, tmp_path / "trained" / file.name)
        assert fingerprint_of_files(tmp_path / "trained") != fingerprint_of_files(export), index
        shutil.rmtree(tmp_path / "trained")
    words = tmp_path / "copy" / "tokenizer.json"
    words.write_text(words.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert fingerprint_of_files(tmp_path / "copy") != fingerprint_of_files(export)
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(b"\x08" + bytes(7) + b"no  json")
    with pytest.raises(ValueError, match="model.safetensors is no safetensors file; is it whole"):
        fingerprint_of_files(tmp_path / "copy")
    weights.unlink()
    with pytest.raises(ValueError, match="no weights in .*; expected "):
        fingerprint_of_files(tmp_path / "copy")
