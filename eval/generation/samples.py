"""Pictures for prompts and captions for pictures, shown beside the true ones and scored."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_pipeline.languages import caption_prompt
from data_pipeline.shards.code_shards import CodeSample, DatasetManifest, require_same_codes
from dualtoken.generation.generators import generate_images, generate_text
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.inputs import (
    EvaluationPaths,
    draw_prompts,
    load_codes,
    load_models,
    load_pictures,
    stack_codes,
    to_picture,
)
from eval.metrics.recall import recall_at_1
from eval.results import write_json
from eval.visual_tokenizer.reconstruction import BATCH
from eval.visual_tokenizer.retrieval import image_features

GUIDANCE_SCALES = (1.0, 1.5, 3.0)
PROMPTS = 32  # of each split
PROMPTS_SHOWN = 12
CAPTIONS_SHOWN = 18
CAPTION_TOKENS = 24
SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}  # the likeliest code: the same picture each time


def decode_codes(tokenizer: DualTokenVisualTokenizer, codes: Tensor) -> Tensor:
    """Pictures [N, 3, S, S] of codes [N, P, Q, D], in batches."""
    return torch.cat(
        [tokenizer.decode(part.to(tokenizer.device)).float().cpu() for part in codes.split(BATCH)]
    )


def write_captions(
    model: DualTokenForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    images: Sequence[Tensor],
    language: str,
    max_new_tokens: int = CAPTION_TOKENS,
) -> list[str]:
    """The likeliest caption, word by word, for the codes [P, Q, D] of each image."""
    question = TextPart(caption_prompt(language), loss=False)
    prefixes = [Document([ImagePart(codes), question]) for codes in images]
    written = generate_text(model, text_tokenizer, prefixes, max_new_tokens=max_new_tokens, temperature=0.0)
    return [text.strip() for text in written]


class _Split:
    """One split's samples and the pictures they were made from."""

    def __init__(
        self,
        name: str,
        samples: list[CodeSample],
        tokenizer: DualTokenVisualTokenizer,
        images: Path,
        output: Path,
    ) -> None:
        self.name = name
        self.samples = samples
        self.tokenizer = tokenizer
        self.output = output
        self.folder = output / "generation" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.codes = list(stack_codes(samples))
        pictures = load_pictures(images, tokenizer.config.image_size)
        place = {key: index for index, key in enumerate(pictures.keys)}
        missing = [sample.key for sample in samples if sample.key not in place]
        if missing:
            raise ValueError(f"{images} lacks the picture {missing[0]} that the codes were made from")
        self.true_images = pictures.images[[place[sample.key] for sample in samples]]

    def save(self, image: Tensor, name: str) -> str:
        """Write a picture; returns its path below the output folder."""
        path = self.folder / f"{name}.png"
        to_picture(image).save(path)
        return str(path.relative_to(self.output))

    def generate(
        self,
        model: DualTokenForCausalLM,
        text_tokenizer: PreTrainedTokenizerBase,
        scales: Sequence[float],
        seed: int,
    ) -> dict:
        """Draw every prompt at every guidance scale; find each picture's nearest true one."""
        rows = draw_prompts(self.samples)
        for index, row in enumerate(rows[:PROMPTS_SHOWN]):
            row["true_picture"] = self.save(self.true_images[index], f"{index:03d}-true")
            row["pictures"] = {}
        device = self.tokenizer.device
        truth = image_features(self.tokenizer.encode_semantic, self.true_images, device)
        # Pictures of one name are equally right.
        names = [str(sorted(sample.captions.items())) for sample in self.samples]
        recall = {}
        for scale in scales:
            prompts = [row["prompt"] for row in rows]
            codes = generate_images(
                model, text_tokenizer, prompts, guidance_scale=scale, seed=seed, **SAMPLING
            )
            images = decode_codes(self.tokenizer, codes)
            # The drawn picture is encoded anew: what counts is what one sees, not the codes meant.
            found = image_features(self.tokenizer.encode_semantic, images.clamp(-1, 1), device)
            recall[str(scale)] = vars(recall_at_1(found, truth, names, names))
            for index, row in enumerate(rows[:PROMPTS_SHOWN]):
                row["pictures"][str(scale)] = self.save(images[index], f"{index:03d}-guidance-{scale:g}")
        return {"prompts": rows, "recall": recall}

    def caption(
        self, model: DualTokenForCausalLM, text_tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list, dict]:
        """Caption every picture in every language; returns rows and the share that is exactly right."""
        rows = [{"key": s.key, "captions": s.captions, "written": {}} for s in self.samples]
        exact = {}
        for language in dict.fromkeys(name for sample in self.samples for name in sample.captions):
            written = write_captions(model, text_tokenizer, self.codes, language)
            having = [row for row in rows if language in row["captions"]]
            for row, text in zip(rows, written, strict=True):
                row["written"][language] = text
            right = sum(row["written"][language] == row["captions"][language] for row in having)
            exact[language] = {"share": right / len(having), "pictures": len(having)}
        for index, row in enumerate(rows[:CAPTIONS_SHOWN]):
            row["picture"] = self.save(self.true_images[index], f"{index:03d}-true")
        return rows, exact


@torch.no_grad()
def run(
    paths: EvaluationPaths,
    count: int | None = None,
    seed: int = 0,
    guidance_scales: Sequence[float] = GUIDANCE_SCALES,
) -> dict:
    """Generate and caption for seen and for held-out concepts; write `generation.json` and the pictures.

    Raises:
        FileNotFoundError: a model is missing.
        ValueError: model, codes and visual tokenizer do not belong together.
    """
    model, text_tokenizer, tokenizer = load_models(paths.model, paths.visual_tokenizer)
    result: dict = {
        "settings": {
            **SAMPLING,
            "seed": seed,
            "guidance_scales": [float(scale) for scale in guidance_scales],
        },
        "pictures": {},
        "captions": {},
        "caption_exact": {},
    }
    for name, folder in paths.codes().items():
        require_same_codes(
            folder, DatasetManifest.load(folder).fingerprint, model.config.tokenizer_fingerprint
        )
        samples = load_codes(folder, min(count or PROMPTS, PROMPTS), seed)
        split = _Split(name, samples, tokenizer, paths.images()[name], paths.output)
        result["pictures"][name] = split.generate(model, text_tokenizer, guidance_scales, seed)
        result["captions"][name], result["caption_exact"][name] = split.caption(model, text_tokenizer)
    write_json(paths.output / "generation.json", result)
    return result
