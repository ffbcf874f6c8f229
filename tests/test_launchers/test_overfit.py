"""`dualtoken overfit`: real trainings of a tiny model on pairs of a tiny run."""

import json
from dataclasses import replace

import pytest
import torch

from data_pipeline.shards.code_shards import iterate_shard
from eval.overfit import reproduce
from launchers import overfit, processes
from tests.support.command import call
from tests.support.tiny_run import make_tiny_run

DECODER = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
HEADS = {"head_hidden_size": 32, "head_num_layers": 1, "head_num_attention_heads": 2}
TINY = [
    f"model.llm_config={json.dumps(DECODER)}",
    f"model.heads={json.dumps(HEADS)}",
    "optimizer.name=adamw",  # Muon's compilation takes longer than the training
    "optimizer.lr=1e-2",
    "deepspeed=zero1.json",
    "log_every=20",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def dualtoken(run, tmp_path, capsys):
    """Call `dualtoken overfit` on the tiny run; gives exit code, output and errors."""
    places = {
        "--codes": run / "codes" / "train",
        "--visual-tokenizer": run / "tokenizer" / "export",
        "--text-tokenizer": run / "mllm" / "export",
        "--out": tmp_path / "overfit",
        "--ranks": 1,
    }

    def run_command(*arguments, **replaced):
        options = {**places, **{f"--{key}": value for key, value in replaced.items()}}
        return call(["overfit", *TINY, *arguments, *[w for pair in options.items() for w in pair]], capsys)

    return run_command


def test_one_pair_comes_back_exactly(dualtoken, run, tmp_path, monkeypatch):
    code, out, err = dualtoken("--steps", "1")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: text and image not reproduced exactly after 1 steps: give")
    assert "text from image: " in out and "% of its codes" in out

    # More steps: the training goes on, it does not begin anew.
    code, out, err = dualtoken("--steps", "40")
    assert code == 0, err
    folder = tmp_path / "overfit" / "pairs-1"
    (sample,) = iterate_shard(folder / "codes" / "shard-000000.tar")
    ((caption,),) = [sample.captions.values()]
    assert f"text from image: {caption!r} came back exactly" in out
    assert "image from text: came back exactly" in out
    results = json.loads((folder / "overfit.json").read_text(encoding="utf-8"))
    assert results["captions_exact"] == results["images_exact"] == results["codes_right"] == 1
    assert results["settings"]["steps"] == 40
    page = (folder / "overfit.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 and caption in page and "100.0%" in page

    # Its results do not say so because everything is right: another pair's codes and words are not.
    from eval.inputs import load_unified_model, load_visual_tokenizer

    model, words = load_unified_model(folder / "training" / "export")
    originals = {s.key: s for s in iterate_shard(run / "codes" / "train" / "shard-000000.tar")}
    assert (originals[sample.key].codes == sample.codes).all()
    del originals[sample.key]
    others = overfit.one_caption_each(list(originals.values()))
    found = reproduce(model, words, load_visual_tokenizer(run / "tokenizer" / "export"), others)
    assert not found.exact and found.share("image_exact") == 0 and not found.beats_chance

    # A finished training is not repeated, only its results are taken anew.
    monkeypatch.setattr(processes, "run", lambda *arguments: pytest.fail("a training was started"))
    (folder / "overfit.json").unlink()
    code, out, _ = dualtoken("--steps", "40")
    assert code == 0 and out.startswith("mllm is already finished: 40 steps")
    assert json.loads((folder / "overfit.json").read_text(encoding="utf-8")) == results

    code, _, err = dualtoken("--steps", "40", "--seed", "7")
    assert code == 2 and "pairs-1 was begun with other pairs: give another --out or remove it" in err


def test_pictures_of_several_pairs_are_ranked(run, monkeypatch):
    from eval.inputs import load_codes, load_unified_model, load_visual_tokenizer

    samples = overfit.one_caption_each(load_codes(run / "codes" / "train", 6))
    assert [list(sample.captions) for sample in samples] == [["en"], ["de"]] * 3
    model, words = load_unified_model(run / "mllm" / "export")
    tokenizer = load_visual_tokenizer(run / "tokenizer" / "export")
    result = reproduce(model, words, tokenizer, samples)
    assert result.drawn.shape == (6, *samples[0].codes.shape[1:])
    assert result.recall["candidates"] == 6 and not result.exact
    assert result.codes_right < 0.5  # an untrained model knows nothing
    truth = torch.stack([torch.from_numpy(sample.codes[0].astype("int64")) for sample in samples])
    for pair, drawn, codes in zip(result.pairs, result.drawn, truth, strict=True):
        assert pair.codes_right == pytest.approx((drawn == codes).double().mean().item())
    monkeypatch.setattr("eval.overfit.BATCH", 2)  # the same in pieces
    assert [vars(pair) for pair in reproduce(model, words, tokenizer, samples).pairs] == [
        vars(pair) for pair in result.pairs
    ]
    lines = overfit.outcome(result)
    assert lines[2].startswith("drawn pictures ranked by semantic features: R@1 ") and "(chance " in lines[2]
    if not result.beats_chance:
        assert "no better than by chance" in overfit.shortfall(result, 3)
    result.recall["recall"] = 1.0
    assert result.beats_chance and overfit.shortfall(result, 3) is None
    two = replace(result, pairs=result.pairs[:2], recall={"recall": 1.0, "chance": 0.5})
    assert not two.beats_chance and overfit.shortfall(two, 3) is None  # more than both there is not


def test_mistakes_are_one_line(dualtoken, run, tmp_path):
    for replaced, message in (
        ({"codes": tmp_path / "nowhere"}, "no dual-code data set in "),
        ({"text-tokenizer": tmp_path / "nowhere"}, "no text tokenizer in "),
        ({"visual-tokenizer": tmp_path / "nowhere"}, "no visual tokenizer in "),
        ({"pairs": 13}, "holds 12 pairs, not 13: give fewer --pairs"),
        ({"recipe": "quickstart_siglip"}, "unknown key"),
    ):
        code, _, err = dualtoken(**replaced)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert message in err
