"""Post-quantization features as the language model's input: the tokenizer's own, packed, cached, saved."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dualtoken.generation.generators import generate_images, generate_text
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart, pack_documents, tokenize_document
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from tests.support.unified_support import (
    DEPTH,
    FEATURES,
    IDS,
    POSITIONS,
    TOKENIZER,
    caption,
    generation,
    plain,
    projections,
    random_codes,
    tiny_config,
    tiny_model,
    tokenized,
)

EDIT = Document([ImagePart(random_codes(torch.Generator().manual_seed(4))), TextPart("now blue")], "edit")
TWO = Document([ImagePart(random_codes(torch.Generator().manual_seed(i))) for i in (5, 6)], "two")
PROMPTS = ["red apple", "", EDIT, TWO]


@pytest.fixture(scope="module", params=["both", "semantic"])
def model(request):
    return tiny_model(seed=5, sharpen=30.0, initializer_range=0.3, visual_input=request.param, **FEATURES)


def documents():
    generated = ImagePart(random_codes(torch.Generator().manual_seed(7)), loss=True)
    parts = [TextPart("a", loss=False), generated, TextPart("then"), *TWO.parts]
    return tokenized(caption("cat"), generation("dog", 1), plain("some words"), Document(parts, "mixed"))


def features_of(tokenizer, codes):
    """The tokenizer's own way to the features behind its quantizers, to unit mean square: [P, Q, W]."""
    pixel, semantic = tokenizer.lookup(codes[None])
    features = torch.stack([tokenizer.postquant_pixel(pixel), tokenizer.postquant_semantic(semantic)], 2)
    return (features / features.square().mean(-1, keepdim=True).sqrt())[0]


def test_they_are_the_visual_tokenizers_own():
    torch.manual_seed(0)
    tokenizer = DualTokenVisualTokenizer(preset_config("tiny")).eval()
    config = DualTokenConfig.for_tokenizers(
        tiny_config().text_config, TOKENIZER, tokenizer, visual_features="post_quantization",
        head_hidden_size=24, head_num_attention_heads=3,
    )  # fmt: skip
    assert config.post_quantization_dim == tokenizer.config.vision.hidden_size
    model = DualTokenForCausalLM(config).eval()
    model.set_codebooks(tokenizer.codebooks())
    model.set_post_quantization(tokenizer.postquant_pixel, tokenizer.postquant_semantic)
    size, depth = tokenizer.config.codebook_size, tokenizer.config.num_quantizers
    codes = torch.randint(size, (2, tokenizer.config.positions, 2, depth))
    document = Document([ImagePart(image) for image in codes])
    pack = pack_documents([tokenize_document(document, TOKENIZER, config.special)])
    embedded = model.embed(pack.input_ids, pack.codes)[0]
    expected = model.visual_embedder(torch.cat([features_of(tokenizer, image) for image in codes]))
    at = pack.input_ids[0] == config.special.image_pad
    torch.testing.assert_close(embedded[at], expected, rtol=1e-4, atol=1e-5)


def test_the_cache_gives_the_features_of_the_whole_image(model):
    codes = torch.stack([random_codes() for _ in range(3)])
    whole = model._features(model.codebooks(codes.flatten(0, 1)).unflatten(0, (3, POSITIONS)))
    cache = model.new_feature_cache()
    for position in range(POSITIONS):
        vectors = model.codebooks(codes[:, position])[:, None]
        step = model._features(vectors, cache)[:, 0]
        torch.testing.assert_close(step, whole[:, position], rtol=1e-4, atol=1e-5)
    changed = codes.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 11
    other = model._features(model.codebooks(changed.flatten(0, 1)).unflatten(0, (3, POSITIONS)))
    assert torch.equal(other[:, :2], whole[:, :2])  # nothing is seen before its time
    assert not torch.allclose(other[:, 3], whole[:, 3])  # but later positions see it


def test_packed_documents_equal_single_ones_gradients_included(model):
    packed = model(**pack_documents(documents(), 150).model_inputs())
    model.zero_grad()
    (packed.text_nll + packed.visual_nll.sum()).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = [model(**pack_documents([document]).model_inputs()) for document in documents()]
    torch.testing.assert_close(packed.visual_nll, sum(o.visual_nll for o in alone))
    torch.testing.assert_close(packed.text_nll, sum(o.text_nll for o in alone))
    sum(o.text_nll + o.visual_nll.sum() for o in alone).backward()
    trained = {name for name, p in model.named_parameters() if not name.startswith("post_quantization.")}
    assert got.keys() == trained == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in trained:
            noise = 1e-4 * parameter.grad.abs().max().item() + 1e-6
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=noise)
    model.zero_grad()


@torch.no_grad()
def naive_image(model, prompt, guidance_scale):
    """Greedy codes by the forward pass over whole images, whose later positions nothing can see."""
    document = prompt if isinstance(prompt, Document) else Document([TextPart(prompt, loss=False)])
    rows = [tokenize_document(d, TOKENIZER, IDS, end=False) for d in (document, Document([]))]
    codes = torch.zeros(POSITIONS, 2, DEPTH, dtype=torch.long)
    for position in range(POSITIONS):
        hidden = []
        for row in rows:
            image = torch.tensor([IDS.image_gen_start] + [IDS.image_pad] * POSITIONS)
            ids = torch.cat([row.input_ids, image])
            all_codes = torch.cat([row.codes, codes]) if len(row.codes) else codes
            embedded = model.embed(ids[None], all_codes)
            states = model.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
            hidden.append(states[len(row.input_ids) + position])
        for q, (projector, head) in enumerate(model.visual_heads()):
            for depth in range(DEPTH):
                prefix = model.codebooks(codes[position][None])[:, q, :-1].cumsum(dim=1)
                given, empty = (head.logits(projector(h[None]), prefix)[0, depth] for h in hidden)
                codes[position, q, depth] = (empty + guidance_scale * (given - empty)).argmax()
    return codes


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_cached_batched_images_equal_recomputed_single_ones(model, guidance_scale):
    codes = generate_images(model, TOKENIZER, PROMPTS, guidance_scale=guidance_scale, temperature=0)
    for prompt, got in zip(PROMPTS, codes, strict=True):
        assert torch.equal(got, naive_image(model, prompt, guidance_scale)), prompt
    assert len(codes.unique(dim=0)) == len(PROMPTS)  # the prompts matter


def test_batched_text_equals_single_text(model):
    together = generate_text(model, TOKENIZER, PROMPTS, max_new_tokens=8)
    assert together == [generate_text(model, TOKENIZER, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert len(set(together)) > 1


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = pack_documents(documents()).model_inputs()
    assert torch.equal(loaded(**batch).visual_nll, model(**batch).visual_nll)
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"post_quantization"}
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_mistakes_are_named(model):
    row = tokenized(caption("cat"))[0]
    cut = torch.cat([row.input_ids[:4], row.input_ids[6:]])[None]
    with pytest.raises(ValueError, match="2 image-pad tokens do not come in runs of 4, an image each"):
        model(input_ids=cut, codes=row.codes[:2])
    scattered = row.input_ids.clone()
    scattered[[2, 7]] = scattered[[7, 2]]
    with pytest.raises(ValueError, match="4 image-pad tokens do not come in runs of 4"):
        model(input_ids=scattered[None], codes=row.codes)
    with pytest.raises(ValueError, match="pixel projection behind the quantizer sees the whole image"):
        model.set_post_quantization(*projections(causal=False))
    with pytest.raises(ValueError, match="pixel projection maps 8 to 24 features, the config asks for 8"):
        model.set_post_quantization(*projections(24))
    with pytest.raises(ValueError, match="this model reads code vectors, not post-quantization features"):
        tiny_model().set_post_quantization(*projections())
    unset = DualTokenForCausalLM._from_config(tiny_config(**FEATURES))
    unset.set_codebooks(model.codebooks.vectors)
    with pytest.raises(ValueError, match="post-quantization projections are not set: call set_post_quant"):
        unset(**pack_documents(documents()).model_inputs())
    with pytest.raises(ValueError, match="'post_quantization' with post_quantization_dim=None; expected the"):
        tiny_config(visual_features="post_quantization")
    with pytest.raises(ValueError, match="visual_features='latents'; expected one of 'code_vectors', 'post"):
        tiny_config(visual_features="latents")
