"""A run folder as the quickstart leaves it, with tiny untrained models on real shards."""

import io
import json

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipModel
from webdataset import TarWriter

from data_pipeline.shards.code_shards import CodeSample, DatasetManifest, ShardWriter
from data_pipeline.streams import prepare_dataset
from dualtoken.unified_model.model import DualTokenConfig, DualTokenForCausalLM
from dualtoken.unified_model.sequence import add_special_tokens
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer

COLOURS = ["red", "green", "blue", "yellow", "black", "orange"]
GERMAN = ["rot", "gelb", "blau", "schwarz"]


def captions_of(index):
    return {"en": COLOURS[index % 6], "de": GERMAN[index % 4]}


def picture(index):
    image = Image.new("RGB", (24, 20), COLOURS[index % 6])
    image.putpixel((index, index), (255, 255, 255))
    return image


def write_images(folder, first, count):
    folder.mkdir(parents=True)
    with TarWriter(str(folder / "shard-000000.tar"), encoder=False) as writer:
        for index in range(first, first + count):
            png = io.BytesIO()
            picture(index).save(png, "PNG")
            record = json.dumps({"captions": captions_of(index)}).encode()
            writer.write({"__key__": f"picture{index:02d}", "png": png.getvalue(), "json": record})
    prepare_dataset(folder)


def text_tokenizer():
    words = ["<|endoftext|>", "[unk]", "English", "German", ":", *COLOURS, *GERMAN]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", unk_token="[unk]")
    fast.add_special_tokens({"eos_token": "<|endoftext|>"})
    add_special_tokens(fast)
    return fast


def write_codes(folder, tokenizer, first, count):
    folder.mkdir(parents=True)
    config = tokenizer.config
    manifest = DatasetManifest(
        tokenizer.fingerprint(),
        config.codebook_size,
        config.num_quantizers,
        config.positions,
        config.image_size,
    )
    draw = np.random.default_rng(first)
    with ShardWriter(folder / "shard-000000.tar", manifest.geometry) as writer:
        for index in range(first, first + count):
            codes = draw.integers(0, config.codebook_size, (1, *manifest.geometry.shape)).astype("uint16")
            parts = [{"image": 0}, {"text": captions_of(index)["en"]}]
            writer.write(CodeSample(f"picture{index:02d}", codes, parts, captions_of(index)))
    writer.entry.samples_in = writer.entry.samples
    manifest.add("shard-000000.tar", writer.entry)
    manifest.save(folder)


def make_tiny_run(folder):
    """Fill a folder: 12 pictures seen, 5 held out, a SigLIP, a visual tokenizer, codes, a unified model."""
    torch.manual_seed(0)
    write_images(folder / "sample_data" / "images" / "train" / "drawings", 0, 12)
    write_images(folder / "sample_data" / "images" / "val" / "drawings", 12, 5)
    words = text_tokenizer()
    config = preset_config("tiny")
    siglip = SiglipModel(config.backbone_config())
    siglip.save_pretrained(folder / "siglip" / "export")
    words.save_pretrained(folder / "siglip" / "export")
    tokenizer = DualTokenVisualTokenizer.from_backbone(config, folder / "siglip" / "export")
    tokenizer.save_pretrained(folder / "tokenizer" / "export")
    write_codes(folder / "codes" / "train", tokenizer, 0, 12)
    write_codes(folder / "codes" / "val", tokenizer, 12, 5)
    decoder = {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    unified = DualTokenForCausalLM(
        DualTokenConfig.for_tokenizers(
            decoder, words, tokenizer, head_hidden_size=32, head_num_layers=1, head_num_attention_heads=2
        )
    )
    unified.set_codebooks(tokenizer.codebooks())
    unified.save_pretrained(folder / "mllm" / "export")
    words.save_pretrained(folder / "mllm" / "export")
    return folder
