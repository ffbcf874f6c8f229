"""The unified model under DeepSpeed ZeRO-3 on two gloo ranks, one of which sees text only.

The file is its own worker: the test starts it twice as a script and compares what the ranks saved with
plain torch.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.model import DualTokenForCausalLM, DualTokenOutput
from dualtoken.unified_model.sequence import Document, PackedBatch, TextPart, pack_documents
from tests.support.distributed import run_module
from tests.support.unified_support import (
    CODES,
    FEATURES,
    TILES,
    VOCABULARY,
    caption,
    generation,
    plain,
    projections,
    seeing,
    tiny_config,
    tiny_model,
    tokenized,
    vision_model,
    with_one_code,
)

STEPS, RATE, CONTEXT = 3, 1e-2, 128
SCENARIOS = {
    # (config overrides, frozen parts, gradient checkpointing)
    "joint": ({}, (), True),
    "frozen_llm": ({"decoder": "llama", "embedder": "mlp_concat"}, ("llm",), True),
    "frozen_heads": ({"decoder": "llama", "visual_input": "pixel"}, ("pixel_head", "semantic_head"), False),
    "features": (FEATURES, ("llm",), True),
    "vision_tower": (seeing("codes_and_features"), (), True),
    "frozen_tower": (seeing("features"), ("vision_tower",), False),
    "vocabulary": (VOCABULARY, (), True),
    "tiles": (seeing("codes_and_features", tiles=TILES), (), True),
    "heads_only": ({}, ("llm", "visual_embedder", "pixel_projector", "semantic_projector"), False),
}


def batch(rank: int, step: int, config: DualTokenConfig) -> PackedBatch:
    """Rank 0 sees images, more than a chunk of them; rank 1 has only text, at last without a target."""
    if rank == 0:
        documents = [
            generation("dog", step),
            caption("cat", step),
            *(generation("x", i) for i in range(step)),
        ]
    else:
        documents = [plain("only words")] if step < 2 else [Document([TextPart("none", loss=False)])]
    if config.num_codebooks == 1:
        documents = with_one_code(*documents)
    return pack_documents(tokenized(*documents, layout=config.image_layout), CONTEXT)


def loss_of(output: DualTokenOutput, text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    return output.text_nll / text + output.visual_nll.sum() / visual


def counts(step: int, config: DualTokenConfig) -> tuple[torch.Tensor, torch.Tensor]:
    packs = [batch(rank, step, config) for rank in range(2)]
    text = sum((pack.labels != -100).sum() for pack in packs)
    return text, sum(pack.visual_loss_mask.sum() for pack in packs)


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    # SGD: Adam would blow up the rounding noise of gradients that are zero in exact arithmetic.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def freeze(model: DualTokenForCausalLM, parts: tuple[str, ...]) -> None:
    for name in parts:
        model.parts()[name].requires_grad_(False)


def worker(output: Path) -> None:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from pretrain.engine import gathered_for_writing

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed("gloo", verbose=False)
    rank = int(os.environ["RANK"])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000,
    }
    tower = vision_model()  # whole: built before models are built sharded
    alive = HfDeepSpeedConfig(settings)
    for name, (overrides, frozen, checkpointing) in SCENARIOS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(**overrides))
        assert all(p.ds_numel == 0 or p.numel() == 0 for p in model.parameters()), "not sharded"
        if model.codebooks is not None:
            assert model.codebooks.vectors.dtype == torch.float32
            vectors = model.codebooks.vectors
            model.set_codebooks(torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1)))
        if model.post_quantization is not None:
            with gathered_for_writing(model.post_quantization):
                model.set_post_quantization(*projections())
        if model.vision_tower is not None:
            with gathered_for_writing(model.vision_tower):
                model.set_vision_tower(tower)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        freeze(model, frozen)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_for(model), config=settings)
        start = full_state(model)
        losses = []
        for step in range(STEPS):
            result = engine(**batch(rank, step, model.config).model_inputs())
            loss = loss_of(result, *counts(step, model.config))
            losses.append(loss.item())
            engine.backward(2 * loss)  # the engine takes the mean over ranks
            engine.step()
        end = full_state(model)
        torch.save({"start": start, "end": end, "losses": losses}, output / f"{name}_{rank}.pt")
        engine.destroy()
    sharded = {
        "pretrained": DualTokenForCausalLM.from_pretrained(output / "unified"),
        "base": DualTokenForCausalLM.from_base(tiny_config(), str(output / "base")),
        "rows": DualTokenForCausalLM.from_base(tiny_config(**VOCABULARY), str(output / "base")),
    }
    for name, model in sharded.items():
        state = {**full_state(model), **dict(model.named_buffers())}
        torch.save({k: v for k, v in state.items()}, output / f"{name}_{rank}.pt")
    try:
        DualTokenForCausalLM.from_pretrained(output / "incomplete")
    except ValueError as error:
        (output / f"refused_{rank}.txt").write_text(str(error), encoding="utf-8")
    assert alive is not None
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort now and then at interpreter exit


def full_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("zero3")
    tiny_model(seed=3).save_pretrained(output / "unified")
    tiny_model(seed=3).save_pretrained(output / "incomplete")
    weights = load_file(output / "incomplete" / "model.safetensors")
    del weights["pixel_head.classifier"]
    save_file(weights, output / "incomplete" / "model.safetensors", {"format": "pt"})
    small = tiny_config(initializer_range=0.1).text_config
    small.vocab_size = 258
    AutoModelForCausalLM.from_config(small).save_pretrained(output / "base")
    run_module(
        "tests.test_dualtoken.unified_model.test_unified_zero3", [str(output)], world_size=2, timeout=300
    ).check()
    return output


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_of_which_one_has_no_images_train_like_one_process(runs, name):
    saved = [torch.load(runs / f"{name}_{rank}.pt") for rank in range(2)]
    overrides, frozen, _ = SCENARIOS[name]
    model = DualTokenForCausalLM._from_config(tiny_config(**overrides))
    if model.codebooks is not None:
        vectors = model.codebooks.vectors
        model.set_codebooks(torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1)))
    if model.post_quantization is not None:
        model.set_post_quantization(*projections())
        for key, value in model.post_quantization.named_parameters():
            assert torch.equal(saved[0]["start"][f"post_quantization.{key}"], value), key
    if model.vision_tower is not None:
        model.set_vision_tower(vision_model())
        for key, value in model.vision_tower.named_parameters():
            assert torch.equal(saved[0]["start"][f"vision_tower.{key}"], value), key
    missing, unexpected = model.load_state_dict(saved[0]["start"], strict=False)
    buffers = {key for key, _ in model.named_buffers()}
    assert not unexpected and set(missing) <= buffers | {"llm.lm_head.weight"}
    model.tie_weights()
    freeze(model, frozen)
    optimizer = optimizer_for(model)
    for step in range(STEPS):
        packs = [batch(rank, step, model.config) for rank in range(2)]
        losses = [loss_of(model(**pack.model_inputs()), *counts(step, model.config)) for pack in packs]
        for rank in range(2):
            assert saved[rank]["losses"][step] == pytest.approx(losses[rank].item(), rel=1e-5), (step, rank)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    for parameter, value in model.named_parameters():
        torch.testing.assert_close(saved[0]["end"][parameter], value, rtol=1e-4, atol=1e-6, msg=parameter)
        moved = not torch.equal(saved[0]["end"][parameter], saved[0]["start"][parameter])
        is_frozen = any(parameter.startswith(part) for part in (*frozen, "post_quantization"))
        assert moved != is_frozen or "k_proj.bias" in parameter, parameter


def test_sharded_construction_draws_the_same_kind_of_weights(runs):
    start = torch.load(runs / "joint_0.pt")["start"]
    torch.manual_seed(0)
    for name, parameter in DualTokenForCausalLM._from_config(tiny_config()).named_parameters():
        assert start[name].std().item() == pytest.approx(parameter.std().item(), rel=0.35, abs=1e-3), name


def test_sharded_loading(runs):
    """Saved models and decoders arrive whole; the embedding grows for the special tokens."""
    state = torch.load(runs / "pretrained_0.pt")
    for name, value in load_file(runs / "unified" / "model.safetensors").items():
        assert torch.equal(state[name], value), name
    state = torch.load(runs / "base_0.pt")
    for name, value in load_file(runs / "base" / "model.safetensors").items():
        assert torch.equal(state[f"llm.{name}"][: len(value)], value), name
    assert state["llm.model.embed_tokens.weight"].shape == (320, 32)
    assert 0 < state["pixel_head.classifier"].std() < 0.1
    rows = torch.load(runs / "rows_0.pt")["llm.model.embed_tokens.weight"]
    base = load_file(runs / "base" / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape == (384, 32) and torch.equal(rows[:258], base)
    assert rows[320 : 320 + CODES].std() == pytest.approx(0.1, rel=0.3)


def test_sharded_loading_is_strict(runs):
    for rank in range(2):
        refused = (runs / f"refused_{rank}.txt").read_text(encoding="utf-8")
        assert "do not fit their config: 1 missing (pixel_head.classifier)" in refused


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
