"""Retrieval among pictures with several captions: Karpathy's files, shards, and recalls worked by hand."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from eval import inputs
from eval.metrics.recall import recall_at
from eval.visual_tokenizer import retrieval, retrieval_task
from eval.visual_tokenizer.batches import Share, build_decoder, read_batch
from tests.support.tiny_run import COLOURS, GERMAN, text_tokenizer
from tests.test_eval.visual_tokenizer.conftest import picture, write_shard

SENTENCES = [
    [COLOURS[index], f"{COLOURS[index]} {GERMAN[index % 4]}", GERMAN[index % 4]] for index in range(6)
]
SENTENCES[2] = SENTENCES[2][:1]  # not every picture has as many


@pytest.fixture
def karpathy(tmp_path):
    folder = tmp_path / "flickr"
    (folder / "Images").mkdir(parents=True)
    images = []
    for index, sentences in enumerate(SENTENCES):
        picture(index).save(folder / "Images" / f"{index}.png")
        rows = [{"raw": f" {text} ", "tokens": text.split()} for text in sentences]
        images.append({"filename": f"{index}.png", "split": "test", "sentences": rows})
    images.insert(0, {"filename": "unseen.png", "split": "train", "sentences": [{"raw": "red"}]})
    path = folder / "dataset_flickr8k.json"
    path.write_text(json.dumps({"dataset": "flickr8k", "images": images}), encoding="utf-8")
    return folder


def test_recalls_by_hand():
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.9, 0.1]])
    images = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    owners = [0, 0, 1, 1]
    to_image = recall_at(texts, images, owners, [0, 1], (1, 2))
    # Texts 0 and 3 are nearest to picture 1, text 1 to picture 0; text 2 is as near to both: the earlier.
    assert (to_image[1].recall, to_image[2].recall) == (0.5, 1.0)
    assert (to_image[1].chance, to_image[2].chance) == (0.5, 1.0)
    to_text = recall_at(images, texts, [0, 1], owners, (1, 2))
    assert (to_text[1].recall, to_text[2].recall) == (0.5, 1.0)
    # Two of four captions are right: two drawn miss both once in six times.
    assert to_text[2].chance == pytest.approx(1 - 1 / 6)
    with pytest.raises(ValueError, match="NaN or infinite"):
        recall_at(texts * torch.nan, images, owners, [0, 1], (1,))


def test_features_that_are_all_the_same_find_what_luck_finds():
    same = torch.ones(10, 4)
    found = recall_at(same, same, range(10), range(10), (1, 5))
    for k, share in ((1, 0.1), (5, 0.5)):
        assert found[k].recall == share == pytest.approx(found[k].chance)


def test_karpathys_test_split_both_ways(job, run, karpathy):
    job = replace(job, data=karpathy)
    result = retrieval_task.measure(job, run / "siglip" / "export")
    tokenizer = inputs.load_visual_tokenizer(job.visual_tokenizer)
    pictures = retrieval_task.open_captioned(karpathy, "en")
    assert [list(one.captions) for one in pictures.pictures] == SENTENCES
    images = read_batch(pictures, range(6), build_decoder(16, "center_crop"))
    image = F.normalize(tokenizer.encode_semantic(images), dim=-1)
    words = [text for texts in SENTENCES for text in texts]
    owners = torch.tensor([index for index, texts in enumerate(SENTENCES) for _ in texts])
    text = F.normalize(retrieval.text_features(tokenizer, text_tokenizer(), words), dim=-1)
    for k in (1, 5):
        nearest = (text @ image.T).topk(k).indices
        recall = (nearest == owners[:, None]).any(1).float().mean().item()
        assert result.figures[f"R@{k}, picture by caption, quantized"] == pytest.approx(100 * recall)
        nearest = owners[(image @ text.T).topk(k).indices]
        recall = (nearest == torch.arange(6)[:, None]).any(1).float().mean().item()
        assert result.figures[f"R@{k}, caption by picture, quantized"] == pytest.approx(100 * recall)
    assert len(result.figures) == 12
    assert result.chance == pytest.approx(100 / 6)
    assert result.settings["captions"] == 16 and result.count == 6
    assert result.settings["data_kind"] == "Karpathy's split 'test' of dataset_flickr8k.json"
    assert all((job.output / case.picture).is_file() for case in (*result.worst, *result.best))
    halves = [
        retrieval_task.measure(
            replace(job, output=job.output / "two", share=Share(rank, 3)), run / "siglip" / "export"
        )
        for rank in (2, 0, 1)
    ]
    assert halves[:2] == [None, None]  # the first of them had no batch
    assert halves[2].figures == result.figures


def test_shards_with_several_captions(job, run, tmp_path):
    samples = [(f"k{index}", {"txt": "\n".join(texts)}) for index, texts in enumerate(SENTENCES)]
    folder = write_shard(tmp_path / "shards" / "a.tar", samples)
    assert [list(one.captions) for one in retrieval_task.open_captioned(folder, "en").pictures] == SENTENCES
    result = retrieval_task.measure(replace(job, data=folder), run / "siglip" / "export")
    assert result.settings["data_kind"] == "WebDataset shards"
    assert 0 <= result.value <= 100


def test_a_trained_text_tower_does_not_stand_in_for_siglips(job, run, karpathy, tmp_path):
    tokenizer = inputs.load_visual_tokenizer(job.visual_tokenizer)
    text_tokenizer().save_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        for weight in tokenizer.backbone.text_model.parameters():
            weight.add_(torch.randn_like(weight))
    siglip = run / "siglip" / "export"
    found = retrieval_task.load_matchers(tokenizer, tmp_path / "tuned", siglip)
    tokens = found.tokens(["red", "blue"])
    first, second = (way.encode_texts(tokens) for way in found.ways.values())
    assert not torch.allclose(first, second)
    alone = retrieval_task.load_matchers(tokenizer, tmp_path / "tuned", None)
    assert list(alone.ways) == ["quantized"]
    untouched = inputs.load_visual_tokenizer(job.visual_tokenizer)
    ways = retrieval_task.load_matchers(untouched, job.visual_tokenizer, siglip).ways
    assert ways["quantized"].encode_texts == ways["continuous"].encode_texts


def test_files_that_do_not_fit_are_named(karpathy):
    path = karpathy / "dataset_flickr8k.json"
    (karpathy / "Images" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"dataset_flickr8k.json: no picture 3.png below"):
        retrieval_task.open_captioned(karpathy, "en")
    with pytest.raises(ValueError, match=r"has no pictures of the split 'val'"):
        retrieval_task.open_captioned(karpathy, "en", "val")
    path.write_text('{"images": [{"split": "test"}]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"is no file of Karpathy's splits \(KeyError: 'filename'\)"):
        retrieval_task.open_captioned(karpathy, "en")
    (karpathy / "dataset_coco.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 2 files dataset_\*.json"):
        retrieval_task.open_captioned(karpathy, "en")
