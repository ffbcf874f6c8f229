"""What a unified model writes: captions in the language asked for, pictures of codes in any number."""

import torch

from dualtoken.unified_model.sequence import ImagePart
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.generation import writing


def test_captions_answer_in_the_language_asked(monkeypatch):
    asked = []

    def answer(model, words, prefixes, **settings):
        asked.extend((prefix.parts[-1].text, prefix.parts[-1].loss) for prefix in prefixes)
        assert settings == {"max_new_tokens": 5, "temperature": 0.0}
        return [" rot "] * len(prefixes)

    monkeypatch.setattr(writing, "generate_text", answer)
    image = ImagePart(torch.zeros(16, 2, 2, dtype=torch.long))
    assert writing.write_captions(None, None, [image, image], "de", 5) == ["rot", "rot"]
    assert asked == [("German:", False)] * 2


def test_pictures_of_codes_are_the_same_in_batches(monkeypatch):
    torch.manual_seed(0)
    config = preset_config("tiny")
    tokenizer = DualTokenVisualTokenizer(config).eval().requires_grad_(False)
    codes = torch.randint(config.codebook_size, (5, config.positions, 2, config.num_quantizers))
    together = writing.decode_codes(tokenizer, codes)
    assert together.shape == (5, 3, config.image_size, config.image_size)
    torch.testing.assert_close(together, tokenizer.decode(codes))
    monkeypatch.setattr(writing, "BATCH", 2)
    torch.testing.assert_close(writing.decode_codes(tokenizer, codes), together)
