"""The recipes of the unified model's phases: what each trains, and two of them run one after the other."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, Qwen2Config
from webdataset import TarWriter

from data_pipeline.streams import prepare_dataset
from dualtoken.processing import DualTokenProcessor
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart, pack_documents
from dualtoken.visual_tokenizer.config import preset_config
from eval.inputs import load_unified_model, load_visual_tokenizer
from pretrain.config import ConfigError, load_job_config
from pretrain.engine import count_parameters
from pretrain.mllm_task import MllmTask
from pretrain.optim import build_optimizer, freeze_parameters, parameter_groups
from pretrain.runtime import Runtime
from tests.support.distributed import run_module
from tests.support.tiny_run import make_tiny_run, picture
from tests.support.unified_support import (
    FEATURES,
    byte_tokenizer,
    caption,
    generation,
    plain,
    random_codes,
    random_pixels,
    seeing,
    tiny_config,
    tiny_model,
    tokenized,
)
from tests.test_pretrain.test_config import missing_words

ROOT = Path(__file__).resolve().parents[2]
EMBEDDER = {"visual_embedder"}
WRITERS = {"pixel_projector", "semantic_projector", "pixel_head", "semantic_head"}
TRAINED = {
    "mllm_align": EMBEDDER,
    "mllm_understand": {"llm"} | EMBEDDER,
    "mllm_generate": WRITERS,
    "mllm_joint": {"llm"} | EMBEDDER | WRITERS,
    "mllm_joint_second": {"llm"} | EMBEDDER | WRITERS,
    "llava15_align": EMBEDDER,
    "llava15_finetune": {"llm"} | EMBEDDER,
}
DOCUMENTS = {
    "caption": caption("cat"),
    "generate": generation("dog", 1),
    "text": plain("some words"),
    "document": Document(
        [TextPart("a"), ImagePart(random_codes(), True, random_pixels(2)), TextPart("then")], "mixed"
    ),
}


def recipe_of(name, *words):
    return load_job_config([f"recipe={name}", *missing_words(name), *words], world_size=1)


def test_the_table_of_phases_is_true():
    lines = (ROOT / "docs" / "unified_model.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in TRAINED}
    assert table.keys() == TRAINED.keys()
    for recipe, (parts, views, rate, documents, packs) in table.items():
        config = recipe_of(recipe)
        assert set(parts.replace("`", "").split()) == TRAINED[recipe], recipe
        assert set(views.split(", ")) == {entry.view for entry in config.data.blend}, recipe
        assert float(rate) == config.optimizer.lr, recipe
        assert packs == f"{config.global_batch_size} x {config.data.context_length}", recipe
        assert int(documents) % config.global_batch_size == 0, recipe
        shared = (config.optimizer.warmup_ratio, config.optimizer.schedule, config.optimizer.weight_decay)
        assert (*shared, config.deepspeed) == (0.03, "cosine", 0.0, "zero3.json"), recipe


def test_the_table_of_parts_is_true():
    decoder = Qwen2Config(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    config = DualTokenConfig(
        text_config=decoder, visual_features="post_quantization", post_quantization_dim=1152
    )
    with torch.device("meta"):
        model = DualTokenForCausalLM(config)
    names = ["visual_embedder", "post_quantization", "llm", "pixel_projector", "pixel_head"]
    counts = [count_parameters(getattr(model, name)) for name in names]
    text = (ROOT / "docs" / "unified_model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| ([\d,]{7,}) \|$", text, re.MULTILINE)
    assert [int(row.replace(",", "")) for row in rows] == counts


@pytest.mark.parametrize("recipe", TRAINED)
def test_gradients_and_optimizer_state_are_those_of_the_phase(recipe):
    """On documents of the recipe's own views, in the loss of the task."""
    config = recipe_of(recipe)
    model = tiny_model(decoder="llama", **FEATURES).train()
    freeze_parameters(model, config.frozen)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = build_optimizer(model, config.optimizer)
    documents = [DOCUMENTS[entry.view] for entry in config.data.blend]
    output = model(**pack_documents(tokenized(*documents), 128).model_inputs())
    task = MllmTask.__new__(MllmTask)  # its loss needs the settings alone
    task.config = config
    task.weighted_sum(output).backward()
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in TRAINED[recipe]:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    with_state = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    assert {name.split(".")[0] for name in with_state} == TRAINED[recipe]
    assert with_state == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def weighted(words, losses):
    """Loss and gradients of all documents under a recipe's weights, and of `losses` of the model's output."""
    task = MllmTask.__new__(MllmTask)  # its loss needs the settings alone
    task.config = recipe_of("mllm_joint", *words)
    found = []
    for loss_of in (task.weighted_sum, losses):
        model = tiny_model(decoder="llama", sharpen=3.0).train()
        batch = pack_documents(tokenized(*DOCUMENTS.values()), 128).model_inputs()
        loss = loss_of(model(**batch, z_loss=task.config.losses.z_loss))
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    return found


def test_every_depth_weighs_the_same():
    def plain_sum(output):
        return output.text_nll + output.visual_nll.sum()

    (loss, gradients), (expected, by_hand) = weighted([], plain_sum)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, by_hand)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_modalities_have_weights(z_loss):
    """By hand, beside the weights of modalities: text three times, pixels twice."""

    def by_hand(output):
        text, (pixel, semantic) = output.text_nll, output.visual_nll
        if z_loss:
            text = text + output.text_z_loss
            pixel, semantic = pixel + output.visual_z_loss[0], semantic + output.visual_z_loss[1]
        return 3 * text + 2 * pixel.sum() + semantic.sum()

    words = ["losses.pixel=2", "losses.text=3", f"losses.z_loss={z_loss}"]
    (loss, gradients), (expected, expected_gradients) = weighted(words, by_hand)
    torch.testing.assert_close(loss, expected)
    assert {"pixel_head", "semantic_head", "llm"} <= {name.split(".")[0] for name in gradients}
    torch.testing.assert_close(gradients, expected_gradients)


def test_each_part_can_have_a_rate_of_its_own():
    config = recipe_of("mllm_joint", "optimizer.lr_scales={'llm.*': 0.1, '*_head.*': 3.0}")
    model = tiny_model(decoder="llama")
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale_of = {
        names[parameter]: group["lr_scale"]
        for group in parameter_groups(model, config.optimizer)
        for parameter in group["params"]
    }
    assert scale_of["llm.lm_head.weight"] == scale_of["llm.model.norm.weight"] == 0.1
    assert scale_of["pixel_head.classifier"] == scale_of["semantic_head.code_in"] == 3.0
    assert scale_of["pixel_projector.up.weight"] == scale_of["visual_embedder.mlps.0.up.weight"] == 1.0


def test_the_vision_tower_has_a_rate_of_its_own_or_no_state():
    """A hundredth of the adapter's for the tower and nothing else; frozen, it is in no group."""
    config = recipe_of("mllm_joint", "optimizer.lr_scales={'vision_tower.*': 0.01}")
    model = tiny_model(decoder="llama", **seeing("codes_and_features"))
    scales = rates_by_part(model, config)
    assert scales.pop("vision_tower") == {0.01} and scales["feature_adapter"] == {1.0}
    assert set().union(*scales.values()) == {1.0} and scales.keys() == model.parts().keys() - {"vision_tower"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config.optimizer)
    documents = tokenized(*DOCUMENTS.values(), layout=model.config.image_layout)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    output = model(**pack_documents(documents, 160).model_inputs())
    (output.text_nll + output.visual_nll.sum()).backward()
    optimizer.step()
    moved = {n: (p.detach() - before[n]).abs().max().item() for n, p in model.named_parameters()}
    for part in ("vision_tower", "feature_adapter"):  # Adam's first step is the rate, whatever the gradient
        largest = max(step for name, step in moved.items() if name.startswith(part))
        assert largest == pytest.approx(1e-4 if part == "vision_tower" else 1e-2, rel=0.01), part

    config = recipe_of("mllm_joint")
    freeze_parameters(model, ["vision_tower.*"])
    assert "vision_tower" not in rates_by_part(model, config)
    optimizer = build_optimizer(model, config.optimizer)
    output = model(**pack_documents(documents, 160).model_inputs())
    model.zero_grad()
    (output.text_nll + output.visual_nll.sum()).backward()
    optimizer.step()
    with_state = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    assert {name.split(".")[0] for name in with_state} == model.parts().keys() - {"vision_tower"}
    assert all(p.grad is None for p in model.vision_tower.parameters())


def rates_by_part(model, config):
    """Scales of the learning rate by part of the model, of what is in the optimizer's groups."""
    names = {parameter: name.split(".")[0] for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, config.optimizer):
        for parameter in group["params"]:
            found.setdefault(names[parameter], set()).add(group["lr_scale"])
    return found


def words_of(folder, phase, *words):
    return [
        f"recipe=mllm_{phase}",
        f"run_dir={folder / phase}",
        f"model.visual_tokenizer={folder / 'tokenizer' / 'export'}",
        f"data.blend.0.path={folder / 'codes' / 'train'}",
        "steps=4",
        "global_batch_size=4",
        "data.context_length=64",
        "data.contexts_held=2",
        "data.num_workers=0",
        "log_every=1",
        "precision=fp32",
        "wandb.mode=disabled",
        *words,
    ]


def base_words(folder):
    return [
        f"model.text_tokenizer={folder / 'siglip' / 'export'}",
        f"model.llm={folder / 'llm'}",
        "model.heads={head_hidden_size: 24, head_num_layers: 1, head_num_attention_heads: 2}",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Phases align and generate, each on two ranks under ZeRO-3, from a tiny language model."""
    folder = make_tiny_run(tmp_path_factory.mktemp("phases"))
    prepare_dataset(folder / "codes" / "train")
    decoder = tiny_config(decoder="llama", initializer_range=0.1).text_config
    decoder.vocab_size = 16  # fewer rows than the text tokenizer has tokens
    torch.manual_seed(1)
    # Stored in bf16 as real ones are, trained in fp32.
    AutoModelForCausalLM.from_config(decoder, dtype=torch.bfloat16).save_pretrained(folder / "llm")
    run_module("pretrain.train", words_of(folder, "align", *base_words(folder))).check()
    exported = folder / "align" / "export"
    generate = words_of(
        folder,
        "generate",
        f"model.text_tokenizer={exported}",
        f"model.init_from={exported}",
        "optimizer.lr=0.003",
        "losses.z_loss=5e-5",
    )
    run_module("pretrain.train", generate).check()
    return folder


@pytest.mark.parametrize("phase", ["align", "generate"])
def test_auto_classes_load_the_export(runs, phase):
    export = runs / phase / "export"
    processor = AutoProcessor.from_pretrained(export)
    assert isinstance(processor, DualTokenProcessor)
    model, text_tokenizer = load_unified_model(export)
    assert processor.text_tokenizer.get_vocab() == text_tokenizer.get_vocab()
    assert processor.special == model.config.special
    config = model.config
    codes = torch.zeros(config.positions_per_image, 2, config.num_quantizers, dtype=torch.long)
    inputs = processor(text="red <image> blue", codes=[codes])
    assert model(**inputs).text_count == 0  # no targets without labels, but the layout fits
    visual_tokenizer = load_visual_tokenizer(runs / "tokenizer" / "export")
    assert processor.image_size == visual_tokenizer.config.image_size
    document = processor.documents("<image> red", images=[picture(0)], visual_tokenizer=visual_tokenizer)[0]
    assert document.parts[0].codes.shape == codes.shape


def changed_parts(before, after):
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_phases_go_on_from_each_other(runs):
    base = load_file(runs / "llm" / "model.safetensors")
    first = load_file(runs / "align" / "export" / "model.safetensors")
    second = load_file(runs / "generate" / "export" / "model.safetensors")
    for name, value in base.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(first[f"llm.{name}"][: len(value)], value.float()), name
    for name in (*WRITERS, *EMBEDDER):  # drawn in fp32, not in what the base is stored in
        drawn = max((v for k, v in first.items() if k.startswith(name)), key=torch.Tensor.numel)
        assert drawn.dtype == torch.float32 and not torch.equal(drawn.bfloat16().float(), drawn), name
    tokenizer = load_file(runs / "tokenizer" / "export" / "model.safetensors")
    for name, value in tokenizer.items():
        if name.startswith("postquant_"):
            assert torch.equal(first[name.replace("postquant_", "post_quantization.")], value), name
    assert changed_parts(first, second) == WRITERS
    records = [
        json.loads(line)
        for line in (runs / "generate" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [record for record in records if record["split"] == "train"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    losses = [record["loss/pixel"] + record["loss/semantic"] for record in steps]
    assert losses[-1] < losses[0]
    # Untrained heads have all logits near 0: the partition is the number of codes.
    expected = 5e-5 * 2 * math.log(preset_config("tiny").codebook_size) ** 2
    assert steps[0]["z_loss/pixel"] == pytest.approx(expected, rel=0.1)
    assert all(record["documents"] > 4 for record in steps)  # more than one in a pack


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.init_from=nowhere"], "init_from=nowhere: expected the export folder of a unified model"),
        (["model.text_tokenizer={other}"], r"the text tokenizer .* expected the one it was trained with"),
        (["model.text_tokenizer=nowhere"], "text_tokenizer=nowhere: expected a folder with a Hugging Face"),
        (["model.llm=base"], r"model\.llm beside model\.init_from=.*: expected one .*; leave model\.llm out"),
        (["model.llm_config={{model_type: qwen2}}"], r"model\.llm_config beside model\.init_from"),
        (
            ["model.init_from=null", "model.llm={llm}", "model.heads={{head_num_layer: 1}}"],
            "head_num_layer is no field of the unified model's config; did you mean head_num_layers",
        ),
        (["model.heads.head_num_layers=3"], r"layers=3, but .* has head_num_layers=1: leave it"),
        (["frozen=[lm.*]"], r"frozen: 'lm\.\*' matches no parameter"),
    ],
)
def test_what_does_not_fit_the_phase_before_is_named(runs, tmp_path, words, message):
    byte_tokenizer().save_pretrained(tmp_path / "other")
    exported = runs / "align" / "export"
    settings = [f"model.text_tokenizer={exported}", f"model.init_from={exported}", "deepspeed=zero1.json"]
    settings += [word.format(other=tmp_path / "other", llm=runs / "llm") for word in words]
    config = load_job_config(words_of(runs, "generate", *settings), world_size=1)
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, 0, 4, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        MllmTask(config, runtime)
    assert "\n" not in str(caught.value)


def test_a_forward_pass_takes_one_pack():
    with pytest.raises(ConfigError, match="micro_batch_size=2: expected 1, a forward pass takes one pack"):
        recipe_of("mllm_align", "micro_batch_size=2")


@pytest.mark.slow
def test_all_phases_one_after_the_other(runs):
    """Understand, generate, both halves of joint, and LLaVA-1.5's stages, after the align of `runs`."""
    texts = runs / "text"
    texts.mkdir()
    with TarWriter(str(texts / "shard-000000.tar"), encoder=False) as writer:
        for number in range(12):
            writer.write({"__key__": f"{number:03d}", "txt": b"red green blue yellow black orange " * 3})
    prepare_dataset(texts)
    codes = runs / "codes" / "train"
    blends = {
        "understand": [texts],
        "chained_generate": [],
        "joint": [codes, codes, texts],
        "joint_second": [codes, codes, texts],
        "llava15_align": [],
        "llava15_finetune": [],
    }
    before = "align"
    for phase, more in blends.items():
        recipe = phase if phase.startswith("llava15") else f"mllm_{phase.removeprefix('chained_')}"
        exported = runs / before / "export"
        start = [f"model.text_tokenizer={exported}", f"model.init_from={exported}"]
        if phase == "llava15_align":
            start = base_words(runs)
        blend = [f"data.blend.{number}.path={path}" for number, path in enumerate(more, start=1)]
        words = [f"recipe={recipe}", *words_of(runs, phase, *start, *blend)[1:]]
        run_module("pretrain.train", words).check()
        before = phase
        weights = load_file(runs / phase / "export" / "model.safetensors")
        assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())
        if phase != "llava15_align":
            changed = changed_parts(load_file(exported / "model.safetensors"), weights)
            assert changed == TRAINED[recipe], phase
