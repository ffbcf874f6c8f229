"""How alike the layers of a SigLIP are, which ones one would read, and which ones a tokenizer reads."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from dualtoken.visual_tokenizer.backbone import load_backbone
from dualtoken.visual_tokenizer.config import DualTokenVisualTokenizerConfig
from dualtoken.visual_tokenizer.layer_analysis import analyze_backbone, plot_similarity
from eval.inputs import EvaluationPaths, default_device, load_pictures, require_export
from eval.results import write_json

BATCH = 64


def run(paths: EvaluationPaths, count: int | None = None, seed: int = 0) -> dict:
    """Compare the layers on held-out pictures; write `layers.json` and `layers.png`.

    Raises:
        FileNotFoundError: a model is missing.
    """
    require_export(paths.siglip, "SigLIP", "dualtoken train quickstart_siglip")
    require_export(paths.visual_tokenizer, "visual tokenizer", "dualtoken train quickstart_tokenizer")
    siglip = load_backbone(paths.siglip).to(default_device())
    read = DualTokenVisualTokenizerConfig.from_pretrained(paths.visual_tokenizer)
    pictures = load_pictures(paths.held_out_images, siglip.config.vision_config.image_size, count, seed)
    layers = {"reconstruction_layer": read.reconstruction_layer, "semantic_layer": read.semantic_layer}
    batches = pictures.images.split(BATCH)
    return compare_layers(siglip, batches, len(pictures), str(paths.siglip), paths.output, layers)


def compare_layers(
    siglip: nn.Module,
    batches: Iterable[Tensor],
    pictures: int,
    source: str,
    output: Path,
    read: dict[str, int] | None = None,
) -> dict:
    """Compare the layers of a SigLIP; write `layers.json` and `layers.png`.

    Args:
        siglip: the model, on its device.
        batches: pictures [B, 3, H, W] in [-1, 1].
        pictures: how many they are.
        source: where the model is from, as the plot and the file name it.
        output: folder, made where it is missing.
        read: reconstruction_layer and semantic_layer of a tokenizer built on it, where there is one.

    Returns:
        what the file holds.
    """
    similarity, proposal = analyze_backbone(siglip, batches)
    result = {
        "backbone": source,
        "pictures": pictures,
        "layers": list(range(1, len(similarity) + 1)),
        "matrix": similarity.tolist(),
        "blocks": [list(block) for block in proposal.blocks],
        "blocks_are_clear": proposal.clear,
        "proposed": {
            "reconstruction_layer": proposal.reconstruction_layer,
            "by_blocks": proposal.from_blocks,
            "by_first_quarter": proposal.from_rule,
            "semantic_layer": proposal.semantic_layer,
        },
        "proposal": proposal.describe(),
        "read": read,
    }
    output.mkdir(parents=True, exist_ok=True)
    plot_similarity(similarity, proposal, output / "layers.png", f"{source}, {pictures} pictures")
    write_json(output / "layers.json", result)
    return result
