"""Models and losses on a pretended GPU: results as on the CPU, nothing mixed, few waits for the device.

Nothing here has run on a GPU; `make test-gpu` is for the day there is one.
"""

import copy
import functools
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import SiglipModel

from dualtoken.generation.generators import generate_images, generate_text
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart, pack_documents
from dualtoken.visual_tokenizer.backbone import FrozenTeacher
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from tests.support.pretend_cuda import OnGPU, PretendCuda, cast_parameters, move_to_gpu
from tests.support.unified_support import (
    FEATURES,
    byte_tokenizer,
    caption,
    generation,
    plain,
    tiny_model,
    tokenized,
)

TOKENIZERS = {
    "plain": {},
    "mcq": {"quantizer": "mcq"},
    "a codebook per depth": {"shared_codebook": False},
    "merged": {"merged_codebook": True, "shortcut_layer": None},
    "shortcut": {"shortcut_layer": 2},
    "no norm, full attention": {"latent_norm": False, "causal_post_quantization": False},
}
# The pretended GPU has the plain attention kernel alone.
same_kernel = functools.partial(sdpa_kernel, SDPBackend.MATH)
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def on_cpu(value):
    return value.elem if isinstance(value, OnGPU) else value


def assert_same(pairs, rtol=0.0, atol=0.0):
    """Check that of each pair the first is on the GPU, with the values of the second."""
    for name, (found, expected) in pairs.items():
        assert isinstance(found, OnGPU), f"{name} is not on the GPU"
        torch.testing.assert_close(
            found.elem, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- the visual tokenizer ----------------------------------------------------------------------------------


@both_precisions
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_visual_tokenizer_on_a_gpu(name, dtype):
    torch.manual_seed(0)
    config = preset_config("tiny", **TOKENIZERS[name])
    cpu = cast_parameters(DualTokenVisualTokenizer(config), dtype)
    images, ids = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([[3, 5, 1], [2, 2, 0]])
    gpu = copy.deepcopy(cpu)
    with same_kernel():
        expected = cpu.train()(images, ids)
        stats = cpu.update_codebooks()
        codes = cpu.eval().encode(images)
        picture, pooled = cpu.decode(codes), cpu.encode_semantic(codes)
    quantizers, depth = len(cpu.quantizers()), config.num_quantizers
    with PretendCuda() as device:
        move_to_gpu(gpu)
        found = gpu.train()(images.to("cuda"), ids.to("cuda"))
        # A depth's search asks which rows need fp64; nothing else does. The first draw reads a count.
        searches = quantizers * depth
        assert (
            device.waits.pop("dualtoken/visual_tokenizer/nearest.py:NearestCodeSearch.__call__") == searches
        )
        assert (
            device.waits.pop("dualtoken/visual_tokenizer/codebooks.py:EMACodebooks._number_of_updates")
            == quantizers
        )
        assert not device.waits
        found_stats = gpu.update_codebooks()
        assert device.waits == {"dualtoken/visual_tokenizer/codebooks.py:EMACodebooks.update": quantizers}
        device.waits.clear()
        gpu.train()(images.to("cuda"))
        assert device.waits == {"dualtoken/visual_tokenizer/nearest.py:NearestCodeSearch.__call__": searches}
        gpu.quantizer_semantic.reset_window()
        found_codes = gpu.eval().encode(images.to("cuda"))
        device.waits.clear()
        found_picture, found_pooled = gpu.decode(found_codes), gpu.encode_semantic(found_codes)
        assert device.waits == {"dualtoken/visual_tokenizer/codebooks.py:EMACodebooks._check_codes": 4}
    assert found_stats == stats
    pairs = {name: (found[name], value) for name, value in expected.items()}
    pairs |= {"encode": (found_codes, codes), "decode": (found_picture, picture)}
    assert_same({**pairs, "encode_semantic": (found_pooled, pooled)})


def test_mixed_devices_are_noticed():
    """The net is not full of holes: a buffer left on the CPU, a tensor made there, a forgotten cast."""
    model = DualTokenVisualTokenizer(preset_config("tiny"))
    with PretendCuda(), pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
        model(torch.zeros(1, 3, 16, 16).to("cuda"))
    with PretendCuda():
        move_to_gpu(cast_parameters(model, torch.bfloat16))
        projection = model.prequant_pixel.attn
        with pytest.raises(RuntimeError, match="same dtype|expected m1 and m2|mat1 and mat2"):
            projection.proj(torch.zeros(2, projection.proj.in_features).to("cuda"))


def test_broken_images_and_latents_are_named_on_a_gpu():
    model = DualTokenVisualTokenizer(preset_config("tiny"))
    images = torch.zeros(1, 3, 16, 16)
    images[0, 0, 3, 3] = torch.nan
    with PretendCuda():
        move_to_gpu(model)
        with pytest.raises(ValueError, match="pixel_values contain NaN or infinity; check the image dec"):
            model(images.to("cuda"))
        model.prequant_pixel.proj.weight.data.fill_(torch.inf)
        with pytest.raises(ValueError, match=r"pixel latents contain NaN or infinity \(\d+ of"):
            model(torch.zeros(1, 3, 16, 16).to("cuda"))


# -- the unified model -------------------------------------------------------------------------------------

BATCHES = {
    "text": [plain("some words")],
    "read and written pictures": [caption("cat"), generation("dog", 1), plain("x")],
}


@both_precisions
@pytest.mark.parametrize("features", [{}, FEATURES], ids=["codes", "features"])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_unified_model_on_a_gpu(batch, features, dtype):
    cpu = cast_parameters(tiny_model(decoder="llama", **features).train(), dtype)
    gpu = copy.deepcopy(cpu)
    packed = pack_documents(tokenized(*BATCHES[batch]), 128)
    with torch.no_grad(), same_kernel():
        expected = cpu(**packed.model_inputs(), z_loss=1e-4)
    with PretendCuda() as device, torch.no_grad():
        move_to_gpu(gpu)
        inputs = packed.to("cuda").model_inputs()
        gpu(**inputs, z_loss=1e-4)  # the first pass also looks whether there are codebooks
        device.waits.clear()
        found = gpu(**inputs, z_loss=1e-4)
    model = "dualtoken/unified_model/model.py:DualTokenForCausalLM"
    # The second one is transformers', which looks whether the positions are those of a pack.
    allowed = Counter({f"{model}.checked_codes": 1, f"{model}.forward": 1})
    if dtype == torch.float32:  # document by document, where there is no kernel for packs
        allowed["dualtoken/unified_model/attention.py:loop_over_documents"] = (
            cpu.decoder_config.num_hidden_layers
        )
    if features and len(packed.codes):
        allowed["dualtoken/unified_model/visual_features.py:require_whole_images"] = 1
    assert device.waits == allowed
    assert_same({name: (found[name], value) for name, value in expected.items()})


def test_generation_on_a_gpu():
    """The same picture and text as on the CPU, from cached steps with guidance."""
    cpu = tiny_model(decoder="llama", **FEATURES).eval()
    gpu, words = copy.deepcopy(cpu), byte_tokenizer()
    settings = {"guidance_scale": 1.5, "temperature": 0.0, "seed": 3}
    with same_kernel():
        codes = generate_images(cpu, words, ["cat", "a dog"], **settings)
        question = [Document([ImagePart(codes[0]), TextPart("what", loss=False)])]
        text = generate_text(cpu, words, question, max_new_tokens=4, temperature=0.0)
    with PretendCuda():
        move_to_gpu(gpu)
        found = generate_images(gpu, words, ["cat", "a dog"], **settings)
        found_text = generate_text(gpu, words, question, max_new_tokens=4, temperature=0.0)
    assert torch.equal(on_cpu(found), codes) and found_text == text


# -- losses and the fixed networks -------------------------------------------------------------------------


@both_precisions
def test_losses_and_fixed_networks_on_a_gpu(dtype):
    from pretrain import losses
    from pretrain.contrastive_task import ContrastiveModel
    from pretrain.discriminator import DiscriminatorConfig, PatchDiscriminator

    torch.manual_seed(0)
    siglip = SiglipModel(preset_config("tiny").backbone_config())
    discriminator = PatchDiscriminator(DiscriminatorConfig(channels=8, num_layers=2))
    parts = {
        "teacher": FrozenTeacher(siglip.vision_model, 3),
        "discriminator": discriminator,
        "contrastive": ContrastiveModel(siglip, rank=0, world_size=1),
    }
    pictures, painted = (torch.rand(2, 3, 16, 16) * 2 - 1 for _ in range(2))
    perceptual = losses.PerceptualLoss(losses.PerceptualConfig("vgg", "stlpips"))
    ids = torch.zeros(2, 1, 6, dtype=torch.long)

    def all_of(networks, perceptual, pictures, painted, ids):
        teacher, student = (networks["teacher"](p.to(dtype)).semantic_features for p in (pictures, painted))
        real, fake = networks["discriminator"](pictures.to(dtype)), networks["discriminator"](painted)
        kernel = torch.Size([3, 4, 3, 3])
        gradients = [
            losses.last_layer_gradient(features[:, None, 0].expand(-1, 4, -1, -1), kernel, painted)
            for features in (pictures, painted)
        ]
        return {
            "distillation": losses.semantic_distillation_loss(student, teacher),
            "hinge": losses.hinge_discriminator_loss(real, fake),
            "generator": losses.generator_loss(fake),
            "perceptual": perceptual(painted, pictures),
            "weight": losses.adaptive_gan_weight(*gradients),
            "contrastive": networks["contrastive"](pictures.to(dtype), ids),
        }

    networks = {name: cast_parameters(part, dtype) for name, part in parts.items()}
    with torch.no_grad(), same_kernel():
        expected = all_of(networks, perceptual, pictures, painted, ids)
    with PretendCuda() as device, torch.no_grad():
        on_gpu = {name: move_to_gpu(copy.deepcopy(part)) for name, part in networks.items()}
        inputs = [tensor.to("cuda") for tensor in (pictures, painted, ids)]
        found = all_of(on_gpu, move_to_gpu(perceptual), *inputs)
    assert not device.waits
    assert_same({name: (found[name], value) for name, value in expected.items()})


@both_precisions
def test_backward_passes_have_shapes_and_types(dtype):
    """On the meta device, where nothing is computed: gradients of the parameters' shape, type and device."""
    from dualtoken.projection import AttentionProjection
    from dualtoken.unified_model.visual_embedder import GeluMLP
    from dualtoken.visual_tokenizer.pixel_decoder import ResidualBlock
    from pretrain.discriminator import DiscriminatorConfig, PatchDiscriminator

    with torch.device("meta"):
        parts = [
            (AttentionProjection(64, 16), torch.zeros(2, 9, 64)),
            (AttentionProjection(16, 64, causal=True), torch.zeros(2, 9, 16)),
            (ResidualBlock(64, 32, first_kernel=1), torch.zeros(2, 64, 4, 4, dtype=dtype)),
            (GeluMLP(16, 32, 64), torch.zeros(5, 16)),
            (PatchDiscriminator(DiscriminatorConfig(channels=8, num_layers=2)), torch.zeros(2, 3, 16, 16)),
        ]
        siglip = SiglipModel(preset_config("tiny").backbone_config()).vision_model
        parts.append((siglip.encoder.layers[0], torch.zeros(2, 16, 32, dtype=dtype)))
    for part, inputs in parts:
        cast_parameters(part, dtype)
        output = part(inputs, None) if part is parts[-1][0] else part(inputs)
        output.float().sum().backward()
        for name, parameter in part.named_parameters():
            gradient = parameter.grad
            assert gradient is not None and gradient.is_meta, (type(part).__name__, name)
            assert (gradient.shape, gradient.dtype) == (parameter.shape, dtype)
