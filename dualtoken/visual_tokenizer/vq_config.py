"""What a VQ model of others is: its own config, the size of its pictures, and how their values are scaled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig, SubConfigSpec

from dualtoken.visual_tokenizer.config import image_processor_settings

WHOLE_MODELS = {"emu3_vqgan": "emu3", "janus_vqgan": "janus", "chameleon_vqgan": "chameleon"}
"""Kind of VQ model -> kind of the whole model in transformers that it is a part of."""

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SCALING = ("rescale_factor", "image_mean", "image_std")
"""Fields of `VQTokenizerConfig` that say which values a VQ model reads and paints."""


class VQTokenizerConfig(PretrainedConfig):
    """Every figure of a `VQTokenizer`.

    Args:
        vq_config: config of the VQ model, of a kind in `WHOLE_MODELS`.
        image_size: height and width of the input in pixels.
        rescale_factor: a value from 0 to 255, times this, less `image_mean`, over `image_std`, is what the
            VQ model reads and paints; of its image processor.
        image_mean: of each colour.
        image_std: of each colour.
    """

    model_type = "dualtoken_vq_tokenizer"
    sub_configs_defaults = {"vq_config": SubConfigSpec(config_class=AutoConfig, model_type="emu3_vqgan")}

    vq_config: dict | PretrainedConfig | None = None
    image_size: int = 256
    rescale_factor: float = 1 / 255
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the VQ model's config and check that the numbers fit each other."""
        super().__post_init__(**kwargs)
        if self.vq.model_type not in WHOLE_MODELS:
            raise ValueError(f"vq_config is of a {self.vq.model_type!r}, expected one of {_known()}")
        if self.image_size < 1 or self.image_size % self._pixels_per_position:
            raise ValueError(
                f"image_size={self.image_size}, but a position of this VQ model stands for "
                f"{self._pixels_per_position} pixels a side; expected a multiple of that"
            )
        if self.vq.model_type == "janus_vqgan":
            self.vq.num_patches = self.grid_size  # a side; no weight depends on it
        if self.codebook_size > 65536:
            raise ValueError(
                f"the codebook has {self.codebook_size} codes; they are stored in 16 bits, so at most 65536"
            )
        divisors = (*self.image_std, self.rescale_factor)
        if len(self.image_mean) != 3 or len(divisors) != 4 or 0 in divisors:
            raise ValueError(
                f"rescale_factor={self.rescale_factor}, image_mean={self.image_mean}, "
                f"image_std={self.image_std}; expected three of the latter two, and no 0 to divide by"
            )

    @classmethod
    def of_folder(cls, folder: str | Path, image_size: int | None = None) -> VQTokenizerConfig:
        """Read the config of a saved tokenizer, of a VQ model of transformers, or of a whole one's VQ part.

        Args:
            folder: with config.json, and for the latter two the settings of the image processor beside it.
            image_size: None for the size that the files name.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: it is another kind of model, or the files do not name what is needed.
        """
        content = _read_json(Path(folder) / "config.json", f"the config of a VQ model: {_known()}")
        kind = content.get("model_type")
        if kind == cls.model_type:
            saved = cls.from_pretrained(folder)
            if image_size not in (None, saved.image_size):
                raise ValueError(
                    f"{folder} was saved for pictures of {saved.image_size} pixels, got image_size="
                    f"{image_size}; convert the VQ model that it was made of again"
                )
            return saved
        if kind in WHOLE_MODELS.values():
            content, kind = (
                content["vq_config"],
                next(vq for vq, whole in WHOLE_MODELS.items() if whole == kind),
            )
        if kind not in WHOLE_MODELS:
            raise ValueError(
                f"{folder} holds a {kind!r} model, expected a visual tokenizer: an export of ours, or "
                f"{_known()}"
            )
        settings = _processor_settings(Path(folder))
        vq: Any = AutoConfig.for_model(kind, **{k: v for k, v in content.items() if k != "model_type"})
        size = image_size or _own_size(vq)
        if size is None:
            raise ValueError(
                f"{folder} names no size of pictures, for this VQ model takes any; choose one: "
                f"dualtoken convert vq --model {folder} --image-size 256 --out tokenizer"
            )
        return cls(vq_config=vq, image_size=size, **settings)

    @property
    def vq(self) -> Any:
        """The config of the VQ model."""
        return self.vq_config

    @property
    def _pixels_per_position(self) -> int:
        return _pixels_per_position(self.vq)

    @property
    def num_codebooks(self) -> int:
        """Codebooks, Q."""
        return 1

    @property
    def num_quantizers(self) -> int:
        """Depths, D."""
        return 1

    @property
    def codebook_size(self) -> int:
        """Codes, K."""
        emu3 = self.vq.model_type == "emu3_vqgan"
        return cast(int, self.vq.codebook_size if emu3 else self.vq.num_embeddings)

    @property
    def codebook_dim(self) -> int:
        """Width of a code vector, E."""
        return cast(int, self.vq.embed_dim)

    @property
    def grid_size(self) -> int:
        """Positions along each side of the image."""
        return self.image_size // self._pixels_per_position

    @property
    def positions(self) -> int:
        """Positions per image, P."""
        return self.grid_size**2

    @property
    def reconstruction_size(self) -> int:
        """Height and width of decoded images in pixels."""
        return self.image_size

    def image_processor_settings(self) -> dict[str, Any]:
        """Return the ``preprocessor_config.json`` of this tokenizer, whose input is in [-1, 1]."""
        return image_processor_settings(self.image_size)


def _pixels_per_position(vq: Any) -> int:
    return 2 ** (len(vq.channel_multiplier) - 1)


def _own_size(vq: Any) -> int | None:
    """Pixels a side that a VQ model's config names; None for Emu3's, whose pictures have any size."""
    if vq.model_type == "janus_vqgan":
        return vq.num_patches * _pixels_per_position(vq)
    return getattr(vq, "resolution", None)


def _processor_settings(folder: Path) -> dict[str, Any]:
    """Read how pictures are scaled from the settings of the image processor."""
    path = next(
        (p for name in _PROCESSOR_FILES if (p := folder / name).is_file()), folder / _PROCESSOR_FILES[0]
    )
    saved = "the settings of the model's image processor, as AutoImageProcessor's save_pretrained writes them"
    content = _read_json(path, saved)
    content = content.get("image_processor", content)
    if missing := [name for name in SCALING if name not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; expected {saved}")
    settings = {name: content[name] for name in SCALING}
    if not content.get("do_rescale", True):
        settings["rescale_factor"] = 1.0
    if not content.get("do_normalize", True):
        settings |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return settings


def _read_json(path: Path, expected: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; expected {expected}")
    return json.loads(path.read_text(encoding="utf-8"))


def _known() -> str:
    return ", ".join(f"{vq} (alone, or as a part of {whole})" for vq, whole in WHOLE_MODELS.items())


AutoConfig.register(VQTokenizerConfig.model_type, VQTokenizerConfig, exist_ok=True)
