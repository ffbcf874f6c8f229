"""What `dualtoken reconstruct`, `generate` and `caption` do with files."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from data_pipeline.images.decoding import DecodedImages, ImageDecoder, build_image_decoder
from eval.inputs import load_models, load_visual_tokenizer, to_picture
from eval.seeing import load_sight
from launchers.errors import UserError


def drawing_progress() -> Callable[[int, int], None] | None:
    """Shows how much of a picture is drawn on a terminal's standard error; elsewhere None."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        sys.stderr.write("\r\033[K" if done == total else f"\rdrawing {done}/{total}")
        sys.stderr.flush()

    return show


def read_pictures(paths: Sequence[Path], image_size: int) -> torch.Tensor:
    """As `decode_files`, to [N, 3, S, S] in [-1, 1], resized to a square as in training."""
    return decode_files(paths, build_image_decoder(image_size)).images


def decode_files(paths: Sequence[Path], decode: ImageDecoder) -> DecodedImages:
    """Decode picture files.

    Raises:
        UserError: a file is missing or no readable picture; the message names it.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"no such file: {missing[0]}")
    decoded = decode([path.read_bytes() for path in paths])
    if decoded.rejected:
        bad = decoded.rejected[0]
        raise UserError(f"{paths[bad.index]} is no picture that can be read: {bad.reason}")
    return decoded


def reconstruct_files(images: Sequence[Path], visual_tokenizer: Path, output: Path) -> Iterator[str]:
    """Write each picture beside its reconstruction; yields a line for each."""
    from eval.visual_tokenizer.reconstruction import reconstruct, side_by_side

    tokenizer = load_visual_tokenizer(visual_tokenizer)
    pictures = read_pictures(images, tokenizer.config.image_size)
    found = reconstruct(tokenizer, pictures)
    for path, target, picture, result, quality in zip(
        images, free_names(output, [path.stem for path in images]), pictures, found.images, found.psnr
    ):
        side_by_side(picture, result).save(target)
        yield f"{path} -> {target} (left the input, right the reconstruction, {quality:.1f} dB)"


def generate_files(
    prompts: Sequence[str],
    model: Path,
    visual_tokenizer: Path,
    output: Path,
    guidance_scale: float,
    sampling: dict,
    images: Sequence[Path] = (),
    vision_tower: str | None = None,
    precision: str = "fp32",
) -> Iterator[str]:
    """Write a picture for each prompt; yields a line for each.

    `images` take the places of the prompts' image tags, in their order.
    """
    from dualtoken.generation.generators import generate_images
    from dualtoken.processing import DualTokenProcessor
    from dualtoken.visual_tokenizer.vq_tokenizer import VQTokenizer

    output.mkdir(parents=True, exist_ok=True)  # told before anything is drawn, as what follows
    unified, text_tokenizer, tokenizer = load_models(model, visual_tokenizer, precision)
    if isinstance(tokenizer, VQTokenizer):
        tokenizer.require_decoder()
    sight = load_sight(unified.config, text_tokenizer, tokenizer, vision_tower)
    shown = sight.look(decode_files(images, sight.decoder())) if images else []
    processor = DualTokenProcessor.for_config(unified.config, text_tokenizer)
    documents = processor.documents(list(prompts), parts=shown)
    codes = generate_images(
        unified,
        text_tokenizer,
        documents,
        guidance_scale=guidance_scale,
        progress=drawing_progress(),
        **sampling,
    )
    pictures = tokenizer.decode(codes.to(tokenizer.device)).float().cpu()
    for prompt, target, picture in zip(prompts, free_names(output, prompts), pictures):
        to_picture(picture).save(target)
        yield f"{prompt!r} -> {target}"


def caption_files(
    images: Sequence[Path],
    model: Path,
    visual_tokenizer: Path,
    language: str,
    max_new_tokens: int,
    vision_tower: str | None = None,
    precision: str = "fp32",
) -> Iterator[str]:
    """Yield a line with a caption for each picture."""
    from eval.generation.writing import write_captions

    unified, text_tokenizer, tokenizer = load_models(model, visual_tokenizer, precision)
    sight = load_sight(unified.config, text_tokenizer, tokenizer, vision_tower)
    seen = sight.look(decode_files(images, sight.decoder()))
    captions = write_captions(unified, text_tokenizer, seen, language, max_new_tokens)
    for path, text in zip(images, captions):
        yield f"{path}: {text}"


def free_names(output: Path, names: Sequence[str]) -> list[Path]:
    """A PNG path in `output` for each name, none of them there yet, so that nothing is overwritten."""
    output.mkdir(parents=True, exist_ok=True)
    taken: set[Path] = set()
    paths = []
    for name in names:
        words = "".join(letter if letter.isalnum() or letter in "-_" else " " for letter in name).split()
        stem = "-".join(words)[:60] or "picture"
        path, number = output / f"{stem}.png", 2
        while path in taken or path.exists():
            path, number = output / f"{stem}-{number}.png", number + 1
        taken.add(path)
        paths.append(path)
    return paths
