"""Unified models that read continuous features, beside those of a tiny run."""

import torch

from dualtoken.unified_model.config import DualTokenConfig, feature_fields
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import add_special_tokens
from dualtoken.unified_model.vision_tower import VisionTower
from dualtoken.visual_tokenizer.backbone import load_backbone
from eval.inputs import load_visual_tokenizer
from tests.support.tiny_run import text_tokenizer

DECODER = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


def export_seeing(run, name, visual_input="features", inside=True, layer=None, factor=20.0, **fields):
    """Export an untrained model that reads features of the run's SigLIP; returns its folder.

    With the tower inside or outside, and whatever it reads, models share what they have in common; `factor`
    makes what they write depend on what they see.
    """
    words = text_tokenizer()
    add_special_tokens(words, features=True)
    tokenizer = load_visual_tokenizer(run / "tokenizer" / "export")
    whole = load_backbone(run / "siglip" / "export").vision_model
    tower = VisionTower.of_model(whole, layer)
    torch.manual_seed(0)
    model = DualTokenForCausalLM(
        DualTokenConfig.for_tokenizers(
            DECODER, words, tokenizer, head_hidden_size=32, head_num_layers=1, head_num_attention_heads=2,
            visual_input=visual_input, **feature_fields(tower, inside), **fields,
        )
    )  # fmt: skip
    model.set_codebooks(tokenizer.codebooks())
    own = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.dim() > 1 and not part.startswith("vision_tower."):
                parameter.normal_(0, factor * 0.02, generator=own)
    if inside:
        model.set_vision_tower(whole)
    model.save_pretrained(run / name)
    words.save_pretrained(run / name)
    return run / name
