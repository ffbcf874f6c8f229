"""Drawing with a tiny real model: places, ranks, batches, going on, settings that have to agree."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from eval.benchmark_files import BenchmarkError
from eval.generation.drawing import Artist, DrawingSettings, draw_prompts, listed_drawings
from eval.generation.prompts import GENEVAL, MJHQ, PLAIN, Prompt, PromptSet

COLOURS = ["red", "green", "blue", "yellow", "black"]


def prompt_set(layout=PLAIN, count=5):
    prompts = [
        Prompt(f"{index:05d}", colour, f"part{index % 2}", {"prompt": colour, "tag": "colors"})
        for index, colour in enumerate(COLOURS[:count])
    ]
    return PromptSet(None, layout, prompts, "d" * 64)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same(folder, other, only=None):
    """The same files; pixels may differ by what rounds differently in another batch."""
    found, expected = contents(folder), contents(other)
    assert set(found) == (set(expected) if only is None else only)
    for name, data in found.items():
        if not name.endswith(".png"):
            assert data == expected[name]
            continue
        ours, theirs = (np.asarray(Image.open(io.BytesIO(one))).astype(int) for one in (data, expected[name]))
        assert np.abs(ours - theirs).max() <= 1, name


@pytest.fixture(scope="module")
def whole(artist, tmp_path_factory):
    """All pictures by one rank, two of each prompt."""
    output = tmp_path_factory.mktemp("whole")
    draw_prompts(prompt_set(), artist, output, DrawingSettings(per_prompt=2))
    return output


def test_pictures_settings_and_prompts(whole, artist):
    names = [f"0000{index}{end}.png" for index in range(5) for end in ("", "-1")]
    pictures = contents(whole / "pictures")
    assert sorted(pictures) == sorted(names) and len(set(pictures.values())) == 10
    with Image.open(whole / "pictures" / "00003-1.png") as image:
        assert image.size == (16, 16) and image.format == "PNG"
    settings = json.loads((whole / "settings.json").read_text(encoding="utf-8"))
    versions = settings.pop("versions")
    assert "torch" in versions
    assert settings == {
        "prompts": "d" * 64, "per_prompt": 2, "guidance_scale": 3.0, "temperature": 1.0, "top_k": 0,
        "top_p": 1.0, "seed": 0, **artist.settings,
    }  # fmt: skip
    assert len({artist.settings["model"], artist.settings["visual_tokenizer"]}) == 2
    listed = listed_drawings(whole)
    assert [one.prompt.text for one in listed[:3]] == ["red", "red", "green"]
    assert listed[2].path == whole / "pictures" / "00001.png"


def test_ranks_and_batches_change_nothing(whole, artist, tmp_path):
    settings = DrawingSettings(per_prompt=2)
    drawn = [
        draw_prompts(prompt_set(), artist, tmp_path, settings, rank=rank, world_size=2, batch_size=3)
        for rank in (1, 0)
    ]
    assert drawn[0] is None and len(drawn[1]) == 10
    assert_same(tmp_path, whole)


def test_a_prompt_alone_is_drawn_as_among_others(whole, artist, tmp_path):
    part = replace(prompt_set(), prompts=prompt_set().prompts[3:4])
    draw_prompts(part, artist, tmp_path, DrawingSettings(per_prompt=2))
    assert_same(tmp_path / "pictures", whole / "pictures", {"00003.png", "00003-1.png"})


def test_a_stopped_run_goes_on(whole, artist, tmp_path, monkeypatch):
    asked = []

    class Counting(Artist):
        def __init__(self):
            self.settings = artist.settings

        def draw(self, texts, seeds, settings):
            asked.extend(texts)
            return artist.draw(texts, seeds, settings)

    settings = DrawingSettings(per_prompt=2)
    draw_prompts(prompt_set(), Counting(), tmp_path, settings)
    assert len(asked) == 10
    for name in ("00001.png", "00004-1.png"):
        (tmp_path / "pictures" / name).unlink()
    kept = (tmp_path / "pictures" / "00000.png").stat().st_mtime_ns
    asked.clear()
    draw_prompts(prompt_set(), Counting(), tmp_path, settings)
    assert asked == ["green", "black"]
    assert_same(tmp_path, whole)
    assert (tmp_path / "pictures" / "00000.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"guidance_scale": 5.0}, "holds pictures with guidance_scale 3.0, not 5.0; name another output"),
        ({"seed": 1}, "holds pictures with seed 0, not 1"),
        ({"per_prompt": 1}, "holds pictures with per_prompt 2, not 1"),
    ],
)
def test_other_settings_are_refused(whole, artist, changed, message):
    before = contents(whole)
    with pytest.raises(BenchmarkError, match=message):
        draw_prompts(prompt_set(), artist, whole, replace(DrawingSettings(per_prompt=2), **changed))
    with pytest.raises(BenchmarkError, match="holds pictures with prompts d.*, not e"):
        other = replace(prompt_set(), digest="e" * 64)
        draw_prompts(other, artist, whole, DrawingSettings(per_prompt=2))
    assert contents(whole) == before


def test_geneval_finds_its_folders(artist, tmp_path):
    drawn = draw_prompts(prompt_set(GENEVAL, 2), artist, tmp_path, DrawingSettings())
    assert [one.place for one in drawn[:4]] == [f"00000/samples/000{sample}.png" for sample in range(4)]
    assert len(drawn) == 8 and all(one.path.is_file() for one in drawn)
    row = json.loads((tmp_path / "pictures" / "00001" / "metadata.jsonl").read_text(encoding="utf-8"))
    assert row == {"prompt": "green", "tag": "colors"}


def test_jpegs_where_a_judge_wants_them(artist, tmp_path):
    draw_prompts(prompt_set(MJHQ, 2), artist, tmp_path, DrawingSettings())
    with Image.open(tmp_path / "pictures" / "part1" / "00001.jpg") as image:
        assert image.format == "JPEG" and image.size == (16, 16)


def test_the_seed_is_the_pictures_own(whole, artist, tmp_path):
    """A seed of its own for each picture, of the run's seed: no picture of a run is another's of the next."""
    first = listed_drawings(whole)
    seeds = {replace(one, sample=sample).seed(seed) for one in first for sample in (0, 1) for seed in (0, 1)}
    assert len(seeds) == len({one.prompt.key for one in first}) * 4
    draw_prompts(prompt_set(), artist, tmp_path, DrawingSettings(per_prompt=2, seed=1))
    assert not set(contents(tmp_path / "pictures").values()) & set(contents(whole / "pictures").values())


def test_settings_that_mean_nothing_are_refused(artist, tmp_path):
    with pytest.raises(ValueError, match="temperature 0 draws the same picture 4 times; draw 1 a prompt"):
        DrawingSettings(temperature=0).of(GENEVAL)
    with pytest.raises(ValueError, match="2 pictures a prompt; the layout of mjhq has places for 1"):
        DrawingSettings(per_prompt=2).of(MJHQ)
    with pytest.raises(ValueError, match="0 pictures a prompt; expected 1 or more"):
        DrawingSettings(per_prompt=0)
    with pytest.raises(ValueError, match="top_p=2; expected more than 0"):
        DrawingSettings(top_p=2)
    with pytest.raises(ValueError, match="rank 2 of 2, batch size 16; expected a rank from 0"):
        draw_prompts(prompt_set(), artist, tmp_path, DrawingSettings(), rank=2, world_size=2)


def test_models_are_wanted(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no unified model in"):
        Artist(tmp_path, run / "tokenizer" / "export")
    with pytest.raises(ValueError, match="precision is 'fp8', expected fp32 or bf16"):
        Artist(run / "mllm" / "export", run / "tokenizer" / "export", "fp8")


def test_lists_of_pictures_stay_in_their_folder(tmp_path):
    (tmp_path / "secret.png").touch()
    folder = tmp_path / "drawn"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"picture": "../secret.png", "prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"prompts.jsonl, line 1: no picture \.\./secret.png"):
        listed_drawings(folder)
    (folder / "prompts.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"names no pictures; expected lines \{picture, prompt\}"):
        listed_drawings(folder)
