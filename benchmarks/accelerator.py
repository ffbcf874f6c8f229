"""Steps of both stages, pretokenizing and drawing at the papers' sizes, on one GPU, beside its limits.

Weights are random, pictures crops of a photograph, codes random: none of it changes the time. Each case runs
alone, the training jobs as a user starts them (`python -m pretrain.train`, one rank) and are ended once they
have logged their steps; figures are medians of those after the first `--warm-up`. `matmul` is what the device
can do: products of 8192 x 8192 matrices. Run: ``python -m benchmarks.accelerator [--cases matmul mllm encode]
[--output figures.json]``; ``--size tiny`` runs the same on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import SiglipModel

from benchmarks.decoding import photographs
from benchmarks.overlap import write_shards
from benchmarks.quantizer import build
from benchmarks.streams import byte_tokenizer, write_codes
from benchmarks.visual_heads import plain_loss
from data_pipeline.images.decoding import build_image_decoder
from data_pipeline.pretokenize.command import pretokenize
from data_pipeline.pretokenize.shard_tokenizer import Settings, ShardTokenizer
from data_pipeline.shards.code_shards import CodeGeometry
from dualtoken.generation.generators import generate_images
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.depth_transformer import VisualHead
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from pretrain.metrics import read_metrics
from pretrain.planned_models import LLM_PRESETS

_TINY_LLM = {
    "model_type": "qwen2", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
_TINY_HEADS = {"head_hidden_size": 24, "head_num_layers": 1, "head_num_attention_heads": 2}

SIZES: dict[str, dict[str, Any]] = {
    "paper": {
        "preset": "so400m_384", "llm": LLM_PRESETS["qwen2.5-3b"], "heads": {}, "context": 8192,
        "micro_batch": 32, "pictures": 2048, "batch": 64, "drawn": 8, "latents": 16 * 729, "matrix": 8192,
        "head": (2048, 3, 16), "positions": 4096,
    },
    "tiny": {
        "preset": "tiny", "llm": _TINY_LLM, "heads": _TINY_HEADS, "context": 128,
        "micro_batch": 2, "pictures": 24, "batch": 4, "drawn": 2, "latents": 64, "matrix": 64,
        "head": (32, 1, 2), "positions": 16,
    },
}  # fmt: skip


class Bench:
    """The files of a size, made when first needed, and the cases."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.size = SIZES[options.size]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = preset_config(self.size["preset"])
        self.work.mkdir(parents=True, exist_ok=True)

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return a folder of the work folder, made where it is not there."""
        folder = self.work / name
        if not folder.exists():
            torch.manual_seed(0)
            unfinished = self.work / f"{name}.part"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
        return folder

    def pictures(self) -> Path:
        """JPEGs of 512 pixels in three shards."""
        count = self.size["pictures"]

        def write(folder: Path) -> None:
            files = photographs(min(count, 256))
            write_shards(folder, (files * -(-count // len(files)))[:count], with_broken=False)

        return self.made("pictures", write)

    def visual_tokenizer(self) -> DualTokenVisualTokenizer:
        """A tokenizer with random weights, on the device."""
        torch.manual_seed(0)
        with self.device:
            return DualTokenVisualTokenizer(self.config).eval()

    def tokenizer_words(self) -> list[str]:
        """Stage 1 as the paper's joint phase, all losses from the first step."""
        with self.device:
            backbone = self.made(
                "siglip", lambda folder: SiglipModel(self.config.backbone_config()).save_pretrained(folder)
            )
        batch = self.size["micro_batch"]
        return [
            "recipe=tokenizer_joint",
            f"model.preset={self.size['preset']}",
            f"model.backbone={backbone}",
            f"data.path={self.pictures()}",
            f"global_batch_size={batch}",
            f"micro_batch_size={batch}",
            "losses.gan_start_step=0",
            "perceptual_network.trunk=stlpips",
        ]

    def mllm_words(self) -> list[str]:
        """Stage 2, everything trained, on captions and pictures to draw alike."""
        tokenizer = self.made("tokenizer", lambda folder: self.visual_tokenizer().save_pretrained(folder))
        text = self.made("text_tokenizer", lambda folder: byte_tokenizer().save_pretrained(folder))

        def write(folder: Path) -> None:
            fingerprint = self.visual_tokenizer().fingerprint()
            write_codes(folder, CodeGeometry.of(self.config), self.size["pictures"], fingerprint)

        codes = self.made("codes", write)
        words = {
            "visual_tokenizer": tokenizer,
            "text_tokenizer": text,
            "llm_config": json.dumps(self.size["llm"]),
            "heads": json.dumps(self.size["heads"]),
        }
        blend = [{"path": str(codes), "view": view, "weight": 1.0} for view in ("caption", "generate")]
        return [
            "job=mllm",
            "deepspeed=zero3.json",
            *(f"model.{key}={value}" for key, value in words.items()),
            f"data.blend={json.dumps(blend)}",
            f"data.context_length={self.size['context']}",
            "data.num_workers=2",
            "global_batch_size=1",
            "micro_batch_size=1",
        ]

    def train(self, name: str, words: list[str]) -> dict[str, float]:
        """Run a job until its steps are logged, end it, and return the medians of what it logged."""
        steps = self.options.warm_up + self.options.steps
        run = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=self.work))
        words = [*words, f"run_dir={run}", "steps=100000", "log_every=1", "wandb.mode=disabled"]
        metrics, log = run / "metrics.jsonl", run / "log.txt"
        environment = {**os.environ, "DS_ACCELERATOR": self.device.type}
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.train", *words],
                stdout=file, stderr=file, env=environment, start_new_session=True,
            )  # fmt: skip
        records: list[dict[str, float]] = []
        try:
            deadline = time.monotonic() + self.options.limit
            while len(records) < steps:
                time.sleep(0.2)
                if process.poll() is not None or time.monotonic() > deadline:
                    why = f"ended with {process.returncode}" if process.poll() is not None else "too slow"
                    raise RuntimeError(f"{name}: {why}\n{log.read_text(encoding='utf-8')[-3000:]}")
                records = [record for record in read_metrics(metrics) if record["split"] == "train"]
        finally:
            if process.poll() is None:  # its readers too; nothing is saved
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        kept = records[self.options.warm_up : steps]
        keys = [
            key
            for key, value in kept[-1].items()
            if isinstance(value, int | float)
            and key.startswith(("mfu", "tflops", "seconds", "memory", "data_wait", "tokens_", "images_"))
        ]
        return {key: statistics.median(record.get(key, 0.0) for record in kept) for key in keys}

    def seconds(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Return the median time of some rounds after two to warm up, waiting for the device."""
        times = []
        for _ in range(2 + rounds):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[2:])

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_of(self, work: Callable[[], object]) -> float:
        """Return the most GiB that tensors held besides what was there before; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0.0
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def matmul(self) -> dict[str, float]:
        """What the device can do: TFLOP/s of products in bf16, in fp32 and in TF32."""
        found = {}
        side = self.size["matrix"]
        for name, dtype, precision in (
            ("bf16", torch.bfloat16, "highest"),
            ("fp32", torch.float32, "highest"),
            ("tf32", torch.float32, "high"),
        ):
            torch.set_float32_matmul_precision(precision)
            left, right = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
            found[f"{name}_tflops"] = 2 * side**3 / self.seconds(lambda a=left, b=right: a @ b) / 1e12
        torch.set_float32_matmul_precision("highest")
        return found

    def encode(self) -> dict[str, float]:
        """Images a second of the tokenizer's encoder by precision, and the share of fp32's codes."""
        model, batch = self.visual_tokenizer(), self.size["batch"]
        side = self.config.image_size
        images = torch.rand(batch, 3, side, side, device=self.device) * 2 - 1
        found, expected = {}, model.encode(images)
        for name in ("fp32", "tf32", "bf16"):
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            with torch.autocast(self.device.type, torch.bfloat16, enabled=name == "bf16"):
                found[f"{name}_images_per_second"] = batch / self.seconds(lambda: model.encode(images))
                same = model.encode(images) == expected
            found[f"{name}_same_codes"] = same.float().mean().item()
            found[f"{name}_same_first_codes"] = same[..., 0].float().mean().item()
        torch.set_float32_matmul_precision("highest")
        return found

    def pretokenize(self, backend: str) -> dict[str, float]:
        """Images a second of the whole command, beside reading, decoding and encoding alone."""
        model = self.visual_tokenizer()
        shards = [str(shard) for shard in sorted(self.pictures().glob("*.tar"))]
        settings = Settings(batch_size=self.size["batch"])
        decoder = build_image_decoder(self.config.image_size, backend, self.device)
        tokenizer = ShardTokenizer(model, decoder, settings)
        timed: dict[str, float] = {}

        def alone(name: str, work: Callable[[], list[Any]]) -> list[Any]:
            self.wait()
            begin = time.perf_counter()
            made = work()
            self.wait()
            timed[f"{name}_images_per_second"] = self.size["pictures"] / (time.perf_counter() - begin)
            return made

        batches = alone("reading", lambda: [b for shard in shards for b in tokenizer.read(shard)])
        tokenizer.collect(tokenizer.encode(tokenizer.decode(batches[0])))  # warms up
        decoded = alone("decoding", lambda: [tokenizer.decode(batch) for batch in batches])
        alone("encoding", lambda: [tokenizer.encode(batch) for batch in decoded])
        with tempfile.TemporaryDirectory(dir=self.work) as output:
            alone(
                "whole",
                lambda: [pretokenize(shards, model, decoder, output, settings, report=lambda line: None)],
            )
        timed["of_the_limit"] = timed["whole_images_per_second"] / min(
            timed[f"{part}_images_per_second"] for part in ("reading", "decoding", "encoding")
        )
        return timed

    def quantizer(self) -> dict[str, float]:
        """A training step of the residual quantizer against the textbook's and the products it needs."""
        config, rows = self.config, self.size["latents"]
        size, width, depth = config.codebook_size, config.codebook_dim, config.num_quantizers
        codebook = torch.randn(size, width, device=self.device)
        latents = torch.randn(rows, width, device=self.device)

        def products() -> None:
            for _ in range(depth):
                latents @ codebook.t()

        ours, textbook = (build(name, latents, codebook, depth)[0] for name in ("ours", "plain"))
        times = {"ours": ours, "textbook": textbook, "products": products}
        found = {f"{name}_milliseconds": 1e3 * self.seconds(work) for name, work in times.items()}
        return found | {f"{name}_gib": self.peak_of(work) for name, work in times.items() if name[0] != "p"}

    def head(self) -> dict[str, float]:
        """Forward and backward of a visual head against all logits at once, in bf16."""
        config, count = self.config, self.size["positions"]
        hidden, layers, heads = self.size["head"]
        shape = (hidden, layers, heads, 4 * hidden, config.num_quantizers, config.codebook_dim)
        head = VisualHead(*shape, config.codebook_size, 128)
        head.init_weights()
        head = head.to(self.device, torch.bfloat16)
        inputs = (
            torch.randn(count, hidden, device=self.device, dtype=torch.bfloat16, requires_grad=True),
            torch.randn(count, config.num_quantizers - 1, config.codebook_dim, device=self.device),
            torch.randint(config.codebook_size, (count, config.num_quantizers), device=self.device),
        )
        losses: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: head(*inputs)[0].sum(),
            "all_logits": lambda: plain_loss(head, *inputs),
        }
        found = {}
        for name, loss in losses.items():
            found[f"{name}_milliseconds"] = 1e3 * self.seconds(lambda loss=loss: loss().backward())
            found[f"{name}_gib"] = self.peak_of(lambda loss=loss: loss().backward())
        return found

    def draw(self) -> dict[str, float]:
        """Seconds a picture takes to be drawn, in bf16 and with guidance, alone and several at a time."""
        text = byte_tokenizer()
        config = DualTokenConfig.for_tokenizers(
            dict(self.size["llm"]), text, self.visual_tokenizer(), **self.size["heads"]
        )
        with self.device:
            model = DualTokenForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
            model.set_codebooks(
                torch.randn(2, 1, config.codebook_size, config.codebook_dim, device=self.device)
            )
        found = {}
        for count in (1, self.size["drawn"]):
            self.wait()
            begin = time.perf_counter()
            generate_images(model, text, ["a photograph"] * count, guidance_scale=3.0, seed=0)
            self.wait()
            found[f"{count}_seconds_per_picture"] = (time.perf_counter() - begin) / count
        return found

    def cases(self) -> dict[str, Callable[[], dict[str, float]]]:
        """All cases by name."""
        checkpointing = "gradient_checkpointing=true"
        tokenizer = {"tokenizer": [], "tokenizer_compiled": ["compile=[towers,decoder]"]}
        mllm = {
            "mllm": [checkpointing],
            "mllm_compiled": [checkpointing, "compile=[all]"],
            "mllm_keeps_products": [checkpointing, "checkpointing_keeps=products"],
            "mllm_no_checkpointing": [],
        }
        trained = {name: (self.tokenizer_words, more) for name, more in tokenizer.items()}
        trained |= {name: (self.mllm_words, more) for name, more in mllm.items()}
        return {
            "matmul": self.matmul,
            "quantizer": self.quantizer,
            "head": self.head,
            "encode": self.encode,
            **{
                f"pretokenize_{backend}": lambda backend=backend: self.pretokenize(backend)
                for backend in ("torchvision", "dali")
            },
            "draw": self.draw,
            **{
                name: lambda name=name, words=words, more=more: self.train(name, [*words(), *more])
                for name, (words, more) in trained.items()
            },
        }


def main() -> int:
    """Run the cases and print them; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="paper", choices=list(SIZES))
    parser.add_argument("--cases", nargs="+", help="some of them; all by default")
    parser.add_argument("--work", default="runs/accelerator", help="folder for models, data and runs")
    parser.add_argument("--steps", type=int, default=10, help="of a training job that count")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them")
    parser.add_argument("--limit", type=float, default=600, help="seconds a training job may take")
    parser.add_argument("--output", type=Path, help="file for the figures as JSON")
    options = parser.parse_args()
    bench = Bench(options)
    cases = bench.cases()
    for name in options.cases or cases:
        if name not in cases:
            parser.error(f"--cases {name}: expected some of {', '.join(cases)}")
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, size {options.size}", flush=True)
    found: dict[str, Any] = {}
    failed = False
    for name in options.cases or cases:
        begin = time.perf_counter()
        try:
            found[name] = cases[name]()
        except (RuntimeError, ValueError, ImportError, OSError) as error:
            failed = True
            print(f"{name}: FAILED, {error}", flush=True)
            continue
        finally:
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        figures = ", ".join(f"{key} {value:,.4g}" for key, value in found[name].items())
        print(f"{name} ({time.perf_counter() - begin:.0f} s): {figures}", flush=True)
        if options.output:
            options.output.write_text(json.dumps({"device": device, **found}, indent=2), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
