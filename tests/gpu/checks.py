"""The checks, each a function of the device, so that their own logic can be tried where there is no GPU."""

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from data_pipeline.images.decoding import SideDecoder, build_image_decoder
from dualtoken.generation.generators import generate_images
from dualtoken.unified_model.attention import loop_over_documents, varlen_documents
from dualtoken.unified_model.depth_transformer import VisualHead
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.nearest import NearestCodeSearch
from pretrain.timing import StepClock
from tests.support.distributed import run_module
from tests.support.unified_support import FEATURES, byte_tokenizer, tiny_model
from tests.test_data_pipeline.pretokenize.test_pretokenize import picture
from tests.test_pretrain import test_contrastive
from tests.test_pretrain.test_jobs import mllm_words, tokenizer_words

STEPS = 20


def environment(device: str) -> dict[str, str]:
    """What the processes of a job need to run on a device; tests run on the CPU otherwise."""
    return {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"} if device == "cuda" else {}


def job_words(folder: Path, job: str) -> list[str]:
    """A job at the tests' sizes, on one rank, in bf16; `JOB_compiled` with its parts compiled."""
    words = {
        "contrastive": [
            *test_contrastive.words(folder, "unused", "global_batch_size=4"),
            *(f"{name}.path={folder / 'images'}" for name in ("data", "validation_data")),
            f"text_tokenizer={folder / 'siglip'}",
        ],
        "tokenizer": tokenizer_words(folder, "unused", 1),
        "mllm": mllm_words(folder, "unused", 1),
    }
    kind, _, compiled = job.partition("_")
    return [*words[kind], *(["compile=[all]"] if compiled else []), "precision=bf16", "log_every=1"]


def check_job(folder: Path, job: str, device: str, steps: int = STEPS) -> str:
    """Train on the device and on the CPU: losses stay close at first and fall; returns a line of figures."""
    records = {}
    for where in dict.fromkeys((device, "cpu")):
        run = folder / f"{job}_on_{where}"
        words = [*job_words(folder, job), f"run_dir={run}", f"steps={steps}"]
        run_module("pretrain.train", words, 1, env=environment(where)).check()
        lines = [
            json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        records[where] = [line for line in lines if line["split"] == "train"]
    found, expected = records[device], records["cpu"]
    keys = [key for key in expected[0] if key.startswith("loss/")]
    for step in range(3):
        for key in keys:
            difference = abs(found[step][key] - expected[step][key])
            assert difference <= 0.05 * abs(expected[step][key]) + 0.05, (job, step + 1, key)
    main = "loss/total" if "loss/total" in keys else keys[0]
    assert found[-1][main] < found[0][main], (job, main)
    done = json.loads((folder / f"{job}_on_{device}" / "done.json").read_text(encoding="utf-8"))
    assert done["precision"] == "bfloat16"
    rates = [f"{found[-1][key]:,.0f} {key}" for key in found[-1] if key.endswith("_per_second")]
    memory = done["peak_memory_bytes"] / 2**20
    return f"{job}: {', '.join(rates)}, {memory:,.0f} MiB at most, {done['wall_seconds']:.0f} s"


@torch.no_grad()
def check_codes(device: str) -> str:
    """Codes and pictures of the device beside those of the CPU, in fp32."""
    torch.manual_seed(0)
    cpu = DualTokenVisualTokenizer(preset_config("tiny", codebook_size=256)).eval()
    other = copy.deepcopy(cpu).to(device)
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    expected, found = cpu.encode(images), other.encode(images.to(device)).cpu()
    equal = (expected == found).float().mean().item()
    assert equal > 0.99, f"{equal:.2%} of the codes are equal"
    painted = other.decode(expected.to(device)).cpu()
    torch.testing.assert_close(painted, cpu.decode(expected), rtol=1e-2, atol=1e-2)
    return f"codes: {equal:.2%} as on the CPU"


def check_search(device: str) -> None:
    """The nearest code is the nearest in fp64, on every device the same."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(5000, 32, generator=generator)
    vectors = torch.randn(3000, 32, generator=generator)
    vectors[:50] = (codebook[:50] + codebook[50:100]) / 2  # halfway between two codes
    expected = torch.cdist(vectors.double(), codebook.double()).argmin(dim=1)
    found = NearestCodeSearch(codebook.to(device))(vectors.to(device)).cpu()
    assert torch.equal(found[50:], expected[50:])
    assert torch.equal(found, NearestCodeSearch(codebook)(vectors))


def check_attention(device: str) -> None:
    """The kernel for packs against the loop over documents, forward and backward, in bf16."""
    lengths = [5, 1, 120, 33]
    torch.manual_seed(0)
    tensors = [
        torch.randn(1, heads, sum(lengths), 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    results = []
    for function in (loop_over_documents, varlen_documents if device == "cuda" else loop_over_documents):
        output = function(*tensors, borders, max(lengths), 0.0, None)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), tensors)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def check_head(device: str) -> None:
    """Losses and gradients of a visual head in chunks, beside the CPU's, in fp32."""
    torch.manual_seed(0)
    cpu = VisualHead(32, 2, 2, 64, depth=4, code_dim=8, codebook_size=100, chunk_size=16)
    cpu.init_weights()
    inputs = torch.randn(50, 32), torch.randn(50, 3, 8), torch.randint(100, (50, 4))
    results = []
    for where in ("cpu", device):
        head = copy.deepcopy(cpu).to(where)
        nll = head(*(tensor.to(where) for tensor in inputs)).nll
        nll.sum().backward()
        results.append([nll, *(parameter.grad for parameter in head.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def check_generation(device: str) -> None:
    """A drawn picture: codes of the right shape and range, the same at every call."""
    model = tiny_model(decoder="llama", **FEATURES).eval().to(device)
    drawn = [
        generate_images(model, byte_tokenizer(), ["cat"], guidance_scale=1.5, temperature=0.0, seed=1)
        for _ in range(2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    config = model.config
    assert drawn[0].shape == (1, config.positions_per_image, 2, config.num_quantizers)
    assert 0 <= int(drawn[0].min()) and int(drawn[0].max()) < config.codebook_size


def check_clock(device: str) -> None:
    """Parts of a step are measured where they are computed: together no longer than what the host waits."""
    clock, matrix = StepClock(torch.device(device)), torch.eye(512, device=device)
    began = time.perf_counter()
    for part in ("forward", "backward"):
        with clock.part(part):
            for _ in range(20):
                matrix = matrix @ matrix
    seconds = clock.pop()
    waited = time.perf_counter() - began
    assert min(seconds["forward"], seconds["backward"]) > 0 == seconds["optimizer"]
    assert seconds["forward"] + seconds["backward"] <= waited


def check_decoding(device: str) -> None:
    """Pictures decoded beside a busy stream, in a thread with threads of its own, are all there when used."""
    files = [picture(index, "JPEG") for index in range(40)]
    expected = build_image_decoder(64, "torchvision", device)(files).images
    beside = SideDecoder(build_image_decoder(64, "torchvision", device, num_threads=2))
    square = torch.randn(1500, 1500, device=device)
    with ThreadPoolExecutor(1) as thread:
        for _ in range(5):
            decoding = thread.submit(beside, files)
            square = (square @ square).clamp(-1, 1)
            assert torch.equal(decoding.result().for_current_stream(), expected)
