"""Pictures in tiles, from the file to the loss: what is kept of them by each kind, and who may read it."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipModel

from data_pipeline.errors import DatasetError
from data_pipeline.images.decoding import build_image_decoder
from data_pipeline.pretokenize.command import main, pretokenize
from data_pipeline.pretokenize.shard_tokenizer import Settings
from data_pipeline.shards.code_shards import DatasetManifest, check_sample, verify_dataset
from data_pipeline.streams.views import build_document
from dualtoken.unified_model.tiles import Tiles
from dualtoken.unified_model.vision_tower import VisionTower
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from tests.support.unified_support import tiny_model
from tests.test_data_pipeline.pretokenize.test_features import (
    KINDS,
    batches,
    model_reading,
    samples,
    whole_tower,
)
from tests.test_data_pipeline.pretokenize.test_pretokenize import SIZE, StandInTokenizer
from tests.test_data_pipeline.streams.test_streams import write_tar
from tests.test_dualtoken.unified_model.test_tiles import naive_order

GRIDS = "1x2,2x1,2x2"
TILES = Tiles([[1, 2], [2, 1], [2, 2]], SIZE)
SIZES = {"a.0": (20, 24), "b.0": (40, 18), "b.1": (12, 33), "c.0": (16, 16), "d.0": (50, 60)}


def noise(name: str) -> np.ndarray:
    return np.random.default_rng(list(SIZES).index(name)).integers(0, 256, (*SIZES[name], 3), dtype=np.uint8)


def write_inputs(folder: Path) -> None:
    """Captions, a document of two pictures of other sizes, a text, and a picture that is broken."""
    folder.mkdir()
    members = []
    for key in "abcde":
        for name in [name for name in SIZES if name.startswith(key)]:
            buffer = io.BytesIO()
            Image.fromarray(noise(name)).save(buffer, "PNG")
            members.append((f"{name}.png", buffer.getvalue()[: 90 if key == "c" else None]))
        record = {"captions": {"en": f"thing {key}"}}
        if key == "b":
            record = {"parts": [{"image": 0}, {"text": "and then"}, {"image": 1}, {"text": "at last"}]}
        if key == "e":
            record = {"parts": [{"text": "words alone"}]}
        members.append((f"{key}.json", json.dumps(record).encode()))
    write_tar(folder / "in-000.tar", members)


def run(
    folder: Path, kind: str, tiles: str = GRIDS, output: str = "", fit: str = "resize"
) -> DatasetManifest:
    tower = None if kind == "pixels" else VisionTower.of_model(whole_tower())
    settings = Settings(batch_size=3, features=kind, tiles=tiles)
    decoder = build_image_decoder(SIZE, "pil", fit=fit, tiles=settings.tiles_of(SIZE))
    where = folder / (output or kind)
    return pretokenize([str(folder / "in")], StandInTokenizer(), decoder, where, settings, vision_tower=tower)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    write_inputs(folder / "in")
    for kind in KINDS:
        run(folder, kind)
    run(folder, "pixels", tiles="", output="whole")
    run(folder, "pixels", tiles="2x2", output="other")
    return folder


def naive_crops(name: str) -> np.ndarray:
    """Base picture and tiles with PIL alone: [F, 3, S, S]."""
    picture, size = Image.fromarray(noise(name)), SIZES[name]
    rows, columns = TILES.grid(size)
    crops = [picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)]
    height, width = TILES.fitted(size)
    frame = Image.new("RGB", (columns * SIZE, rows * SIZE))
    place = (frame.width - width) // 2, (frame.height - height) // 2
    frame.paste(picture.resize((width, height), Image.Resampling.BICUBIC), place)
    for row in range(rows):
        for column in range(columns):
            left, top = column * SIZE, row * SIZE
            crops.append(frame.crop((left, top, left + SIZE, top + SIZE)))
    return np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_what_was_cut(folder: Path, kind: str) -> None:
    manifest = verify_dataset(folder / kind)
    assert (manifest.samples_out, manifest.rejected) == (4, 1) and manifest.features is not None
    assert manifest.features.tiles == TILES
    tower = VisionTower.of_model(whole_tower())
    kept, plain = samples(folder / kind), samples(folder / "whole")
    assert [sample.key for sample in kept] == ["a", "b", "d", "e"] and kept[3].sizes == []
    for sample, without in zip(kept, plain, strict=True):
        assert np.array_equal(sample.codes, without.codes) and without.sizes is None
        for image in range(len(sample.codes)):
            name = f"{sample.key}.{image}"
            assert sample.size_of(image) == SIZES[name]
            crops, found = naive_crops(name), torch.from_numpy(sample.features_of(image))
            assert np.array_equal(crops[0], without.features_of(image)) or kind != "pixels"
            if kind == "pixels":
                assert np.array_equal(found, crops)
                continue
            with torch.no_grad():
                made = tower(torch.from_numpy(crops))
            order = naive_order(SIZES[name], TILES, 2)
            expected = torch.stack([made[one] for one in order if one != "end"])
            found = found.view(torch.bfloat16) if kind == "bfloat16" else found
            exact = 2.0 ** -(8 if kind == "bfloat16" else 11)  # half a unit in the last place
            torch.testing.assert_close(found.float(), expected, rtol=exact, atol=1e-5)


@pytest.mark.parametrize("visual_input", ["features", "codes_and_features"])
def test_a_model_with_the_tower_and_one_without_lose_the_same(folder: Path, visual_input: str) -> None:
    """From shards through the stream, pictures of several sizes in a pack."""
    inside, brought = (model_reading(visual_input, tower, TILES) for tower in (True, False))
    weights = {n: t for n, t in inside.state_dict().items() if not n.startswith("vision_tower.")}
    brought.load_state_dict(weights)
    of_pixels = batches(folder / "pixels", inside, "document")
    for kind, tolerance in (("float16", 1e-3), ("bfloat16", 1e-2)):
        of_features = batches(folder / kind, brought, "document")
        assert len(of_features) == len(of_pixels) > 0
        for pixels, features in zip(of_pixels, of_features, strict=True):
            assert torch.equal(pixels.input_ids, features.input_ids)
            assert len(pixels.feature_order) == len(features.feature_order) > len(features.features)
            wrong = dict(features.model_inputs(), feature_order=features.feature_order.flip(0))
            with torch.no_grad():
                a, b = inside(**pixels.model_inputs()), brought(**features.model_inputs())
                c = brought(**wrong)  # the order matters
            assert a.text_count > 0
            torch.testing.assert_close(a.text_nll, b.text_nll, rtol=tolerance, atol=0.0)
            rounding, other = ((a.text_position_nll - x.text_position_nll).abs().max().item() for x in (b, c))
            assert other > 2 * rounding


def test_captions_come_with_the_size_of_their_picture(folder: Path) -> None:
    sample = next(sample for sample in samples(folder / "float16") if sample.key == "d")
    image = build_document(sample, "caption", random.Random(0)).parts[0]
    assert image.size == SIZES["d.0"] and np.array_equal(image.features.numpy(), sample.features_of(0))


def test_a_model_of_codes_alone_reads_the_same_shards(folder: Path) -> None:
    model = tiny_model()
    plain, kept = (batches(folder / name, model, "document") for name in ("whole", "float16"))
    assert all(batch.features is batch.feature_order is None for batch in kept)
    assert [b.input_ids.tolist() for b in plain] == [b.input_ids.tolist() for b in kept]


def test_shards_of_other_grids_are_refused(folder: Path) -> None:
    inside, plain = model_reading("features", True, TILES), model_reading("features", True)
    expected = "the model expects pixels 3 x 16 x 16 in tiles of 1x2,2x1,2x2; pretokenize with .* --tiles"
    with pytest.raises(DatasetError, match=f"has pixels 3 x 16 x 16 in tiles of 2x2 for .*, {expected}"):
        batches(folder / "other", inside, "document")
    with pytest.raises(DatasetError, match=f"has pixels 3 x 16 x 16 for continuous features, {expected}"):
        batches(folder / "whole", inside, "document")
    with pytest.raises(
        DatasetError, match="in tiles of 1x2,2x1,2x2 for .*, the model expects pixels 3 x 16 x "
    ):
        batches(folder / "pixels", plain, "document")
    run(folder, "pixels")  # finished: nothing to do
    with pytest.raises(
        DatasetError, match="in tiles of 1x2,2x1,2x2 for continuous features, the model expec"
    ):
        run(folder, "pixels", tiles="2x2")


def test_a_context_that_cannot_hold_a_picture_is_refused(folder: Path) -> None:
    model = model_reading("codes_and_features", True, TILES)
    message = "context_length is 33, but an image in tiles takes up to 34 tokens with its marks; set data.con"
    with pytest.raises(ValueError, match=message):
        batches(folder / "pixels", model, "document", context_length=33)
    with pytest.raises(DatasetError, match="the view generate takes one"):  # nor does it read any: it went on
        batches(folder / "pixels", model, "generate", context_length=33)


def test_the_central_square_in_tiles(folder: Path) -> None:
    run(folder, "pixels", output="crop", fit="crop")
    sample = samples(folder / "crop")[0]
    assert sample.sizes == [(20, 20)] and TILES.grid((20, 20)) == (2, 2)
    square = noise("a.0")[:, 2:22].mean()
    assert sample.features[1:].sum() / 3 / TILES.fitted((20, 20))[0] ** 2 == pytest.approx(square, rel=0.02)


def test_sizes_that_do_not_fit_are_refused(folder: Path) -> None:
    manifest = DatasetManifest.load(folder / "pixels")
    sample = samples(folder / "pixels")[1]
    check_sample(sample, manifest.geometry, manifest.features)
    for wrong in (
        replace(sample, sizes=None),
        replace(sample, sizes=sample.sizes[:1]),
        replace(sample, sizes=[(40, 40), (12, 33)]),  # would be cut into more
        replace(sample, feature_counts=[1, 7]),
    ):
        with pytest.raises(ValueError, match="expected a size of each of 2 images, and as many features as"):
            check_sample(wrong, manifest.geometry, manifest.features)
    with pytest.raises(
        ValueError, match=r"features are \(\(5, 3, 16, 16\), 'uint8'\), expected \(\(6, 3, 16, 16"
    ):
        check_sample(replace(sample, features=sample.features[1:]), manifest.geometry, manifest.features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tiles": "1x2"}, "tiles are '1x2' without features; expected one of --features float16, bfloat16"),
        ({"tiles": "1x2;2x2", "features": "pixels"}, "tiles '1x2;2x2'; expected rows x columns, such as 1x2"),
        ({"tiles": "1x2", "features": "pixels"}, "the decoder cuts None, the settings ask for Tiles"),
    ],
)
def test_options_that_do_not_go_together_are_named(folder: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder = build_image_decoder(SIZE, "pil")
        pretokenize([str(folder / "in")], StandInTokenizer(), decoder, folder / "no", Settings(**settings))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    config = preset_config("tiny")
    SiglipModel(config.backbone_config()).save_pretrained(tmp_path / "siglip")
    DualTokenVisualTokenizer(config).save_pretrained(tmp_path / "tokenizer")
    write_inputs(tmp_path / "in")
    words = ["--inputs", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--tiles", GRIDS]
    words += ["--visual-tokenizer", str(tmp_path / "tokenizer")]
    assert main(words) == 2 and "tiles are '1x2,2x1,2x2' without features" in capsys.readouterr().err
    words += ["--features", "float16", "--vision-tower", str(tmp_path / "siglip")]
    assert main([*words, "--backend", "dali"]) == 2 and "dali does not cut" in capsys.readouterr().err
    assert main(words) == 0 and "and in tiles" in capsys.readouterr().out
    features = verify_dataset(tmp_path / "out").features
    assert features is not None and features.tiles == Tiles([[1, 2], [2, 1], [2, 2]], config.image_size)
