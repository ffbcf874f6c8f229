"""Attention within packed documents against one document at a time and against explicit masks."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from dualtoken.unified_model.attention import (
    describe,
    document_attention,
    loop_over_documents,
    varlen_documents,
)
from dualtoken.unified_model.sequence import pack_documents
from tests.support.unified_support import plain, tiny_model, tokenized

LENGTHS = [5, 1, 12, 3]


def tensors(heads=4, key_heads=2, lengths=LENGTHS, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    shape = lambda n: torch.randn(1, n, sum(lengths), 16, dtype=dtype, device=device, requires_grad=True)  # noqa: E731
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    return shape(heads), shape(key_heads), shape(key_heads), borders


def masked(query, key, value, borders):
    """The textbook version: one softmax over the row, other documents and the future masked out."""
    document = torch.bucketize(torch.arange(query.shape[2]), borders[1:], right=True)
    seen = (document[:, None] == document[None]).tril()
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (4, 1)])
def test_documents_equal_an_explicit_mask_gradients_included(heads, key_heads):
    query, key, value, borders = tensors(heads, key_heads)
    weights = torch.randn(1, sum(LENGTHS), heads, 16)
    results = []
    for function in (
        lambda: masked(query, key, value, borders),
        lambda: document_attention(None, query, key, value, None, cu_seq_lens_q=borders)[0],
    ):
        output = function()
        results.append([output, *torch.autograd.grad((output * weights).sum(), (query, key, value))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def tiny_decoder(attention):
    torch.manual_seed(1)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def test_a_decoder_treats_packed_documents_like_single_ones():
    model = tiny_decoder("document")
    ids = torch.randint(50, (1, sum(LENGTHS)))
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    packed = model(
        ids, position_ids=positions, use_cache=False, cu_seq_lens_q=borders, cu_seq_lens_k=borders,
        max_length_q=max(LENGTHS), max_length_k=max(LENGTHS),
    ).logits  # fmt: skip
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


def test_without_borders_it_is_the_decoders_usual_attention():
    """Prefill, a cache continued by several tokens, by one token, and padding: all as with sdpa."""
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(2))
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, :4] = 0
    outputs = []
    for attention in ("document", "sdpa"):
        model = tiny_decoder(attention)
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:8], past_key_values=first.past_key_values)
        third = model(ids[:, 8:], past_key_values=second.past_key_values)
        padded = model(ids, attention_mask=padding).logits * padding[..., None]
        outputs.append([model(ids).logits, first.logits, second.logits, third.logits, padded])
    for got, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_misuse_is_named():
    query, key, value, borders = tensors()
    rows = [t.expand(2, -1, -1, -1) for t in (query, key, value)]
    with pytest.raises(ValueError, match="one row without a mask, got 2 rows;"):
        document_attention(None, *rows, None, cu_seq_lens_q=borders)
    mask = torch.ones(1, 1, 21, 21, dtype=torch.bool)
    with pytest.raises(ValueError, match="got 1 rows and a mask"):
        document_attention(None, query, key, value, mask, cu_seq_lens_q=borders)
    match = "document of 12 tokens exceeds .* window of 8; set use_sliding_window.*sliding_window=None"
    with pytest.raises(ValueError, match=match):
        document_attention(None, query, key, value, None, cu_seq_lens_q=borders, sliding_window=8)
    gpt_oss = AutoConfig.for_model(
        "gpt_oss", hidden_size=32, num_hidden_layers=1, intermediate_size=48, num_attention_heads=4,
        head_dim=8, num_key_value_heads=2, vocab_size=264, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = tiny_model(text_config=gpt_oss)
    with pytest.raises(ValueError, match="GptOssAttention has attention sinks, .* without them, such as"):
        model(**pack_documents(tokenized(plain("x"))).model_inputs())


def test_the_choice_is_described():
    assert describe("cpu", torch.bfloat16) == "scaled dot product attention, document by document"


@pytest.mark.gpu
def test_the_variable_length_kernel_equals_the_loop():
    query, key, value, borders = tensors(dtype=torch.bfloat16, device="cuda")
    arguments = (query, key, value, borders, max(LENGTHS), 0.0, None)
    results = []
    for function in (loop_over_documents, varlen_documents):
        output = function(*arguments)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), (query, key, value))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
