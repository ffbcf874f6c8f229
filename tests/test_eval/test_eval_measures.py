"""The measures on tiny real models and real shards: right numbers, right files, clear errors."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipModel

from data_pipeline.shards.code_shards import CodeSample
from data_pipeline.streams.views import image_parts
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval import inputs, likelihood
from eval.inputs import EvaluationPaths
from eval.visual_tokenizer import layers, reconstruction, retrieval
from tests.support.tiny_run import captions_of, make_tiny_run, text_tokenizer, write_codes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def paths(run, tmp_path):
    return EvaluationPaths.from_run(run, output=tmp_path)


def test_pictures_come_in_order_and_by_draw(paths):
    everything = inputs.load_pictures(paths.seen_images, 16)
    assert everything.keys == [f"picture{index:02d}" for index in range(12)]
    assert everything.captions[3] == captions_of(3)
    assert everything.images.shape == (12, 3, 16, 16)
    torch.testing.assert_close(everything.images[0, :, 8, 8], torch.tensor([1.0, -1.0, -1.0]))
    drawn = inputs.load_pictures(paths.seen_images, 16, 4, seed=1)
    assert len(drawn) == 4 and drawn.keys == sorted(drawn.keys)
    assert drawn.keys == inputs.load_pictures(paths.seen_images, 16, 4, seed=1).keys
    assert drawn.keys != inputs.load_pictures(paths.seen_images, 16, 4, seed=2).keys


def test_every_item_has_the_same_chance():
    counts = torch.zeros(10)
    for seed in range(600):
        counts[inputs.choose(range(10), 3, seed)] += 1
    assert counts.sum() == 1800
    assert ((counts - 180).abs() < 5 * math.sqrt(600 * 0.3 * 0.7)).all()


def test_reconstruction(paths):
    result = reconstruction.run(paths)
    written = json.loads((paths.output / "reconstruction.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result))
    assert result["pictures"] == 5 and len(result["per_picture"]) == 5
    assert [row["key"] for row in result["per_picture"]] == [f"picture{i}" for i in range(12, 17)]
    mean = sum(row["psnr"] for row in result["per_picture"]) / 5
    assert result["tokenizer"]["psnr"] == pytest.approx(mean)
    # The flat picture differs from the drawing in one pixel of 24 x 20 only.
    assert result["mean_colour"]["psnr"] > 20 > result["untrained"]["psnr"]
    for row in result["per_picture"]:
        with Image.open(paths.output / row["picture"]) as pair:
            assert pair.size == (32, 16)
    assert (paths.output / "reconstruction.png").is_file()
    depths = [(row["codebook"], row["depth"]) for row in result["codebooks"]["held_out"]]
    assert depths == [(name, depth) for name in ("pixel", "semantic") for depth in (1, 2, None)]


def test_reconstruction_is_what_the_tokenizer_decodes(paths):
    tokenizer = inputs.load_visual_tokenizer(paths.visual_tokenizer)
    pictures = inputs.load_pictures(paths.held_out_images, 16)
    found = reconstruction.reconstruct(tokenizer, pictures.images)
    with torch.no_grad():
        output = tokenizer(pictures.images)
    assert torch.equal(found.codes, output.codes)
    torch.testing.assert_close(found.images, output.reconstruction)
    perfect = reconstruction.score(pictures.images, pictures.images)
    assert perfect.summary() == {"psnr": pytest.approx(80.0), "ssim": pytest.approx(1.0), "mse": 0, "l1": 0}
    off = reconstruction.score(pictures.images + 0.5, pictures.images).summary()
    assert (off["mse"], off["l1"]) == (pytest.approx(0.25), pytest.approx(0.5))  # not clamped


def test_untrained_twin_is_another_model_and_leaves_the_seed_alone(paths):
    tokenizer = inputs.load_visual_tokenizer(paths.visual_tokenizer)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    twin = reconstruction.untrained_twin(tokenizer)
    assert torch.equal(torch.rand(1), expected)
    assert twin.fingerprint() != tokenizer.fingerprint()
    assert twin.fingerprint() == reconstruction.untrained_twin(tokenizer).fingerprint()


def test_retrieval(paths):
    result = retrieval.run(paths)
    assert set(result) == {"held_out", "seen"} and set(result["seen"]) == {"en", "de"}
    found = result["seen"]["en"]["quantized"]
    assert found["pictures"] == 5
    assert 0 <= found["text_to_image"] <= 1
    assert (paths.output / "retrieval.json").is_file()


def test_retrieval_text_features_are_siglips(paths):
    tokenizer = inputs.load_visual_tokenizer(paths.visual_tokenizer)
    siglip = SiglipModel.from_pretrained(paths.siglip).eval()
    words = text_tokenizer()
    found = retrieval.text_features(tokenizer, words, ["red", "blue"])
    tokens = words(["red", "blue"], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        expected = siglip.get_text_features(input_ids=tokens["input_ids"])
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(found, expected)


def test_equal_captions_are_equally_right():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    result = retrieval.both_directions(images, images, ["a", "a", "b"])
    assert (result["text_to_image"], result["image_to_text"]) == (1.0, 1.0)
    assert result["chance"] == pytest.approx(5 / 9)


def test_likelihood(paths):
    result = likelihood.run(paths)
    assert result["log_codebook_size"] == pytest.approx(math.log(32))
    assert result["training_images"] == 12
    held_out = result["splits"]["held_out"]
    assert held_out["documents"] == 5
    assert [(row["codebook"], row["depth"]) for row in held_out["visual"]] == [
        ("pixel", 1), ("pixel", 2), ("semantic", 1), ("semantic", 2),
    ]  # fmt: skip
    # An untrained model knows nothing: random codes cost about log K whatever the predictor.
    for row in held_out["visual"]:
        assert row["nll"] == pytest.approx(math.log(32), rel=0.25)
        assert row["unigram"] == pytest.approx(math.log(32), rel=0.25)
    assert set(held_out["captions"]) == {"en", "de"}
    assert held_out["captions"]["en"]["tokens"] == 5 * 2  # the word and the end


def test_likelihood_is_the_mean_over_documents_one_by_one(paths):
    model, words = inputs.load_unified_model(paths.model)
    samples = inputs.load_codes(paths.held_out_codes)
    images = [image_parts(sample)[0] for sample in samples]
    together = likelihood.measure_captions(model, words, samples, images)["en"]
    alone = [
        likelihood.measure_captions(model, words, [sample], [image])["en"]
        for sample, image in zip(samples, images, strict=True)
    ]
    for name in ("with_image", "image_removed"):
        mean = sum(row[name] * row["tokens"] for row in alone) / sum(row["tokens"] for row in alone)
        assert together[name] == pytest.approx(mean, rel=1e-5)
    assert together["with_image"] != together["image_removed"]
    # Alone, a sample's other picture is its own.
    assert alone[0]["other_image"] == alone[0]["with_image"]


def test_unigram_by_hand():
    def sample(codes):
        return CodeSample("k", np.array(codes, dtype="uint16").reshape(1, -1, 1, 1), [])

    codes = torch.tensor([[0, 1]]).view(1, 2, 1, 1)
    found = likelihood.unigram([sample([0, 0]), sample([0, 1])], codes, codebook_size=2)
    assert found.item() == pytest.approx(-(math.log(4 / 6) + math.log(2 / 6)) / 2)


def test_layers(paths):
    result = layers.run(paths)
    assert result["layers"] == [1, 2, 3, 4] and result["pictures"] == 5
    matrix = torch.tensor(result["matrix"])
    torch.testing.assert_close(matrix.diagonal(), torch.ones(4))
    assert result["read"] == {"reconstruction_layer": 1, "semantic_layer": 3}
    assert result == json.loads((paths.output / "layers.json").read_text(encoding="utf-8"))
    assert (paths.output / "layers.png").is_file()


def test_missing_models_are_named(paths, tmp_path):
    gone = EvaluationPaths.from_run(tmp_path / "nothing", output=tmp_path)
    with pytest.raises(FileNotFoundError, match="no visual tokenizer in .*dualtoken train quickstart_tok"):
        reconstruction.run(gone)
    with pytest.raises(FileNotFoundError, match="no unified model in .*dualtoken train quickstart_mllm"):
        likelihood.run(gone)


def test_codes_of_another_tokenizer_are_refused(run, paths, tmp_path):
    other = tmp_path / "codes"
    torch.manual_seed(5)
    tokenizer = DualTokenVisualTokenizer(preset_config("tiny"))
    write_codes(other, tokenizer, 0, 2)
    mixed = EvaluationPaths.from_run(run, output=tmp_path, held_out_codes=other)
    with pytest.raises(ValueError, match="codes of one mean nothing to the other"):
        likelihood.run(mixed)
