"""Bytes by formula: against engines on two ranks, what autograd keeps, and figures known from the papers."""

import dataclasses
import itertools
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from data_pipeline.streams import BlendEntry, DocumentStreamConfig
from dualtoken.projection import AttentionProjection
from dualtoken.unified_model.attention import DOCUMENT_ATTENTION
from dualtoken.unified_model.config import HEAD_PRESETS, head_settings
from dualtoken.unified_model.depth_transformer import VisualHead
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImageLayout, ImagePart, TextPart, pack_documents
from pretrain.activations import (
    decoder_layer_activations,
    encoder_layer_activations,
    feature_activations,
    kept_bytes,
    projection_activations,
)
from pretrain.budget import LEVELS, ParameterCount, checkpoint_bytes, sent_bytes, state_bytes
from pretrain.config import JobConfig, OptimizerConfig
from pretrain.flops import PackContents, unified_model_flops
from pretrain.job_budget import expected_pack
from pretrain.planned_models import LLM_PRESETS, count_parts
from pretrain.runtime import Runtime
from tests.support.distributed import run_function
from tests.support.unified_support import (
    FEATURE_IDS,
    POSITIONS,
    SEEN,
    TILES,
    random_codes,
    random_pixels,
    seeing,
    tiny_model,
    tokenized,
)

WIDTH = 192


class Stack(nn.Module):
    """Enough parameters for padding not to matter, a ninth of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.tanh(self.frozen(x)))


def storage_bytes(tensors) -> int:
    """Bytes of the storages behind tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def held(engine) -> dict[str, int]:
    """Bytes that an engine holds between two backward passes of a step."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    zero, module = engine.optimizer, engine.module
    if isinstance(zero, BF16_Optimizer):  # ZeRO-1 in bf16
        sums, masters = zero.fp32_groups_gradients_flat, zero.fp32_groups_flat_partition
    elif hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        sums, masters = [zero.grad_partitions_flat_buffer], zero.fp32_partitioned_groups_flat
    else:
        sums = [t for parts in zero.all_grad_tensors.values() for t in parts or ()]
        sums += [t for parts in zero.averaged_gradients.values() for t in parts or ()]
        masters = zero.single_partition_of_fp32_groups
    parameters = [getattr(p, "ds_tensor", p) for p in module.parameters()]
    gradients = [*sums, *(p.grad for p in module.parameters() if p.grad is not None)]
    states = [t for state in zero.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    groups = {
        "parameters": parameters,
        "gradients": gradients,
        "masters": masters,
        "optimizer": [t for t in states if t.numel() > 1],
    }
    return {name: storage_bytes(tensors) for name, tensors in groups.items()}


def engines_of_all_levels(folder) -> dict:
    """What each level holds, by optimizer, type and level."""
    import os

    from pretrain.checkpoints.engines import engine_files
    from pretrain.engine import build_engine
    from pretrain.metrics import Averages
    from pretrain.runtime import start_runtime
    from pretrain.stepping import backward, take_step

    found: dict = {}
    runtime: Runtime | None = None
    for name, dtype in (("adamw", "bf16"), ("adamw", "fp32"), ("muon", "bf16")):
        for level in LEVELS:
            if (name, level) == ("muon", 2):
                continue  # gradients of whole matrices on each border of ranks: an estimate in small models
            path = folder / f"zero{level}-{os.environ['RANK']}.json"
            settings = json.loads((folder / f"zero{level}.json").read_text(encoding="utf-8"))
            settings["zero_optimization"]["reduce_bucket_size"] = 20_000
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            path.write_text(json.dumps(settings), encoding="utf-8")
            config = JobConfig(
                "toy", str(folder / "run"), steps=9, global_batch_size=8, micro_batch_size=2,
                deepspeed=str(path), precision=dtype, gradient_clipping=0.0,
                optimizer=OptimizerConfig(name=name, muon_exclude=[]),
            )  # fmt: skip
            runtime = runtime or start_runtime(config)
            runtime.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
            engine = build_engine(Stack(), config, runtime)
            for micro_step in range(3):  # optimizer states come with the step after the second
                loss = engine(torch.randn(2, WIDTH, dtype=runtime.dtype)).float().square().mean()
                backward(engine, loss)
                if micro_step == 1:
                    take_step({"model": engine}, Averages(runtime.device))
            found[name, dtype, level] = held(engine)
            if name == "adamw":
                files, _ = engine_files({"model": engine}, {}, runtime)
                tensors = [t for f in files.values() if hasattr(f, "tensors") for t in f.tensors.values()]
                found[name, dtype, level]["checkpoint"] = sum(t.numel() * t.element_size() for t in tensors)
            engine.destroy()
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    from pretrain.runtime import DS_CONFIGS

    folder = tmp_path_factory.mktemp("budget")
    for level in LEVELS:
        text = (DS_CONFIGS / f"zero{level}.json").read_text(encoding="utf-8")
        (folder / f"zero{level}.json").write_text(text, encoding="utf-8")
    return run_function(engines_of_all_levels, folder, process_group=False)


def stack_count(muon: bool) -> ParameterCount:
    layer = WIDTH * WIDTH
    return ParameterCount(9 * (layer + WIDTH), 8 * (layer + WIDTH), 8 * layer if muon else 0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_engines_hold_what_the_plan_says(two_ranks, level, dtype):
    weight = {"bf16": 2, "fp32": 4}[dtype]
    zero = {"reduce_bucket_size": 20_000}
    plan = state_bytes(level, 2, stack_count(False), weight, zero)
    for found in two_ranks:
        measured = found["adamw", dtype, level]
        # Two per cent: a rank's part ends at a multiple of a few elements, the last one's is padded.
        for part in ("parameters", "masters", "optimizer", "gradients"):
            assert measured[part] == pytest.approx(getattr(plan, part), rel=0.02), part


@pytest.mark.parametrize("level", [1, 3])
def test_muon_holds_one_state(two_ranks, level):
    plan = state_bytes(level, 2, stack_count(True), 2, {})
    for found in two_ranks:
        measured = found["muon", "bf16", level]
        for part in ("parameters", "masters", "optimizer"):
            assert measured[part] == pytest.approx(getattr(plan, part), rel=0.02), part


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_checkpoints_are_as_large_as_the_plan_says(two_ranks, level, dtype):
    written = sum(found["adamw", dtype, level]["checkpoint"] for found in two_ranks)
    expected = checkpoint_bytes(stack_count(False), {"bf16": 2, "fp32": 4}[dtype])
    assert written == pytest.approx(expected, rel=0.01)


def test_offloaded_states_leave_the_gpu():
    zero = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    here, there = (state_bytes(3, 8, stack_count(False), 2, z) for z in ({}, zero))
    assert there.gradients == there.masters == there.optimizer == there.parameters == 0
    assert there.host == here.total - here.buffers and there.total == there.buffers


def test_sent_bytes_are_the_papers_in_its_types():
    """Section 7 of arXiv 1910.02054: 2 and 3 times the parameters, where everything is sent in bf16."""
    count, ranks = ParameterCount(1000, 1000), 8
    share = 7 / 8
    assert sent_bytes(2, ranks, count, 2, gradient=2).total == pytest.approx(2 * 2 * 1000 * share)
    assert sent_bytes(3, ranks, count, 2, gradient=2).total == pytest.approx(3 * 2 * 1000 * share)
    # Micro-batches: ZeRO-3 gathers and reduces for each, ZeRO-2 only reduces.
    assert sent_bytes(3, ranks, count, 2, 4, 2).total == pytest.approx(4 * 3 * 2 * 1000 * share)
    assert sent_bytes(2, ranks, count, 2, 4, 2).total == pytest.approx(5 * 2 * 1000 * share)
    assert sent_bytes(3, 1, count, 2).total == 0
    half = ParameterCount(1000, 500)
    assert sent_bytes(3, ranks, half, 2, gradient=4, gathered=1500).total == pytest.approx(5000 * share)


@pytest.mark.parametrize(("dtype", "weight"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_activations_are_what_autograd_keeps(dtype, weight):
    tokens = 48
    config = Qwen2Config(
        hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=100,
    )  # fmt: skip
    llm = AutoModelForCausalLM.from_config(config, attn_implementation=DOCUMENT_ATTENTION).to(dtype)
    positions, borders = torch.arange(tokens)[None], torch.tensor([0, tokens], dtype=torch.int32)
    x = torch.randn(1, tokens, 64, dtype=dtype, requires_grad=True)
    layer, rotary = llm.model.layers[0], llm.model.rotary_emb(x, positions)
    documents = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "position_embeddings": rotary}
    documents |= {"max_length_q": tokens, "max_length_k": tokens, "position_ids": positions}
    kept = kept_bytes(layer, lambda: layer(x, **documents))
    assert kept == pytest.approx(tokens * decoder_layer_activations(config, weight), rel=0.02)

    config = SiglipVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4, image_size=28,
        patch_size=4,
    )  # fmt: skip
    block = SiglipVisionModel._from_config(config).to(dtype).encoder.layers[0]
    kept = kept_bytes(block, lambda: block(x, None))
    assert kept == pytest.approx(tokens * encoder_layer_activations(config, weight), rel=0.02)

    for widths, attends in itertools.product(((64, 16), (16, 64)), (True, False)):
        projection = AttentionProjection(*widths, attend=attends).to(dtype)
        x = torch.randn(1, tokens, widths[0], dtype=dtype, requires_grad=True)
        kept = kept_bytes(projection, lambda p=projection, x=x: p(x))
        estimate = tokens * projection_activations(64, 16, weight, widths[1] == 64, attends)
        assert kept == pytest.approx(estimate, rel=0.06)


def meta_unified(llm: str, **heads) -> DualTokenForCausalLM:
    from dualtoken.unified_model.config import DualTokenConfig

    with torch.device("meta"):
        config = DualTokenConfig(text_config=LLM_PRESETS[llm], **head_settings(heads))
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("llm", "published"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama-2-7b", 6_738_415_616),
    ],
)
def test_language_models_have_their_published_sizes(llm, published):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(meta_config(llm), attn_implementation=DOCUMENT_ATTENTION)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def meta_config(llm: str):
    from transformers import AutoConfig

    fields = dict(LLM_PRESETS[llm])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def head_parameters(width: int, inner: int, depth: int = 8, codes: int = 16384, layers: int = 3) -> int:
    with torch.device("meta"):
        head = VisualHead(width, layers, 1, inner, depth, 32, codes, 128)
    return sum(parameter.numel() for parameter in head.parameters())


def test_the_papers_heads():
    """258 M parameters (arXiv 2503.14324): 3 layers, 8 depths, a classifier of 16384 codes for each."""
    assert head_parameters(2048, 8192) == 419_512_320  # the default, wider than the paper's
    preset = HEAD_PRESETS["paper_258m"]
    found = head_parameters(preset["head_hidden_size"], preset["head_intermediate_size"])
    assert found == 258_011_136 and round(found / 1e6) == 258
    model = meta_unified("qwen2.5-0.5b", preset="paper_258m", chunk_size=64)
    assert sum(p.numel() for p in model.pixel_head.parameters()) == found
    assert model.config.chunk_size == 64
    # Widths in steps of 64 with whole MLP ratios: one other setting, none with the usual ratio of 4.
    fitting = [
        (width, ratio)
        for width in range(512, 2561, 64)
        for ratio in (1, 2, 3, 4)
        if round(head_parameters(width, ratio * width) / 1e6) == 258
    ]
    assert fitting == [(1472, 3), (1536, 2)]
    with pytest.raises(ValueError, match="preset 'paper'; expected one of paper_258m"):
        head_settings({"preset": "paper"})


def test_figures_of_the_real_system():
    """A picture and 20 tokens of text through the 3B model, by hand: arXiv 2001.08361's 2N and attention."""
    model = meta_unified("qwen2.5-3b")
    length = 749
    pack = PackContents.of_documents([length], 729, 20, 729)
    flops = unified_model_flops(model, pack)
    forward = {name: part.forward / 1e12 for name, part in flops.items()}
    assert forward["llm"] == pytest.approx(4.24, rel=0.01)
    assert forward["pixel_head"] + forward["pixel_projector"] == pytest.approx(2.16, rel=0.01)
    assert forward["text_head"] == pytest.approx(0.012, rel=0.05)
    assert sum(part.total for part in flops.values()) / 1e12 == pytest.approx(25.7, rel=0.01)
    count = sum(count_parts(model, model.parts(), OptimizerConfig()).values(), ParameterCount(0, 0))
    assert count.total == count.trained == 3_946_078_208
    # In bf16 all through: ZeRO-3 20.7 GB a micro-step, ZeRO-1 and 2 13.8 GB.
    assert sent_bytes(3, 8, count, 2, gradient=2).total / 1e9 == pytest.approx(20.7, rel=0.005)
    assert sent_bytes(2, 8, count, 2, gradient=2).total / 1e9 == pytest.approx(13.8, rel=0.005)


BLEND = [BlendEntry("a", "caption", 1.0), BlendEntry("b", "generate", 2.0), BlendEntry("c", "text", 1.0)]


def test_packs_hold_documents_by_their_shares():
    data = DocumentStreamConfig(BLEND, context_length=1000)
    pack = expected_pack(data, ImageLayout(), 60, 36, 98)
    assert pack.documents == pytest.approx(10) and pack.pictures == pytest.approx(7.5)
    assert pack.visual_positions == pytest.approx(450) and pack.visual_targets == pytest.approx(300)
    assert pack.text_targets == pytest.approx(2.5 * 37 + 5 * 2 + 2.5 * 99)
    assert pack.pairs == pytest.approx(10 * 100 * 101 / 2) and pack.feature_pictures == 0
    with pytest.raises(ValueError, match="longer than data.context_length=1000; give another"):
        expected_pack(data, ImageLayout(), 960, 64, 98)


@pytest.mark.parametrize(("codes", "tiles"), [(True, None), (False, None), (True, TILES)])
def test_packs_of_models_that_read_features_hold_what_such_documents_do(codes, tiles):
    """One document of each view in a context that holds just these; the largest picture in tiles."""
    layout, words = ImageLayout(codes=codes, features=SEEN, tiles=tiles), "w" * 10  # a token a byte
    image = ImagePart(random_codes(), features=random_pixels(0))
    if tiles is not None:
        image = ImagePart(random_codes(), False, image.features.expand(5, -1, -1, -1), tiles.largest)
    documents = tokenized(
        Document([image, TextPart(words)]),
        Document([TextPart(words, loss=False), ImagePart(random_codes(), loss=True)]),
        Document([TextPart("w" * 7)]),
        layout=layout,
    )
    blend = [BlendEntry("a", view) for view in ("document", "generate", "text")]
    batch = pack_documents(documents)
    config = DocumentStreamConfig(blend, context_length=batch.input_ids.shape[1])
    expected = expected_pack(config, layout, POSITIONS, len(words), 7)
    found = PackContents.of_batch(batch, FEATURE_IDS)
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(expected))


def test_a_towers_activations_are_what_autograd_keeps():
    model = tiny_model(**seeing("features"))
    pixels = torch.stack([random_pixels(seed) for seed in range(3)])
    tower, patches = model.vision_tower, 3 * SEEN
    kept = kept_bytes(tower, lambda: tower(pixels))
    kept += kept_bytes(model.feature_adapter, lambda: model.feature_adapter(torch.randn(patches, 16)))
    estimate = feature_activations(model, patches, patches, 4, checkpoints=False, keeps_products=False)
    # On top: the pixels as the first layer takes them.
    pictures = pixels.numel() * 4
    assert kept - pictures == pytest.approx(estimate, rel=0.05)
    layers = tower.settings["num_hidden_layers"]
    of_layers = layers * patches * encoder_layer_activations(SiglipVisionConfig(**tower.settings), 4)
    checkpointed = feature_activations(model, patches, patches, 4, checkpoints=True, keeps_products=False)
    products = feature_activations(model, patches, patches, 4, checkpoints=True, keeps_products=True)
    assert estimate - of_layers < checkpointed < products < estimate + of_layers / layers
    tower.requires_grad_(False)
    frozen = feature_activations(model, patches, patches, 4, checkpoints=False, keeps_products=False)
    assert frozen == pytest.approx(estimate - of_layers * (layers - 1) / layers)
