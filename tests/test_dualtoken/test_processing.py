"""Texts with image tags and images -> model inputs."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from data_pipeline.images.decoding import decode_rgb
from dualtoken.generation.generators import generate_images, generate_text
from dualtoken.processing import DualTokenProcessor
from dualtoken.unified_model.sequence import ImagePart, TextPart
from dualtoken.unified_model.tiles import in_order
from dualtoken.unified_model.vision_tower import VisionTower, to_bytes
from tests.support.distributed import run_code
from tests.support.unified_support import (
    CODES,
    DEPTH,
    FEATURE_TOKENIZER,
    IDS,
    POSITIONS,
    TILES,
    byte_tokenizer,
    random_codes,
    seeing,
    tiny_config,
    tiny_model,
    vision_model,
)


class MeanColours:
    """A visual tokenizer whose codes are the mean colours of the image's quarters."""

    device = torch.device("cpu")

    def encode(self, images):
        assert images.shape[1:] == (3, 32, 32) and images.abs().max() <= 1
        quarters = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2)  # [B, 4, 3]
        codes = ((quarters + 1) * 5).round().long()
        return torch.stack([codes, codes.flip(-1)], dim=2)

    def decode(self, codes):
        colours = codes[:, :, 0].float().transpose(1, 2) / 5 - 1
        return torch.nn.functional.interpolate(colours.unflatten(-1, (2, 2)), size=32) * 1.5


@pytest.fixture
def processor():
    return DualTokenProcessor.for_config(tiny_config(), byte_tokenizer())


def red_and_clear():
    """Left half red, right half transparent."""
    pixels = np.zeros((50, 70, 4), np.uint8)
    pixels[:, :35] = (255, 0, 0, 255)
    return Image.fromarray(pixels, "RGBA")


def test_images_take_the_places_of_their_tags(processor):
    visual_tokenizer = MeanColours()
    green = Image.new("RGB", (9, 9), (0, 255, 0))
    documents = processor.documents(
        ["<image>What is this?", "no image", "a<image><image>"],
        images=[red_and_clear(), green, torch.ones(3, 32, 32)],
        visual_tokenizer=visual_tokenizer,
    )
    kinds = [[type(part) for part in document.parts] for document in documents]
    assert kinds == [[ImagePart, TextPart], [TextPart], [TextPart, ImagePart, ImagePart]]
    assert documents[0].parts[1] == TextPart("What is this?", loss=False)
    quarters = documents[0].parts[0].codes[:, 0].tolist()
    assert quarters == [[10, 0, 0], [10, 10, 10]] * 2  # transparency is white
    assert documents[2].parts[1].codes[:, 0].tolist() == [[0, 10, 0]] * 4
    assert (documents[2].parts[2].codes == 10).all()
    for one in (green, torch.ones(3, 32, 32)):
        (alone,) = processor.documents("<image>", images=one, visual_tokenizer=visual_tokenizer)
        (listed,) = processor.documents("<image>", images=[one], visual_tokenizer=visual_tokenizer)
        assert torch.equal(alone.parts[0].codes, listed.parts[0].codes)
    nested = processor.documents(
        ["<image>What is this?", "no image", "a<image><image>"],
        images=[[red_and_clear()], [], [green, torch.ones(3, 32, 32)]],
        visual_tokenizer=visual_tokenizer,
    )
    for a, b in zip(documents, nested, strict=True):
        for x, y in zip(a.parts, b.parts, strict=True):
            assert torch.equal(x.codes, y.codes) if isinstance(x, ImagePart) else x == y


@pytest.mark.parametrize("kind", ["turned", "16-bit grey", "damaged EXIF"])
def test_pictures_are_seen_as_training_decoded_them(processor, kind):
    file, exif = io.BytesIO(), Image.Exif()
    if kind != "16-bit grey":
        exif[0x0112] = 6  # as a camera on its side writes it
        exif[0x0131] = "a program"
        picture = Image.fromarray(np.tile(np.arange(0, 240, 8, dtype=np.uint8), (20, 1))).convert("RGB")
    else:
        picture = Image.fromarray(np.tile(np.arange(0, 60000, 2000, dtype=np.uint16), (20, 1)))
    written = exif.tobytes()
    if kind == "damaged EXIF":  # a width that is a text can be read, but not written anew
        written = written.replace(b"\x01\x31\x00\x02", b"\x01\x00\x00\x02")
    picture.save(file, "PNG", exif=written)
    found = processor._pixels(Image.open(file), 0)
    expected = processor._pixels(Image.fromarray(decode_rgb(file.getvalue())), 0)
    assert torch.equal(found, expected) and len(found.unique()) > 10


def test_inputs_are_what_the_model_takes(processor):
    model = tiny_model()
    codes = [random_codes(), random_codes()]
    inputs = processor(text=["<image>x", "y<image>"], codes=codes)
    assert (inputs["input_ids"] == IDS.image_pad).sum() == 2 * POSITIONS
    assert torch.equal(inputs["codes"], torch.cat(codes))
    assert set(inputs) == set(processor.model_input_names)
    output = model(**inputs)
    assert output.text_count == 0 and output.visual_count == 0


def test_documents_prompt_generation(processor):
    model = tiny_model()
    prompt = processor.documents("change <image> a bit", codes=[random_codes()])
    assert generate_images(model, processor.text_tokenizer, prompt).shape == (1, POSITIONS, 2, DEPTH)
    assert isinstance(generate_text(model, processor.text_tokenizer, prompt, max_new_tokens=2)[0], str)


@pytest.mark.parametrize("inside", [True, False])
def test_images_are_cut_into_tiles(inside):
    """Pictures of several sizes: what the model reads of each, made by a tower outside or left to its own."""
    config = tiny_config(**seeing("codes_and_features", inside, TILES))
    processor = DualTokenProcessor.for_config(config, FEATURE_TOKENIZER)
    assert processor.layout == config.image_layout
    model = tiny_model(**seeing("codes_and_features", inside, TILES))
    tower = VisionTower.of_model(vision_model())
    wide = Image.fromarray(np.tile(np.linspace(0, 255, 90).astype(np.uint8), (33, 1)))  # darker on the left
    whole = torch.rand(3, 32, 32) * 2 - 1
    given = {"text": ["<image>What?", "<image><image>"], "images": [wide, red_and_clear(), whole]}
    given |= {"visual_tokenizer": MeanColours(), "vision_tower": None if inside else tower}
    inputs = processor(**given)
    sizes = [(33, 90), (50, 70), (32, 32)]
    orders = [TILES.order(size, 9) for size in sizes]
    assert len(inputs["feature_order"]) == sum(map(len, orders))
    assert set(inputs) == set(processor.model_input_names)
    assert model(**inputs).text_count == 0  # no targets, but the layout fits
    parts = [
        part for one in processor.documents(**given) for part in one.parts if isinstance(part, ImagePart)
    ]
    assert [part.size for part in parts] == sizes
    crops = [part.features for part in parts]
    if not inside:
        given["vision_tower"] = None
        documents = processor.documents(**given)
        crops = [part.features for one in documents for part in one.parts if isinstance(part, ImagePart)]
        for part, own, order in zip(parts, crops, orders, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(part.features, in_order(tower(own), order))
    assert [len(own) for own in crops] == [TILES.crops(size) for size in sizes]
    levels = crops[0][1:, 0, 16].flatten().int()  # of the wide one, on from tile to tile
    assert len(levels) == 64 and (levels.diff() >= 0).all() and levels[0] < 10 and levels[-1] > 245
    assert torch.equal(crops[2][0], to_bytes(whole[None])[0])


def test_codes_become_pictures(processor):
    codes = MeanColours().encode(torch.ones(1, 3, 32, 32))
    (picture,) = processor.pictures(codes, MeanColours())
    assert picture.size == (32, 32) and np.asarray(picture).min() == 255


AUTO_CLASSES = """
import pickle, sys
from dualtoken import DualTokenConfig, DualTokenForCausalLM, DualTokenProcessor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor
folder = pickle.load(sys.stdin.buffer)
loaders = (AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor)
print(*(type(loader.from_pretrained(folder)).__name__ for loader in loaders))
"""


def test_auto_classes_in_a_new_process(tmp_path, processor):
    tiny_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    names = run_code(AUTO_CLASSES, str(tmp_path)).decode().split()
    assert names == ["DualTokenConfig", *["DualTokenForCausalLM"] * 2, "DualTokenProcessor"]


def test_saved_and_loaded(tmp_path, processor):
    tiny_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for loaded in (DualTokenProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, DualTokenProcessor)
        assert (loaded.image_size, loaded.positions_per_image, loaded.num_quantizers) == (
            32,
            POSITIONS,
            DEPTH,
        )
        arguments = {"text": "a<image>b", "codes": [torch.full((POSITIONS, 2, DEPTH), CODES - 1)]}
        for name, value in processor(**arguments).items():
            assert torch.equal(torch.as_tensor(loaded(**arguments)[name]), torch.as_tensor(value)), name
        pixels = [p._pixels(red_and_clear(), 0) for p in (processor, loaded)]
        assert torch.equal(*pixels)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text": "<image>"}, "the text has 1 <image> tags but 0 images; give one image for each tag"),
        ({"text": "x", "codes": [random_codes()]}, "the text has 0 <image> tags but 1 images"),
        (
            {"text": ["<image>", "<image>"], "codes": [[random_codes()] * 2, []]},
            r"\[1, 1\] <image> tags but \[2, 0\]",
        ),
        (
            {"text": "<image>", "codes": [random_codes(positions=5)]},
            r"codes of image 0 have shape \(5, 2, 3\), expected \(4, 2, 3\)",
        ),
        ({"text": "x", "codes": [random_codes()], "images": [red_and_clear()]}, "both images and codes"),
        ({"text": "<image>", "images": [red_and_clear()]}, "images need visual_tokenizer=.* or pass codes"),
        (
            {"text": "<image>", "images": [torch.zeros(3, 40, 40)], "visual_tokenizer": MeanColours()},
            r"image 0 is a tensor of shape \(3, 40, 40\), expected \(3, 32, 32\) .* pass a PIL image",
        ),
        (
            {"text": "<image>", "images": ["cat.png"], "visual_tokenizer": MeanColours()},
            "image 0 is a str, expected a PIL image or a tensor; open files with PIL.Image.open",
        ),
        ({"codes": [random_codes()]}, "text is missing; for an image alone pass text='<image>'"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)
