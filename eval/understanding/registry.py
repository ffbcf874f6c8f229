"""The benchmarks that `dualtoken evaluate` knows, by name."""

from eval.understanding.ai2d import AI2D
from eval.understanding.benchmark import Benchmark
from eval.understanding.mmbench import MMBENCH
from eval.understanding.mme import MME
from eval.understanding.mmvet import MMVET
from eval.understanding.pope import POPE
from eval.understanding.seed import SEED
from eval.understanding.textvqa import TEXTVQA
from eval.understanding.vqav2 import VQAV2

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one for one in (VQAV2, TEXTVQA, POPE, MME, SEED, MMBENCH, MMVET, AI2D)
}
