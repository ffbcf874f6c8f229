"""Checkpointing in full and of all but products: same gradients, bytes between all and the least."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualtoken.unified_model.sequence import pack_documents
from pretrain.activations import decoder_layer_products
from pretrain.config import ConfigError
from pretrain.mllm_task import MllmJobConfig
from pretrain.recomputation import PRODUCTS, checkpoint_activations
from tests.support.unified_support import caption, generation, plain, tiny_model, tokenized

LONG = "some words that make the document longer"


def batch(repeated: int = 1):
    documents = [caption("a cat"), generation("dog"), *[plain(LONG)] * repeated]
    return pack_documents(tokenized(*documents), 40 + 45 * repeated).model_inputs()


def model_keeping(kept):
    model = tiny_model(sharpen=8.0).train()
    if kept != "everything":
        checkpoint_activations(model, kept)
    return model


def loss_of(output):
    return output.text_nll + output.visual_nll.sum()


class CountProducts(TorchDispatchMode):
    """Counts the operators that `PRODUCTS` names."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in PRODUCTS
        return func(*args, **(kwargs or {}))


def forward_and_backward(kept):
    """Loss, gradients, and how many products the decoder's passes took."""
    model = model_keeping(kept)
    with CountProducts() as forward:
        loss = loss_of(model(**batch()))
    with CountProducts() as backward:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), gradients, (forward.count, backward.count)


def test_gradients_are_the_same_and_products_are_computed_once():
    loss, gradients, (forward, backward) = forward_and_backward("everything")
    counts = {}
    for kept in ("nothing", "products"):
        same_loss, same_gradients, counts[kept] = forward_and_backward(kept)
        assert torch.equal(same_loss, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert counts["products"] == (forward, backward)
    # Of each of two layers, seven matrix products and attention in three documents.
    assert counts["nothing"] == (forward, backward + 2 * (7 + 3))


def kept_bytes(kept, repeated):
    """Bytes that the forward pass leaves allocated for the backward pass."""
    model, inputs = model_keeping(kept), batch(repeated)
    with torch.profiler.profile(profile_memory=True) as profile:
        output = model(**inputs)
    del output
    return sum(
        event.self_device_memory_usage or event.self_cpu_memory_usage for event in profile.key_averages()
    )


def test_products_take_fewer_bytes_than_everything_and_more_than_nothing():
    """By what further tokens add, so that nothing else counts; fp32."""
    more = {}
    for kept in ("nothing", "products", "everything"):
        few, many = kept_bytes(kept, 1), kept_bytes(kept, 5)
        more[kept] = (many - few) / (batch(5)["input_ids"].shape[1] - batch(1)["input_ids"].shape[1])
    assert 0 < more["nothing"] < 0.9 * more["products"] < 0.8 * more["everything"]
    config = tiny_model().decoder_config
    expected = config.num_hidden_layers * decoder_layer_products(config, weight=4)
    assert more["products"] - more["nothing"] == pytest.approx(expected, rel=0.02)


def test_keeping_more_needs_checkpointing():
    with pytest.raises(ConfigError, match="checkpointing_keeps=products: .* set gradient_checkpointing=true"):
        MllmJobConfig(
            run_dir="x", steps=1, global_batch_size=1, micro_batch_size=1, checkpointing_keeps="products"
        )
