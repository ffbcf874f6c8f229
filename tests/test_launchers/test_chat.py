"""`dualtoken chat` with a tiny real model: what it is asked, what it answers, what is kept."""

import io
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_pipeline.shards.conversations import TEMPLATES
from dualtoken.generation.generators import generate, generate_images
from dualtoken.generation.sampling import Sampling
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart, tokenize_document
from eval.inputs import load_models
from eval.seeing import load_sight
from eval.templates import NO_TEMPLATE, views_learned
from launchers.chat import choose_template
from launchers.conversation import Chat
from launchers.errors import UserError
from tests.support.command import call
from tests.support.tiny_run import make_tiny_run, picture

TOKENS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def models(run):
    model, words, tokenizer = load_models(run / "mllm" / "export", run / "tokenizer" / "export")
    return model, words, load_sight(model.config, words, tokenizer)


@pytest.fixture
def typed(run, tmp_path, monkeypatch, capsys):
    """Run `dualtoken chat` on lines; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    picture(0).save("red one.png")

    def run_command(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        places = [f"--visual-tokenizer={run / 'tokenizer' / 'export'}", f"--model={run / 'mllm' / 'export'}"]
        return call(["chat", *options, "--max-new-tokens", TOKENS, *places], capsys)

    return run_command


def texts_and_images(parts):
    return [part.codes if isinstance(part, ImagePart) else part.text for part in parts]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second)
    )


def test_answers_are_what_generate_returns_and_pictures_are_saved(typed, models, tmp_path):
    chat = Chat(*models, guidance_scale=1.5, max_new_tokens=TOKENS)
    settings = {
        "max_new_tokens": TOKENS, "max_images": 4, "guidance_scale": 1.5,
        "image_sampling": Sampling(0.0), "stop": "<|im_end|>",
    }  # fmt: skip
    expected = []
    for text in ("red", "green blue"):
        answer = generate(*models[:2], chat.ask(text), **settings)
        assert same(
            texts_and_images(answer), joined(list(chat.say(text)))
        )  # and the turn is kept, so the next question is another
        expected += answer
    chat.attach(tmp_path / "red one.png")
    before = chat.ask("what is it")
    assert [type(part) for part in before.parts].count(ImagePart) == 1 + len(chat.images)
    expected += generate(*models[:2], before, **settings)
    list(chat.say("what is it"))
    expected.append(ImagePart(generate_images(*models[:2], [chat.ask("black")], 1.5, 0.0)[0]))

    code, out, err = typed("red", "green blue", "/image red one.png", "what is it", "/draw black")
    assert code == 0
    assert err == "attached to your next message: red one.png\n"
    words = "".join(part.text for part in expected if isinstance(part, TextPart))
    shown = [line for line in out.splitlines() if not line.startswith("[picture: ")]
    assert words and "".join("".join(shown).split()) == "".join(words.split())
    saved = [line[len("[picture: ") : -1] for line in out.splitlines() if line.startswith("[picture: ")]
    codes = [part.codes for part in expected if isinstance(part, ImagePart)]
    assert len(saved) == len(codes) and saved[-1] == "generated/black.png"
    tokenizer = models[2].visual_tokenizer
    for name, drawn in zip(saved, codes, strict=True):
        with Image.open(tmp_path / name) as image:
            pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
        decoded = tokenizer.decode(drawn[None])[0].permute(1, 2, 0).clamp(-1, 1)
        torch.testing.assert_close(pixels, decoded, atol=0.01, rtol=0)


def test_pictures_drawn_within_an_answer_are_kept_in_their_places(run):
    model, words, tokenizer = load_models(run / "mllm" / "export", run / "tokenizer" / "export")
    head, special = model.get_output_embeddings(), model.config.special
    head.bias = torch.nn.Parameter(torch.full((head.out_features,), -100.0), requires_grad=False)
    for token in (words.convert_tokens_to_ids("red"), special.image_gen_start):
        head.bias[token] = 0.0
    sight = load_sight(model.config, words, tokenizer)
    chat = Chat(model, words, sight, sampling=Sampling(1.0), max_new_tokens=TOKENS, seed=1)
    said = joined(list(chat.say("red")))
    drawn = [piece for piece in said if isinstance(piece, torch.Tensor)]
    assert len(drawn) == 4 and len(said) > 4  # four at most, words between or after them
    answer = "".join("<image>" if isinstance(piece, torch.Tensor) else piece for piece in said)
    assert chat.turns[1] == {"from": "gpt", "value": answer}
    assert same([image.codes for image in chat.images], drawn)
    parts = [part for part in chat.ask("blue").parts if isinstance(part, ImagePart)]
    assert all(part.loss for part in parts)
    assert same([torch.as_tensor(part.codes) for part in parts], drawn)
    again = Chat(model, words, sight, sampling=Sampling(1.0), max_new_tokens=TOKENS, seed=1)
    assert same(joined(list(again.say("red"))), said)


def joined(pieces):
    """Pieces of a stream with neighbouring texts put together."""
    found = []
    for piece in pieces:
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece.codes if isinstance(piece, ImagePart) else piece)
    return found


def test_the_history_is_laid_out_as_in_training(models):
    from data_pipeline.shards.code_shards import CodeSample
    from data_pipeline.shards.conversations import conversation_parts
    from data_pipeline.streams.views import parts_document

    model, words, _ = models
    for name, template in TEMPLATES.items():
        chat = Chat(*models, template)
        blank = torch.zeros(model.config.positions_per_image, 2, 2, dtype=torch.long)
        chat.attached = [ImagePart(blank)]
        chat._keep("look: <image>", "a red <image> one", [ImagePart(blank + 1)])
        asked = chat.ask("blue")
        turns = [*chat.turns, {"from": "human", "value": "blue"}, {"from": "gpt", "value": "yes"}]
        codes = torch.stack([image.codes for image in chat.images]).numpy()
        trained = parts_document(CodeSample("k", codes, conversation_parts(turns, 2, name)))
        ids, whole = (
            tokenize_document(document, words, model.config.special, end=False).input_ids.tolist()
            for document in (asked, trained)
        )
        assert ids == whole[: len(ids)] and len(ids) < len(whole)
        assert [part.loss for part in asked.parts if isinstance(part, ImagePart)] == [False, True]


def test_without_a_template_it_asks_as_captions_and_prompts_were_learned(models, tmp_path):
    chat = Chat(*models, NO_TEMPLATE)
    assert chat.ask("purple circle") == Document([TextPart("purple circle", loss=False)], "chat")
    picture(0).save(tmp_path / "a.png")
    chat.attach(tmp_path / "a.png")
    image, question = chat.ask("English:").parts
    assert image == chat.attached[0] and not image.loss
    assert question == TextPart("English:", loss=False)


def test_mistakes_are_one_line_and_the_chat_goes_on(typed, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code, out, err = typed(
        "/image gone.png", "/image bad.png", "/image", "/frob", "", "compare <image> with <image>",
        "/image red one.png", "two: <image> <image>", "/reset", "/help", "/draw red", "/quit", "/draw blue",
    )  # fmt: skip
    assert code == 0
    lines = err.splitlines()
    assert [line for line in lines if not line.startswith("error: ")] == [
        "attached to your next message: red one.png", "forgotten",
    ]  # fmt: skip
    for message in (
        "error: no such file: gone.png",
        "error: bad.png is no picture that can be read",
        "error: /image needs the path of a picture file",
        "error: unknown command /frob; /help lists them",
        "error: the text has 2 <image> tags but 0 images; attach one for each by /image",
        "error: the text has 2 <image> tags but 1 images",
    ):
        assert sum(line.startswith(message) for line in lines) == 1, message
    assert "/draw PROMPT" in out and out.splitlines()[-1] == "[picture: generated/red.png]"


def test_pictures_as_arguments_belong_to_the_first_message(typed):
    code, out, err = typed("/draw like <image>", options=["red one.png"])
    assert code == 0 and err == "" and out == "[picture: generated/like.png]\n"
    code, _, err = typed("red", options=["gone.png"])
    assert code == 2 and err == "error: no such file: gone.png\n"
    code, _, err = typed("red", options=["--chat-template", "none", "--system", "Be brief."])
    assert code == 2 and err.startswith("error: this chat template has no place for a system prompt")


def test_an_interrupted_answer_is_forgotten(typed, monkeypatch):
    calls = []

    def interrupted(self, text, progress=None):
        calls.append(len(self.turns))
        yield "gre"
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "say", interrupted)
    code, out, err = typed("red", "blue")
    assert code == 0 and calls == [0, 0] and out == "gre\ngre\n"
    assert err.count("stopped; this message and its answer are forgotten") == 2


def test_a_conversation_that_does_not_fit_is_named(models):
    model = models[0]
    chat = Chat(*models, NO_TEMPLATE)
    limits = model.decoder_config
    before = limits.max_position_embeddings
    try:
        limits.max_position_embeddings = model.config.positions_per_image
        with pytest.raises(UserError, match="too long for the model's 16 tokens; /reset forgets it"):
            chat.draw("red")
        limits.max_position_embeddings = 4
        with pytest.raises(UserError, match="too long for the model's 4 tokens"):
            list(chat.say("red green blue"))
    finally:
        limits.max_position_embeddings = before
    assert not chat.turns


def test_says_that_a_model_never_saw_conversations_only_where_that_is_known(tmp_path):
    def settings(*views, **model):
        blend = [{"view": view, "weight": float(view != "document")} for view in views]
        return {"job": "mllm", "model": model, "data": {"blend": blend}}

    export = tmp_path / "export"
    assert views_learned(export) is None and choose_template(None, export) == (TEMPLATES["qwen"], [])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings("caption", "generate", "document")), encoding="utf-8")
    template, (note,) = choose_template(None, export)
    assert template is NO_TEMPLATE
    assert note.startswith("note: this model was never trained on conversations, but on caption, generate:")
    assert choose_template("vicuna", export) == (TEMPLATES["vicuna"], [note])
    for unknown in (settings("caption", llm="some-model"), settings("caption", init_from="other")):
        config.write_text(yaml.safe_dump(unknown), encoding="utf-8")
        assert choose_template(None, export) == (TEMPLATES["qwen"], [])
    known = settings("document")
    known["data"]["blend"][0]["weight"] = 1.0
    config.write_text(yaml.safe_dump(known), encoding="utf-8")
    assert choose_template(None, export) == (TEMPLATES["qwen"], [])
    assert choose_template("plain", export)[1] == [
        "note: by the template plain the model sees your pictures, not your words"
    ]
