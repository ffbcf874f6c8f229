"""What pretokenize keeps for continuous features: the same, from picture to loss, by each of its kinds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SiglipModel, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from data_pipeline.errors import DatasetError
from data_pipeline.images.decoding import build_image_decoder
from data_pipeline.pretokenize.command import main, pretokenize
from data_pipeline.pretokenize.shard_tokenizer import Settings
from data_pipeline.shards.code_shards import (
    CodeGeometry,
    DatasetManifest,
    expected_features,
    iterate_shard,
    verify_dataset,
)
from data_pipeline.streams import BlendEntry, DocumentStreamConfig, document_loader
from dualtoken.unified_model.config import feature_fields
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.tiles import Tiles
from dualtoken.unified_model.vision_tower import VisionTower
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from tests.support.unified_support import FEATURE_IDS, FEATURE_TOKENIZER, tiny_config, tiny_model
from tests.test_data_pipeline.pretokenize.test_pretokenize import (
    SIZE,
    StandInTokenizer,
    picture,
    write_inputs,
)

KINDS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "pixels": torch.uint8}


def whole_tower(seed: int = 3, size: int = SIZE) -> SiglipVisionModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SiglipVisionModel._from_config(SiglipVisionConfig(**sizes, image_size=size, patch_size=8)).eval()


def run(folder: Path, kind: str, tower: VisionTower | None = None, **settings: object) -> DatasetManifest:
    if tower is None and kind in ("float16", "bfloat16"):
        tower = VisionTower.of_model(whole_tower())
    return pretokenize(
        [str(folder / "in")],
        StandInTokenizer(),
        build_image_decoder(SIZE, "pil"),
        folder / kind,
        Settings(batch_size=5, features=kind, **settings),
        vision_tower=tower,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with pictures, some of them broken, and what is made of them by each kind, and by none."""
    folder = tmp_path_factory.mktemp("features")
    write_inputs(folder / "in", shards=2)
    for kind in ("none", *KINDS):
        run(folder, kind)
    return folder


def samples(folder: Path) -> list:
    return [sample for path in sorted(folder.glob("*.tar")) for sample in iterate_shard(path)]


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_the_sample_and_codes_stay_the_same(folder: Path, kind: str) -> None:
    verify_dataset(folder / kind)
    plain, kept = samples(folder / "none"), samples(folder / kind)
    assert [sample.key for sample in plain] == [sample.key for sample in kept] and len(plain) > 10
    decoder = build_image_decoder(SIZE, "pil")
    tower = VisionTower.of_model(whole_tower())
    for before, sample in zip(plain, kept, strict=True):
        assert before.features is None and np.array_equal(before.codes, sample.codes)
        decoded = decoder([picture(int(sample.key[1:]))]).images
        found = torch.from_numpy(sample.features)
        if kind == "pixels":
            assert torch.equal(found.float() / 127.5 - 1, decoded)
            continue
        with torch.no_grad():
            expected = tower(decoded)
        found = found.view(torch.bfloat16) if kind == "bfloat16" else found
        exact = 2.0 ** -(8 if kind == "bfloat16" else 11)  # half a unit in the last place
        torch.testing.assert_close(found.float(), expected, rtol=exact, atol=1e-5)


def model_reading(visual_input: str, inside: bool, tiles: Tiles | None = None) -> DualTokenForCausalLM:
    fields = {"visual_input": visual_input, "special_tokens": vars(FEATURE_IDS), "image_size": SIZE}
    fields |= {"tiles": [list(grid) for grid in tiles.grids] if tiles else [], "codebook_size": 50}
    fields |= feature_fields(VisionTower.of_model(whole_tower()), inside)
    torch.manual_seed(0)
    model = DualTokenForCausalLM._from_config(tiny_config(initializer_range=0.3, **fields))
    model.set_codebooks(torch.randn(2, 1, 50, 8, generator=torch.Generator().manual_seed(1)))
    if inside:
        model.set_vision_tower(whole_tower())
    return model.eval()


def batches(folder: Path, model, view: str, context_length: int = 128) -> list:
    settings = DocumentStreamConfig([BlendEntry(str(folder), view)], context_length, contexts_held=2)
    loader = document_loader(
        settings,
        FEATURE_TOKENIZER,
        CodeGeometry(4, 3, 50),
        split="val",
        layout=model.config.image_layout,
        features=expected_features(model.config),
    )
    return list(loader)


@pytest.mark.parametrize("view", ["caption", "document"])
@pytest.mark.parametrize("visual_input", ["features", "codes_and_features"])
def test_a_model_with_the_tower_and_one_without_lose_the_same(folder: Path, visual_input: str, view: str):
    """From shards through the stream: pixels to a tower in the model, and its features computed before."""
    inside, brought = (model_reading(visual_input, tower) for tower in (True, False))
    weights = {n: t for n, t in inside.state_dict().items() if not n.startswith("vision_tower.")}
    brought.load_state_dict(weights)
    of_pixels = batches(folder / "pixels", inside, view)
    for kind, tolerance in (("float16", 1e-3), ("bfloat16", 1e-2)):
        of_features = batches(folder / kind, brought, view)
        assert len(of_features) == len(of_pixels) > 2
        for pixels, features in zip(of_pixels, of_features, strict=True):
            assert pixels.features.dtype == torch.uint8 and features.features.dtype == KINDS[kind]
            assert torch.equal(pixels.input_ids, features.input_ids)
            assert torch.equal(pixels.codes, features.codes)
            with torch.no_grad():
                a, b = inside(**pixels.model_inputs()), brought(**features.model_inputs())
            assert a.text_count > 0
            torch.testing.assert_close(a.text_nll, b.text_nll, rtol=tolerance, atol=0.0)
            wrong = dict(features.model_inputs(), features=features.features.flip(0) + 1)
            with torch.no_grad():  # the features matter
                c = brought(**wrong)
            rounding, other = ((a.text_position_nll - x.text_position_nll).abs().max().item() for x in (b, c))
            assert other > 5 * rounding


def test_a_model_of_codes_alone_reads_the_same_shards(folder: Path) -> None:
    model = tiny_model()
    plain, kept = batches(folder / "none", model, "caption"), batches(folder / "float16", model, "caption")
    assert all(batch.features is None for batch in kept)
    assert [b.input_ids.tolist() for b in plain] == [b.input_ids.tolist() for b in kept]


def test_a_finished_data_set_of_other_features_is_refused(folder: Path) -> None:
    run(folder, "float16")  # finished: nothing to do
    with pytest.raises(DatasetError, match="features 4 x 16 of the vision tower"):
        run(folder, "float16", VisionTower.of_model(whole_tower(seed=4)))
    with pytest.raises(DatasetError, match="features 4 x 16 of the vision tower"):
        run(folder, "float16", VisionTower.of_model(whole_tower(), layer=1))
    with pytest.raises(DatasetError, match="features"):
        brought = model_reading("features", inside=False)
        batches(folder / "pixels", brought, "caption")


@pytest.mark.parametrize(
    ("kind", "tower", "message"),
    [
        (
            "float16",
            False,
            "features are 'float16' without a vision tower; expected --vision-tower",
        ),
        (
            "pixels",
            True,
            "features are 'pixels' with a vision tower; expected --vision-tower with",
        ),
        ("float8", True, "features are 'float8', expected none, float16, bfloat16, pixels"),
    ],
)
def test_options_that_do_not_go_together_are_named(tmp_path: Path, kind: str, tower: bool, message: str):
    given = VisionTower.of_model(whole_tower()) if tower else None
    write_inputs(tmp_path / "in", shards=1, samples=2)
    with pytest.raises(ValueError, match=message):
        pretokenize(
            [str(tmp_path / "in")], StandInTokenizer(), build_image_decoder(SIZE, "pil"), tmp_path / "out",
            Settings(features=kind), vision_tower=given,
        )  # fmt: skip


def test_the_tower_has_to_read_the_size_of_the_tokenizer(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", shards=1, samples=2)
    with pytest.raises(ValueError, match="reads images of 32 pixels a side, the visual tokenizer of 16; e"):
        run(tmp_path, "float16", VisionTower.of_model(whole_tower(size=32)))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With real models from their folders, the layer given."""
    torch.manual_seed(0)
    config = preset_config("tiny")
    siglip = SiglipModel(config.backbone_config())
    siglip.save_pretrained(tmp_path / "siglip")
    DualTokenVisualTokenizer(config).save_pretrained(tmp_path / "tokenizer")
    write_inputs(tmp_path / "in", shards=1, samples=4)
    words = ["--inputs", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--backend", "pil"]
    words += ["--visual-tokenizer", str(tmp_path / "tokenizer"), "--features", "bfloat16"]
    assert main(words) == 2 and "without a vision tower" in capsys.readouterr().err
    assert main([*words, "--vision-tower", str(tmp_path / "siglip"), "--feature-layer", "1"]) == 0
    features = verify_dataset(tmp_path / "out").features
    tower = VisionTower.of_model(siglip.vision_model, 1)
    assert features is not None and features.fingerprint == tower.fingerprint()
