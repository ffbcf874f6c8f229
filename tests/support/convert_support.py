"""Folders to convert: tiny language models with their text tokenizers, a visual tokenizer."""

import torch
from transformers import AutoModelForCausalLM

from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from tests.support.command import call
from tests.support.unified_support import byte_tokenizer, llama_tokenizer, tiny_config

HEADS = ("head_hidden_size=32", "head_num_layers=1", "head_num_attention_heads=2", "chunk_size=16")


def write_base(folder, kind, dtype=torch.float32, **save):
    """A base language model: "qwen2" ties its output layer and has spare rows, "llama" neither."""
    torch.manual_seed(1)
    config = tiny_config(kind).text_config
    words = byte_tokenizer(special=False) if kind == "qwen2" else llama_tokenizer()
    config.vocab_size = 300 if kind == "qwen2" else len(words)
    if kind == "qwen2":
        words.add_special_tokens({"eos_token": "<|endoftext|>"})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder, **save)
    words.save_pretrained(folder)
    return folder


def write_visual_tokenizer(folder, **overrides):
    torch.manual_seed(2)
    DualTokenVisualTokenizer(preset_config("tiny", **overrides)).save_pretrained(folder)
    return folder


def run(capsys, *words):
    """Exit code, lines printed and lines of errors of `dualtoken convert ...`."""
    code, out, err = call(("convert", *words), capsys)
    return code, out.splitlines(), err.splitlines()


def unified(capsys, base, visual_tokenizer, output, *more):
    """Convert, expecting success; returns the lines."""
    folders = ("--llm", base, "--visual-tokenizer", visual_tokenizer, "--out", output)
    code, lines, errors = run(capsys, "unified", *folders, *HEADS, *more)
    assert code == 0, errors
    return lines
