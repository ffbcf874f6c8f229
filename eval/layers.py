"""How alike the layers of the SigLIP are, which ones one would read, and which ones the tokenizer reads."""

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
    similarity, proposal = analyze_backbone(siglip, pictures.images.split(BATCH))
    result = {
        "pictures": len(pictures),
        "layers": list(range(1, len(similarity) + 1)),
        "matrix": similarity.tolist(),
        "reconstruction_layer": read.reconstruction_layer,
        "semantic_layer": read.semantic_layer,
        "proposal": proposal.describe(),
    }
    paths.output.mkdir(parents=True, exist_ok=True)
    plot_similarity(similarity, proposal, paths.output / "layers.png")
    write_json(paths.output / "layers.json", result)
    return result
