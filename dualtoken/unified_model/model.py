"""The unified language model: a decoder that reads text and dual visual codes and predicts both.

At each image position the decoder reads the summed code vectors of the pixel and the semantic codebook, or
the visual tokenizer's causal features of them, through a small MLP. Text targets meet the decoder's own
output layer; at visual targets two depth transformers, one per codebook, predict the D codes of each from
the hidden state of the position before (arXiv 2503.14324, section 3.3). Only supervised positions meet a
classifier. Codes of one depth of a single codebook may instead be rows of the decoder's vocabulary, read by
its embedding and predicted by its output layer, among all tokens (Chameleon, arXiv 2405.09818).

A model may also, or instead, read continuous features of complete images, through an adapter, made by a
vision tower that is a part of it or brought along (UniToken, arXiv 2504.04423). They are never targets.

Shapes: T tokens of a pack, V visual positions in it, Q codebooks (0 pixel, 1 semantic, if any), D depths, K
codes, E dimensions of a code vector, H width of the decoder, N selected positions; I images with continuous
features, or crops of images in tiles, F features of each, C their width, S pixels a side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.utils import ModelOutput

from dualtoken.projection import AttentionProjection
from dualtoken.strict_loading import load_strictly
from dualtoken.unified_model.attention import DOCUMENT_ATTENTION
from dualtoken.unified_model.chunked_loss import Scores, TextHead
from dualtoken.unified_model.config import (
    WITH_FEATURES,
    DualTokenConfig,
    padded_vocabulary,
    require_plain_logits,
)
from dualtoken.unified_model.depth_transformer import VisualHead
from dualtoken.unified_model.sequence import IGNORE_INDEX
from dualtoken.unified_model.vision_tower import VisionTower
from dualtoken.unified_model.visual_embedder import (
    CODEBOOKS,
    Codebooks,
    FeatureAdapter,
    GeluMLP,
    VisualEmbedder,
)
from dualtoken.unified_model.visual_features import FeatureCache, PostQuantization, require_whole_images

PARTS = (
    "llm",
    "visual_embedder",
    "pixel_projector",
    "semantic_projector",
    "pixel_head",
    "semantic_head",
    "feature_adapter",
    "vision_tower",
)


@dataclass
class DualTokenOutput(ModelOutput):
    """Sums of negative log likelihoods, in fp32, and counts; only sums carry gradients.

    Divide by the counts of *all* ranks and micro-batches to get a per-token loss.

    Attributes:
        text_nll: scalar, sum over supervised text positions.
        text_count: scalar, their number.
        text_correct: scalar, at how many the target was the most likely token.
        visual_nll: [Q, D], sums over supervised visual positions.
        visual_count: scalar, their number.
        visual_correct: [Q, D].
        text_z_loss: scalar, sum of the z-losses over supervised text positions; None without.
        visual_z_loss: [Q, D], likewise.
        text_positions: [N] places in the row of the text targets.
        text_position_nll: [N] nll of each.
        visual_positions: [N] places in the row of the visual targets.
        visual_position_nll: [N, Q, D] nll of each.
    """

    text_nll: torch.Tensor | None = None
    text_count: torch.Tensor | None = None
    text_correct: torch.Tensor | None = None
    visual_nll: torch.Tensor | None = None
    visual_count: torch.Tensor | None = None
    visual_correct: torch.Tensor | None = None
    text_z_loss: torch.Tensor | None = None
    visual_z_loss: torch.Tensor | None = None
    text_positions: torch.Tensor | None = None
    text_position_nll: torch.Tensor | None = None
    visual_positions: torch.Tensor | None = None
    visual_position_nll: torch.Tensor | None = None


class DualTokenForCausalLM(PreTrainedModel):
    """A decoder with a visual embedder and two visual heads.

    Build it with `AutoModelForCausalLM.from_config(config)` (sharded under an active DeepSpeed ZeRO-3
    config), `from_base` or `from_pretrained`, then give it the visual tokenizer's codebooks by
    `set_codebooks`, its projections by `set_post_quantization` if it reads their features, and a vision
    tower's weights by `set_vision_tower` if it has one; `save_pretrained` keeps all of them.

    Every part runs in every forward pass, on a batch without images or text targets with weight
    zero, so that all ranks of ZeRO-3 gather and reduce the same parameters in the same order.
    """

    config_class = DualTokenConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["codebooks"]
    _no_split_modules = ["VisualHead"]
    part_names = PARTS

    config: DualTokenConfig
    codebooks: Codebooks  # None, as the embedder, where codes are rows of the vocabulary
    visual_embedder: VisualEmbedder

    def __init__(self, config: DualTokenConfig, llm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if llm is None:
            llm = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=DOCUMENT_ATTENTION)
        require_decoder(llm)
        if not isinstance(llm.get_output_embeddings(), TextHead):
            llm.set_output_embeddings(TextHead(llm.get_output_embeddings(), config.chunk_size))
        self.llm = llm
        width = self.decoder_config.hidden_size
        has_vectors = not config.codes_in_vocabulary
        if not has_vectors:
            _require_code_rows(config, llm)
        self.register_module("codebooks", _codebooks(config) if has_vectors else None)
        self.post_quantization = None
        if config.post_quantization_dim is not None:
            self.post_quantization = PostQuantization(config.codebook_dim, config.post_quantization_dim)
        self.register_module("visual_embedder", _visual_embedder(config, width) if has_vectors else None)
        self.feature_adapter = self.vision_tower = None
        if config.feature_dim is not None:
            self.feature_adapter = FeatureAdapter(config.feature_dim, width, ends_rows=bool(config.tiles))
        if config.vision_config is not None:
            self.vision_tower = VisionTower(config.vision_config)
        heads = config.codebooks if has_vectors else ()
        for name in CODEBOOKS:
            self.register_module(f"{name}_projector", _projector(config, width) if name in heads else None)
        for name in CODEBOOKS:
            self.register_module(f"{name}_head", _visual_head(config) if name in heads else None)
        self._codebooks_checked = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only modules that hold parameters themselves: transformers skips others in code that is not its own.
        if isinstance(module, VisualHead):
            # One loaded in part under ZeRO-3 is not whole here; `load_strictly` refuses it.
            if all(parameter.numel() for parameter in module.parameters()):
                module.init_weights()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)  # what an MLP makes of codes is about as large
        elif isinstance(module, FeatureAdapter) and module.end_of_row is not None:
            nn.init.normal_(module.end_of_row, std=0.2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def decoder_config(self) -> PretrainedConfig:
        """Config of the decoder."""
        return cast(PretrainedConfig, self.config.text_config)

    @classmethod
    def from_base(cls, config: DualTokenConfig, path: str, **kwargs: Any) -> DualTokenForCausalLM:
        """Build the model around a pretrained decoder.

        Args:
            config: its `text_config` is replaced by the decoder's.
            path: a folder (or name) that `AutoModelForCausalLM.from_pretrained` reads.
            kwargs: passed on to it, such as `dtype`; fp32 by default, whatever the decoder is stored in,
                for what is trained is drawn and kept in fp32.

        The embedding is enlarged (to a multiple of 64 rows) if the special tokens do not fit into it, or any
        of the text tokenizer's where the config was made for it and this decoder (`for_tokenizers`); rows
        beyond the text tokenizer's length, as Qwen's checkpoints have, are used as they are. Rows for codes
        are added behind, drawn as the decoder draws its own.

        Raises:
            ValueError: the decoder's weights do not fit its config (`load_strictly`).
        """
        settings = {"attn_implementation": DOCUMENT_ATTENTION, "dtype": torch.float32, **kwargs}
        llm, _ = load_strictly(AutoModelForCausalLM.from_pretrained, path, **settings)
        return cls.around(config, llm)

    @classmethod
    def around(cls, config: DualTokenConfig, llm: Any) -> DualTokenForCausalLM:
        """Build the model around a decoder: its weights stay, those of the other parts are drawn.

        Args:
            config: its `text_config` is replaced by the decoder's.
            llm: the decoder; weights other than those of its embedding and output layer may be on the meta
                device.
        """
        given: Any = config.text_config
        tokens = max(config.special.ids()) + 1
        # Room for the whole text tokenizer, as `for_tokenizers` made it.
        if config.first_code is not None:
            tokens, config.first_code = max(tokens, config.first_code), None
        elif all(getattr(given, n) == getattr(llm.config, n) for n in ("model_type", "hidden_size")):
            tokens = max(tokens, given.vocab_size)
        rows = llm.get_input_embeddings().num_embeddings
        if (needed := padded_vocabulary(rows, tokens)) > rows:
            llm.resize_token_embeddings(needed)
        config.text_config = llm.config
        config.make_room(tokens)
        if (needed := llm.config.vocab_size) > llm.get_input_embeddings().num_embeddings:
            llm.resize_token_embeddings(needed, mean_resizing=False)
        for module in llm.modules():
            module._is_hf_initialized = True  # what was just loaded is not to be drawn anew
        config.tie_word_embeddings = bool(llm.config.tie_word_embeddings)
        return cls._from_config(config, dtype=llm.dtype, llm=llm)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, strictly; arguments and result as of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the weights do not fit the config (`load_strictly`).
        """
        load = super().from_pretrained
        model, report = load_strictly(load, pretrained_model_name_or_path, *args, **kwargs)
        if model.post_quantization is not None:
            model.post_quantization.requires_grad_(False)  # loading puts trainable parameters in their place
        return (model, report) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's token embedding."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's output layer."""
        return self.llm.get_output_embeddings()

    def set_codebooks(self, vectors: torch.Tensor, fingerprint: str | None = None) -> None:
        """Take over the visual tokenizer's codebooks, [Q, Dc, K, E] as its `codebooks()` returns them.

        Where codes are rows of the vocabulary their vectors are not kept.
        """
        config = self.config
        expected = (config.num_codebooks, config.codebook_depths, config.codebook_size, config.codebook_dim)
        if tuple(vectors.shape) != expected:
            raise ValueError(
                f"codebooks have shape {tuple(vectors.shape)}, the config asks for {expected} "
                "[codebooks, depths, codes, dimensions]; build the config with DualTokenConfig.for_tokenizers"
            )
        if self.codebooks is not None:
            self.codebooks.set(vectors)
        if fingerprint is not None:
            config.tokenizer_fingerprint = fingerprint

    def set_post_quantization(self, pixel: AttentionProjection, semantic: AttentionProjection) -> None:
        """Take over the visual tokenizer's `postquant_pixel` and `postquant_semantic`.

        Under ZeRO-3 call it where the parameters of `post_quantization` are gathered.

        Raises:
            ValueError: this model does not read their features, or they do not fit (`PostQuantization.set`).
        """
        if self.post_quantization is None:
            raise ValueError(
                "this model reads code vectors, not post-quantization features; build its config with "
                "visual_features='post_quantization'"
            )
        self.post_quantization.set(pixel, semantic)

    def set_vision_tower(self, vision_model: SiglipVisionModel) -> None:
        """Take over the layers of a SigLIP tower.

        Under ZeRO-3 call it where the parameters of `vision_tower` are gathered.

        Raises:
            ValueError: this model has no vision tower, or one of other sizes.
        """
        if self.vision_tower is None:
            raise ValueError(
                "this model has no vision tower; build its config with feature_fields(tower) and one of "
                f"visual_input={', '.join(map(repr, WITH_FEATURES))}"
            )
        self.vision_tower.set(vision_model)

    def parts(self) -> dict[str, nn.Module]:
        """Return the trainable parts by name, to group, freeze or count their parameters."""
        parts = ((name, getattr(self, name)) for name in PARTS)
        return {name: part for name, part in parts if part is not None}

    def visual_heads(self) -> list[tuple[GeluMLP, VisualHead]]:
        """Return projector and head of each codebook, in the order of Q; none for rows of the vocabulary."""
        parts = [(getattr(self, f"{name}_projector"), getattr(self, f"{name}_head")) for name in CODEBOOKS]
        return [(projector, head) for projector, head in parts if head is not None]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        codes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        visual_loss_mask: torch.Tensor | None = None,
        z_loss: float = 0.0,
        features: torch.Tensor | None = None,
        feature_order: torch.Tensor | None = None,
        stretch: tuple[int, int] | None = None,
    ) -> DualTokenOutput:
        """Score a pack of documents: equations (5) to (8) of arXiv 2503.14324, as sums.

        Args:
            input_ids: [1, T], image-pad ids at visual positions.
            position_ids: [1, T], restarting per document; None to take them from `cu_seqlens`.
            cu_seqlens: [n + 1] int32, borders of the documents; None for a single one.
            max_seqlen: length of the longest document.
            codes: [V, Q, D] of the image-pad positions in order; None without images.
            labels: [1, T], -100 where there is no text target; None without any. The first token of a
                document is never a target.
            visual_loss_mask: [V] bool, which visual positions are targets; None for none.
            z_loss: weight of the squared log-partition at each target (see `chunked_loss`); 0 for none.
            features: of the images that have them, in order: images as uint8 or floats in [-1, 1],
                [I, 3, S, S], for the vision tower; without one, features [I, F, C], or [n, C] of images in
                tiles. None for none.
            feature_order: of images in tiles, which crop (or feature) and which of its features stands at
                each position of a feature, [M, 2], crop -1 for the end of a row. None for whole images.
            stretch: first place, and the one behind the last, whose hidden states are computed here, with
                the targets that they predict; the others are other ranks', with which the decoder's attention
                exchanges what it needs. All other arguments are of the whole row. None for the whole row,
                as a model of continuous features needs it.

        Raises:
            ValueError: on more than one row, or numbers of codes or features and of their positions that
                differ; on a stretch, if the decoder's attention is that of a single rank, or the model reads
                continuous features.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != 1:
            raise ValueError(
                f"input_ids have shape {tuple(input_ids.shape)}, expected [1, T]; "
                "put several documents into one row with pack_documents"
            )
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, input_ids.shape[1]], dtype=torch.int32, device=input_ids.device)
        if position_ids is None:
            position_ids = _positions_within(cu_seqlens)[None]
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        if labels is None:
            labels = torch.full_like(input_ids, IGNORE_INDEX)
        # A document's first token has nothing before it to be predicted from.
        labels = labels.index_fill(1, cu_seqlens[:-1].long(), IGNORE_INDEX)[0]
        if visual_loss_mask is None:
            visual_loss_mask = torch.zeros(
                0 if codes is None else len(codes), dtype=torch.bool, device=input_ids.device
            )
        supervised = labels != IGNORE_INDEX
        visual_positions = self.visual_positions(input_ids[0], 0 if codes is None else len(codes))
        start, stop = stretch or (0, input_ids.shape[1])
        ends = []
        if stretch is not None:
            if self.config.reads_features:
                raise ValueError(
                    f"got the stretch {stretch} of a row, and a model of continuous features; expected a "
                    "model of codes alone, or the whole row"
                )
            if self.decoder_config._attn_implementation == DOCUMENT_ATTENTION:
                raise ValueError(
                    f"got the stretch {stretch} of a row, and attention that sees what this rank has alone; "
                    "expected that of pretrain.sequence_parallel.share_attention"
                )
            supervised = supervised & _predicted_in(stretch, torch.arange(len(labels), device=labels.device))
            visual_loss_mask = visual_loss_mask & _predicted_in(stretch, visual_positions)
            ends = [visual_positions < start, visual_positions < stop]
        codes, counts = self.checked_codes(
            input_ids, codes, supervised, visual_loss_mask, *ends,
            features=features, feature_order=feature_order,
        )  # fmt: skip
        # An image of which a part is another stretch's is embedded whole, for its places and features.
        first, last = counts[2:] or (0, len(codes))
        per_image = self.config.positions_per_image
        images = slice(first // per_image * per_image, -(-last // per_image) * per_image)
        hidden = self.decoder(
            inputs_embeds=self._embed(
                input_ids[:, start:stop],
                codes[images],
                visual_positions[images] - start,
                slice(first - images.start, last - images.start),
                features,
                feature_order,
            ),
            position_ids=position_ids[:, start:stop],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
        ).last_hidden_state[0]  # [T or less, H]
        text_positions, visual_targets = map(_places, (supervised, visual_loss_mask), counts[:2])
        text = self._text_loss(hidden, labels, text_positions, start, z_loss)
        visual = self._visual_loss(
            hidden, codes[visual_targets], visual_positions[visual_targets], start, z_loss
        )
        return DualTokenOutput(**text, **visual)

    @property
    def decoder(self) -> nn.Module:
        """The language model without its output layer."""
        return self.llm.base_model

    def embed(
        self,
        input_ids: torch.Tensor,
        codes: torch.Tensor,
        features: torch.Tensor | None = None,
        feature_order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed tokens [B, T], codes [V, Q, D] and continuous features at their places: [B, T, H].

        `features` and `feature_order` as of `forward`.
        """
        positions = self.visual_positions(input_ids.flatten(), len(codes))
        return self._embed(input_ids, codes, positions, features=features, feature_order=feature_order)

    def _embed(
        self,
        input_ids: torch.Tensor,
        codes: torch.Tensor,
        positions: torch.Tensor,
        here: slice = slice(None),  # noqa: B008
        features: torch.Tensor | None = None,
        feature_order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `embed`, of codes whose `positions` [V] are in `input_ids` for those `here` alone."""
        if self.config.codes_in_vocabulary:
            rows = self._code_rows(codes[here])
            ids = input_ids.flatten().index_copy(0, positions[here], rows).view_as(input_ids)
            embeddings = self.get_input_embeddings()(ids)
        else:
            embeddings = self.get_input_embeddings()(input_ids)
            embeddings = _put(embeddings, positions[here], self._embedded(codes, positions)[here])
        if self.feature_adapter is None:
            return embeddings
        count = self._feature_positions(features, feature_order)
        positions = _places(input_ids.flatten() == self.config.special.image_feature, count)
        adapted = self._adapted(self.feature_adapter, features, feature_order, embeddings.device)
        return _put(embeddings, positions, adapted)

    def _embedded(self, codes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embed codes [V, Q, D] at `positions` [V] by their vectors, [V, H]; one of zeros without codes."""
        vectors = self.codebooks(codes)  # [V, Q, D, E]
        images = vectors[None]
        per_image = self.config.positions_per_image
        if len(vectors) == 0:
            images = self._no_vectors(1)[None]
        elif self.post_quantization is not None or self.config.place_embedding:
            require_whole_images(positions, per_image)
            images = vectors.unflatten(0, (-1, per_image))
        sums = self._features(images).flatten(0, 1)
        places = torch.arange(len(sums), device=sums.device) % per_image
        return self.visual_embedder(sums, places)

    def _code_rows(self, codes: torch.Tensor) -> torch.Tensor:
        """Rows of the vocabulary [N] of codes [N, 1, 1]."""
        return codes.flatten() + cast(int, self.config.first_code)

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, K] of the rows of codes in the vocabulary, of hidden states [N, H] before them."""
        first = cast(int, self.config.first_code)
        layer: Any = self.get_output_embeddings()
        rows = slice(first, first + self.config.codebook_size)
        return F.linear(hidden, layer.weight[rows], None if layer.bias is None else layer.bias[rows])

    def _feature_positions(self, features: torch.Tensor | None, order: torch.Tensor | None) -> int:
        if features is None:
            return 0
        return len(features) * self.config.features_per_image if order is None else len(order)

    def _adapted(
        self,
        adapter: FeatureAdapter,
        features: torch.Tensor | None,
        order: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Bring features to the width of the decoder, [I * F or M, H]; those of a blank image for None."""
        if self.vision_tower is not None:
            if features is None:
                size = self.vision_tower.settings["image_size"]
                features = torch.zeros(1, 3, size, size, device=device)
            features = self.vision_tower(features)
        elif features is None:
            features = torch.zeros(1, cast(int, self.config.feature_dim), device=device)
        if order is None:
            return adapter(features.flatten(0, -2))
        crops, places = order.unbind(1)
        # Ends of rows have no feature; the one they are given, the last crop's, takes no part.
        chosen = features[crops] if features.dim() == 2 else features[crops, places]
        return adapter(chosen, crops < 0)

    def new_feature_cache(self) -> FeatureCache | None:
        """Return what `embed_next` needs from one position to the next; to be had anew for each image."""
        return None if self.post_quantization is None else FeatureCache()

    def embed_next(self, codes: torch.Tensor, place: int, cache: FeatureCache | None) -> torch.Tensor:
        """Embed the codes [N, Q, D] at one place, from 0, of N images that are being generated: [N, H]."""
        if self.config.codes_in_vocabulary:
            return self.get_input_embeddings()(self._code_rows(codes))
        places = torch.full((len(codes),), place, device=codes.device)
        return self.visual_embedder(self._features(self.codebooks(codes)[:, None], cache)[:, 0], places)

    def _features(self, vectors: torch.Tensor, cache: FeatureCache | None = None) -> torch.Tensor:
        """Turn code vectors [I, N, Q, D, E] of images into what the embedder reads, [I, N, Q, E or W]."""
        sums = vectors.sum(dim=-2)
        if self.post_quantization is None:
            return sums
        latents = sums / self.codebooks.scale[:, None]  # as the visual tokenizer has them
        return self.post_quantization(latents, cache)

    def _text_loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, start: int, z_loss: float
    ) -> dict[str, torch.Tensor | None]:
        """Loss of targets at `positions` [N] of the row, by hidden states from the place `start` on."""
        count, chosen, targets = len(positions), positions - 1 - start, labels[positions]
        if count == 0:
            chosen, targets = positions.new_zeros(1), positions.new_zeros(1)
        scores = self.get_output_embeddings()(hidden[chosen], targets, z_loss)
        return {
            "text_nll": _sum(scores.nll, count),
            "text_count": torch.full((), count, device=hidden.device),
            "text_correct": scores.correct[:count].sum(),
            "text_z_loss": _sum(scores.z_loss, count) if z_loss else None,
            "text_positions": positions,
            "text_position_nll": scores.nll.detach()[:count],
        }

    def _visual_loss(
        self,
        hidden: torch.Tensor,
        codes: torch.Tensor,
        positions: torch.Tensor,
        start: int,
        z_loss: float,
    ) -> dict[str, torch.Tensor | None]:
        """Loss of target codes [N, Q, D]; `positions` and `start` as of `_text_loss`."""
        count, chosen = len(positions), positions - 1 - start
        if count == 0:
            chosen = positions.new_zeros(1)
            codes = codes.new_zeros(1, *self.config.code_shape[1:])
        scores = self._code_scores(hidden[chosen], codes, z_loss)
        return {
            "visual_nll": _sum(scores.nll, count),
            "visual_count": torch.full((), count, device=hidden.device),
            "visual_correct": scores.correct[:count].sum(dim=0),
            "visual_z_loss": None if scores.z_loss is None else _sum(scores.z_loss, count),
            "visual_positions": positions,
            "visual_position_nll": scores.nll.detach()[:count],
        }

    def _code_scores(self, before: torch.Tensor, codes: torch.Tensor, z_loss: float) -> Scores:
        """Score codes [N, Q, D] by the hidden states [N, H] before them: scores [N, Q, D]."""
        if self.config.codes_in_vocabulary:
            found = self.get_output_embeddings()(before, self._code_rows(codes), z_loss)
            return _each(lambda parts: parts[0].view(codes.shape), found)
        prefix = self.codebooks(codes)[:, :, :-1].cumsum(dim=2)  # [N, Q, D - 1, E]
        by_codebook = [
            head(projector(before), prefix[:, q], codes[:, q], z_loss)
            for q, (projector, head) in enumerate(self.visual_heads())
        ]
        return _each(lambda parts: torch.stack(parts, dim=1), *by_codebook)

    def _no_vectors(self, positions: int) -> torch.Tensor:
        shape = (positions, *self.config.code_shape[1:], self.config.codebook_dim)
        return self.codebooks.vectors.new_zeros(shape)

    def visual_positions(self, input_ids: torch.Tensor, count: int) -> torch.Tensor:
        """Return the places [V] of the `count` image-pad tokens in `input_ids` [T]."""
        return _places(input_ids == self.config.special.image_pad, count)

    def checked_codes(
        self,
        input_ids: torch.Tensor,
        codes: torch.Tensor | None,
        *masks: torch.Tensor,
        features: torch.Tensor | None = None,
        feature_order: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Return codes as int64 [V, Q, D], V being 0 for None, and how often each of `masks` is true.

        All that the host has to know of a batch is asked for here, so that it waits for the device only once.

        Raises:
            ValueError: the codes or features do not fit the tokens, or there are no codebooks yet.
        """
        self._check_features(features, feature_order)
        expected = self.config.code_shape[1:]
        if codes is None or len(codes) == 0:
            codes = torch.zeros(0, *expected, dtype=torch.int64, device=input_ids.device)
        if tuple(codes.shape[1:]) != expected:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}, expected [V, {expected[0]}, {expected[1]}]; "
                "they come from another visual tokenizer"
            )
        codes = codes.long()
        special = self.config.special
        found = [(input_ids == token).sum() for token in (special.image_pad, special.image_feature)]
        found += [mask.sum() for mask in masks]
        furthest = () if feature_order is None else feature_order.amax(dim=0).unbind()
        extremes = codes.aminmax() if len(codes) else ()
        known = iter(torch.stack([*found, *furthest, *extremes]).tolist())
        places, feature_places, *counts = itertools.islice(known, len(found))
        reached = list(itertools.islice(known, len(furthest)))
        smallest, largest = known if len(codes) else (0, 0)
        self._check_feature_positions(feature_places, features, feature_order, reached)
        if places != len(codes):
            raise ValueError(
                f"{places} image-pad tokens but {len(codes)} visual positions in codes; "
                f"an image takes {self.config.positions_per_image} of each"
            )
        size = self.config.codebook_size
        if not 0 <= smallest <= largest < size:
            raise ValueError(
                f"codes go from {smallest} to {largest}, expected 0 to {size - 1}: the codebooks have "
                f"{size} codes; take the codes from the visual tokenizer the model was trained with"
            )
        if places and self.codebooks is not None and not self._codebooks_checked:
            if not bool(self.codebooks.vectors.any()):
                raise ValueError(
                    "the codebooks are not set: call set_codebooks(visual_tokenizer.codebooks())"
                )
            if self.post_quantization is not None and not bool(self.post_quantization.is_set):
                raise ValueError(
                    "the post-quantization projections are not set: call set_post_quantization("
                    "visual_tokenizer.postquant_pixel, visual_tokenizer.postquant_semantic)"
                )
            self._codebooks_checked = True
        return codes, counts

    def _check_feature_positions(
        self, found: int, features: torch.Tensor | None, order: torch.Tensor | None, reached: list[int]
    ) -> None:
        """Raise ValueError unless there are as many positions, and features at the places of an order."""
        if found != self._feature_positions(features, order):
            per_image = self.config.features_per_image
            images = 0 if features is None else len(features)
            given = f"features of {images} images; an image takes {per_image} positions"
            if order is not None:
                given = f"an order of {len(order)}; take both from one tokenize_document or pack_documents"
            raise ValueError(f"{found} positions of continuous features but {given}")
        if order is None or features is None:
            return
        room = (len(features), 1 if features.dim() == 2 else self.config.features_per_image)
        if reached[0] >= room[0] or reached[1] >= room[1]:
            raise ValueError(
                f"feature_order goes up to crop {reached[0]} and place {reached[1]}, but there are "
                f"{room[0]} crops with {room[1]} places; take it from the documents that the features are of"
            )

    def _check_features(self, features: torch.Tensor | None, order: torch.Tensor | None) -> None:
        if features is None:
            return
        config = self.config
        shape: tuple[int, ...] = (config.features_per_image, config.feature_dim or 0)
        what = "precomputed features [images, {}, {}]".format(*shape)
        if config.tiles:
            shape, what = shape[1:], f"precomputed features [features, {config.feature_dim}]"
        if config.vision_config is not None:
            size = config.vision_config["image_size"]
            shape, what = (3, size, size), f"images [images, 3, {size}, {size}] for the vision tower"
        if not config.reads_features:
            what = "none, it reads codes alone"
        if not config.reads_features or tuple(features.shape[1:]) != shape:
            raise ValueError(
                f"features have shape {tuple(features.shape)}, the model expects {what}; pretokenize with "
                "the --features that it was built for"
            )
        if (order is not None) != bool(config.tiles) or (order is not None and order.shape[1:] != (2,)):
            found = "no feature_order" if order is None else f"a feature_order {tuple(order.shape)}"
            raise ValueError(
                f"features come with {found}, the model has tiles={config.tiles}; expected an order [M, 2] "
                "for images in tiles, and none for whole ones"
            )


def require_decoder(llm: PreTrainedModel) -> None:
    """Raise ValueError unless a decoder keeps packed documents apart and has logits as `TextHead` makes them.

    Documents are told apart by the attention alone: a state that is carried from token to token (Mamba and
    its hybrids), or attention that cannot be replaced, would leak from one to the next.
    """
    require_plain_logits(llm.config)
    if llm._is_stateful or not llm._supports_attention_backend:
        raise ValueError(
            f"{type(llm).__name__} does not leave all mixing of tokens to transformers' attention interface, "
            "so packed documents would leak into each other; take a decoder that does, such as Qwen2.5"
        )


def _codebooks(config: DualTokenConfig) -> Codebooks:
    return Codebooks(config.codebook_depths, config.codebook_size, config.codebook_dim, config.num_codebooks)


def _visual_embedder(config: DualTokenConfig, width: int) -> VisualEmbedder:
    return VisualEmbedder(
        config.codebooks_read,
        config.embedder,
        config.post_quantization_dim or config.codebook_dim,
        width,
        config.positions_per_image if config.place_embedding else 0,
    )


def _require_code_rows(config: DualTokenConfig, llm: PreTrainedModel) -> None:
    rows = llm.config.vocab_size
    if config.first_code is None or config.first_code + config.codebook_size > rows:
        raise ValueError(
            f"codes_as='vocabulary' with first_code={config.first_code} and {config.codebook_size} codes, "
            f"but the decoder's vocabulary has {rows} rows; build the config with "
            "DualTokenConfig.for_tokenizers, or call its make_room"
        )


def _projector(config: DualTokenConfig, width: int) -> GeluMLP:
    return GeluMLP(width, config.head_hidden_size, config.head_hidden_size)


def _visual_head(config: DualTokenConfig) -> VisualHead:
    return VisualHead(
        hidden_size=config.head_hidden_size,
        num_layers=config.head_num_layers,
        num_heads=config.head_num_attention_heads,
        intermediate_size=config.head_intermediate_size or 4 * config.head_hidden_size,
        depth=config.num_quantizers,
        code_dim=config.codebook_dim,
        codebook_size=config.codebook_size,
        chunk_size=config.chunk_size,
    )


def _sum(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Sum scores [N, ...] of `count` targets, 0 of which leave the sum in the graph with weight zero.

    Weights of one stay away: without them its gradient at the scores is one number, expanded, which is all
    that `chunked_loss` has to know of it.
    """
    total = scores.sum(dim=0)
    return total if count else (0.0 * total.sum()).expand_as(total)


def _each(function: Callable[[list[torch.Tensor]], torch.Tensor], *scores: Scores) -> Scores:
    """Make one of several scores, each of its fields of theirs."""
    z_losses = [one.z_loss for one in scores if one.z_loss is not None]
    return Scores(
        function([one.nll for one in scores]),
        function([one.correct for one in scores]),
        function(z_losses) if z_losses else None,
    )


def _put(embeddings: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Put values [N, H] at N places of embeddings [B, T, H]; without places, into the graph times zero."""
    values = values.to(embeddings.dtype)
    if len(positions) == 0:
        return embeddings + 0.0 * values.sum()
    return embeddings.flatten(0, 1).index_copy(0, positions, values).view_as(embeddings)


def _predicted_in(stretch: tuple[int, int], places: torch.Tensor) -> torch.Tensor:
    """Whether what stands at `places` is predicted from one place before it that lies in a stretch."""
    return (places > stretch[0]) & (places <= stretch[1])


def _places(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Where `mask` [N] is true, [count], knowing that it is so `count` times: no wait for the device."""
    return torch.nonzero_static(mask, size=count)[:, 0]


def _positions_within(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Positions [T] that restart at each border."""
    lengths = cu_seqlens.diff().long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    return torch.arange(len(starts), device=starts.device) - starts


AutoModel.register(DualTokenConfig, DualTokenForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(DualTokenConfig, DualTokenForCausalLM, exist_ok=True)
