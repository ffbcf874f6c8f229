"""Jobs of models that read continuous features, from pictures to exports: UniToken's stages one by one."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from data_pipeline.pretokenize.command import main
from data_pipeline.shards.code_shards import CodeGeometry, expected_features
from data_pipeline.streams import document_loader
from dualtoken.generation.generators import generate_text
from dualtoken.unified_model.sequence import ImageLayout
from dualtoken.unified_model.vision_tower import VisionTower, name_in_siglip
from dualtoken.visual_tokenizer.backbone import load_backbone
from eval.inputs import load_unified_model, load_visual_tokenizer
from pretrain.config import load_job_config
from pretrain.job_budget import expected_pack
from pretrain.mllm_task import MllmTask
from pretrain.optim import freeze_parameters
from pretrain.runtime import Runtime
from pretrain.tower_collapse import effective_rank, mean_cosine
from tests.support.distributed import run_module
from tests.support.tiny_run import make_tiny_run, picture
from tests.test_pretrain.test_config import missing_words

ROOT = Path(__file__).resolve().parents[2]
DECODER = (
    "{model_type: qwen2, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 64}"
)
TILES, GRIDS = "[[1,2],[2,1]]", "1x2,2x1"
HEADS = "head_hidden_size: 24, head_num_layers: 1, head_num_attention_heads: 2"


# Parts that the stages train, and what each learns from (docs/unitoken.md).
SEEING = {"feature_adapter", "vision_tower", "visual_embedder"}
WRITERS = {"pixel_projector", "semantic_projector", "pixel_head", "semantic_head"}
TRAINED = {
    "unitoken_stage1": SEEING,
    "unitoken_stage2": {"llm"} | SEEING | WRITERS,
    "unitoken_stage3": {"llm"} | SEEING | WRITERS,
}


def words_of(folder, run, kind, *words):
    """Settings of a run on two pictures a pack; `run` also of the recipe, or of no recipe."""
    codes = folder / "features" / kind
    views = {"unitoken_stage1": ["caption"]}.get(run, ["document", "generate"])
    start = [f"recipe={run}"] if run in TRAINED else ["job=mllm"]
    if run in TRAINED:
        words = [
            f"data.blend.{place}.path={codes}" for place in range(len(views))
        ] + [
            *(f"validation_data.blend.{place}.path={codes}" for place in range(len(views))),
            "validation_data.context_length=64", *words,
        ]  # fmt: skip
    else:
        blend = ", ".join(f"{{path: {codes}, view: {view}}}" for view in ("caption", "generate"))
        words = [f"data.blend=[{blend}]", *words]
    return [
        *start,
        f"run_dir={folder / run}",
        f"model.visual_tokenizer={folder / 'tokenizer' / 'export'}",
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
        "model.llm=null",
        f"model.llm_config={DECODER}",
        f"model.heads={{{HEADS}, visual_input: {visual_input}}}",
        f"model.vision_tower={folder / 'siglip' / 'export'}",
        *words,
    ]


def stage_after(folder, before):
    exported = folder / before / "export"
    return [f"model.text_tokenizer={exported}", f"model.init_from={exported}"]


def test_the_table_of_stages_is_true():
    lines = (ROOT / "docs" / "unitoken.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in TRAINED}
    assert table.keys() == TRAINED.keys()
    for recipe, (parts, views, rate, of_tower, documents, packs) in table.items():
        config = load_job_config([f"recipe={recipe}", *missing_words(recipe)], world_size=1)
        assert set(parts.replace("`", "").split()) == TRAINED[recipe], recipe
        assert set(views.split(", ")) == {entry.view for entry in config.data.blend}, recipe
        optimizer = config.optimizer
        assert float(rate) == optimizer.lr, recipe
        assert float(of_tower) == pytest.approx(optimizer.lr * optimizer.lr_scales["vision_tower.*"]), recipe
        assert packs == f"{config.global_batch_size} x {config.data.context_length}", recipe
        shared = (optimizer.betas, optimizer.weight_decay, optimizer.warmup_ratio, optimizer.schedule)
        assert shared == ([0.9, 0.95], 0.1, 0.01, "cosine"), recipe
        assert (config.gradient_clipping, config.losses.z_loss, config.deepspeed) == (4, 1e-5, "zero3.json")
        # As many documents as the table says, of 64 tokens of text beside a picture.
        pack = expected_pack(config.data, ImageLayout(features=729), 729, 64, 512)
        assert pack.documents * config.global_batch_size == pytest.approx(int(documents), rel=0.02), recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """UniToken's stages, the last with its tower frozen, and a model that reads what was stored, in tiles.

    Stage I is started on two ranks and goes on on one.
    """
    folder = make_tiny_run(tmp_path_factory.mktemp("seeing"))
    source = [
        "--visual-tokenizer", str(folder / "tokenizer" / "export"), "--backend", "pil",
        "--inputs", str(folder / "sample_data" / "images" / "train" / "drawings"),
    ]  # fmt: skip
    tower = ["--vision-tower", str(folder / "siglip" / "export")]
    for kind, more in (("pixels", []), ("bfloat16", [*tower, "--tiles", GRIDS])):
        assert main([*source, "--output", str(folder / "features" / kind), "--features", kind, *more]) == 0
    first = new_model(folder, "codes_and_features", "precision=fp32", "validate_every=1")
    words = words_of(folder, "unitoken_stage1", "pixels", *first)
    outputs = [
        run_module("pretrain.train", [*words, f"steps={steps}"], ranks).check().output
        for steps, ranks in ((1, 2), (2, 1))
    ]
    (folder / "stage1.txt").write_text("\n".join(outputs), encoding="utf-8")
    second = [*stage_after(folder, "unitoken_stage1"), "precision=fp32"]
    run_module("pretrain.train", words_of(folder, "unitoken_stage2", "pixels", *second), 1).check()
    third = [*stage_after(folder, "unitoken_stage2"), "frozen=['vision_tower.*']", "precision=bf16"]
    run_module("pretrain.train", words_of(folder, "unitoken_stage3", "pixels", *third), 2).check()
    stored = new_model(
        folder, "features", "model.precomputed_features=true", f"model.heads.tiles={TILES}", "precision=fp32",
        "data.context_length=128",
    )  # fmt: skip
    run_module("pretrain.train", words_of(folder, "stored", "bfloat16", *stored), 2).check()
    return folder


def weights(folder, prefix="vision_tower."):
    found = load_file(folder / "export" / "model.safetensors")
    return {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}


def test_the_tower_learns_at_its_rate_and_stays_where_it_is_frozen(runs):
    whole = load_backbone(runs / "siglip" / "export").vision_model.state_dict()
    first, second, third = (weights(runs / stage) for stage in TRAINED)
    frozen = ("patch_embedding.", "position_embedding.")
    before = {name: whole[name_in_siglip(name)] for name in first}
    # Two steps of at most a hundredth, then a tenth of the rate each, by Adam; with decay, next to none.
    for old, new, rate in ((before, first, 1e-5), (first, second, 1e-6)):
        changes = {name: (value - old[name]).abs().max().item() for name, value in new.items()}
        assert all(change == 0 for name, change in changes.items() if name.startswith(frozen))
        assert 0 < max(changes.values()) < 2.1 * rate
    assert all(torch.equal(second[name], value) for name, value in third.items())  # in bf16 too, to the bit
    assert not weights(runs / "stored")
    assert "end_of_row" in weights(runs / "stored", "feature_adapter.")


def test_each_stage_goes_on_from_the_one_before_and_trains_its_parts(runs):
    exports = [load_file(runs / stage / "export" / "model.safetensors") for stage in TRAINED]
    for old, new, trained in zip(exports, exports[1:], [*TRAINED.values()][1:]):
        assert old.keys() == new.keys()
        changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
        assert changed == (trained if new is exports[1] else trained - {"vision_tower"})
        # What was there is gone on with: no rate moves it far, and bf16 rounds it.
        assert max((new[name].float() - old[name].float()).abs().max().item() for name in old) < 0.02
    words = words_of(runs, "unitoken_stage1", "pixels", *new_model(runs, "codes_and_features"))
    config = load_job_config(words, world_size=1)
    model = AutoModelForCausalLM.from_pretrained(runs / "unitoken_stage1" / "export")
    freeze_parameters(model, config.frozen)
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == TRAINED["unitoken_stage1"]


def records_of(run, split):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def test_the_tower_is_watched_from_its_first_weights_on(runs):
    """Two ranks find what one finds that goes on from their checkpoint: the same pictures, the same start."""
    starts = re.findall(r"vision tower watched: (.*)", (runs / "stage1.txt").read_text(encoding="utf-8"))
    assert len(starts) == 2 and starts[0] == starts[1] and starts[0].endswith("12 held-out pictures")
    whole = load_backbone(runs / "siglip" / "export").vision_model
    pixels = held_out_pictures(runs)
    first = VisionTower.of_model(whole)(pixels).flatten(0, 1)
    assert starts[0].startswith(f"effective rank {effective_rank(first):.4g} at the start")
    trained = AutoModelForCausalLM.from_pretrained(runs / "unitoken_stage1" / "export").vision_tower
    last = trained(pixels).flatten(0, 1)
    one, two = records_of(runs / "unitoken_stage1", "val")
    assert two["tower/cosine"] == pytest.approx(mean_cosine(last, first), abs=1e-6)
    assert two["tower/effective_rank"] == pytest.approx(effective_rank(last), rel=1e-4)
    assert two["tower/rank_share"] == pytest.approx(effective_rank(last) / effective_rank(first), rel=1e-4)
    assert two["tower/cosine"] < one["tower/cosine"] < 1 and one["tower/collapsed"] == 0
    # From the tower that stage I left; and nothing where it does not learn.
    (second,) = records_of(runs / "unitoken_stage2", "val")
    assert two["tower/cosine"] < second["tower/cosine"] < 1 + 1e-6
    (third,) = records_of(runs / "unitoken_stage3", "val")
    assert third["loss/text"] > 0 and not any(key.startswith("tower/") for key in third)


def held_out_pictures(runs):
    """All pictures as the tower reads them, in the order in which stage I validates."""
    export = runs / "unitoken_stage1" / "export"
    words = words_of(runs, "unitoken_stage1", "pixels", *new_model(runs, "codes_and_features"))
    data, model = load_job_config(words, world_size=1).validation_data, AutoConfig.from_pretrained(export)
    geometry = CodeGeometry(model.positions_per_image, model.num_quantizers, model.codebook_size)
    layout, features = model.image_layout, expected_features(model)
    loader = document_loader(data, str(export), geometry, split="val", layout=layout, features=features)
    return torch.cat([pack.features for pack in loader])


def test_figures_count_pictures_whatever_stands_for_them(runs):
    for run in ("unitoken_stage1", "unitoken_stage2", "stored"):
        steps = records_of(runs / run, "train")
        assert len(steps) == 2
        for record in steps:  # captions and drawings alike are of one picture
            pictures = record["images_per_second"] * record["seconds_per_step"]
            assert pictures == pytest.approx(record["documents"]), run
        assert all(record["loss/text"] > 0 for record in steps), run
        if run != "unitoken_stage1":
            assert all(record["loss/pixel"] > 0 for record in steps), run


def test_an_export_reads_pictures_by_its_processor(runs):
    tokenizer = load_visual_tokenizer(runs / "tokenizer" / "export")
    whole = load_backbone(runs / "siglip" / "export").vision_model
    for run, tower in (("unitoken_stage3", None), ("stored", VisionTower.of_model(whole))):
        model, text_tokenizer = load_unified_model(runs / run / "export")
        processor = AutoProcessor.from_pretrained(runs / run / "export")
        assert processor.layout == model.config.image_layout
        inputs = processor(
            text=["<image> red <image>", "blue"], images=[picture(0), picture(1)],
            visual_tokenizer=tokenizer, vision_tower=tower,
        )  # fmt: skip
        order = inputs.get("feature_order")
        assert (order is None) == (run == "unitoken_stage3")
        assert len(inputs["features"]) == (2 if order is None else (order[:, 0] >= 0).sum())
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
        ("features", ["model.heads.tiles=[[2]]"], r"tiles are \[\[2\]\]; expected grids \[rows, columns\]"),
    ],
)
def test_what_does_not_go_together_is_named(runs, tmp_path, visual_input, words, message):
    given = new_model(runs, visual_input, "deepspeed=zero1.json", *words)
    config = load_job_config(words_of(runs, "unused", "pixels", *given), world_size=1)
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, 0, 4, tmp_path)
    with pytest.raises(ValueError, match=message):
        MllmTask(config, runtime)
