"""A tiny unified model and documents for it, shared by the tests of the language model."""

from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from dualtoken.projection import AttentionProjection
from dualtoken.unified_model.config import DualTokenConfig, feature_fields
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import (
    Document,
    ImageLayout,
    ImagePart,
    SpecialTokens,
    TextPart,
    add_special_tokens,
    tokenize_document,
)
from dualtoken.unified_model.tiles import Tiles
from dualtoken.unified_model.vision_tower import VisionTower

POSITIONS, DEPTH, CODES, DIM = 4, 3, 11, 8
IMAGE_SIZE, SEEN = 32, 9  # pixels a side, continuous features per image
ONE_CODE = {"num_codebooks": 1, "num_quantizers": 1}  # of a position, as VQ models of others have it
VOCABULARY = {**ONE_CODE, "codes_as": "vocabulary"}
TILES = Tiles([[1, 2], [2, 1], [2, 2]], IMAGE_SIZE)
SIZES = [(40, 60), (33, 90), (64, 64), (70, 31)]  # of pictures in tiles: each grid, with margins and without
FEATURES = {"visual_features": "post_quantization", "post_quantization_dim": 16}


def byte_tokenizer(special: bool = True, features: bool = False) -> PreTrainedTokenizerFast:
    """A text tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if special:
        add_special_tokens(text_tokenizer, features)
    return text_tokenizer


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """One with LLaMA's marks: `<s>` opens a document, `</s>` ends it, there is no `<|endoftext|>`."""
    text_tokenizer = byte_tokenizer(special=False)
    text_tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return text_tokenizer


TOKENIZER = byte_tokenizer()
IDS = SpecialTokens.from_tokenizer(TOKENIZER)
FEATURE_TOKENIZER = byte_tokenizer(features=True)
FEATURE_IDS = SpecialTokens.from_tokenizer(FEATURE_TOKENIZER)


def tiny_config(decoder: str = "qwen2", initializer_range: float = 0.02, **overrides) -> DualTokenConfig:
    sizes = {
        "initializer_range": initializer_range,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 264, "max_position_embeddings": 512,
    }  # fmt: skip
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[decoder]
    fields = {
        "text_config": kind(**sizes, tie_word_embeddings=decoder == "qwen2"),
        "codebook_size": CODES, "codebook_dim": DIM, "num_quantizers": DEPTH,
        "positions_per_image": POSITIONS, "image_size": IMAGE_SIZE, "head_hidden_size": 24,
        "head_num_layers": 2, "head_num_attention_heads": 3, "chunk_size": 5, "special_tokens": vars(IDS),
    }  # fmt: skip
    config = DualTokenConfig(**{**fields, **overrides})
    config.make_room(0)
    return config


def tiny_model(seed: int = 0, sharpen: float = 1.0, **overrides) -> DualTokenForCausalLM:
    """A tiny model in eval mode; `sharpen` scales the output layers away from uniform predictions."""
    torch.manual_seed(seed)
    config = tiny_config(**overrides)
    model = DualTokenForCausalLM._from_config(config)
    model.set_codebooks(torch.randn(config.num_codebooks, config.codebook_depths, CODES, DIM))
    if model.post_quantization is not None:
        model.set_post_quantization(*projections(config.post_quantization_dim))
    if model.vision_tower is not None:
        model.set_vision_tower(vision_model())
    with torch.no_grad():
        for _, head in model.visual_heads():
            head.classifier.mul_(sharpen)
        model.get_output_embeddings().weight.mul_(sharpen**0.5)
    return model.eval()


def projections(width: int = 16, causal: bool = True) -> list[AttentionProjection]:
    """Projections behind the quantizers, as a visual tokenizer has them."""
    torch.manual_seed(11)
    return [AttentionProjection(DIM, width, causal) for _ in range(2)]


def vision_model(seed: int = 12, layers: int = 3) -> SiglipVisionModel:
    """A whole SigLIP tower with 3 x 3 patches of 10 pixels, two pixels at the edges left over."""
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        image_size=IMAGE_SIZE, patch_size=10,
    )  # fmt: skip
    return SiglipVisionModel._from_config(config).eval()


def seeing(visual_input: str = "codes_and_features", inside: bool = True, tiles: Tiles | None = None) -> dict:
    """Fields of the config of a model that reads continuous features, of a tower inside or brought along."""
    fields = feature_fields(VisionTower.of_model(vision_model()), inside)
    fields |= {"tiles": [list(grid) for grid in tiles.grids]} if tiles else {}
    return {"visual_input": visual_input, "special_tokens": vars(FEATURE_IDS), **fields}


def random_pixels(seed: int) -> torch.Tensor:
    """An image as uint8 [3, S, S]."""
    shape = (3, IMAGE_SIZE, IMAGE_SIZE)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def in_tiles(document: Document, layout: ImageLayout) -> Document:
    """The document for a layout: with tiles, each image is the base picture of one of `SIZES`."""
    parts = list(document.parts)
    for index, part in enumerate(parts):
        whole = isinstance(part, ImagePart) and part.features is not None and part.size is None
        if layout.tiles and whole:
            seed = int(part.features.sum())
            size = SIZES[seed % len(SIZES)]
            shape = (layout.tiles.crops(size) - 1, *part.features.shape)
            tiles = torch.randint(
                256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
            )
            parts[index] = replace(part, features=torch.cat([part.features[None], tiles]), size=size)
    return replace(document, parts=parts)


def random_codes(generator: torch.Generator | None = None, positions: int = POSITIONS) -> torch.Tensor:
    return torch.randint(CODES, (positions, 2, DEPTH), generator=generator)


def caption(text: str, seed: int = 0) -> Document:
    codes = random_codes(torch.Generator().manual_seed(seed))
    image = ImagePart(codes, features=random_pixels(seed))
    return Document([image, TextPart("Say: ", loss=False), TextPart(text)], f"caption {text}")


def generation(text: str, seed: int = 0) -> Document:
    codes = random_codes(torch.Generator().manual_seed(seed))
    image = ImagePart(codes, loss=True, features=random_pixels(seed))
    return Document([TextPart(text, loss=False), image], f"generate {text}")


def with_one_code(*documents: Document) -> list[Document]:
    """The same documents with the first code of every position alone."""
    images = {
        id(p): replace(p, codes=p.codes[:, :1, :1]) for d in documents for p in d.parts if hasattr(p, "codes")
    }
    return [replace(d, parts=[images.get(id(part), part) for part in d.parts]) for d in documents]


def plain(text: str) -> Document:
    return Document([TextPart(text)], f"text {text}")


def tokenized(*documents: Document, layout: ImageLayout | None = None):
    ids = FEATURE_IDS if layout and layout.features else IDS
    documents = tuple(in_tiles(document, layout or ImageLayout()) for document in documents)
    return [tokenize_document(document, TOKENIZER, ids, layout=layout) for document in documents]
