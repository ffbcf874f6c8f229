"""FLOPs by formula against what torch counts, and against figures known from the papers."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipModel

from dualtoken.unified_model.sequence import pack_documents
from dualtoken.visual_tokenizer.backbone import FrozenTeacher
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from pretrain.contrastive_task import ContrastiveModel
from pretrain.discriminator import DiscriminatorConfig, PatchDiscriminator
from pretrain.flops import PackContents, unified_model_flops
from pretrain.optim import freeze_parameters
from pretrain.tokenizer_flops import (
    discriminator_flops,
    encode_flops,
    perceptual_flops,
    perceptual_network,
    siglip_flops,
    teacher_flops,
    tokenizer_flops,
)
from tests.support import tiny_vq
from tests.support.unified_support import (
    FEATURE_IDS,
    FEATURES,
    IDS,
    ONE_CODE,
    POSITIONS,
    SEEN,
    TILES,
    VOCABULARY,
    caption,
    generation,
    plain,
    seeing,
    tiny_model,
    tokenized,
    with_one_code,
)

TOLERANCE = 0.02


def counted(run) -> tuple[float, float]:
    """FLOPs of a forward pass, and of forward and backward pass, as torch counts them."""
    # Fused attention is counted on GPUs alone, products added in place nowhere.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss = run()
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    ("overrides", "frozen"),
    [
        ({}, []),
        ({"decoder": "llama", "embedder": "mlp_concat"}, []),
        (FEATURES, ["llm.*", "pixel_*", "semantic_*"]),  # as mllm_align
        ({}, ["llm.*", "visual_embedder.*"]),  # as mllm_generate
        (seeing("codes_and_features"), []),
        (seeing("features"), ["llm.*", "vision_tower.*"]),
        (seeing("features", inside=False), []),
        (seeing("codes_and_features", tiles=TILES), []),
        (ONE_CODE, []),
        (VOCABULARY, []),
    ],
)
def test_unified_model(overrides, frozen):
    model = tiny_model(chunk_size=64, **overrides)
    freeze_parameters(model, frozen)
    documents = [caption("a red cat"), generation("a blue dog, large and fierce"), plain("some words")]
    if model.config.num_codebooks == 1:
        documents = with_one_code(*documents)
    batch = pack_documents(tokenized(*documents, layout=model.config.image_layout), 160)
    if model.feature_adapter is not None and model.vision_tower is None:
        batch.features = torch.rand(len(batch.features), SEEN, 16)
    lengths = batch.cu_seqlens.diff().tolist()

    def run():
        output = model(**batch.model_inputs())
        return output.text_nll + output.visual_nll.sum()

    # The square of a document is computed here, whatever of it is masked.
    pack = PackContents(
        tokens=sum(lengths),
        pairs=sum(length**2 for length in lengths),
        visual_positions=len(batch.codes),
        text_targets=int((batch.labels != -100).sum()),
        visual_targets=POSITIONS,
        feature_pictures=0 if batch.features is None else len(batch.features),
        feature_positions=int((batch.input_ids == FEATURE_IDS.image_feature).sum()),
    )
    parts = unified_model_flops(model, pack)
    _, total = counted(run)
    assert sum(part.total for part in parts.values()) == pytest.approx(total, rel=TOLERANCE)
    with torch.no_grad():
        forward, _ = counted(run)
    assert sum(part.forward for part in parts.values()) == pytest.approx(forward, rel=TOLERANCE)
    if "llm.*" in frozen and "visual_embedder.*" in frozen:
        assert parts["llm"].backward == 0 < parts["pixel_head"].backward


def test_parts_of_the_unified_model():
    """Each part's forward pass by itself, and the contents of a pack as a step counts them."""
    model = tiny_model(chunk_size=64)
    documents = [caption("a red cat"), generation("a blue dog, large and fierce"), plain("some words")]
    batch = pack_documents(tokenized(*documents), 96)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, depth=None) as counter,
    ):
        model(**batch.model_inputs())
    by_module = {
        name.partition(".")[2]: sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
    }
    pack = PackContents.of_batch(batch, IDS)
    lengths = batch.cu_seqlens.diff().tolist()
    assert batch.padding == lengths[-1] > 0 and pack.tokens == sum(lengths[:-1])
    assert pack == dataclasses.replace(
        PackContents.of_documents(lengths[:-1], 2 * POSITIONS, int((batch.labels != -100).sum()), POSITIONS),
        pictures=2,
    )
    # Computed here: the padding too, and the square of each document.
    computed = dataclasses.replace(pack, tokens=sum(lengths), pairs=sum(length**2 for length in lengths))
    parts = unified_model_flops(model, computed)
    modules = {"llm": "llm.model", "text_head": "llm.lm_head"}
    for part, flops in parts.items():
        assert flops.forward == pytest.approx(by_module[modules.get(part, part)], rel=TOLERANCE), part
    assert {"llm", "text_head", "visual_embedder", "pixel_head", "semantic_head"} <= parts.keys()


@pytest.mark.parametrize("kind", tiny_vq.KINDS)
def test_encoding_by_vq_models_of_others(kind):
    tokenizer = tiny_vq.vq_tokenizer(kind)
    size = tiny_vq.SIZE
    with torch.no_grad():
        _, latents = counted(lambda: tokenizer.latents(torch.zeros(1, 3, size, size)).sum())
    search = 2 * tiny_vq.POSITIONS * tiny_vq.CODES * tiny_vq.DIM
    assert encode_flops(tokenizer.to("meta")) == latents + search > search


def test_sharded_parameters_count_by_their_whole_shapes():
    model = tiny_model()
    pack = PackContents.of_documents([20, 12], 8, 9, 4)
    whole = unified_model_flops(model, pack)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)  # as ZeRO-3 leaves it between its uses
    assert unified_model_flops(model, pack) == whole


def tiny_tokenizer(**overrides) -> tuple[DualTokenVisualTokenizer, DualTokenVisualTokenizer]:
    """The same tokenizer on the CPU and on the meta device."""
    config = preset_config("tiny", **overrides)
    with torch.device("meta"):
        planned = DualTokenVisualTokenizer(config)
    return DualTokenVisualTokenizer(config), planned


SEMANTIC = ["backbone.text_model.*", "backbone.logit_*", "backbone.vision_model.embeddings.*",
            "backbone.vision_model.encoder.layers.0.*", "prequant_pixel.*", "postquant_pixel.*",
            "post_quant_conv.*", "decoder.*"]  # fmt: skip


ALONE = {"reconstruction_layer": 0, "pixel_attention": False}


@pytest.mark.parametrize(
    ("frozen", "paint", "overrides"),
    [(["backbone.text_model.*"], True, {}), (["backbone.text_model.*"], True, ALONE), (SEMANTIC, False, {})],
)
def test_visual_tokenizer(frozen, paint, overrides):
    # Few codes: a search looks twice at a block of them and sometimes once more in fp64, which the formula
    # leaves out; of 16384 codes a block is one in 128.
    models = tiny_tokenizer(decoder_attention_resolutions=[4], codebook_size=8, **overrides)
    for model in models:
        freeze_parameters(model, frozen)
    real, planned = models
    images = torch.rand(1, 3, 16, 16) * 2 - 1

    def run():
        output = real(images, paint=paint)
        loss = output.semantic_features.square().mean() + output.pooled.square().mean()
        loss = loss + output.commitment_loss_pixel + output.commitment_loss_semantic
        return loss + output.reconstruction.square().mean() if paint else loss

    parts = tokenizer_flops(planned, paint)
    forward, total = counted(run)
    assert sum(part.forward for part in parts.values()) == pytest.approx(forward, rel=TOLERANCE)
    assert sum(part.total for part in parts.values()) == pytest.approx(total, rel=TOLERANCE)
    assert ("pixel_decoder" in parts) == paint
    with torch.no_grad():
        encoded, _ = counted(lambda: real.encode(images).sum())
    assert encode_flops(planned) == pytest.approx(encoded, rel=TOLERANCE)


def test_networks_of_the_tokenizers_losses():
    real, planned = tiny_tokenizer()
    teacher = FrozenTeacher(real.backbone.vision_model, 3)
    images = torch.rand(1, 3, 16, 16)
    forward, _ = counted(lambda: teacher(images).pooled.sum())
    assert teacher_flops(planned.backbone.vision_model, 16, 32).total == pytest.approx(forward, rel=TOLERANCE)

    images = torch.rand(1, 3, 64, 64).requires_grad_()
    perceptual = perceptual_network("alex").to_empty(device="cpu")
    _, total = counted(lambda: perceptual(images, images.detach()).mean())
    assert perceptual_flops("alex", 64).total == pytest.approx(total, rel=TOLERANCE)

    config = DiscriminatorConfig(channels=8, num_layers=2)
    discriminator = PatchDiscriminator(config)
    with torch.device("meta"):
        of_plan = PatchDiscriminator(config)
    discriminator.requires_grad_(False)
    _, through = counted(lambda: discriminator(images).mean())
    discriminator.requires_grad_(True)
    _, own = counted(lambda: discriminator(torch.cat([images, images]).detach()).mean())
    assert discriminator_flops(of_plan, 64).total == pytest.approx(through + own, rel=TOLERANCE)


def test_siglip():
    config = preset_config("tiny").backbone_config()
    config.text_config.projection_size = 32
    model = ContrastiveModel(SiglipModel(config), 0, 1)
    ids = torch.ones(1, 2, 8, dtype=torch.int64)
    forward, total = counted(lambda: model(torch.rand(1, 3, 16, 16), ids, patch_dropout=0.5))
    with torch.device("meta"):
        planned = SiglipModel(config)
    parts = siglip_flops(planned, kept=8, captions=2, caption_tokens=8)
    assert sum(part.forward for part in parts.values()) == pytest.approx(forward, rel=TOLERANCE)
    assert sum(part.total for part in parts.values()) == pytest.approx(total, rel=TOLERANCE)
