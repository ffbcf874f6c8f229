"""Zero-shot classification against open_clip's own classifier and against features put together by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import SiglipModel

from eval import inputs
from eval.visual_tokenizer import retrieval, zero_shot
from eval.visual_tokenizer.batches import build_decoder, read_batch
from eval.visual_tokenizer.class_names import class_names
from eval.visual_tokenizer.pictures import Picture, PictureSet, Place, open_pictures
from tests.support.tiny_run import text_tokenizer
from tests.test_eval.visual_tokenizer.conftest import write_shard

NAMES = ["black", "blue", "green", "orange", "red", "yellow"]


class StubModel:
    """A model with open_clip's interface: a vector for each token, summed."""

    def __init__(self):
        self.table = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def encode_text(self, tokens, normalize=False):
        features = self.table[tokens].sum(dim=1)
        return F.normalize(features, dim=-1) if normalize else features


def test_classifier_is_open_clips(monkeypatch):
    from open_clip import OPENAI_IMAGENET_TEMPLATES
    from open_clip.zero_shot_classifier import build_zero_shot_classifier_legacy

    model, words = StubModel(), text_tokenizer()

    def tokens(texts):
        return retrieval.text_tokens(words, texts, 16)

    expected = build_zero_shot_classifier_legacy(model, tokens, NAMES, OPENAI_IMAGENET_TEMPLATES)
    for at_a_time in (100, 400):
        monkeypatch.setattr(zero_shot, "TEXTS", at_a_time)
        found = zero_shot.build_classifier(model.encode_text, tokens, NAMES, OPENAI_IMAGENET_TEMPLATES)
        torch.testing.assert_close(found, expected.T)


def test_places_by_hand():
    classifier = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    places, first = zero_shot.places_of(
        torch.tensor([[2.0, 0.1], [1.0, 2.0], [0.0, 1.0]]), classifier, [0, 0, 2]
    )
    assert places.tolist() == [0, 2, 1]
    assert first.tolist() == [0, 2, 1]
    # A collapsed model is right where its one guess is.
    places, first = zero_shot.places_of(torch.ones(4, 2), torch.ones(4, 2), [0, 1, 2, 3])
    assert places.tolist() == [0, 1, 2, 3] and first.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="features that are NaN or infinite"):
        zero_shot.places_of(torch.full((1, 2), torch.nan), classifier, [0])


def test_figures_are_the_models(job, run):
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    result = zero_shot.measure(job, run / "siglip" / "export")
    tokenizer = inputs.load_visual_tokenizer(job.visual_tokenizer)
    siglip = SiglipModel.from_pretrained(run / "siglip" / "export").eval()
    texts = [template(name) for name in NAMES for template in OPENAI_IMAGENET_TEMPLATES]
    features = retrieval.text_features(tokenizer, text_tokenizer(), texts)
    classifier = F.normalize(F.normalize(features, dim=-1).view(6, 80, -1).mean(1), dim=-1)
    pictures = open_pictures(job.data)
    images = read_batch(pictures, range(11), build_decoder(16, "center_crop"))
    labels = torch.tensor([one.label for one in pictures.pictures])
    with torch.no_grad():
        vectors = {
            "quantized": tokenizer.encode_semantic(images),
            "continuous": siglip.vision_model(pixel_values=images).pooler_output,
        }
    for way, vector in vectors.items():
        best = (F.normalize(vector, dim=-1) @ classifier.T).topk(5).indices
        hits = (best == labels[:, None]).float()
        assert result.figures[f"top-1, {way}"] == pytest.approx(100 * hits[:, 0].mean().item())
        assert result.figures[f"top-5, {way}"] == pytest.approx(100 * hits.sum(1).mean().item())
    assert result.value == result.figures["top-1, quantized"]
    assert result.chance == pytest.approx(100 / 6)
    rows = result.tables["Classes"]
    assert [row["class"] for row in rows] == NAMES and sum(row["pictures"] for row in rows) == 11
    weighted = sum(row["pictures"] * row["top-1, quantized"] for row in rows) / 11
    assert weighted == pytest.approx(result.value)
    assert all((job.output / case.picture).is_file() for case in (*result.worst, *result.best))
    assert len(result.worst) + len(result.best) > 0
    assert result.settings["templates"] == "open_clip's 80 for ImageNet"


def test_models_that_cannot_read_are_refused(job, run, tmp_path):
    with pytest.raises(ValueError, match=r"holds no text tokenizer; name the SigLIP it was built on"):
        zero_shot.measure(job)
    tokenizer = inputs.load_visual_tokenizer(job.visual_tokenizer)
    tokenizer.config.text_config = None
    with pytest.raises(ValueError, match=r"has no text tower \(text_config is null\)"):
        zero_shot.load_matchers(tokenizer, job.visual_tokenizer, run / "siglip" / "export")


def numbered(folder, count):
    names = tuple(f"n{index:08d}" for index in range(count))
    return PictureSet(folder, "", [Picture("k", Place(folder), label=count - 1)], names)


def test_names_come_from_the_data(classes, tmp_path):
    from open_clip import IMAGENET_CLASSNAMES

    assert class_names(open_pictures(classes), None) == NAMES
    assert class_names(numbered(tmp_path, 1000), None) == list(IMAGENET_CLASSNAMES)
    shards = open_pictures(write_shard(tmp_path / "s" / "a.tar", [("k", {"cls": "1"})])).with_labels()
    with pytest.raises(ValueError, match=r"has classes by number and no classnames.txt; give a text file"):
        class_names(shards, None)
    (tmp_path / "s" / "classnames.txt").write_text("cat\ndog\nfish\n", encoding="utf-8")
    assert class_names(shards, None) == ["cat", "dog", "fish"]


def test_names_that_do_not_fit_are_refused(classes, tmp_path):
    pictures, names = open_pictures(classes), tmp_path / "names.txt"
    with pytest.raises(
        ValueError, match=r"2 folders with ImageNet's numbers \(n00000000\); expected all 1000"
    ):
        class_names(numbered(tmp_path, 2), None)
    with pytest.raises(ValueError, match=r"no class names at .*names.txt; expected a text file"):
        class_names(pictures, names)
    names.write_text("a\n\nb\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"names.txt, line 2: no class name"):
        class_names(pictures, names)
    with pytest.raises(ValueError, match=r"imagenet has 1000 class names; .* has 6 classes"):
        class_names(pictures, "imagenet")


def test_two_shares_are_the_whole(job, run):
    from dataclasses import replace

    from eval.visual_tokenizer.batches import Share

    siglip = run / "siglip" / "export"
    alone = zero_shot.measure(job, siglip)
    halves = [
        zero_shot.measure(replace(job, output=job.output / "two", share=Share(rank, 2)), siglip)
        for rank in (1, 0)
    ]
    assert halves[0] is None
    assert halves[1].figures == alone.figures and halves[1].tables == alone.tables
    assert np.isfinite(alone.value)
