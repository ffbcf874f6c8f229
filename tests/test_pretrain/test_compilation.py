"""Compiled parts: whole graphs, shared by like layers, and the figures of what is not compiled."""

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from dualtoken.unified_model.attention import DOCUMENT_ATTENTION
from dualtoken.unified_model.sequence import pack_documents
from dualtoken.visual_tokenizer.backbone import FrozenTeacher
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from pretrain import mllm_task, tokenizer_task
from pretrain.compilation import compile_parts
from pretrain.config import ConfigError
from pretrain.recomputation import checkpoint_activations
from tests.support.distributed import run_function
from tests.support.unified_support import caption, generation, plain, tiny_config, tiny_model, tokenized
from tests.test_dualtoken.unified_model import test_unified_zero3 as zero3

BACKEND = "aot_eager"  # forward and backward graphs as inductor gets them, run operator by operator


@pytest.fixture(autouse=True)
def no_graphs_of_others():
    torch.compiler.reset()
    counters.clear()


def packs():
    """Two packs that differ in their numbers of documents and positions, and in their longest document."""
    documents = [
        [caption("a cat"), generation("dog"), plain("words")],
        [generation("a longer prompt", 1), generation("x", 2)],
    ]
    return [pack_documents(tokenized(*pack), 140).model_inputs() for pack in documents]


def two_passes(model, step):
    """Losses of two batches and the gradients of each."""
    found = []
    for batch in step.batches:
        model.zero_grad()
        loss = step(model, batch)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    return found


def mllm_loss(model, batch):
    output = model(**batch, z_loss=1e-3)
    return output.text_nll + output.visual_nll.sum() + output.visual_z_loss.sum()


def tokenizer_loss(model, images):
    output = model(images)
    losses = (output.reconstruction, output.semantic_features, output.pooled)
    return sum(loss.square().mean() for loss in losses) + output.commitment_loss_pixel


mllm_loss.batches = packs()
tokenizer_loss.batches = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def unified_model(kept="products"):
    model = tiny_model(sharpen=8.0).train()
    checkpoint_activations(model, kept)
    return model, mllm_task.compiled_parts(model)


def visual_tokenizer():
    torch.manual_seed(0)
    model = DualTokenVisualTokenizer(preset_config("tiny")).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    teacher = FrozenTeacher(model.backbone.vision_model, semantic_layer=2)
    return model, tokenizer_task.compiled_parts(model, teacher)


@pytest.mark.parametrize(("build", "loss"), [(unified_model, mllm_loss), (visual_tokenizer, tokenizer_loss)])
def test_losses_and_gradients_are_those_of_the_uncompiled_model(build, loss):
    expected = two_passes(build()[0], loss)
    model, parts = build()
    names = [name for name, _ in model.named_parameters()]
    compile_parts(parts, ["all"], backend=BACKEND)
    found = two_passes(model, loss)
    assert counters["stats"]["unique_graphs"] > len(parts) and not counters["graph_break"]
    assert [name for name, _ in model.named_parameters()] == names
    for (one, gradients), (two, same_gradients) in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
        assert same_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (same_gradients[name] - gradient).abs().max()
            assert error <= 1e-4 * gradient.abs().max() + 1e-6, name


def test_a_decoder_layer_is_one_graph_that_layers_share():
    model, parts = unified_model("nothing")
    graphs = CompileCounterWithBackend(BACKEND)
    compile_parts(parts, ["decoder"], backend=graphs)
    model(**packs()[0])
    assert len(parts["decoder"]) == 2 and graphs.frame_count == 1
    assert counters["graph_break"] == {}


def test_a_visual_head_is_a_graph_of_its_trunk_and_one_of_its_loss():
    model, _ = unified_model()
    graphs = CompileCounterWithBackend(BACKEND)
    model.pixel_head.compile(backend=graphs)  # breaks allowed, to be counted
    output = model(**packs()[0])
    output.visual_nll.sum().backward()
    assert graphs.frame_count == 2
    assert counters["graph_break"] == {}


def test_what_breaks_a_graph_is_an_error():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    module = Branches()
    compile_parts({"part": [module]}, ["part"], backend=BACKEND)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="(?i)data-dependent branching"):
        module(torch.ones(2))


@pytest.fixture
def in_bf16():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_decoder_of_a_gpu_is_one_graph_too(in_bf16):
    """On tensors that claim to be on a GPU, in bf16: its attention is the variable-length kernel."""
    config = tiny_config().text_config
    config._attn_implementation = DOCUMENT_ATTENTION
    graphs = CompileCounterWithBackend("eager")
    with FakeTensorMode(), torch.device("cuda"):
        layer = Qwen2DecoderLayer(config, 0)
        rotary = (torch.empty(1, 140, 8), torch.empty(1, 140, 8))
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        output = torch.compile(layer, backend=graphs, fullgraph=True)(
            torch.empty(1, 140, 32), attention_mask=None, position_embeddings=rotary,
            cu_seq_lens_q=cu_seqlens, max_length_q=80,
        )  # fmt: skip
    assert graphs.frame_count == 1 and output.device.type == "cuda"
    targets = {str(node.target) for graph in graphs.graphs for node in graph.graph.nodes}
    assert any("varlen_attn" in target for target in targets), targets


def test_unknown_parts():
    with pytest.raises(ConfigError, match=r"compile=towers: expected a list of decoder, heads, or \[all\]"):
        compile_parts({"decoder": [], "heads": []}, ["decoder", "towers"])


def zero3_steps():
    """Losses, gradients and final weights under ZeRO-3, of rank 1 without pictures; plain and compiled."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed("gloo", verbose=False)
    rank = torch.distributed.get_rank()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000,
    }
    found = {}
    for frozen in ((), ("llm",)):
        for compiled in ([], ["all"]):
            torch.manual_seed(0)
            model, parts = unified_model("nothing")
            zero3.freeze(model, frozen)
            compile_parts(parts, compiled, backend=BACKEND)
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=zero3.optimizer_for(model), config=settings
            )
            losses, gradients = [], {}
            for step in range(2):
                output = engine(**zero3.batch(rank, step, model.config).model_inputs())
                loss = zero3.loss_of(output, *zero3.counts(step, model.config))
                losses.append(loss.item())
                engine.backward(loss)
                trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
                gradients |= {f"{step} {n}": safe_get_full_grad(p).numpy().copy() for n, p in trained}
                engine.step()
            assert all(p.numel() == 0 for p in model.parameters()), "parameters are left gathered"
            found[frozen, bool(compiled)] = losses, gradients
            engine.destroy()
    found["graphs"] = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    return found


def test_two_ranks_of_zero3_train_compiled_parts_like_others():
    for found in run_function(zero3_steps, timeout=600, process_group=False):
        assert found["graphs"][0] > 0 and found["graphs"][1] == {}
        for frozen in ((), ("llm",)):
            (losses, gradients), (same_losses, same_gradients) = (found[frozen, c] for c in (False, True))
            assert (
                same_losses == pytest.approx(losses, rel=1e-4) and gradients.keys() == same_gradients.keys()
            )
            for name, gradient in gradients.items():
                error = abs(same_gradients[name] - gradient).max()
                assert error <= 1e-4 * abs(gradient).max() + 1e-6, name
