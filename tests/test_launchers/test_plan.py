"""`dualtoken plan`: figures without files, one line for what cannot be planned."""

import json

import pytest
from transformers import AutoModelForCausalLM

from dualtoken.unified_model.config import DualTokenConfig, feature_fields
from dualtoken.unified_model.vision_tower import VisionTower
from dualtoken.visual_tokenizer.backbone import load_backbone
from eval.inputs import load_visual_tokenizer
from launchers.gpus import GPUS
from launchers.plan import Cluster, make_plan, shard_bytes
from pretrain.config import find_recipe, load_recipe
from pretrain.engine import count_parameters
from pretrain.optim import freeze_parameters
from pretrain.planned_models import ModelOptions
from tests.support.command import call
from tests.support.tiny_run import make_tiny_run, write_codes


def planned(recipe, *settings, options=None, **cluster):
    cluster = Cluster(**{"nodes": 1, "gpus": 8, "gpu": "h100", **cluster})
    return make_plan(recipe, settings, cluster, options or ModelOptions())


def test_the_command_prints_tables_of_a_hundred_columns(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["plan", "recipe=mllm_joint", "nodes=8", "gpu=h100", "--json", "plan.json"]
    words += ["--gpus", "8", "--samples", "1000000"]
    code, out, err = call(words, capsys)
    assert code == 0 and err == ""
    assert max(map(len, out.splitlines())) <= 100
    for line in (
        "mllm_joint on 64 x h100, bf16",
        "Assumed: visual tokenizer: so400m_384",
        "3,085,938,688  3,085,938,688",
        "23,328 bytes a picture",
        "at 400 GB/s",
    ):
        assert line in out, line
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["steps"] == -(-1_000_000 // plan["samples_per_step"])
    assert plan["seconds_per_step"] == pytest.approx(plan["flops"] / (64 * 989.5e12 * 0.4))
    assert plan["gpu_hours"] == pytest.approx(plan["steps"] * plan["seconds_per_step"] * 64 / 3600)
    assert [level["is_recipes"] for level in plan["levels"]] == [False, False, True]


def test_a_frozen_language_model_costs_no_gradients_of_its_own():
    align = planned("mllm_align", "global_batch_size=16")
    parts = {part.name: part for part in align.parts}
    assert parts["llm"].parameters.trained == 0 and parts["visual_embedder"].parameters.trained == 8_916_992
    # Gradients pass the language model; its weights take none.
    assert 0.9 < parts["llm"].flops.backward / parts["llm"].flops.forward < 1.1
    generate = planned("mllm_generate")
    parts = {part.name: part for part in generate.parts}
    assert parts["llm"].flops.backward == 0 < parts["pixel_head"].flops.backward
    assert generate.levels[2].held.activations < align.levels[2].held.activations


def test_checkpointing_trades_memory_for_flops():
    checkpointed = planned("mllm_joint")
    whole = planned("mllm_joint", "gradient_checkpointing=false")
    assert whole.recomputed == 0 < checkpointed.recomputed
    assert whole.flops == checkpointed.flops
    for a, b in zip(checkpointed.levels, whole.levels, strict=True):
        assert a.total == b.total_other < a.total_other == b.total


def test_a_second_partition_of_parameters_takes_its_share():
    plain, second = (planned("mllm_joint", f"deepspeed={f}.json", nodes=2) for f in ("zero3", "zero3_hpz"))
    total = sum(part.parameters.total for part in plain.parts)
    one, two = plain.levels[2], second.levels[2]
    assert two.held.parameters - one.held.parameters == pytest.approx(2 * total / 8)
    assert two.total - one.total == pytest.approx(2 * total / 8)


def test_ranks_that_share_a_pack_hold_less_of_it():
    plain, shared = (planned("mllm_joint", f"sequence_parallel_size={size}") for size in (1, 4))
    assert shared.levels[2].held.activations == pytest.approx(plain.levels[2].held.activations / 4)
    assert shared.micro_steps == 4 * plain.micro_steps
    assert shared.flops == plain.flops and shared.samples_per_step == plain.samples_per_step


def test_phases_take_models_from_the_recipes_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ModelOptions(llm="qwen2.5-7b")
    plan = planned("mllm_joint", "model.heads.preset=paper_258m", options=options)
    parts = {part.name: part.parameters.total for part in plan.parts}
    assert parts["llm"] == 7_615_616_512 and parts["pixel_head"] == 258_011_136
    assert parts["post_quantization"] == 18_904_576  # asked for by mllm_align, three phases before
    assert any("mllm_understand on that of mllm_align" in line for line in plan.assumed)
    quickstart = planned("quickstart_mllm", gpus=2)
    assert quickstart.code_bytes == 16 * 2 * 8 * 2
    assert any("as recipe quickstart_tokenizer makes it" in line for line in quickstart.assumed)


def test_a_phase_before_that_is_there_keeps_what_it_has(tmp_path):
    run = make_tiny_run(tmp_path / "run")
    model, tokenizer = run / "mllm" / "export", run / "tokenizer" / "export"
    words = [
        f"model.init_from={model}",
        f"model.visual_tokenizer={tokenizer}",
        f"model.text_tokenizer={model}",
    ]
    plan = planned("mllm_joint", *words)
    saved = AutoModelForCausalLM.from_pretrained(model)
    assert sum(part.parameters.total for part in plan.parts) == sum(p.numel() for p in saved.parameters())
    assert not any("before" in line for line in plan.assumed)
    with pytest.raises(ValueError, match="has a language model; leave it out"):
        planned("mllm_joint", *words, options=ModelOptions(llm="qwen2.5-3b"))
    with pytest.raises(ValueError, match="model.heads.head_hidden_size=64, but .* has head_hidden_size=32"):
        planned("mllm_joint", *words, "model.heads.head_hidden_size=64")


def test_a_vision_tower_counts_as_it_trains(tmp_path):
    """Parts of the model as training builds it; gradients, optimizer and activations only where it learns."""
    run = make_tiny_run(tmp_path / "run")
    tower, tokenizer = run / "siglip" / "export", run / "tokenizer" / "export"
    decoder = {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    heads = {"head_hidden_size": 24, "head_num_layers": 1, "head_num_attention_heads": 2}
    words = [
        f"model.visual_tokenizer={tokenizer}", f"model.vision_tower={tower}", "model.llm=null",
        f"model.llm_config={decoder}", f"model.heads={ {**heads, 'visual_input': 'codes_and_features'} }",
    ]  # fmt: skip
    plan = planned("unitoken_stage1", *words)
    fields = feature_fields(VisionTower.of_model(load_backbone(tower).vision_model))
    config = DualTokenConfig.for_visual_tokenizer(
        decoder, load_visual_tokenizer(tokenizer), **heads, visual_input="codes_and_features", **fields
    )
    model = AutoModelForCausalLM.from_config(config)
    freeze_parameters(model, load_recipe(find_recipe("unitoken_stage1")).frozen)
    built = {
        name: (count_parameters(part), count_parameters(part, True)) for name, part in model.parts().items()
    }
    found = {part.name: (part.parameters.total, part.parameters.trained) for part in plan.parts}
    assert {name: counts for name, counts in found.items() if any(counts)} == built
    whole, trained = built["vision_tower"]
    assert 0 < trained < whole  # patches and places are frozen

    frozen = planned("unitoken_stage1", *words, "frozen=[llm.*, pixel_*, semantic_*, vision_tower.*]")
    for level, without in zip(plan.levels, frozen.levels, strict=True):
        for state, size in (("masters", 4), ("optimizer", 8)):
            held = getattr(level.held, state) - getattr(without.held, state)
            assert held == pytest.approx(size * trained / 8), state
        assert level.held.gradients > without.held.gradients
        assert level.held.parameters == without.held.parameters
        assert level.held.activations > without.held.activations
    flops = {part.name: part.flops for part in frozen.parts}["vision_tower"]
    assert flops.backward == 0 < flops.forward < plan.recomputed - frozen.recomputed + 1


def test_stages_of_unitoken_take_the_tower_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = planned("unitoken_stage3")
    parts = {part.name: part.parameters for part in plan.parts}
    # 26 of the 27 layers of SO400M/14, 1152 wide, inside 4304.
    layer = 4 * 1152 * 1153 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    embeddings = 3 * 14 * 14 * 1152 + 1152 + 729 * 1152
    assert parts["vision_tower"].total == 26 * layer + embeddings
    assert parts["vision_tower"].trained == 26 * layer
    assert parts["llm"].trained == parts["llm"].total == 3_085_938_688
    assumed = " ".join(plan.assumed)
    assert "recipe unitoken_stage1 on that of unitoken_stage2" in assumed or "unitoken_stage2" in assumed
    assert "vision tower: one of the visual tokenizer's size" in assumed
    assert "(1,459 positions if read, 730 if drawn)" in assumed


@pytest.mark.parametrize("recipe", ["tokenizer_semantic", "quickstart_tokenizer", "quickstart_siglip"])
def test_the_other_jobs(recipe):
    plan = planned(recipe, gpus=2)
    parts = {part.name: part for part in plan.parts}
    assert plan.tokens_per_second == 0 < plan.images_per_second
    assert parts["vision_tower"].parameters.total > 0 and parts["vision_tower"].flops.backward > 0
    if recipe == "tokenizer_semantic":  # the decoder has no part in it
        assert parts["pixel_decoder"].flops.total == parts["pixel_decoder"].parameters.trained == 0
    if recipe == "quickstart_tokenizer":
        assert parts["discriminator"].parameters.trained == parts["discriminator"].parameters.total > 0
        assert parts["perceptual"].flops.total > 0


def test_links():
    assert Cluster(1, 8, "h100").link == GPUS["h100"].nvlink
    assert Cluster(2, 8, "h100").link == 8 * GPUS["h100"].adapter
    assert Cluster(2, 8, "h100", inter=45e9).link == 45e9
    assert Cluster(2, 8, "h100", intra=20e9).link == 20e9


def test_shards_are_as_large_as_said(tmp_path):
    from dualtoken.visual_tokenizer.config import preset_config
    from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer

    tokenizer = DualTokenVisualTokenizer(preset_config("tiny"))
    write_codes(tmp_path / "codes", tokenizer, 0, 12)
    written = (tmp_path / "codes" / "shard-000000.tar").stat().st_size
    config = tokenizer.config
    expected = 12 * shard_bytes(config.positions * 2 * config.num_quantizers * 2, 2)
    assert expected <= written <= expected + 2 * 10240  # tar fills up to blocks of its own


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mllm_joint", "--gpu", "h999"], "--gpu h999: no figures of it; expected one of a100-40, a100-80,"),
        (["mllm_joint", "--mfu", "40"], "--mfu 40.0: expected a share of the peak"),
        (["mllm_align", "--nodes", "8"], "global_batch_size=16 cannot be split: expected a multiple of"),
        (["mllm_joint", "nodes=many"], "nodes=many: expected a number of at least 1, for example nodes=8"),
        (["mllm_joynt"], "did you mean 'mllm_joint'?"),
        (["mllm_joint", "--llm", "gpt-7"], "no language model in gpt-7; give --llm and one of qwen2.5-0.5b"),
        (
            ["mllm_joint", "--visual-tokenizer", "nowhere"],
            "no visual tokenizer in nowhere, and no recipe makes it; give --visual-tokenizer and one of",
        ),
        (
            ["tokenizer_joint", "--llm", "qwen2.5-7b"],
            "are for unified models, tokenizer_joint is a tokenizer job",
        ),
        (
            ["mllm_align", "model.heads.visual_input=features"],
            "model.vision_tower=None with model.heads.visual_input=features: expected a SigLIP",
        ),
        (["mllm_joint", "model.init_from=gone"], "model.init_from=gone is not there, and no recipe makes it"),
        (
            ["quickstart_mllm", "data.context_length=640", "--gpus", "2", "--visual-tokenizer", "so400m_384"],
            "a document of a picture of 729 positions and 64 tokens is longer than data.context_length=640",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(["plan", *words], capsys)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
