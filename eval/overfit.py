"""Whether a unified model reproduces the pairs it was trained on: captions, codes, pictures."""

import html
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_pipeline.shards.code_shards import CodeSample
from data_pipeline.streams.views import image_parts
from dualtoken.generation.generators import generate_images
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.comparisons import Baseline, Comparison
from eval.generation.writing import decode_codes, write_captions
from eval.html import data_uri
from eval.inputs import draw_prompts, stack_codes, to_picture
from eval.metrics.recall import recall_at_1
from eval.results import write_json
from eval.visual_tokenizer.retrieval import BATCH, image_features

CAPTION_TOKENS = 128


@dataclass
class PairResult:
    """One pair, asked both ways."""

    key: str
    language: str
    caption: str
    written: str  # the model's caption of the picture
    codes_right: float  # share of the P x Q x D codes drawn for the caption
    picture: str = ""  # file, below the folder of the results
    drawn: str = ""

    @property
    def text_exact(self) -> bool:
        """Whether the caption came back word for word."""
        return self.written == self.caption

    @property
    def image_exact(self) -> bool:
        """Whether every code came back."""
        return self.codes_right == 1.0


@dataclass
class Reproduction:
    """What a model made of the pairs it was trained on."""

    pairs: list[PairResult]
    recall: dict  # R@1 of the drawn pictures among the originals, and its chance
    drawn: Tensor  # [N, P, Q, D]

    def share(self, exact: str) -> float:
        """Share of the pairs whose `text_exact` or `image_exact` holds."""
        return sum(getattr(pair, exact) for pair in self.pairs) / len(self.pairs)

    @property
    def codes_right(self) -> float:
        """Share of all codes that came back."""
        return sum(pair.codes_right for pair in self.pairs) / len(self.pairs)

    @property
    def exact(self) -> bool:
        """Whether all texts and pictures came back."""
        return self.share("text_exact") == self.share("image_exact") == 1.0

    @property
    def beats_chance(self) -> bool:
        """Whether the drawn pictures match their prompts more often than luck would have it."""
        chance = Baseline("chance", self.recall["chance"])
        return Comparison("R@1", self.recall["recall"], "share", [chance], trials=len(self.pairs)).beats(
            chance
        )

    def as_json(self) -> dict:
        """The figures."""
        return {
            "captions_exact": self.share("text_exact"),
            "images_exact": self.share("image_exact"),
            "codes_right": self.codes_right,
            "recall_at_1": self.recall,
            "pairs": [
                {**asdict(pair), "text_exact": pair.text_exact, "image_exact": pair.image_exact}
                for pair in self.pairs
            ],
        }


@torch.no_grad()
def reproduce(
    model: DualTokenForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    visual_tokenizer: DualTokenVisualTokenizer,
    samples: Sequence[CodeSample],
    progress: Callable[[int, int], None] | None = None,
) -> Reproduction:
    """Ask for each pair's caption and for its picture, the likeliest token and code each time.

    The drawn codes are ranked by the visual tokenizer's own semantic features: cosine of their pooled vector
    with those of all the originals' codes. Pairs of one caption are equally right.

    Args:
        model: the unified model.
        text_tokenizer: its text tokenizer.
        visual_tokenizer: the one whose codes they are.
        samples: pairs of one image and its caption in one language.
        progress: called with (positions drawn, P) of each batch.
    """
    rows = draw_prompts(samples)
    codes = stack_codes(samples)
    prompts = [row["prompt"] for row in rows]
    drawn = torch.cat(
        [
            generate_images(model, text_tokenizer, batch, temperature=0.0, progress=progress).cpu()
            for batch in _batches(prompts)
        ]
    )
    right = (drawn == codes).flatten(1).double().mean(dim=1).tolist()
    written: dict[int, str] = {}
    for language in dict.fromkeys(row["language"] for row in rows):
        for places in _batches([place for place, row in enumerate(rows) if row["language"] == language]):
            images = [image_parts(samples[place])[0] for place in places]
            texts = write_captions(model, text_tokenizer, images, language, CAPTION_TOKENS)
            written.update(zip(places, texts, strict=True))
    device, encode = visual_tokenizer.device, visual_tokenizer.encode_semantic
    found, truth = (image_features(encode, given, device) for given in (drawn, codes))
    pairs = [
        PairResult(row["key"], row["language"], row["prompt"].strip(), written[place], right[place])
        for place, row in enumerate(rows)
    ]
    return Reproduction(pairs, vars(recall_at_1(found, truth, prompts, prompts)), drawn)


def _batches(items: Sequence) -> list[Sequence]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def write_results(
    result: Reproduction,
    visual_tokenizer: DualTokenVisualTokenizer,
    samples: Sequence[CodeSample],
    settings: dict,
    output: Path,
) -> None:
    """Write `overfit.json`, the pictures, and `overfit.html`: original | drawn, with the captions."""
    codes = stack_codes(samples)
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    originals, drawings = (decode_codes(visual_tokenizer, given) for given in (codes, result.drawn))
    for place, pair in enumerate(result.pairs):
        pair.picture = f"pictures/{place:03d}-original.png"
        pair.drawn = f"pictures/{place:03d}-drawn.png"
        for image, name in ((originals[place], pair.picture), (drawings[place], pair.drawn)):
            to_picture(image).save(output / name)
    write_json(output / "overfit.json", {"settings": settings, **result.as_json()})
    (output / "overfit.html").write_text(_sheet(result, output), encoding="utf-8")


def _sheet(result: Reproduction, output: Path) -> str:
    cells = []
    for pair in result.pairs:
        words = html.escape(pair.caption)
        if not pair.text_exact:
            words += f"<br><s>{html.escape(pair.written) or '(nothing)'}</s>"
        shown = (("original", pair.picture), ("drawn", pair.drawn))
        images = "".join(f'<img alt="{alt}" src="{data_uri(output / name)}">' for alt, name in shown)
        cells.append(f"<figure>{images}<figcaption>{words}<br>{pair.codes_right:.1%}</figcaption></figure>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Overfit</title><style>'
        "body{font-family:sans-serif}figure{display:inline-block;margin:8px;width:264px;"
        "vertical-align:top}img{width:128px;margin-right:4px}s{color:#b00}</style>"
        "<p>Left the picture of the original codes, right the one drawn for the caption. Below: the caption, "
        "what the model wrote instead if that differs, and the share of codes drawn right.</p>"
        f"{''.join(cells)}</html>\n"
    )
