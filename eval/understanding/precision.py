"""How exactly models compute for a benchmark, and by which versions of what."""

import torch
import transformers

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def versions() -> dict[str, str]:
    """Versions by which answers may differ in rounding."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
