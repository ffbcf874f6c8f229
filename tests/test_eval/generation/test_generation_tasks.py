"""The tasks from files to results, with tiny real models: drawn, scored by what is given."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from eval.benchmark_files import BenchmarkError
from eval.generation.clip_score import ClipScorer
from eval.generation.drawing import DrawingSettings
from eval.generation.tasks import Scorers, measure_clip_score, measure_frechet, measure_prompts
from eval.metrics.frechet import FeatureStatistics, frechet_distance
from eval.metrics.siglip_features import load_siglip_features
from tests.support.tiny_run import COLOURS, text_tokenizer


@pytest.fixture(scope="module")
def siglip(run):
    return ClipScorer(run / "siglip" / "export")


@pytest.fixture(scope="module")
def extractor(run):
    return load_siglip_features(run / "siglip" / "export")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def noise(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_clip_scores_are_the_models(run, siglip):
    pictures = [Image.new("RGB", (16, 16), colour) for colour in COLOURS[:3]]
    found = siglip.score(pictures, COLOURS[:3])
    words = text_tokenizer()
    length = siglip.model.config.text_config.max_position_embeddings
    tokens = words(COLOURS[:3], padding="max_length", max_length=length, return_tensors="pt")
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 127.5 - 1 for one in pictures])
    with torch.no_grad():
        output = siglip.model(input_ids=tokens["input_ids"], pixel_values=pixels)
    expected = 100 * (output.image_embeds * output.text_embeds).sum(dim=1).clamp(min=0)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-3)
    assert siglip.name == "CLIP score by SigLIP"


def test_clip_reads_no_padding(tmp_path):
    torch.manual_seed(0)
    words = text_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(words),
        "max_position_embeddings": 8,
        "eos_token_id": words.eos_token_id,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    scorer = ClipScorer(tmp_path)
    assert scorer.name == "CLIP score"
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    together = scorer.score([noisy, noisy], ["red", "red green blue"])
    assert together[0] == pytest.approx(scorer.score([noisy], ["red"])[0], abs=1e-3)


def test_models_that_are_no_clip_are_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no CLIP in .*openai/clip-vit-large.*nothing is downloaded"):
        ClipScorer(tmp_path)
    with pytest.raises(
        ValueError, match="mllm/export holds a 'dualtoken.*' model: expected a folder of a CLIP"
    ):
        ClipScorer(run / "mllm" / "export")


def test_geneval_from_prompts_to_score(artist, siglip, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"tag": "colors", "include": [], "prompt": colour} for colour in COLOURS[:3]]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "evaluation_metadata.jsonl").write_text(lines, encoding="utf-8")
    settings = DrawingSettings(per_prompt=2)
    drawn = measure_prompts("geneval", data, tmp_path / "out", Scorers(), artist, settings)
    assert (drawn.headline, drawn.value, drawn.count, drawn.worst) == ("overall", None, 6, ())
    assert drawn.files == ["geneval/pictures"] and "evaluate_images.py" in drawn.notes[0]
    assert drawn.settings["guidance_scale"] == 3.0 and drawn.settings["model"] == artist.settings["model"]
    judged = tmp_path / "results.jsonl"
    results = [
        {"filename": f"p/{index:05d}/samples/{sample:04d}.png", "tag": tag, "correct": sample == 0}
        for index, tag in enumerate(
            ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
        )
        for sample in range(2)
    ]
    judged.write_text("".join(json.dumps(row) + "\n" for row in results), encoding="utf-8")
    # Without the model now: the pictures are there.
    scorers = Scorers(judged=judged, clip=siglip)
    found = measure_prompts("geneval", data, tmp_path / "out", scorers, settings=settings)
    assert (found.headline, found.value, found.unit) == ("overall", 50.0, "%")
    assert found.notes == [
        "the judge's file has 12 pictures, 6 of the 6 that are here: the figures are of those in the file"
    ]
    assert set(found.figures) >= {"overall", "CLIP score by SigLIP"}
    assert [case.score for case in found.worst] == [0, 0, 0] and [case.score for case in found.best] == [
        1,
        1,
        1,
    ]
    assert found.worst[0].lines[1] == "judge: not correct" and found.worst[0].lines[0].startswith("prompt: ")
    assert (tmp_path / "out" / found.worst[0].picture).is_file()
    assert found.settings["seed"] == 0 and found.settings["judged"] == str(judged)
    json.dumps(found.as_json())


def test_genai_bench_scores_pictures_of_others(tmp_path):
    write_json(tmp_path / "genai_image.json", {f"{index:05d}": {"prompt": "red"} for index in (1, 2, 3)})
    write_json(tmp_path / "genai_skills.json", {"basic": [1], "advanced": [2, 3]})
    write_json(tmp_path / "scores.json", [0.9, 0.2, 0.4])
    pictures = tmp_path / "theirs"
    for index in (1, 2):
        noise(pictures / f"{index:05d}.jpg", index)
    scorers = Scorers(judged=tmp_path / "scores.json")
    with pytest.raises(
        BenchmarkError, match="1 of 3 pictures are missing, such as .*theirs/00003.jpg; give a"
    ):
        measure_prompts("genai_bench", tmp_path, tmp_path / "out", scorers, pictures=pictures)
    noise(pictures / "00003.jpg", 3)
    found = measure_prompts("genai_bench", tmp_path, tmp_path / "out", scorers, pictures=pictures)
    assert found.value == pytest.approx(0.3) and found.figures["VQAScore, basic"] == pytest.approx(0.9)
    assert [case.score for case in found.worst] == [0.2, 0.4] and [case.score for case in found.best] == [0.9]
    assert found.settings["pictures"] == str(pictures) and found.files == [] and found.notes == []


def test_mjhq_is_compared_by_category(artist, extractor, siglip, tmp_path):
    names = [("food", "a1"), ("food", "a2"), ("people", "b1"), ("people", "b2")]
    rows = {name: {"category": category, "prompt": "red"} for category, name in names}
    write_json(tmp_path / "meta_data.json", rows)
    for seed, (category, name) in enumerate(names):
        noise(tmp_path / "mjhq30k_imgs" / category / f"{name}.jpg", seed)
    scorers = Scorers(extractor=extractor, clip=siglip)
    found = measure_prompts("mjhq", tmp_path, tmp_path / "out", scorers, artist)
    assert found.headline == extractor.name and not found.higher_is_better and found.value > 0
    table = found.tables[f"{extractor.name} by category"]
    assert [(row["category"], row["pictures"], row["references"]) for row in table] == [
        ("food", 2, 2), ("people", 2, 2),
    ]  # fmt: skip
    drawn = tmp_path / "out" / "mjhq" / "pictures"
    for category, row in zip(("food", "people"), table, strict=True):
        parts = []
        for folder in (drawn, tmp_path / "mjhq30k_imgs"):
            parts.append(FeatureStatistics(extractor.dim))
            paths = sorted((folder / category).glob("*.jpg"))
            parts[-1].update(extractor([np.asarray(Image.open(path)) for path in paths]))
        assert row[extractor.name] == pytest.approx(frechet_distance(*parts), rel=1e-6)
    assert "4 pictures for 32 channels" in found.notes[0]
    assert [row["category"] for row in found.tables["CLIP score by SigLIP by category"]] == ["food", "people"]
    (drawn / "food" / "a1.jpg").write_bytes(b"no picture")
    with pytest.raises(BenchmarkError, match="food/a1.jpg cannot be decoded.*is the file whole"):
        measure_prompts("mjhq", tmp_path, tmp_path / "out", scorers)


def test_drawing_waits_for_other_ranks_and_gives_a_clip_score(artist, siglip, tmp_path):
    (tmp_path / "prompts.txt").write_text("red\ngreen\nblue\n", encoding="utf-8")
    output, scorers = tmp_path / "out", Scorers(clip=siglip)
    ask = {"artist": artist, "world_size": 2}
    assert measure_prompts("drawing", tmp_path, output, scorers, rank=1, **ask) is None
    found = measure_prompts("drawing", tmp_path, output, scorers, rank=0, **ask)
    assert found.headline == "CLIP score by SigLIP" and 0 <= found.value <= 100
    again = measure_clip_score(output / "drawing", output, siglip)
    assert again.value == pytest.approx(found.value, abs=1e-3) and again.count == 3
    fewer = measure_prompts("drawing", tmp_path, output, scorers, artist, count=2)
    assert fewer.count == 2


def test_a_judge_for_a_task_that_has_none(artist, tmp_path):
    (tmp_path / "prompts.txt").write_text("red\n", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="only geneval and genai_bench have judges' files"):
        measure_prompts("drawing", tmp_path, tmp_path / "out", Scorers(judged=tmp_path / "x"), artist)


def test_two_folders(extractor, tmp_path):
    for seed in range(4):
        noise(tmp_path / "one" / f"{seed}.png", seed)
        noise(tmp_path / "two" / "below" / f"{seed}.jpg", seed + 4)
        noise(tmp_path / "three" / f"{3 - seed}.png", seed)
    (tmp_path / "one" / ".hidden.png").touch()
    apart = measure_frechet(tmp_path / "one", tmp_path / "two", extractor)
    assert apart.value > 0 and apart.count == 4 and apart.settings["compared_with"] == 4 and not apart.tables
    same = measure_frechet(tmp_path / "one", tmp_path / "three", extractor)
    assert same.value == pytest.approx(0, abs=1e-4 * apart.value)
    with pytest.raises(BenchmarkError, match="none; expected one of pictures"):
        measure_frechet(tmp_path / "one", tmp_path / "none", extractor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BenchmarkError, match="empty has no pictures; expected bmp, jpeg"):
        measure_frechet(tmp_path / "empty", tmp_path / "one", extractor)
