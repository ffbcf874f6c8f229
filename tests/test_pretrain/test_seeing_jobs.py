"""Jobs of models that read continuous features, from pictures to exports, on two ranks under ZeRO-3."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from data_pipeline.pretokenize.command import main
from dualtoken.generation.generators import generate_text
from dualtoken.unified_model.vision_tower import VisionTower, name_in_siglip
from dualtoken.visual_tokenizer.backbone import load_backbone
from eval.inputs import load_unified_model, load_visual_tokenizer
from pretrain.config import load_job_config
from pretrain.mllm_task import MllmTask
from pretrain.runtime import Runtime
from tests.support.distributed import run_module
from tests.support.tiny_run import make_tiny_run, picture

DECODER = (
    "{model_type: qwen2, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 64}"
)
HEADS = "head_hidden_size: 24, head_num_layers: 1, head_num_attention_heads: 2"


def words_of(folder, run, kind, *words):
    blend = ", ".join(
        f"{{path: {folder / 'features' / kind}, view: {view}}}" for view in ("caption", "generate")
    )
    return [
        "job=mllm",
        f"run_dir={folder / run}",
        f"model.visual_tokenizer={folder / 'tokenizer' / 'export'}",
        f"data.blend=[{blend}]",
        "steps=2",
        "global_batch_size=4",
        "micro_batch_size=1",
        "deepspeed=zero3.json",
        "data.context_length=64",
        "data.contexts_held=2",
        "data.num_workers=0",
        "log_every=1",
        "wandb.mode=disabled",
        *words,
    ]


def new_model(folder, visual_input, *words):
    return [
        f"model.text_tokenizer={folder / 'siglip' / 'export'}",
        f"model.llm_config={DECODER}",
        f"model.heads={{{HEADS}, visual_input: {visual_input}}}",
        f"model.vision_tower={folder / 'siglip' / 'export'}",
        *words,
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One trains its tower, the next goes on from it with the tower frozen, a third reads what was stored."""
    folder = make_tiny_run(tmp_path_factory.mktemp("seeing"))
    source = [
        "--visual-tokenizer", str(folder / "tokenizer" / "export"), "--backend", "pil",
        "--inputs", str(folder / "sample_data" / "images" / "train" / "drawings"),
    ]  # fmt: skip
    tower = ["--vision-tower", str(folder / "siglip" / "export")]
    for kind, more in (("pixels", []), ("bfloat16", tower)):
        assert main([*source, "--output", str(folder / "features" / kind), "--features", kind, *more]) == 0
    rates = ["optimizer.lr=1e-3", "optimizer.lr_scales={'vision_tower.*': 0.01}", "precision=fp32"]
    first = words_of(folder, "first", "pixels", *new_model(folder, "codes_and_features", *rates))
    run_module("pretrain.train", first, 2).check()
    exported = folder / "first" / "export"
    start = [f"model.text_tokenizer={exported}", f"model.init_from={exported}"]
    second = words_of(folder, "second", "pixels", *start, "frozen=['vision_tower.*']", "precision=bf16")
    run_module("pretrain.train", second, 2).check()
    stored = new_model(folder, "features", "model.precomputed_features=true", "precision=fp32")
    run_module("pretrain.train", words_of(folder, "stored", "bfloat16", *stored), 2).check()
    return folder


def weights(folder, prefix="vision_tower."):
    found = load_file(folder / "export" / "model.safetensors")
    return {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}


def test_the_tower_learns_at_its_rate_and_stays_where_it_is_frozen(runs):
    whole = load_backbone(runs / "siglip" / "export").vision_model.state_dict()
    first, second = weights(runs / "first"), weights(runs / "second")
    changes = [(value - whole[name_in_siglip(name)]).abs().max().item() for name, value in first.items()]
    # Two steps of at most a hundredth of the rate each, by Adam.
    assert 0 < max(changes) < 2.1e-5
    assert all(torch.equal(first[name], value) for name, value in second.items())  # in bf16 too, to the bit
    adapters = [weights(runs / run, "feature_adapter.") for run in ("first", "second")]
    assert not torch.equal(adapters[0]["up.weight"], adapters[1]["up.weight"])
    assert not weights(runs / "stored")


def test_figures_count_pictures_whatever_stands_for_them(runs):
    for run in ("first", "stored"):
        lines = (runs / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [record for record in map(json.loads, lines) if record["split"] == "train"]
        assert len(steps) == 2
        for record in steps:  # captions and drawings alike are of one picture
            pictures = record["images_per_second"] * record["seconds_per_step"]
            assert pictures == pytest.approx(record["documents"]), run
        assert all(record["loss/text"] > 0 and record["loss/pixel"] > 0 for record in steps), run


def test_an_export_reads_pictures_by_its_processor(runs):
    tokenizer = load_visual_tokenizer(runs / "tokenizer" / "export")
    whole = load_backbone(runs / "siglip" / "export").vision_model
    for run, tower in (("second", None), ("stored", VisionTower.of_model(whole))):
        model, text_tokenizer = load_unified_model(runs / run / "export")
        processor = AutoProcessor.from_pretrained(runs / run / "export")
        assert processor.layout == model.config.image_layout
        inputs = processor(
            text=["<image> red <image>", "blue"], images=[picture(0), picture(1)],
            visual_tokenizer=tokenizer, vision_tower=tower,
        )  # fmt: skip
        assert len(inputs["features"]) == 2
        assert model(**inputs).text_count == 0  # no targets without labels, but the layout fits
        documents = processor.documents(
            "<image> English :", [picture(2)], None, tokenizer if tower is None else None, tower
        )
        assert len(generate_text(model, text_tokenizer, documents, max_new_tokens=2)) == 1


@pytest.mark.parametrize(
    ("visual_input", "words", "message"),
    [
        ("features", ["model.vision_tower=null"], "vision_tower=None with model.heads.visual_input=features"),
        ("both", [], "visual_input=both: expected a SigLIP for features, codes_and_features, pixel_and_"),
    ],
)
def test_what_does_not_go_together_is_named(runs, tmp_path, visual_input, words, message):
    given = new_model(runs, visual_input, "deepspeed=zero1.json", *words)
    config = load_job_config(words_of(runs, "unused", "pixels", *given), world_size=1)
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, 0, 4, tmp_path)
    with pytest.raises(ValueError, match=message):
        MllmTask(config, runtime)
