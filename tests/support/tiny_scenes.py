"""Scenes as a quickstart's unified model has them: in a tiny run, and in memory with codes of their own."""

import json
import random
from dataclasses import asdict

import numpy as np
import torch
from torchvision.transforms.v2.functional import pil_to_tensor
from webdataset import TarWriter

from data_pipeline.shards.code_shards import CodeSample, DatasetManifest, ShardWriter
from data_pipeline.sources.sample_data import SampleDataSummary
from data_pipeline.sources.scenes.captions import captions
from data_pipeline.sources.scenes.parts import KINDS, hold_out
from data_pipeline.sources.scenes.pictures import draw_scene
from data_pipeline.sources.scenes.write import held_out_scenes, scene_samples, training_scenes
from data_pipeline.streams import prepare_dataset
from data_pipeline.streams.views import image_parts
from eval.inputs import load_pictures, load_visual_tokenizer
from eval.scenes.samples import SceneSamples
from tests.support.tiny_run import make_tiny_run

LANGUAGES = ("en", "de", "es")
SETTINGS = {"held_out": 0.1, "seed": 0, "languages": list(LANGUAGES)}


def make_scene_run(folder, trained=8, held_out=6):
    """A tiny run whose codes are those of scenes, with what its sample data hold out."""
    make_tiny_run(folder)
    combinations = hold_out(SETTINGS["held_out"], SETTINGS["seed"])
    draw = random.Random(0)
    scenes = {
        "train": training_scenes(trained, combinations, draw),
        "val": held_out_scenes(combinations, draw)[:held_out],
    }
    tokenizer = load_visual_tokenizer(folder / "tokenizer" / "export")
    for split, chosen in scenes.items():
        images, codes = folder / "sample_data" / "images" / split / "scenes", folder / "codes" / split
        images.mkdir(parents=True)
        size = tokenizer.config.image_size
        with TarWriter(str(images / "shard-000000.tar"), encoder=False) as writer:
            for sample in scene_samples(chosen, f"scene-{split}", size, LANGUAGES, combinations, draw):
                writer.write(sample)
        prepare_dataset(images)
        write_scene_codes(codes, images, tokenizer)
    summary = SampleDataSummary(
        str(folder / "sample_data"), SETTINGS, {"train": 12, "val": 5}, {"train": 6, "val": 5}, {}, {},
        {split: len(chosen) for split, chosen in scenes.items()},
        {kind: [str(one) for one in sorted(combinations) if one.kind == kind] for kind in KINDS},
        {}, {}, 0, {}, "drawings by OpenMoji",
    )  # fmt: skip
    (folder / "sample_data" / "summary.json").write_text(json.dumps(asdict(summary)), encoding="utf-8")
    return folder


def write_scene_codes(folder, images, tokenizer):
    """Put the codes of a folder's pictures in place of those that were there."""
    shard, config = folder / "shard-000000.tar", tokenizer.config
    shard.unlink()
    manifest = DatasetManifest(
        tokenizer.fingerprint(),
        config.codebook_size,
        config.num_quantizers,
        config.positions,
        config.image_size,
    )
    pictures = load_pictures(images, config.image_size)
    codes = tokenizer.encode(pictures.images).numpy().astype("uint16")
    with ShardWriter(shard, manifest.geometry) as writer:
        for key, words, one in zip(pictures.keys, pictures.captions, codes, strict=True):
            writer.write(CodeSample(key, one[None], [{"image": 0}, {"text": words["en"]}], words))
    writer.entry.samples_in = writer.entry.samples
    manifest.add(shard.name, writer.entry)
    manifest.save(folder)


def scenes_in_memory(scenes, size=16, languages=LANGUAGES):
    """Scenes with their true pictures, one of the grammar's captions a language, and codes [1, 4, 2, 2].

    No two have the same codes: they count the scenes.
    """
    samples = [
        CodeSample(
            f"scene-{number}",
            np.full((1, 4, 2, 2), number, dtype="uint16"),
            [],
            {language: captions(scene, language)[0] for language in languages},
        )
        for number, scene in enumerate(scenes)
    ]
    pictures = torch.stack([pil_to_tensor(draw_scene(scene, size)) for scene in scenes]) / 255
    return SceneSamples(list(scenes), samples, pictures, [image_parts(sample)[0] for sample in samples])
