"""Configuration of the visual tokenizer and its presets, from the paper's scale down to tests."""

from typing import Any, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from transformers.configuration_utils import PretrainedConfig, SubConfigSpec


@strict
class DualTokenVisualTokenizerConfig(PretrainedConfig):
    """Every figure of a visual tokenizer; the defaults are the paper's SO400M/14-384 (arXiv 2503.14324).

    Args:
        vision_config: fields of a ``SiglipVisionConfig``.
        text_config: fields of a ``SiglipTextConfig`` if the text tower is kept, else None.
        reconstruction_layer: layer read by the pixel branch.
        semantic_layer: layer read by the semantic branch; the layers behind it run on its quantized features.
        shortcut_layer: second, shallower layer of the pixel branch, or None.
        shortcut_weight: its weight in the sum.
        pixel_attention: attention between positions in the pixel branch's projections in front of the
            quantizer, as in the released models. Without it, pixel codes say less of what is elsewhere in
            the picture and are easier to predict; with ``reconstruction_layer=0`` besides, a position's
            pixel codes are a function of its patch alone.
        merged_codebook: ablation: the pixel branch reads the codes of the semantic branch, one codebook for
            both.
        quantizer: "rvq" (residual) or "mcq" (multi-codebook).
        codebook_size: K.
        codebook_dim: width of latents.
        num_quantizers: D.
        shared_codebook: one codebook for all depths of a branch (rvq).
        codebook_decay: of the moving averages.
        restart_unused_codes: replace codes that went out of use.
        restart_threshold: average number of vectors per step below which a code counts as unused.
        codebook_seed: seed of the restarts.
        latent_norm: layer norm without parameters on the latents, in front of the quantizer. Without it the
            scale of the latents can run away from the codebook; the released models do without.
        causal_post_quantization: causal attention behind the quantizer.
        decoder_in_channels: channels behind the post-quantization block.
        decoder_channels: width of the decoder at full resolution.
        decoder_channel_multipliers: width factors, full resolution first; each after the first doubles the
            resolution.
        decoder_num_res_blocks: residual blocks a level, less one.
        decoder_attention_resolutions: resolutions with attention.
        decoder_latent_size: height of the decoder's input; latents are resized to it (None: the grid of the
            backbone).
        decoder_pixel_shuffle: pixels a side painted by each position of the decoder's last level.
    """

    model_type = "dualtoken_visual_tokenizer"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(SiglipVisionConfig),
        "text_config": SubConfigSpec(SiglipTextConfig, optional=True),
    }

    vision_config: dict | PretrainedConfig | None = None
    text_config: dict | PretrainedConfig | None = None
    reconstruction_layer: int = 6
    semantic_layer: int = 26
    shortcut_layer: int | None = 4
    shortcut_weight: float | int = 0.6
    pixel_attention: bool = True
    merged_codebook: bool = False
    quantizer: str = "rvq"
    codebook_size: int = 16384
    codebook_dim: int = 32
    num_quantizers: int = 8
    shared_codebook: bool = True
    codebook_decay: float | int = 0.99
    restart_unused_codes: bool = True
    restart_threshold: float | int = 1.0
    codebook_seed: int = 0
    latent_norm: bool = False
    causal_post_quantization: bool = True
    decoder_in_channels: int = 1024
    decoder_channels: int = 128
    decoder_channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 4, 4, 8)
    decoder_num_res_blocks: int = 2
    decoder_attention_resolutions: list[int] | tuple[int, ...] = (24,)
    decoder_latent_size: int | None = 24
    decoder_pixel_shuffle: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the towers' configs and check that the numbers fit each other."""
        if self.vision_config is None:
            self.vision_config = dict(_SO400M_VISION, image_size=384, patch_size=14)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        vision = self.vision
        if not (isinstance(vision.image_size, int) and isinstance(vision.patch_size, int)):
            raise ValueError(
                f"image_size={vision.image_size}, patch_size={vision.patch_size}; "
                "images and patches must be square, each given by one number"
            )
        layers = vision.num_hidden_layers
        taps = {"reconstruction_layer": self.reconstruction_layer, "semantic_layer": self.semantic_layer}
        if self.shortcut_layer is not None:
            taps["shortcut_layer"] = self.shortcut_layer
        for name, layer in taps.items():
            if not 0 <= layer <= layers:
                raise ValueError(f"{name}={layer}, but the backbone has layers 0 to {layers}")
        if self.quantizer not in ("rvq", "mcq"):
            raise ValueError(f"quantizer={self.quantizer!r}; choose 'rvq' or 'mcq'")
        wide, narrow = max(vision.hidden_size, self.codebook_dim), min(vision.hidden_size, self.codebook_dim)
        if wide % narrow:
            raise ValueError(
                f"codebook_dim={self.codebook_dim} must divide the backbone's width {vision.hidden_size}"
            )
        if self.quantizer == "mcq" and self.codebook_dim % self.num_quantizers:
            raise ValueError(
                f"quantizer='mcq' needs num_quantizers={self.num_quantizers} to divide "
                f"codebook_dim={self.codebook_dim}"
            )
        if self.codebook_size > 65536:
            raise ValueError(
                f"codebook_size={self.codebook_size}; codes are stored in 16 bits, so at most 65536"
            )

    @property
    def vision(self) -> SiglipVisionConfig:
        """The config of the vision tower, with its type."""
        return cast(SiglipVisionConfig, self.vision_config)

    @property
    def text(self) -> SiglipTextConfig | None:
        """The config of the text tower, with its type."""
        return cast(SiglipTextConfig | None, self.text_config)

    @property
    def num_codebooks(self) -> int:
        """Codebooks that codes are of, Q: pixel and semantic."""
        return 2

    @property
    def image_size(self) -> int:
        """Height and width of the input in pixels."""
        return cast(int, self.vision.image_size)

    @property
    def grid_size(self) -> int:
        """Positions along each side of the image."""
        return self.image_size // cast(int, self.vision.patch_size)

    @property
    def positions(self) -> int:
        """Positions per image, P."""
        return self.grid_size**2

    @property
    def pixels_of_patches_alone(self) -> bool:
        """Whether a position's pixel codes are a function of its patch, wherever that is."""
        return self.reconstruction_layer == 0 and not self.pixel_attention

    @property
    def latent_size(self) -> int:
        """Height and width of the decoder's input."""
        return self.grid_size if self.decoder_latent_size is None else self.decoder_latent_size

    @property
    def reconstruction_size(self) -> int:
        """Height and width of decoded images in pixels."""
        doublings = len(self.decoder_channel_multipliers) - 1
        return self.latent_size * 2**doublings * self.decoder_pixel_shuffle

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: all fields of this class and of the towers, with defaults."""
        full = self.to_dict()
        kept = {name: full[name] for name in ("architectures", "dtype", "model_type", "transformers_version")}
        kept |= {name: full[name] for name in DualTokenVisualTokenizerConfig.__annotations__}
        for name, kind in (("vision_config", SiglipVisionConfig), ("text_config", SiglipTextConfig)):
            if full[name] is not None:
                kept[name] = {field: full[name][field] for field in ("model_type", *kind.__annotations__)}
        return kept

    def image_processor_settings(self) -> dict[str, Any]:
        """Return the ``preprocessor_config.json`` of this tokenizer: bicubic resizing, values to [-1, 1]."""
        return image_processor_settings(self.image_size)

    def backbone_config(self) -> SiglipConfig:
        """Return the config of a SigLIP model with these towers, to train or load one that fits.

        Raises:
            ValueError: if this config has no text tower.
        """
        if self.text is None:
            raise ValueError("text_config is None: a SigLIP model needs a text tower")
        return SiglipConfig(vision_config=self.vision.to_dict(), text_config=self.text.to_dict())


def image_processor_settings(size: int) -> dict[str, Any]:
    """Return a ``preprocessor_config.json``: bicubic resizing to `size` pixels a side, values to [-1, 1]."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


# What a vision tower's config has to share with a tokenizer's for its weights to fit.
VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)

_SO400M_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
_SENTENCEPIECE = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
_SO400M_TEXT = {**_SO400M_VISION, **_SENTENCEPIECE, "vocab_size": 32000, "max_position_embeddings": 64}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_DECODER_256 = {
    "decoder_channel_multipliers": (1, 1, 2, 2, 4),
    "decoder_attention_resolutions": (16,),
    "decoder_latent_size": None,
}

PRESETS: dict[str, dict[str, Any]] = {
    "so400m_384": {  # arXiv 2503.14324 and the released configuration
        "vision_config": {**_SO400M_VISION, "image_size": 384, "patch_size": 14},
        "text_config": _SO400M_TEXT,
    },
    "siglip_l_256": {
        "vision_config": {**_LARGE, "image_size": 256, "patch_size": 16},
        "text_config": {**_LARGE, **_SENTENCEPIECE, "vocab_size": 32000, "max_position_embeddings": 64},
        "semantic_layer": 23,
        "num_quantizers": 4,
        **_DECODER_256,
    },
    "siglip2_so400m_256": {
        "vision_config": {**_SO400M_VISION, "image_size": 256, "patch_size": 16},
        "text_config": {**_SO400M_TEXT, "vocab_size": 256000},
        **_DECODER_256,
    },
    "quickstart": {  # 64 pixels on two CPU cores
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
        },
        "text_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 4096,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "max_position_embeddings": 16,
        },
        # Pixel codes of a patch alone: those of the first layer are hard to predict (docs/quickstart.md).
        "reconstruction_layer": 0,
        "semantic_layer": 3,
        "shortcut_layer": None,
        "pixel_attention": False,
        # Few codes, so that each is seen in much company: combinations never seen need no codes of their own.
        "codebook_size": 64,
        "codebook_dim": 64,
        "num_quantizers": 8,
        "shared_codebook": False,
        "latent_norm": True,
        "decoder_in_channels": 64,
        "decoder_channels": 32,
        "decoder_channel_multipliers": (1, 1, 2, 2),
        "decoder_num_res_blocks": 0,
        "decoder_attention_resolutions": (),
        "decoder_latent_size": None,
        "decoder_pixel_shuffle": 2,
    },
    "tiny": {  # for tests
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "max_position_embeddings": 8,
        },
        "reconstruction_layer": 1,
        "semantic_layer": 3,
        "shortcut_layer": None,
        "codebook_size": 32,
        "codebook_dim": 8,
        "num_quantizers": 2,
        "latent_norm": True,
        "decoder_in_channels": 32,
        "decoder_channels": 16,
        "decoder_channel_multipliers": (1, 1, 2),
        "decoder_num_res_blocks": 0,
        "decoder_attention_resolutions": (),
        "decoder_latent_size": None,
    },
}


def preset_config(name: str, **overrides: Any) -> DualTokenVisualTokenizerConfig:
    """Return the preset ``name`` with single fields replaced.

    Raises:
        ValueError: on an unknown preset or field, a wrong type, or numbers that do not fit each other.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown visual tokenizer preset {name!r}; choose one of {', '.join(PRESETS)}")
    known = {field for field in DualTokenVisualTokenizerConfig.__annotations__}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(
            f"unknown visual tokenizer field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    try:
        return DualTokenVisualTokenizerConfig(**{**PRESETS[name], **overrides})
    except StrictDataclassError as error:
        raise ValueError(f"visual tokenizer preset {name!r}: {' '.join(str(error).split())}") from error
