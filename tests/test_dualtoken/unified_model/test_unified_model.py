"""The unified model's loss against equations (5) to (8) written out, and its behaviour around them."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen2Config

from dualtoken.unified_model.chunked_loss import TextHead
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.depth_transformer import VisualHead
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart, pack_documents
from tests.support.unified_support import (
    CODES,
    DEPTH,
    DIM,
    FEATURE_IDS,
    IDS,
    POSITIONS,
    caption,
    generation,
    plain,
    random_codes,
    tiny_config,
    tiny_model,
    tokenized,
)

MIXED = Document(
    [
        TextPart("a", loss=False),
        ImagePart(random_codes(torch.Generator().manual_seed(7)), loss=True),
        TextPart("then"),
        ImagePart(random_codes(torch.Generator().manual_seed(8))),
        ImagePart(random_codes(torch.Generator().manual_seed(9)), loss=True),
    ],
    "mixed",
)


def documents():
    return tokenized(caption("cat"), generation("dog", 1), plain("some words"), MIXED)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        noise = 1e-5 * value.abs().max().item() + 1e-6
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=noise, msg=lambda m, n=name: f"{n}: {m}")


def naive_losses(model, document):
    """Equations (5)-(8) for one document, position by position and depth by depth, with the plain decoder.

    (5) the text term -log P(x_t | before); (6) h_p and the partial sums of code vectors as the inputs of a
    depth transformer; (7), (8) the terms -log P(y_d | y_<d, h), -log P(z_d | z_<d, h) of the two codebooks.
    """
    config = model.config
    books = model.codebooks.vectors
    scales = [books[q, 0].square().mean() ** -0.5 for q in range(2)]

    def vector(q, d, code):
        return books[q, min(d, config.codebook_depths - 1), code] * scales[q]

    inputs, code_of, v = [], {}, 0
    seen = [] if document.features is None else list(document.features.flatten(0, -2))
    if document.feature_order is not None:  # of images in tiles: None for the ends of rows
        seen = [None if crop < 0 else seen.pop(0) for crop, _ in document.feature_order.tolist()]
    for t, token in enumerate(document.input_ids.tolist()):
        if token == IDS.image_pad:
            codes = document.codes[v].long().tolist()
            features = torch.stack([sum(vector(q, d, codes[q][d]) for d in range(DEPTH)) for q in range(2)])
            inputs.append(model.visual_embedder(features[None])[0])
            code_of[t] = (codes, bool(document.visual_loss_mask[v]))
            v += 1
        elif token == FEATURE_IDS.image_feature:
            up, down, feature = model.feature_adapter.up, model.feature_adapter.down, seen.pop(0)
            end = model.feature_adapter.end_of_row
            inputs.append(end if feature is None else down(torch.nn.functional.gelu(up(feature))))
        else:
            inputs.append(model.llm.get_input_embeddings().weight[token])
    hidden = model.llm.base_model(inputs_embeds=torch.stack(inputs)[None], use_cache=False).last_hidden_state[
        0
    ]
    text, visual = torch.zeros(()), [[torch.zeros(()) for _ in range(DEPTH)] for _ in range(2)]
    for t, label in enumerate(document.labels.tolist()):
        if label != -100:
            logits = hidden[t - 1] @ model.llm.get_output_embeddings().weight.t()
            text = text - logits.log_softmax(-1)[label]
        if t in code_of and code_of[t][1]:
            for q, (projector, head) in enumerate(model.visual_heads()):
                codes = code_of[t][0][q]
                steps = [projector(hidden[t - 1][None])[0]]
                for d in range(1, DEPTH):
                    steps.append(head.code_in @ sum(vector(q, e, codes[e]) for e in range(d)))
                for d in range(DEPTH):
                    features = naive_trunk(head, torch.stack(steps[: d + 1]))[d]
                    logits = head.classifier[d] @ features
                    visual[q][d] = visual[q][d] - logits.log_softmax(-1)[codes[d]]
    return text, torch.stack([torch.stack(row) for row in visual])


def naive_trunk(head, x):
    """The depth transformer on one position, [d, C] -> [d, C], head by head."""
    norm = lambda v: v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    x = x + head.depth_embedding[: len(x)]
    width = x.shape[1] // head.num_heads
    for qkv, out, up, down in zip(
        head.query_key_value, head.attention_out, head.mlp_in, head.mlp_out, strict=True
    ):
        query, key, value = (norm(x) @ qkv.t()).split(x.shape[1], dim=1)
        heads = []
        for h in range(head.num_heads):
            part = slice(h * width, (h + 1) * width)
            scores = query[:, part] @ key[:, part].t() / width**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ value[:, part])
        x = x + torch.cat(heads, dim=1) @ out.t()
        x = x + torch.nn.functional.gelu(norm(x) @ up.t()) @ down.t()
    return norm(x)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"embedder": "mlp_concat", "codebook_depths": DEPTH},
        {"visual_input": "semantic", "decoder": "llama"},
        {"visual_input": "pixel", "chunk_size": 1},
    ],
)
def test_the_loss_is_the_sum_written_out_gradients_included(overrides):
    model = tiny_model(sharpen=8.0, **overrides)
    output = model(**pack_documents(documents(), 128).model_inputs())
    naive = [naive_losses(model, document) for document in documents()]
    text, visual = sum(n[0] for n in naive), sum(n[1] for n in naive)
    torch.testing.assert_close(output.text_nll, text, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(output.visual_nll, visual, rtol=1e-5, atol=1e-4)
    assert output.text_count == sum((d.labels != -100).sum() for d in documents())
    assert output.visual_count == sum(d.visual_loss_mask.sum() for d in documents()) == 12
    # Different weights per codebook and depth also take the path that recomputes.
    weights = torch.rand(2, DEPTH, generator=torch.Generator().manual_seed(3))
    for weigh in (lambda t, v: t + v.sum(), lambda t, v: 0.5 * t + (weights * v).sum()):
        output = model(**pack_documents(documents(), 128).model_inputs())
        got = gradients(model, weigh(output.text_nll, output.visual_nll))
        naive = [naive_losses(model, document) for document in documents()]
        expected = gradients(model, weigh(sum(n[0] for n in naive), sum(n[1] for n in naive)))
        assert_same_gradients(got, expected)


READ = {"both": [0, 1], "pixel": [0], "semantic": [1]}


@pytest.mark.parametrize("visual_input", READ)
def test_only_codes_that_are_read_matter_to_what_comes_after(visual_input):
    model = tiny_model(sharpen=8.0, initializer_range=0.3, visual_input=visual_input)
    batch = pack_documents(tokenized(caption("cat"), generation("dog", 1))).model_inputs()
    expected = model(**batch)
    for book in (0, 1):
        codes = batch["codes"].clone()
        codes[:POSITIONS, book] = (codes[:POSITIONS, book] + 1) % CODES  # the picture with a caption
        codes[POSITIONS, book] = (codes[POSITIONS, book] + 1) % CODES  # first position of the drawn one
        output = model(**{**batch, "codes": codes})
        is_read = book in READ[visual_input]
        assert torch.equal(output.text_position_nll, expected.text_position_nll) != is_read
        later, before = output.visual_position_nll[1:], expected.visual_position_nll[1:]
        for written in (0, 1):
            assert torch.equal(later[:, written], before[:, written]) != is_read, (book, written)
        # Both are written, read or not.
        assert not torch.equal(output.visual_position_nll[0, book], expected.visual_position_nll[0, book])


def test_all_that_is_read_goes_through_one_embedding():
    default = tiny_model(seed=2)
    for visual_input, read in READ.items():
        model = tiny_model(seed=2, visual_input=visual_input)
        codes = random_codes(torch.Generator().manual_seed(4))
        sums = model.codebooks(codes).sum(dim=2)  # [P, Q, E]
        joined = torch.cat([sums[:, book] for book in read], dim=1)
        (mlp,) = model.visual_embedder.mlps
        expected = mlp.down(torch.nn.functional.gelu(mlp.up(joined)))
        ids = torch.tensor([[IDS.image_pad] * POSITIONS])
        torch.testing.assert_close(model.embed(ids, codes)[0], expected)
        drawn = torch.stack(
            [model.embed_next(code[None], place, None)[0] for place, code in enumerate(codes)]
        )
        torch.testing.assert_close(drawn, expected)
        assert mlp.up.in_features == len(read) * DIM
        if visual_input == "both":
            assert torch.equal(default.embed(ids, codes)[0], model.embed(ids, codes)[0])


def test_places_are_embedded_alike_in_prompts_and_while_drawing():
    model = tiny_model(seed=2, place_embedding=True)
    without = tiny_model(seed=2)
    without.visual_embedder.mlps.load_state_dict(model.visual_embedder.mlps.state_dict())
    without.set_codebooks(model.codebooks.vectors)
    codes = random_codes(torch.Generator().manual_seed(4))
    two = torch.cat([codes, codes])
    ids = torch.tensor([[IDS.image_pad] * POSITIONS + [1] + [IDS.image_pad] * POSITIONS])
    embedded = model.embed(ids, two)[0]
    first, second = embedded[:POSITIONS], embedded[POSITIONS + 1 :]
    assert torch.equal(first, second)  # places are counted anew in each image
    alone = without.embed(ids[:, :POSITIONS], codes)[0]
    torch.testing.assert_close(first - alone, model.visual_embedder.place_embedding.weight)
    drawn = torch.stack([model.embed_next(code[None], place, None)[0] for place, code in enumerate(codes)])
    torch.testing.assert_close(drawn, first)
    with pytest.raises(ValueError, match="places need whole images"):
        model.embed(ids[:, :3], codes[:3])
    with pytest.raises(ValueError, match="place_embedding='yes'; expected true or false"):
        tiny_model(place_embedding="yes")


def test_counts_of_right_guesses():
    model = tiny_model(sharpen=50.0)
    output = model(**pack_documents(documents(), 128).model_inputs())
    assert output.text_correct <= output.text_count and output.visual_correct.shape == (2, DEPTH)
    assert (output.visual_correct <= output.visual_count).all() and output.visual_correct.sum() > 0
    for nll, total in (
        (output.text_position_nll, output.text_nll),
        (output.visual_position_nll, output.visual_nll),
    ):
        torch.testing.assert_close(nll.sum(0), total)
    assert output.visual_positions.shape == (12,) and output.visual_position_nll.shape == (12, 2, DEPTH)


@pytest.mark.parametrize("chunk_size", [1, 3, 12, 100])
def test_chunks_equal_all_logits_at_once(chunk_size):
    torch.manual_seed(0)
    head = VisualHead(24, 2, 3, 96, DEPTH, DIM, CODES, chunk_size)
    head.init_weights()
    with torch.no_grad():
        head.classifier.mul_(20)
    hidden, prefix = torch.randn(12, 24, requires_grad=True), torch.randn(12, DEPTH - 1, DIM)
    codes = torch.randint(CODES, (12, DEPTH))
    logits = head.logits(hidden, prefix)
    plain_nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
    nll, correct, _ = head(hidden, prefix, codes)
    torch.testing.assert_close(nll, plain_nll)
    assert torch.equal(correct, logits.argmax(-1) == codes)
    inputs = [hidden, *head.parameters()]
    for weight in (torch.tensor(0.7), torch.rand(12, DEPTH), torch.zeros(12, DEPTH)):
        nll = head(hidden, prefix, codes).nll
        plain_nll = torch.nn.functional.cross_entropy(
            head.logits(hidden, prefix).transpose(1, 2), codes, reduction="none"
        )
        got = torch.autograd.grad((weight * nll).sum(), inputs)
        expected = torch.autograd.grad((weight * plain_nll).sum(), inputs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_z_loss_equals_the_formula_gradients_included(chunk_size):
    torch.manual_seed(0)
    head = VisualHead(24, 2, 3, 96, DEPTH, DIM, CODES, chunk_size)
    head.init_weights()
    with torch.no_grad():
        head.classifier.mul_(20)
    text = TextHead(torch.nn.Linear(24, 9), chunk_size)
    hidden, prefix = torch.randn(12, 24, requires_grad=True), torch.randn(12, DEPTH - 1, DIM)
    codes, tokens = torch.randint(CODES, (12, DEPTH)), torch.randint(9, (12,))
    inputs = [hidden, *head.parameters(), *text.parameters()]
    # Alike, a weight per target, and the z-loss left out of the loss although it was asked for.
    for nll_weight, z_weight in ((0.7, 0.7), (torch.rand(12, 1), torch.rand(12, 1)), (0.7, 0.0)):
        ours, plain = torch.zeros(()), torch.zeros(())
        for logits, targets, scores in (
            (head.logits(hidden, prefix), codes, head(hidden, prefix, codes, 0.3)),
            (text(hidden)[:, None], tokens[:, None], text(hidden, tokens, 0.3)),
        ):
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            squared = logits.logsumexp(dim=-1).square()
            torch.testing.assert_close(scores.nll.view_as(nll), nll)
            torch.testing.assert_close(scores.z_loss.view_as(nll), 0.3 * squared)
            plain = plain + (nll_weight * nll + 0.3 * z_weight * squared).sum()
            found = nll_weight * scores.nll.view_as(nll) + z_weight * scores.z_loss.view_as(nll)
            ours = ours + found.sum()
        got, expected = torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_z_loss_of_a_batch_leaves_the_likelihoods_alone():
    model = tiny_model(sharpen=8.0)
    batch = pack_documents(documents(), 128).model_inputs()
    without, output = model(**batch), model(**batch, z_loss=5e-5)
    assert without.text_z_loss is None and without.visual_z_loss is None
    assert torch.equal(output.text_nll, without.text_nll)
    assert torch.equal(output.visual_nll, without.visual_nll)
    assert output.text_z_loss > 0 and (output.visual_z_loss > 0).all()
    assert output.visual_z_loss.shape == (2, DEPTH)
    untaught = pack_documents(tokenized(Document([TextPart("x", loss=False)])))
    idle = model(**untaught.model_inputs(), z_loss=1.0)
    assert idle.text_z_loss == 0 and (idle.visual_z_loss == 0).all()


def test_a_second_backward_pass_gives_the_same_gradients():
    head = TextHead(torch.nn.Linear(6, 9), chunk_size=2)
    hidden = torch.randn(5, 6, requires_grad=True)
    loss = 3 * head(hidden, torch.arange(5))[0].sum()
    first = torch.autograd.grad(loss, [hidden, head.weight, head.bias], retain_graph=True)
    first = [g.clone() for g in first]
    second = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_documents_equal_single_ones_gradients_included():
    model = tiny_model(sharpen=8.0)
    packed = model(**pack_documents(documents(), 150).model_inputs())
    got = gradients(model, packed.text_nll + packed.visual_nll.sum())
    alone = [model(**pack_documents([document]).model_inputs()) for document in documents()]
    torch.testing.assert_close(packed.text_nll, sum(o.text_nll for o in alone))
    torch.testing.assert_close(packed.visual_nll, sum(o.visual_nll for o in alone))
    assert_same_gradients(got, gradients(model, sum(o.text_nll + o.visual_nll.sum() for o in alone)))


def test_the_order_of_documents_does_not_matter():
    model = tiny_model(sharpen=8.0)
    forward, backward = (
        model(**pack_documents(order, 150).model_inputs()) for order in (documents(), documents()[::-1])
    )
    torch.testing.assert_close(forward.text_nll, backward.text_nll)
    torch.testing.assert_close(forward.visual_nll, backward.visual_nll)
    lengths = [int(d.visual_loss_mask.sum()) for d in documents()]
    pieces = backward.visual_position_nll.split(lengths[::-1])[::-1]
    torch.testing.assert_close(forward.visual_position_nll, torch.cat(pieces))


def test_first_tokens_are_never_targets():
    model = tiny_model(sharpen=8.0)
    batch = pack_documents(tokenized(plain("abc"), plain("def"))).model_inputs()
    expected = model(**batch)
    everywhere = model(**{**batch, "labels": batch["input_ids"]})
    assert everywhere.text_count == expected.text_count == batch["input_ids"].shape[1] - 2
    torch.testing.assert_close(everywhere.text_nll, expected.text_nll)


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model(sharpen=8.0).train()
    batch = pack_documents(documents(), 150).model_inputs()
    output = model(**batch)
    expected = gradients(model, output.text_nll + output.visual_nll.sum())
    model.activation_checkpointing_enable({"use_reentrant": False})
    output = model(**batch)
    assert_same_gradients(gradients(model, output.text_nll + output.visual_nll.sum()), expected)


def test_the_untrained_model_knows_nothing():
    model = DualTokenForCausalLM._from_config(
        tiny_config(codebook_size=512, head_hidden_size=96, head_num_attention_heads=4)
    )
    model.set_codebooks(0.01 * torch.randn(2, 1, 512, DIM))
    codes = torch.randint(512, (64, 4, 2, DEPTH))
    batch = pack_documents(tokenized(*(Document([ImagePart(c, loss=True)]) for c in codes)))
    output = model(**batch.model_inputs())
    per_depth = output.visual_nll / output.visual_count
    assert (per_depth - math.log(512)).abs().max() < 0.05
    assert (output.text_nll / output.text_count).item() == pytest.approx(math.log(264), abs=0.3)


@pytest.mark.parametrize(
    "kept", [[plain("words")], [Document([TextPart("x", loss=False)])], [caption("cat")]]
)
def test_every_part_runs_whatever_the_batch_holds(kept):
    """Gradients of parts without work are zeros, not missing, or ZeRO-3 would wait for them forever."""
    model = tiny_model()
    output = model(**pack_documents(tokenized(*kept)).model_inputs())
    got = gradients(model, output.text_nll + output.visual_nll.sum())
    assert got.keys() == dict(model.named_parameters()).keys()
    idle = [name for name in got if name.startswith(("pixel_", "semantic_"))]
    assert idle and all(got[name].abs().max() == 0 for name in idle)
    assert (
        output.visual_nll.sum() == 0 and output.visual_count == 0 and not output.visual_position_nll.numel()
    )
    embedder = [got[name].abs().max() for name in got if name.startswith("visual_embedder")]
    assert (max(embedder) > 0) == any(isinstance(p, ImagePart) for p in kept[0].parts)


@pytest.mark.parametrize("frozen", ["llm", "visual_embedder", "pixel_head", "semantic_projector"])
def test_gradients_reach_what_is_trained_and_only_that(frozen):
    model = tiny_model()
    model.parts()[frozen].requires_grad_(False)
    output = model(**pack_documents(documents()).model_inputs())
    got = gradients(model, output.text_nll + output.visual_nll.sum())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == trained and not any(name.startswith(frozen + ".") for name in got)
    assert all(g.abs().max() > 0 for g in got.values())


def test_frozen_heads_pass_gradients_on():
    model = tiny_model()
    batch = pack_documents(documents()).model_inputs()
    output = model(**batch)
    expected = gradients(model, output.visual_nll.sum())
    for part in ("pixel_head", "semantic_head"):
        model.parts()[part].requires_grad_(False)
    output = model(**batch)
    got = gradients(model, output.visual_nll.sum())
    assert_same_gradients(
        got, {n: g for n, g in expected.items() if "_head." not in n.replace("lm_head", "")}
    )


def test_parts_hold_every_parameter_once():
    model = tiny_model()
    ids = [id(p) for part in model.parts().values() for p in part.parameters()]
    assert sorted(ids) == sorted(id(p) for p in model.parameters()) and len(set(ids)) == len(ids)


def test_codebooks_stay_fp32(tmp_path):
    model = tiny_model()
    vectors = model.codebooks.vectors.clone()
    model.bfloat16()
    assert model.codebooks.vectors.dtype == torch.float32 and torch.equal(model.codebooks.vectors, vectors)
    assert model.pixel_head.classifier.dtype == torch.bfloat16
    output = model(**pack_documents(documents()).model_inputs())
    assert output.text_nll.dtype == output.visual_nll.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = DualTokenForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.codebooks.vectors, vectors)
    assert loaded.pixel_head.classifier.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "decoder, visual_input", [("qwen2", "both"), ("llama", "pixel"), ("qwen2", "semantic")]
)
def test_saved_and_loaded(tmp_path, decoder, visual_input):
    model = tiny_model(decoder=decoder, visual_input=visual_input)
    model.config.tokenizer_fingerprint = "abc"
    model.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json"} <= {f.name for f in tmp_path.iterdir()}
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["visual_input"] == visual_input
    batch = pack_documents(documents()).model_inputs()
    expected = model(**batch)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DualTokenConfig)
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert isinstance(loaded, DualTokenForCausalLM) and loaded.config.tokenizer_fingerprint == "abc"
        assert isinstance(loaded.get_output_embeddings(), TextHead)
        tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert tied == (decoder == "qwen2")
        output = loaded(**batch)
        assert torch.equal(output.text_nll, expected.text_nll)
        assert torch.equal(output.visual_nll, expected.visual_nll)


@pytest.mark.parametrize("rows, expected", [(300, 300), (258, 320)])
def test_built_around_a_pretrained_decoder(tmp_path, rows, expected):
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(
        Qwen2Config(
            hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=rows, tie_word_embeddings=True,
        )
    )  # fmt: skip
    base.save_pretrained(tmp_path)
    model = DualTokenForCausalLM.from_base(tiny_config(), str(tmp_path)).eval()
    assert model.config.text_config.intermediate_size == 40
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == expected
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = model.llm.state_dict()
    for name, value in base.state_dict().items():
        assert torch.equal(state[name][: len(value)], value), name
    for _, head in model.visual_heads():
        assert 0 < head.classifier.std() < 0.1
    ids = torch.randint(250, (1, 7))
    torch.testing.assert_close(
        model.llm(ids).logits[..., :250], base.eval()(ids).logits[..., :250], rtol=1e-5, atol=1e-5
    )
    model.set_codebooks(torch.randn(2, 1, CODES, DIM))
    model.save_pretrained(tmp_path / "unified")
    loaded = DualTokenForCausalLM.from_pretrained(tmp_path / "unified")
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_begin_token_in_saved_configs(tmp_path):
    """Configs saved before there was one open documents as they did."""
    six = {name: value for name, value in vars(IDS).items() if name != "begin_of_text"}
    for given, begin in ((six, IDS.end_of_text), ({**six, "begin_of_text": 1}, 1)):
        tiny_config(special_tokens=given).save_pretrained(tmp_path)
        special = AutoConfig.from_pretrained(tmp_path).special
        assert special.begin_of_text == begin and special.end_of_text == IDS.end_of_text


SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 264, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, message",
    [
        ("gemma2", "a 'gemma2' decoder with final_logit_softcapping=30.0 changes its logits .* Qwen2.5"),
        ("cohere", "a 'cohere' decoder with logit_scale=0.0625 changes its logits"),
        ("granite", "a 'granite' decoder with logits_scaling=8.0 changes its logits"),
        ("mamba", "MambaForCausalLM does not leave all mixing of tokens to .* take a decoder that does"),
        ("jamba", "JambaForCausalLM does not leave all mixing"),
    ],
)
def test_decoders_that_would_be_wrong_in_silence_are_refused(tmp_path, kind, message):
    given = {**SIZES, **({"logits_scaling": 8.0} if kind == "granite" else {})}
    decoder = AutoConfig.for_model(kind, **given)
    with pytest.raises(ValueError, match=message) as caught:
        DualTokenForCausalLM._from_config(tiny_config(text_config=decoder))
    assert "\n" not in str(caught.value)
    AutoModelForCausalLM.from_config(decoder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DualTokenForCausalLM.from_base(tiny_config(), str(tmp_path))


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "phi3", "gemma2", "granite"])
def test_other_decoders_keep_documents_apart_and_have_their_own_likelihoods(kind):
    plain_logits = {"gemma2": {"final_logit_softcapping": None}, "granite": {"logits_scaling": 1.0}}
    decoder = AutoConfig.for_model(kind, **SIZES, **plain_logits.get(kind, {}))
    model = tiny_model(text_config=decoder)
    rows = documents()
    packed = model(**pack_documents(rows).model_inputs())
    alone = [model(**pack_documents([row]).model_inputs()) for row in rows]
    torch.testing.assert_close(packed.text_nll, sum(one.text_nll for one in alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.visual_nll, sum(one.visual_nll for one in alone), rtol=1e-4, atol=1e-4)
    ids = rows[2].input_ids[None]
    logits = model.llm(input_ids=ids).logits[0].log_softmax(-1)
    nll = -logits[:-1].gather(1, ids[0, 1:, None])[rows[2].labels[1:] != -100].sum()
    torch.testing.assert_close(alone[2].text_nll, nll, rtol=1e-4, atol=1e-4)


def rewrite_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


DAMAGES = [
    (lambda w, n: w.pop(n), r"1 missing \({name}\); expected a whole checkpoint"),
    (lambda w, n: w.update({n + "_2": w[n].clone()}), r"1 unexpected \({name}_2\)"),
    (lambda w, n: w.update({n: w[n][:-1].clone()}), r"1 mismatched \({name} \(.*\) there, \(.*\) here\)"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
def test_weights_that_do_not_fit_are_refused(tmp_path, decoder, damage, message):
    tiny_model(decoder=decoder).save_pretrained(tmp_path / "unified")
    AutoModelForCausalLM.from_config(tiny_config(decoder).text_config).save_pretrained(tmp_path / "base")
    loads = {
        "pixel_head.classifier": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "unified"),
        "codebooks.vectors": lambda: DualTokenForCausalLM.from_pretrained(tmp_path / "unified"),
        "model.layers.0.mlp.down_proj.weight": lambda: DualTokenForCausalLM.from_base(
            tiny_config(), str(tmp_path / "base")
        ),
    }
    for name, load in loads.items():
        folder = tmp_path / ("base" if name.startswith("model.") else "unified")
        whole = (folder / "model.safetensors").read_bytes()
        load()
        rewrite_weights(folder, lambda weights, name=name: damage(weights, name))
        with pytest.raises(ValueError, match=message.format(name=re.escape(name))) as caught:
            load()
        assert "\n" not in str(caught.value)
        (folder / "model.safetensors").write_bytes(whole)


def test_wrong_inputs_are_named():
    model = tiny_model()
    batch = pack_documents(documents()).model_inputs()
    with pytest.raises(
        ValueError, match=r"20 image-pad tokens but 8 visual positions in codes; an image takes 4"
    ):
        model(**{**batch, "codes": batch["codes"][:8]})
    with pytest.raises(ValueError, match=r"codes have shape \(20, 2, 2\), expected \[V, 2, 3\]"):
        model(**{**batch, "codes": batch["codes"][..., :2]})
    for wrong, extremes in ((CODES, "0 to 11"), (-1, "-1 to 10")):
        codes = batch["codes"].clone()
        codes[0, 0, 0], codes[1, 0, 0], codes[2, 0, 0] = 0, CODES - 1, wrong
        message = f"codes go from {extremes}, expected 0 to 10: the codebooks have 11 codes; take the codes"
        with pytest.raises(ValueError, match=message):
            model(**{**batch, "codes": codes})
    with pytest.raises(ValueError, match=r"input_ids have shape \(2, 5\), expected \[1, T\]"):
        model(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"codebooks have shape \(2, 1, 4, 8\), the config asks for \(2, 1, 11, 8\)"
    ):
        model.set_codebooks(torch.zeros(2, 1, 4, 8))
    empty = DualTokenForCausalLM._from_config(tiny_config())
    with pytest.raises(ValueError, match="codebooks are not set: call set_codebooks"):
        empty(**batch)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"visual_input": "neither"}, "visual_input='neither'; expected one of 'both', 'pixel', 'semantic'"),
        ({"embedder": "sum"}, "embedder='sum'; expected one of 'concat_mlp', 'mlp_concat'"),
        ({"codebook_depths": 2}, "codebook_depths=2; expected one of 1, 3"),
        (
            {"head_num_attention_heads": 5},
            "head_hidden_size=24 is not divisible by head_num_attention_heads=5",
        ),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"special_tokens": {"image_pad": 3}}, r"special_tokens has the keys \['image_pad'\]"),
    ],
)
def test_wrong_configs_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)
