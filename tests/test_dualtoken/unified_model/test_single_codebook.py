"""One code a position, as VQ models of others have it: by a head of one depth, or rows of the vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from dualtoken.generation.decoding import append
from dualtoken.generation.generators import generate_images, generate_text, open_document, stream
from dualtoken.generation.likelihood import document_nll, option_log_likelihoods
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart, pack_documents
from tests.support.tiny_vq import vq_tokenizer
from tests.support.unified_support import (
    CODES,
    FEATURE_IDS,
    FEATURE_TOKENIZER,
    IDS,
    ONE_CODE,
    POSITIONS,
    TOKENIZER,
    VOCABULARY,
    byte_tokenizer,
    caption,
    generation,
    plain,
    seeing,
    tiny_config,
    tiny_model,
    tokenized,
    with_one_code,
)
from tests.test_dualtoken.unified_model.test_unified_model import MIXED, assert_same_gradients, gradients

WAYS = {"heads": ONE_CODE, "vocabulary": VOCABULARY}
PROMPTS = ["a red cat", "", "dog"]


def model_of(way, **overrides):
    return tiny_model(seed=5, sharpen=30.0, initializer_range=0.3, **{**WAYS[way], **overrides})


def documents():
    return tokenized(*with_one_code(caption("cat"), generation("dog", 1), plain("some words"), MIXED))


def row_logits(model, ids, codes, embed):
    """Logits over all rows of the vocabulary, and hidden states, of one document: [T, ...]."""
    inputs = model.get_input_embeddings().weight[ids].clone()
    places = torch.tensor(ids) == IDS.image_pad
    if len(codes):
        inputs = inputs.index_put((places.nonzero()[:, 0],), torch.stack([embed(code) for code in codes]))
    hidden = model.decoder(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0]
    return hidden @ model.get_output_embeddings().weight.t(), hidden


def embedding_of(model):
    """How a code becomes an input, written out."""
    first = model.config.first_code
    if first is not None:
        return lambda code: model.get_input_embeddings().weight[first + code]
    book = model.codebooks.vectors[0, 0]
    return lambda code: model.visual_embedder(book[code][None, None] * book.square().mean() ** -0.5)[0]


def naive_losses(model, document):
    """Sums over text and code targets of (nll, squared log-partition), one position after the other."""
    codes = document.codes.flatten().tolist()
    logits, hidden = row_logits(model, document.input_ids.tolist(), codes, embedding_of(model))
    text, visual = torch.zeros(2), torch.zeros(2)
    v = 0
    for t, token in enumerate(document.input_ids.tolist()):
        label = int(document.labels[t])
        if label != -100:
            z = logits[t - 1].logsumexp(0)
            text = text + torch.stack([z - logits[t - 1, label], z.square()])
        if token == IDS.image_pad:
            if document.visual_loss_mask[v]:
                of, target = logits[t - 1], codes[v]
                if model.config.first_code is None:
                    ((projector, head),) = model.visual_heads()
                    of = head.logits(projector(hidden[t - 1][None]), torch.zeros(1, 0, 8))[0, 0]
                else:
                    target += model.config.first_code
                z = of.logsumexp(0)
                visual = visual + torch.stack([z - of[target], z.square()])
            v += 1
    return text, visual


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
def test_the_loss_is_the_sum_written_out_gradients_included(way, decoder):
    """With the z-loss; a qwen2 has its embedding and output layer tied here, a llama has not."""
    model = tiny_model(sharpen=8.0, decoder=decoder, **WAYS[way])
    for weights in ((1.0, 1.0), (0.5, 2.0)):
        output = model(**pack_documents(documents(), 128).model_inputs(), z_loss=1e-2)
        naive = [naive_losses(model, document) for document in documents()]
        text, visual = (sum(one[place] for one in naive) for place in range(2))
        assert output.visual_nll.shape == output.visual_z_loss.shape == output.visual_correct.shape == (1, 1)
        torch.testing.assert_close(output.text_nll, text[0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(output.visual_nll[0, 0], visual[0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(output.text_z_loss, 1e-2 * text[1], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(output.visual_z_loss[0, 0], 1e-2 * visual[1], rtol=1e-5, atol=1e-4)
        assert output.visual_count == 3 * POSITIONS
        ours = weights[0] * (output.text_nll + output.text_z_loss)
        ours = ours + weights[1] * (output.visual_nll + output.visual_z_loss).sum()
        got = gradients(model, ours)
        plainly = weights[0] * (text[0] + 1e-2 * text[1]) + weights[1] * (visual[0] + 1e-2 * visual[1])
        assert_same_gradients(got, gradients(model, plainly))


def test_rows_of_the_vocabulary_are_one_softmax():
    """The plain cross-entropy of a language model over the same tokens, codes among them."""
    model = model_of("vocabulary")
    document = documents()[1]  # a prompt, and the picture to draw
    first = model.config.first_code
    ids, labels = document.input_ids.clone(), document.labels.clone()
    at_codes = ids == IDS.image_pad
    ids[at_codes] = labels[at_codes] = document.codes.flatten() + first
    logits = model.llm(input_ids=ids[None], use_cache=False).logits[0]
    expected = F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    output = model(**pack_documents([document]).model_inputs())
    torch.testing.assert_close(output.text_nll + output.visual_nll.sum(), expected)
    assert first == 264 and logits.shape[1] == 320  # a multiple of 64 that holds the codes
    assert not model.visual_heads() and model.codebooks is None and set(model.parts()) == {"llm"}


@pytest.mark.parametrize("way", WAYS)
def test_documents_do_not_see_each_other_and_batches_without_pictures_train(way):
    model = tiny_model(sharpen=8.0, **WAYS[way])
    packed = model(**pack_documents(documents(), 150).model_inputs())
    alone = [model(**pack_documents([document]).model_inputs()) for document in documents()]
    torch.testing.assert_close(packed.visual_nll, sum(o.visual_nll for o in alone))
    words = model(**pack_documents(tokenized(plain("x"))).model_inputs(), z_loss=1.0)
    assert words.visual_nll.shape == (1, 1) and words.visual_nll == words.visual_z_loss == 0
    got = gradients(model, words.text_nll + words.visual_nll.sum())
    assert got.keys() == dict(model.named_parameters()).keys()  # no rank of ZeRO-3 waits for another


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@torch.no_grad()
def test_pictures_are_drawn_as_without_a_cache(way, guidance_scale):
    model = model_of(way)
    codes = generate_images(model, TOKENIZER, PROMPTS, guidance_scale=guidance_scale, temperature=0)
    assert codes.shape == (3, POSITIONS, 1, 1) and codes.max() < CODES
    for prompt, got in zip(PROMPTS, codes, strict=True):
        text = TOKENIZER(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        drawn = []
        for _ in range(POSITIONS):
            found = []
            for words in (text, []):
                ids = [IDS.end_of_text, *words, IDS.image_gen_start] + [IDS.image_pad] * len(drawn)
                logits, hidden = row_logits(model, ids, drawn, embedding_of(model))
                if way == "heads":
                    ((projector, head),) = model.visual_heads()
                    found.append(head.logits(projector(hidden[-1:]), torch.zeros(1, 0, 8))[0, 0])
                else:
                    found.append(logits[-1, model.config.first_code :][:CODES])
            conditional, unconditional = found
            guided = unconditional + guidance_scale * (conditional - unconditional)
            drawn.append(int((conditional if guidance_scale == 1 else guided).argmax()))
        assert got.flatten().tolist() == drawn, prompt
    sampled = generate_images(model, TOKENIZER, PROMPTS, temperature=2.0, seed=1)
    assert sampled.max() < CODES and not torch.equal(sampled, codes)


@torch.no_grad()
def test_text_is_never_a_code_and_reads_the_picture():
    model = model_of("vocabulary")
    first = model.config.first_code
    model.get_output_embeddings().weight[first : first + CODES] *= 50  # codes would be likeliest everywhere
    prefixes = [
        with_one_code(Document([image, TextPart("Say: ", loss=False)]))[0]
        for image in (caption("", 1).parts[0], caption("", 2).parts[0])
    ]
    texts = generate_text(model, TOKENIZER, prefixes, max_new_tokens=6, temperature=1.5, seed=3)
    assert all(TOKENIZER(text)["input_ids"] for text in texts) and texts[0] != texts[1]
    found = [option_log_likelihoods(model, TOKENIZER, [prefix], [["a", "bc"]])[0] for prefix in prefixes]
    row = append(open_document(prefixes[0], TOKENIZER, model), TOKENIZER("bc")["input_ids"])
    logits, _ = row_logits(model, row.input_ids.tolist(), row.codes.flatten().tolist(), embedding_of(model))
    nll = F.cross_entropy(logits[-3:-1], row.input_ids[-2:], reduction="sum")
    assert found[0][1].log_likelihood == pytest.approx(
        -float(nll), rel=1e-5
    )  # codes count as what it could say
    assert found[0] != found[1]
    scored = document_nll(model, documents())
    assert [one.visual_count for one in scored] == [0, POSITIONS, 0, 2 * POSITIONS]
    pieces = list(stream(model, TOKENIZER, "draw", max_new_tokens=3, max_images=0, seed=0))
    assert all(isinstance(piece, str) for piece in pieces)


@pytest.mark.parametrize("visual_input", ["codes_and_features", "features"])
def test_continuous_features_beside_rows_of_the_vocabulary(visual_input):
    """UniToken: codes of a VQ as tokens, a mark, features."""
    model = model_of("vocabulary", **seeing(visual_input))
    shown = with_one_code(caption("cat"), generation("dog", 1), caption("owl", 2))
    inputs = pack_documents(tokenized(*shown, layout=model.config.image_layout)).model_inputs()
    output = model(**inputs, z_loss=1e-5)
    assert output.visual_count == POSITIONS and output.text_nll > 0 and len(inputs["features"]) == 2
    other = model(**{**inputs, "features": inputs["features"].flip(0)})
    assert not torch.equal(other.text_position_nll, output.text_position_nll)
    got = gradients(model, output.text_nll + output.visual_nll.sum())
    assert all(got[f"feature_adapter.{name}.weight"].abs().max() > 0 for name in ("up", "down"))
    drawn = generate_images(model, FEATURE_TOKENIZER, ["x"], guidance_scale=2.0, temperature=0)
    assert drawn.shape == (1, POSITIONS, 1, 1)
    assert model.config.special == FEATURE_IDS


@pytest.mark.parametrize("way", WAYS)
def test_saved_models_come_back(way, tmp_path):
    model = model_of(way)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for field in ("codes_as", "first_code", "num_codebooks", "code_shape"):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    inputs = pack_documents(documents()).model_inputs()
    assert torch.equal(loaded(**inputs).visual_position_nll, model(**inputs).visual_position_nll)


def test_a_base_model_keeps_its_rows_and_gets_one_for_each_code(tmp_path):
    base = AutoModelForCausalLM.from_config(tiny_config(initializer_range=0.1).text_config)
    base.resize_token_embeddings(258, mean_resizing=False)
    base.save_pretrained(tmp_path)
    tokenizer = vq_tokenizer("janus_vqgan")
    config = DualTokenConfig.for_tokenizers(base.config, TOKENIZER, tokenizer, codes_as="vocabulary")
    size = tokenizer.config.codebook_size
    assert (config.first_code, config.text_config.vocab_size) == (320, 384)
    assert config.code_shape == (tokenizer.config.positions, 1, 1) and config.codebooks == ("pixel",)
    model = DualTokenForCausalLM.from_base(config, str(tmp_path))
    assert (model.config.first_code, model.config.text_config.vocab_size) == (320, 384)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[:258], base.get_input_embeddings().weight)
    drawn = rows[320 : 320 + size]
    assert drawn.std().item() == pytest.approx(0.1, rel=0.3)  # as the decoder draws its own, not all alike
    model.set_codebooks(tokenizer.codebooks(), tokenizer.fingerprint())
    assert model.config.tokenizer_fingerprint == tokenizer.fingerprint()
    # With tokens of its own behind the special ones, which have rows too.
    words = byte_tokenizer()
    words.add_tokens([f"<word {number}>" for number in range(100)])
    heads = DualTokenConfig.for_tokenizers(base.config, words, tokenizer, head_hidden_size=16)
    enlarged = DualTokenForCausalLM.from_base(heads, str(tmp_path)).get_input_embeddings()
    assert len(words) == 362 and enlarged.num_embeddings == heads.text_config.vocab_size == 384
    assert heads.first_code is None and heads.num_codebooks == 1 and heads.codebook_dim == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"codes_as": "vocabulary"}, "codes_as='vocabulary' with 2 codebook.* of 3 depth"),
        ({**VOCABULARY, "place_embedding": True}, "codes_as='vocabulary' with place_embedding=True"),
        (
            {**ONE_CODE, "visual_input": "semantic"},
            "visual_input='semantic', but the visual tokenizer has one",
        ),
        ({"codes_as": "rows"}, "codes_as='rows'; expected one of 'vectors', 'vocabulary'"),
        ({"num_codebooks": 3}, "num_codebooks=3; expected one of 1, 2"),
        ({**ONE_CODE, "visual_features": "post_quantization"}, "which a VQ model of others lacks"),
    ],
)
def test_what_does_not_go_together_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


def test_a_vocabulary_without_room_for_codes_is_refused():
    config = tiny_config(**VOCABULARY)
    config.first_code = 310
    with pytest.raises(
        ValueError, match="first_code=310 and 11 codes, but the decoder's vocabulary has 320 rows"
    ):
        DualTokenForCausalLM._from_config(config)


def test_codes_of_another_shape_are_refused():
    model = model_of("vocabulary")
    with pytest.raises(ValueError, match=r"codes of image 0 have shape \(4, 2, 3\), expected \(4, 1, 1\)"):
        open_document(Document([ImagePart(torch.zeros(4, 2, 3, dtype=torch.long))]), TOKENIZER, model)
    inputs = pack_documents(documents()).model_inputs()
    with pytest.raises(ValueError, match="codes go from 0 to 11, expected 0 to 10"):
        model(**{**inputs, "codes": inputs["codes"].clamp(max=0).index_fill(0, torch.tensor([2]), CODES)})
