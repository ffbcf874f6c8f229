"""Discrete codes of others: the VQ models of Emu3, Janus and Chameleon, as visual tokenizers like ours.

They have one codebook, of pixels, and one code at each position. Nothing of them is trained here. The models
are transformers' own; the nearest code is searched as our quantizers do it, which needs neither the memory of
all distances nor luck where two codes are equally near.

Shapes: B images, S pixels a side, P positions, Q = 1 codebook, D = 1 depth, K codes, E dimensions of them.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from dualtoken.digest import sha256_of
from dualtoken.strict_loading import load_strictly
from dualtoken.visual_tokenizer.backbone import full_precision_convolutions, require_images
from dualtoken.visual_tokenizer.nearest import NearestCodeSearch, NonFiniteError
from dualtoken.visual_tokenizer.vq_config import SCALING, VQTokenizerConfig

# Class in transformers, which loads it where it is used.
_MODELS = {"emu3_vqgan": "Emu3VQVAE", "janus_vqgan": "JanusVQVAE", "chameleon_vqgan": "ChameleonVQVAE"}
# What the shapes of the weights do not tell of a VQ model's encoder.
_SETTINGS = (
    "model_type",
    "num_res_blocks",
    "attn_resolutions",
    "attn_type",
    "num_attention_heads",
    "temporal_downsample_factor",
)
_IN_WHOLE_MODEL = re.compile(r"(model\.)?vqmodel\.")
_ENCODING = ("encoder.", "quant_conv.", "quantize.")


class VQTokenizer(PreTrainedModel):
    """Turn images into the codes of a VQ model of others and back.

    Emu3's and Janus's VQ encode and decode; transformers has Chameleon's encoder alone.
    """

    config: VQTokenizerConfig
    config_class = VQTokenizerConfig
    base_model_prefix = "vq_tokenizer"
    main_input_name = "pixel_values"

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__(config)
        # In fp32, whatever type its files name: codes depend on it.
        kind = getattr(transformers, _MODELS[config.vq.model_type])
        self.vq: Any = kind._from_config(config.vq, dtype=torch.float32)
        self.post_init()
        self.train(False)

    def train(self, mode: bool = True) -> VQTokenizer:
        """Stay in eval mode whatever ``mode`` says: Emu3's has batch norms, by which codes would change."""
        return super().train(False)

    # -- use
    # ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes ``[B, P, 1, 1]`` int64 of ``images [B, 3, S, S]`` in [-1, 1].

        Raises:
            ValueError: on images of another size, of integers, or with NaN or infinite values.
        """
        require_images(images, self.config.image_size)
        search = NearestCodeSearch(self._code_vectors())
        with full_precision_convolutions():
            latents = self.latents(images)
        try:
            codes = search(latents.flatten(0, 1).float())
        except NonFiniteError:
            if not torch.isfinite(images).all():
                raise NonFiniteError("images contain NaN or infinity; check the image decoding") from None
            raise
        return codes.view(len(images), self.config.positions, 1, 1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return images ``[B, 3, S, S]``, about [-1, 1] and not clamped, from ``codes [B, P, 1, 1]``.

        Raises:
            ValueError: if the shape or the range of the codes is wrong, or the VQ model is Chameleon's.
        """
        self.require_decoder()
        config = self.config
        if codes.ndim != 4 or tuple(codes.shape[1:]) != (config.positions, 1, 1):
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}, expected [B, P, Q, D] = "
                f"[B, {config.positions}, 1, 1]"
            )
        codes = codes.flatten(1).long()
        if codes.numel():
            smallest, largest = torch.stack(codes.aminmax()).tolist()
            if smallest < 0 or largest >= config.codebook_size:
                raise ValueError(
                    f"codes lie in [{smallest}, {largest}], expected [0, {config.codebook_size - 1}]"
                )
        if config.vq.model_type == "emu3_vqgan":
            codes = codes.unflatten(1, (config.grid_size, config.grid_size))
        painted = self.vq.decode(codes)
        return (painted * self._per_colour(config.image_std) + self._per_colour(config.image_mean)) / (
            127.5 * config.rescale_factor
        ) - 1

    def require_decoder(self) -> None:
        """Raise ValueError unless the VQ model has a decoder."""
        if not hasattr(self.vq, "decode"):
            raise ValueError(
                f"the {self.config.vq.model_type!r} of transformers has an encoder alone, so its codes "
                "cannot be made pictures; read pictures with it, and to draw take the VQ of Emu3 or Janus"
            )

    def codebooks(self) -> Tensor:
        """Return the code vectors as ``[Q, Dc, K, E]`` = ``[1, 1, K, E]`` fp32."""
        return self._code_vectors()[None, None]

    def encode_semantic(self, images_or_codes: Tensor) -> Tensor:
        """Raise ValueError: a VQ of pixels has no semantic features."""
        raise ValueError(
            f"a {self.config.vq.model_type!r} has one codebook, of pixels, and no semantic features; "
            "expected a DualToken visual tokenizer"
        )

    def latents(self, images: Tensor) -> Tensor:
        """Return what codes are looked up for, ``[B, P, E]``, of ``images [B, 3, S, S]`` in [-1, 1]."""
        config, vq = self.config, self.vq
        values = (images.to(self.dtype) + 1) * (127.5 * config.rescale_factor)  # of 0 to 255
        values = (values - self._per_colour(config.image_mean)) / self._per_colour(config.image_std)
        if config.vq.model_type == "emu3_vqgan":
            # A VQ of films: a picture is one that stands still, and becomes one frame of codes.
            film = values[:, None].repeat(1, config.vq.temporal_downsample_factor, 1, 1, 1)
            found = vq.quant_conv(vq.encoder(film).transpose(1, 2))[:, :, 0]
        else:
            found = vq.quant_conv(vq.encoder(values))
        return found.flatten(2).transpose(1, 2)  # [B, E, h, w] -> [B, P, E]

    def _per_colour(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=self.dtype).view(3, 1, 1)

    def _code_vectors(self) -> Tensor:
        """The code vectors [K, E] fp32, as the search and the decoder take them."""
        vectors = self.vq.quantize.embedding.weight.detach().float()
        if self.config.vq.model_type == "janus_vqgan":
            # As it was trained (`codebook_l2_norm` of deepseek-ai/Janus, after LlamaGen, arXiv 2406.06525).
            # transformers' decoder does so too; its encoder, which Janus itself never uses, leaves it out.
            # The nearest of unit vectors is the same for a latent of any length.
            vectors = F.normalize(vectors, dim=-1)
        return vectors

    # -- identity, loading and saving
    # ------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Return the sha256 over everything that can change a code: settings and weights on the way there."""
        config = self.config
        settings = {name: getattr(config, name) for name in SCALING + ("image_size",)}
        settings["vq"] = {name: getattr(config.vq, name, None) for name in _SETTINGS}
        return sha256_of(settings, self.encoding_state())

    def encoding_state(self) -> dict[str, Tensor]:
        """Return the weights between an image and its codes, by their names in the VQ model."""
        return {
            name: value
            for name, value in self.vq.state_dict().items()
            if name.startswith(_ENCODING) and not name.endswith("num_batches_tracked")
        }

    def save_pretrained(
        self, save_directory: str | PathLike, is_main_process: bool = True, *args, **kwargs
    ) -> None:
        """Save config, weights (safetensors) and the settings of the image processor."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            settings = json.dumps(self.config.image_processor_settings(), indent=2)
            path = Path(save_directory) / "preprocessor_config.json"
            path.write_text(settings + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, image_size: int | None = None, **kwargs):
        """Load a tokenizer that `save_pretrained` wrote, or a VQ model of transformers, strictly, in fp32.

        Args:
            pretrained_model_name_or_path: a folder of this class, of a VQ model alone, or of the whole model
                that it is a part of, with its image processor's settings; of the latter only the VQ's weights
                are read.
            args: as of `PreTrainedModel.from_pretrained`, like the others.
            image_size: pixels a side, where a VQ model of transformers is to take others than its files say.
            kwargs: likewise.

        Raises:
            FileNotFoundError, ValueError: as `VQTokenizerConfig.of_folder`; or the weights do not fit the
                config (`load_strictly`).
        """
        folder = Path(pretrained_model_name_or_path)
        config = VQTokenizerConfig.of_folder(folder, image_size)
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if found["model_type"] != cls.config_class.model_type:
            return load_strictly(lambda source, **_: _of_weights(cls(config), source), folder)[0]
        kwargs.setdefault("dtype", torch.float32)
        return load_strictly(super().from_pretrained, folder, *args, **kwargs)[0]


def _of_weights(model: VQTokenizer, folder: Path) -> tuple[VQTokenizer, dict[str, Any]]:
    """Fill a tokenizer from transformers' files; returns it with a report for `load_strictly`."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"no safetensors in {folder}; expected the weights of a VQ model, or of a whole one: load it "
            "with transformers and save it by save_pretrained"
        )
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        names = {name: file for file in opened for name in file.keys()}
        parts = {name: own.end() for name in names if (own := _IN_WHOLE_MODEL.match(name))}
        for name, start in (parts or dict.fromkeys(names, 0)).items():
            state[name[start:]] = names[name].get_tensor(name)
    expected = model.vq.state_dict()
    fitting = {n: t for n, t in state.items() if n in expected and t.shape == expected[n].shape}
    model.vq.load_state_dict(fitting, strict=False)
    shapes = [(n, tuple(state[n].shape), tuple(expected[n].shape)) for n in state.keys() & expected.keys()]
    return model, {
        "missing_keys": expected.keys() - state.keys(),
        "unexpected_keys": state.keys() - expected.keys(),
        "mismatched_keys": [shape for shape in shapes if shape[1] != shape[2]],
    }


AutoConfig.register(VQTokenizerConfig.model_type, VQTokenizerConfig, exist_ok=True)
AutoModel.register(VQTokenizerConfig, VQTokenizer, exist_ok=True)
