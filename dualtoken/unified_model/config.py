"""Configuration of the unified language model."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig, SubConfigSpec

from dualtoken.unified_model.sequence import FEATURE_SPECIAL, SPECIAL, ImageLayout, SpecialTokens
from dualtoken.unified_model.tiles import Tiles
from dualtoken.unified_model.vision_tower import VisionTower, features_per_image
from dualtoken.unified_model.visual_embedder import CODEBOOKS

if TYPE_CHECKING:
    from dualtoken.visual_tokenizer.loading import VisualTokenizer


HEAD_PRESETS: dict[str, dict[str, Any]] = {
    # Of the settings whose heads have the 258 M parameters of arXiv 2503.14324, which gives no width, those
    # with the rounder one: 258,011,136 with 8 depths of 16384 codes of 32 dimensions (docs/planner.md).
    "paper_258m": {
        "head_hidden_size": 1536,
        "head_num_layers": 3,
        "head_num_attention_heads": 12,
        "head_intermediate_size": 3072,
    },
}
"""Sizes of the visual heads by name, for `preset` among a recipe's `model.heads`."""

WITH_FEATURES = ("features", "codes_and_features", "pixel_and_features")
"""Values of `visual_input` by which continuous features are read."""

LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Fields by which transformers' decoders cap or scale their logits."""


class DualTokenConfig(PretrainedConfig):
    """Every figure of a `DualTokenForCausalLM`; the defaults are the paper's 384 px model (arXiv 2503.14324).

    Args:
        text_config: config of the decoder, of a kind that `AutoModelForCausalLM` builds.
        codebook_size: K.
        codebook_dim: E, width of a code vector.
        num_codebooks: Q, 2 of the dual tokenizer, 1 of a VQ model of others, whose codes are of pixels.
        num_quantizers: D.
        codebook_depths: 1 if all depths share a codebook, else D.
        positions_per_image: P.
        image_size: pixels a side of the visual tokenizer's images.
        visual_input: what the decoder reads of an image, in training, in prompts and while it draws: the
            vectors of one codebook, "pixel" or "semantic", or of "both"; "features", the continuous features
            of a vision tower; "codes_and_features", first both codebooks' vectors, then the features, as
            UniToken does; or "pixel_and_features", before them the pixel codebook's vectors alone, a dual
            encoder. Of a single codebook, "both" is that one. It writes all codebooks in any case, and reads
            what it writes as codes until it is complete; there are no weights for vectors that are not read.
        codes_as: what codes are to the language model: "vectors", which the embedder reads and the visual
            heads write; or "vocabulary", rows of its vocabulary beside those of text, which its embedding
            reads and its output layer writes, as in Chameleon and UniToken. Needs one codebook of one depth.
        first_code: row of code 0 in the vocabulary; None for vectors. `make_room` sets it.
        vision_config: settings of the vision tower in the model (`vision_tower.tower_settings`); None
            without features, and where they come precomputed.
        feature_dim: C, width of a continuous feature; None without.
        features_per_image: N, of an image or, with tiles, of each of its crops; 0 without.
        tiles: grids [rows, columns] of tiles, one of which an image is cut into besides being read whole,
            each row of features followed by a learned vector (`Tiles`); empty to read it whole alone.
        feature_fingerprint: of the vision tower that precomputed features come from.
        embedder: "concat_mlp" joins the two vectors of a position and maps them to the decoder's width by
            one MLP; "mlp_concat" has an MLP each, for half the width.
        place_embedding: add a learned embedding of a position's place in its image to what the embedder
            makes of its codes. The published models have none: their decoders learn places from rotary
            positions, which takes a small one long.
        visual_features: what the decoder reads of a position: "code_vectors", the sums of its code vectors,
            or "post_quantization", what the visual tokenizer's frozen causal projections make of them and of
            the positions before.
        post_quantization_dim: width of the post-quantization features, that of the visual tokenizer's
            tower; None for code vectors.
        head_hidden_size: width of the depth transformers.
        head_num_layers: their layers.
        head_num_attention_heads: their attention heads.
        head_intermediate_size: width of their MLPs; None for four times head_hidden_size.
        chunk_size: positions whose logits are computed at a time in training; fewer need less memory and
            more time.
        special_tokens: field of `SpecialTokens` -> id.
        tokenizer_fingerprint: of the visual tokenizer whose codes the model speaks.
    """

    model_type = "dualtoken"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2")}

    text_config: dict | PretrainedConfig | None = None
    codebook_size: int = 16384
    codebook_dim: int = 32
    num_codebooks: int = 2
    num_quantizers: int = 8
    codebook_depths: int = 1
    positions_per_image: int = 729
    image_size: int = 384
    codes_as: str = "vectors"
    first_code: int | None = None
    visual_input: str = "both"
    vision_config: dict[str, Any] | None = None
    feature_dim: int | None = None
    features_per_image: int = 0
    tiles: list[list[int]] | None = None
    feature_fingerprint: str = ""
    embedder: str = "concat_mlp"
    place_embedding: bool = False
    visual_features: str = "code_vectors"
    post_quantization_dim: int | None = None
    head_hidden_size: int = 2048
    head_num_layers: int = 3
    head_num_attention_heads: int = 16
    head_intermediate_size: int | None = None
    chunk_size: int = 128
    special_tokens: dict[str, int] | None = None
    tokenizer_fingerprint: str = ""
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the decoder's config and check the values."""
        super().__post_init__(**kwargs)
        if self.tiles is None:
            self.tiles = []
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self._check()

    def _check(self) -> None:
        for field, choices in (
            ("visual_input", ("both", "pixel", "semantic", *WITH_FEATURES)),
            ("embedder", ("concat_mlp", "mlp_concat")),
            ("visual_features", ("code_vectors", "post_quantization")),
            ("codes_as", ("vectors", "vocabulary")),
            ("num_codebooks", (1, 2)),
            ("codebook_depths", (1, self.num_quantizers)),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field}={getattr(self, field)!r}; expected one of {', '.join(map(repr, choices))}"
                )
        if self.num_codebooks == 1 and self.visual_input == "semantic":
            raise ValueError(
                "visual_input='semantic', but the visual tokenizer has one codebook, of pixels; expected "
                "'both', 'features' or 'codes_and_features'"
            )
        self._check_vocabulary()
        self._check_features()
        if not isinstance(self.place_embedding, bool):
            raise ValueError(f"place_embedding={self.place_embedding!r}; expected true or false")
        if (self.visual_features == "post_quantization") != bool(self.post_quantization_dim):
            raise ValueError(
                f"visual_features={self.visual_features!r} with post_quantization_dim="
                f"{self.post_quantization_dim}; expected the width of the visual tokenizer's tower for "
                "'post_quantization', which a VQ model of others lacks, and None for 'code_vectors'; "
                "DualTokenConfig.for_tokenizers fills it in"
            )
        require_plain_logits(self.text_config)
        if self.head_hidden_size % self.head_num_attention_heads:
            raise ValueError(
                f"head_hidden_size={self.head_hidden_size} is not divisible by "
                f"head_num_attention_heads={self.head_num_attention_heads}"
            )
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}; expected at least 1")
        # Configs saved before `begin_of_text` and the tokens of features existed come without them.
        later = {"begin_of_text", *FEATURE_SPECIAL}
        if self.special_tokens is not None and set(self.special_tokens) - later != set(SPECIAL):
            raise ValueError(
                f"special_tokens has the keys {sorted(self.special_tokens)}, expected {sorted(SPECIAL)}; "
                "take them from SpecialTokens.from_tokenizer(text_tokenizer)"
            )

    def _check_vocabulary(self) -> None:
        if not self.codes_in_vocabulary:
            return
        if self.code_shape[1:] != (1, 1):
            raise ValueError(
                f"codes_as='vocabulary' with {self.num_codebooks} codebook(s) of {self.num_quantizers} "
                "depth(s); expected one code at a position, as VQ models of others have it, or 'vectors'"
            )
        for field, plain in (("visual_features", "code_vectors"), ("place_embedding", False)):
            if getattr(self, field) != plain:
                raise ValueError(
                    f"codes_as='vocabulary' with {field}={getattr(self, field)!r}; expected {plain!r}, for "
                    "rows of the vocabulary are read by the language model's own embedding"
                )

    def make_room(self, tokens: int) -> None:
        """Enlarge the decoder's vocabulary for so many tokens of text, and behind them for codes if need be.

        A vocabulary with rows to spare keeps its size, and one that grows does so to a multiple of 64. What
        has room for codes already stays as it is.
        """
        if self.first_code is not None:
            return
        decoder: Any = self.text_config
        decoder.vocab_size = padded_vocabulary(decoder.vocab_size, tokens)
        if self.codes_in_vocabulary:
            self.first_code = decoder.vocab_size
            decoder.vocab_size = padded_vocabulary(0, self.first_code + self.codebook_size)

    def _check_features(self) -> None:
        sizes = (bool(self.feature_dim), self.features_per_image > 0)
        if sizes != (self.reads_features,) * 2 or (self.vision_config and not self.reads_features):
            raise ValueError(
                f"visual_input={self.visual_input!r} with feature_dim={self.feature_dim}, features_per_image="
                f"{self.features_per_image} and {'a' if self.vision_config else 'no'} vision_config; "
                f"expected those of a vision tower for {', '.join(map(repr, WITH_FEATURES))} alone; "
                "feature_fields fills them in"
            )
        if self.tiles:
            Tiles(self.tiles, self.image_size)  # names what is wrong with them
            if math.isqrt(self.features_per_image) ** 2 != self.features_per_image or not self.reads_features:
                raise ValueError(
                    f"tiles={self.tiles} with visual_input={self.visual_input!r} and features_per_image="
                    f"{self.features_per_image}; expected a model that reads continuous features, a square "
                    "number of each crop"
                )
        if self.vision_config:
            made = (self.vision_config["hidden_size"], features_per_image(self.vision_config))
            if made != (self.feature_dim, self.features_per_image):
                raise ValueError(
                    f"feature_dim={self.feature_dim} and features_per_image={self.features_per_image}, but "
                    f"the tower of vision_config makes {made[1]} features of width {made[0]} of an image"
                )
            if self.vision_config["image_size"] != self.image_size:
                raise ValueError(
                    f"the vision tower reads images of {self.vision_config['image_size']} pixels a side, the "
                    f"visual tokenizer of {self.image_size}; expected one size for both"
                )
        if self.reads_features and self.special_tokens is not None and not self.special.has_features:
            raise ValueError(
                f"special_tokens lacks {' and '.join(FEATURE_SPECIAL)}, which visual_input="
                f"{self.visual_input!r} needs; call add_special_tokens(text_tokenizer, features=True) first"
            )

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """Shape [P, Q, D] of the codes of an image."""
        return (self.positions_per_image, self.num_codebooks, self.num_quantizers)

    @property
    def codes_in_vocabulary(self) -> bool:
        """Whether codes are rows of the decoder's vocabulary."""
        return self.codes_as == "vocabulary"

    @property
    def codebooks(self) -> tuple[str, ...]:
        """Names of the codebooks, in the order of Q."""
        return CODEBOOKS[: self.num_codebooks]

    @property
    def codebooks_read(self) -> tuple[str, ...]:
        """Names of those whose code vectors are embedded wherever there are codes of an image."""
        one = self.visual_input.removesuffix("_and_features")
        return (one,) if one in CODEBOOKS else self.codebooks

    @property
    def reads_features(self) -> bool:
        """Whether the decoder reads continuous features of images."""
        return self.visual_input in WITH_FEATURES

    @property
    def image_layout(self) -> ImageLayout:
        """What stands in the sequence for an image."""
        tiles = Tiles(self.tiles, self.image_size) if self.tiles else None
        return ImageLayout(self.visual_input != "features", self.features_per_image, tiles)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: every field of this class, defaults included."""
        own = [name for name in type(self).__annotations__ if name in self.to_dict()]
        return {**super().to_diff_dict(), **{name: self.to_dict()[name] for name in own}}

    @property
    def special(self) -> SpecialTokens:
        """The ids of the special tokens; ValueError if the config has none yet."""
        if self.special_tokens is None:
            raise ValueError(
                "this config has no special_tokens; build it with DualTokenConfig.for_tokenizers(...)"
            )
        return SpecialTokens(**self.special_tokens)

    @classmethod
    def for_tokenizers(
        cls,
        text_config: dict[str, Any] | PretrainedConfig,
        text_tokenizer: Any,
        visual_tokenizer: VisualTokenizer,
        **overrides: Any,
    ) -> DualTokenConfig:
        """Build the config of a model that speaks the codes and tokens of two tokenizers.

        The decoder's vocabulary is enlarged where it lacks rows (`make_room`).

        Raises:
            ValueError: an override is no field of this class, or has a value that does not fit.
        """
        fields = {
            "special_tokens": vars(SpecialTokens.from_tokenizer(text_tokenizer)),
            "tokenizer_fingerprint": visual_tokenizer.fingerprint(),
        }
        config = cls.for_visual_tokenizer(text_config, visual_tokenizer, **{**fields, **overrides})
        config.make_room(len(text_tokenizer))
        return config

    @classmethod
    def for_visual_tokenizer(
        cls,
        text_config: dict[str, Any] | PretrainedConfig,
        visual_tokenizer: VisualTokenizer,
        **overrides: Any,
    ) -> DualTokenConfig:
        """Build the config of a model around a visual tokenizer, which may lie on the meta device.

        Args:
            text_config: of the decoder.
            visual_tokenizer: only shapes are read.
            overrides: fields of this class, and `preset`, one of `HEAD_PRESETS`.

        Raises:
            ValueError: an override is no field of this class, or has a value that does not fit.
        """
        overrides = head_settings(overrides)
        for name in overrides:
            if name not in cls.__annotations__:
                near = difflib.get_close_matches(name, cls.__annotations__, n=1, cutoff=0.0)
                raise ValueError(
                    f"{name} is no field of the unified model's config; did you mean {near[0]}? known: "
                    f"{', '.join(sorted(cls.__annotations__))}"
                )
        visual = visual_tokenizer.config
        reads_features = overrides.get("visual_features") == "post_quantization"
        tower = getattr(visual, "vision", None) if reads_features else None
        fields = {
            "text_config": text_config,
            "codebook_size": visual.codebook_size,
            "codebook_dim": visual.codebook_dim,
            "num_codebooks": visual.num_codebooks,
            "num_quantizers": visual.num_quantizers,
            "codebook_depths": visual_tokenizer.codebooks().shape[1],
            "positions_per_image": visual.positions,
            "image_size": visual.image_size,
            "post_quantization_dim": tower and tower.hidden_size,
        }
        return cls(**{**fields, **overrides})


def feature_fields(tower: VisionTower, inside: bool = True) -> dict[str, Any]:
    """Return the fields of `DualTokenConfig` for a vision tower's features.

    Args:
        tower: the tower, which may lie on the meta device if it is inside.
        inside: whether it is to be a part of the model, or features come precomputed.
    """
    fields = {
        "feature_dim": tower.settings["hidden_size"],
        "features_per_image": features_per_image(tower.settings),
    }
    if inside:
        return {**fields, "vision_config": tower.settings}
    return {**fields, "feature_fingerprint": tower.fingerprint()}


def head_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace `preset` among fields of `DualTokenConfig` by what `HEAD_PRESETS` has under that name.

    Raises:
        ValueError: there is no such preset.
    """
    if "preset" not in settings:
        return settings
    name = settings["preset"]
    if name not in HEAD_PRESETS:
        raise ValueError(f"heads have the preset {name!r}; expected one of {', '.join(HEAD_PRESETS)}")
    return {**HEAD_PRESETS[name], **{key: value for key, value in settings.items() if key != "preset"}}


def require_plain_logits(text_config: Any) -> None:
    """Raise ValueError if the decoder changes its logits after the output layer, which `TextHead` does not.

    Gemma 2 caps them, Cohere and Granite scale them: their likelihoods would be wrong without a word.
    """
    for name in LOGIT_FIELDS:
        value = getattr(text_config, name, None)
        if value not in (None, 1.0):
            raise ValueError(
                f"a {text_config.model_type!r} decoder with {name}={value} changes its logits after the "
                "output layer, which this model leaves out; take a decoder that does not, such as Qwen2.5, "
                f"or turn {name} off in the config of one that is trained from scratch"
            )


def padded_vocabulary(rows: int, needed: int) -> int:
    """Return `rows` if they hold `needed` tokens, else `needed` rounded up to a multiple of 64."""
    return rows if rows >= needed else -(-needed // 64) * 64


AutoConfig.register("dualtoken", DualTokenConfig, exist_ok=True)
