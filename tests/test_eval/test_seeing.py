"""Models that read continuous features are evaluated with them: questions, scenes, chat, captions."""

import io
import math
import shutil

import pytest
import torch
from transformers import SiglipModel

from data_pipeline.images.decoding import DecodedImages
from data_pipeline.pretokenize.command import main as pretokenize
from dualtoken.generation.generators import generate_text
from dualtoken.generation.likelihood import option_log_likelihoods
from dualtoken.processing import DualTokenProcessor
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart
from dualtoken.unified_model.tiles import Tiles
from dualtoken.unified_model.vision_tower import VisionTower
from dualtoken.visual_tokenizer.backbone import load_backbone
from dualtoken.visual_tokenizer.config import preset_config
from eval import likelihood
from eval.inputs import EvaluationPaths, load_codes, load_models, pictures_of
from eval.overfit import reproduce
from eval.seeing import load_sight
from eval.templates import NO_TEMPLATE
from eval.understanding.benchmark import Question
from eval.understanding.models import load_answerer
from launchers.conversation import Chat
from tests.support.command import call
from tests.support.seeing_run import export_seeing
from tests.support.tiny_run import make_tiny_run, picture

OPTIONS = ("red", "blue green", "black")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_tiny_run(tmp_path_factory.mktemp("run"))
    export_seeing(folder, "features")
    export_seeing(folder, "both", "codes_and_features")
    export_seeing(folder, "outside", inside=False)
    for index in (0, 1):
        picture(index).resize((16, 16)).save(folder / f"{index}.png")
    return folder


def load(run, name, **settings):
    return load_answerer(run / name, run / "tokenizer" / "export", **settings)


def questions(run):
    return [Question(str(index), index, "red ?", run / f"{index}.png", options=OPTIONS) for index in (0, 1)]


@pytest.fixture(scope="module")
def siglip(run):
    return run / "siglip" / "export"


def test_answers_change_with_the_features_alone(run):
    first, second = load(run, "features").choose(questions(run))
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.1
    # The codes of a model that reads them too are the same for both pictures.
    answerer = load(run, "both")
    images = answerer.look(questions(run))
    turns = [{"from": "human", "value": "<image>\nred ?"}]
    prompts = [
        answerer.document(turns, [ImagePart(images[0].codes, features=image.features)], "asked")
        for image in images
    ]
    found = [[o.log_likelihood for o in row] for row in answerer.compare(prompts, [OPTIONS] * 2)]
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) > 0.1
    assert answerer.choose(questions(run))[0] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize("name", ["features", "both", "outside"])
def test_pictures_are_seen_as_the_processor_sees_them(run, siglip, name):
    outside = name == "outside"
    answerer = load(run, name, vision_tower=siglip if outside else None)
    processor = DualTokenProcessor.for_config(answerer.model.config, answerer.text_tokenizer)
    assert answerer.model.config.image_layout.features == 16
    shown = [picture(index).resize((16, 16)) for index in (0, 1)]
    tower = VisionTower.of_model(load_backbone(siglip).vision_model) if outside else None
    documents = processor.documents(
        ["<image>", "<image>"], shown, visual_tokenizer=answerer.visual_tokenizer, vision_tower=tower
    )
    for prompt, document in zip(answerer.prompts(questions(run)), documents, strict=True):
        found, expected = (next(p for p in d.parts if isinstance(p, ImagePart)) for d in (prompt, document))
        assert found.features.shape == ((16, 32) if outside else (3, 16, 16))
        torch.testing.assert_close(found.features, expected.features)
        if name == "both":
            assert torch.equal(found.codes, expected.codes)


def test_a_tower_beside_the_model_answers_as_one_inside(run, siglip):
    inside, outside = load(run, "features"), load(run, "outside", vision_tower=siglip)
    for ours, theirs in zip(inside.choose(questions(run)), outside.choose(questions(run)), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert "vision_tower" not in inside.settings
    fingerprint = VisionTower.of_model(load_backbone(siglip).vision_model).fingerprint()
    assert outside.settings["vision_tower"] == fingerprint


def test_the_layer_is_that_of_the_training(run, siglip):
    export_seeing(run, "early", inside=False, layer=1)
    answerer = load(run, "early", vision_tower=siglip)
    assert answerer._sight.vision_tower.settings["num_hidden_layers"] == 1
    assert len(answerer.answer(questions(run), 3)) == 2


def test_a_tower_that_is_not_the_models_is_refused(run, siglip, tmp_path):
    with pytest.raises(ValueError, match=r"a vision tower outside of it made \(.*--vision-tower FOLDER"):
        load(run, "outside").answer(questions(run), 3)
    torch.manual_seed(7)
    SiglipModel(preset_config("tiny").backbone_config()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="makes other features, after whichever of its 4 layers, than the"):
        load(run, "outside", vision_tower=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no SigLIP backbone at"):
        load(run, "outside", vision_tower=tmp_path / "gone")
    with pytest.raises(ValueError, match="has its vision tower inside, .*: leave .* out"):
        load(run, "features", vision_tower=siglip)
    with pytest.raises(ValueError, match="reads codes alone: leave the vision tower .* out"):
        load(run, "mllm/export", vision_tower=siglip)


@pytest.fixture(scope="module")
def kept(run):
    """The held-out drawings with what stands for their features, both ways."""
    source = [
        "--visual-tokenizer", str(run / "tokenizer" / "export"), "--backend", "torchvision",
        "--inputs", str(run / "sample_data" / "images" / "val" / "drawings"),
    ]  # fmt: skip
    tower = ["--vision-tower", str(run / "siglip" / "export")]
    for kind, more in (("none", []), ("pixels", []), ("float16", tower)):
        assert pretokenize([*source, "--output", str(run / "kept" / kind), "--features", kind, *more]) == 0
    return run / "kept"


@pytest.mark.parametrize(
    "name, kind, stored", [("features", "pixels", True), ("features", "none", False),
                           ("features", "float16", False), ("outside", "float16", True),
                           ("outside", "pixels", False)],
)  # fmt: skip
def test_features_come_from_the_shards_if_they_are_there(run, siglip, kept, name, kind, stored):
    model, words, tokenizer = load_models(run / name, run / "tokenizer" / "export")
    tower = siglip if name == "outside" and not stored else None
    sight = load_sight(model.config, words, tokenizer, tower)
    samples, asked = load_codes(kept / kind), []

    def pictures():
        asked.append(1)
        return pictures_of(samples, kept / kind, run / "sample_data/images/val/drawings", 16)

    found = sight.look_at_samples(kept / kind, samples, pictures)
    assert bool(asked) is not stored and len(found) == 5
    made = None
    if tower or name == "features":
        made = sight.look(DecodedImages(pictures(), list(range(5))))
    for part, sample, place in zip(found, samples, range(5), strict=True):
        assert torch.equal(torch.as_tensor(part.codes).long(), torch.from_numpy(sample.codes[0]).long())
        if made is not None:
            torch.testing.assert_close(part.features, made[place].features)
        else:
            assert part.features.shape == (16, 32) and part.features.dtype == torch.float16


def test_tiles_are_those_of_the_shards(run):
    """Of files as of shards; a data set without them cannot be made up for."""
    grids = [[1, 2], [2, 1], [2, 2]]
    model, words, tokenizer = load_models(
        export_seeing(run, "tiles", tiles=grids), run / "tokenizer" / "export"
    )
    sight = load_sight(model.config, words, tokenizer)
    source = [
        "--visual-tokenizer", str(run / "tokenizer" / "export"), "--backend", "torchvision",
        "--inputs", str(run / "sample_data" / "images" / "val" / "drawings"),
    ]  # fmt: skip
    folder = run / "kept" / "tiles"
    assert (
        pretokenize([*source, "--output", str(folder), "--features", "pixels", "--tiles", "1x2,2x1,2x2"]) == 0
    )
    samples = load_codes(folder)
    stored = sight.look_at_samples(folder, samples, lambda: pytest.fail("asked for pictures"))
    files = [io.BytesIO() for _ in samples]
    for file, sample in zip(files, samples, strict=True):
        picture(int(sample.key.removeprefix("picture"))).save(file, "PNG")
    seen = sight.look(sight.decoder()([file.getvalue() for file in files]))
    for ours, theirs in zip(seen, stored, strict=True):
        assert ours.size == theirs.size == (20, 24) and len(ours.features) > 2
        assert torch.equal(ours.features, theirs.features)
    prompts = [Document([part, TextPart("red")]) for part in seen]
    assert len(generate_text(model, words, prompts, 3)) == 5
    drawn = sight.drawn(torch.zeros(16, 2, 2, dtype=torch.long))
    assert drawn.size == (16, 16) and len(drawn.features) == 1 + math.prod(Tiles(grids, 16).grid((16, 16)))
    with pytest.raises(ValueError, match="in tiles, and .* holds none of those; pretokenize it with"):
        sight.look_at_samples(run / "codes" / "val", samples, lambda: pytest.fail("asked for pictures"))


def test_captions_are_less_likely_of_other_features(run, kept):
    paths = EvaluationPaths.from_run(
        run, model=run / "features", seen_codes=kept / "pixels", held_out_codes=kept / "pixels",
        output=run / "likelihood",
    )  # fmt: skip
    captions = likelihood.run(paths)["splits"]["held_out"]["captions"]["en"]
    assert captions["with_image"] != captions["other_image"] != captions["image_removed"]


def test_pairs_with_features_are_asked_for(run, kept):
    models = load_models(run / "features", run / "tokenizer" / "export")
    found = reproduce(*models, load_codes(kept / "pixels", 2))
    assert len({pair.written for pair in found.pairs}) == 2  # they differ in what is seen alone


def test_a_chat_goes_on_after_pictures_shown_and_drawn(run):
    model, words, tokenizer = load_models(run / "both", run / "tokenizer" / "export")
    sight = load_sight(model.config, words, tokenizer)
    chat = Chat(model, words, sight, NO_TEMPLATE, max_new_tokens=4)
    chat.attach(run / "0.png")
    codes = chat.draw("red")
    shown, drawn = chat.images
    assert shown.features.dtype == drawn.features.dtype == torch.uint8
    decoded = tokenizer.decode(codes[None])[0].clamp(-1, 1)
    expected = ((decoded + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(drawn.features, expected)
    document = chat.ask("blue")
    parts = [part for part in document.parts if isinstance(part, ImagePart)]
    assert [part.loss for part in parts] == [False, True] and torch.equal(parts[1].features, expected)

    def likely(features):
        changed = Document([shown, ImagePart(codes, loss=True, features=features), TextPart("blue")])
        return option_log_likelihoods(model, words, [changed], [["red"]])[0][0].log_likelihood

    assert likely(expected) != likely(255 - expected)


def test_an_answer_goes_on_after_a_picture_within_it(run):
    model, words, tokenizer = load_models(run / "both", run / "tokenizer" / "export")
    head, special = model.get_output_embeddings(), model.config.special
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    head.bias[special.image_gen_start] = 1e6  # as long as it may draw, it does
    sight = load_sight(model.config, words, tokenizer)
    chat = Chat(model, words, sight, NO_TEMPLATE, max_new_tokens=4)
    said = list(chat.say("red"))
    drawn = [piece for piece in said if isinstance(piece, ImagePart)]
    assert len(drawn) == 4 and all(image.features.shape == (3, 16, 16) for image in drawn)
    assert [id(image) for image in chat.images] == [id(image) for image in drawn]


def test_commands_take_the_tower(run, siglip, tmp_path, capsys):
    places = ["--model", run / "outside", "--visual-tokenizer", run / "tokenizer" / "export"]
    code, out, _ = call(["caption", run / "0.png", *places, "--vision-tower", siglip], capsys)
    assert code == 0 and out.startswith(f"{run / '0.png'}: ")
    code, _, err = call(["caption", run / "0.png", *places], capsys)
    assert code == 2 and "name its SigLIP, --vision-tower FOLDER" in err
    code, out, _ = call(
        ["generate", "red <image>", "--image", run / "0.png", *places, "--vision-tower", siglip,
         "--output", tmp_path], capsys,
    )  # fmt: skip
    assert code == 0 and len(list(tmp_path.glob("*.png"))) == 1
    shutil.rmtree(tmp_path)
