"""Files of prompts as their authors give them out, and the places that judges look in."""

import json

import pytest

from eval.benchmark_files import BenchmarkError
from eval.generation.prompts import GENAI_BENCH, GENEVAL, MJHQ, PLAIN, read_prompts

GENEVAL_LINE = (
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}'
)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def places(prompts, samples=1):
    return [prompts.layout.place(one, sample) for one in prompts.prompts for sample in range(samples)]


def test_a_prompt_a_line(tmp_path):
    prompts = read_prompts(write(tmp_path, "p.txt", "red\n\n  a blue\u2028dog \r\ngreen"), PLAIN)
    assert [one.text for one in prompts.prompts] == ["red", "a blue\u2028dog", "green"]
    assert places(prompts, 2)[2:4] == ["00001.png", "00001-1.png"]


def test_geneval(tmp_path):
    path = write(tmp_path, "evaluation_metadata.jsonl", f"{GENEVAL_LINE}\n{GENEVAL_LINE}\n")
    prompts = read_prompts(path, GENEVAL)
    assert prompts.prompts[1].category == "single_object" and prompts.prompts[1].row == json.loads(
        GENEVAL_LINE
    )
    assert places(prompts, 2) == [f"0000{i}/samples/000{j}.png" for i in (0, 1) for j in (0, 1)]
    assert GENEVAL.per_prompt == 4
    assert places(read_prompts(path, PLAIN)) == ["00000.png", "00001.png"]


def test_genai_bench_names_are_those_of_its_file(tmp_path):
    rows = {"00001": {"id": "00001", "prompt": "red", "models": {}}, "00002": {"prompt": "blue"}}
    prompts = read_prompts(write(tmp_path, "genai_image.json", rows), GENAI_BENCH)
    assert [one.text for one in prompts.prompts] == ["red", "blue"]
    assert places(prompts) == ["00001.jpg", "00002.jpg"]


def test_mjhq(tmp_path):
    rows = {"0a1b": {"category": "food", "prompt": "red"}, "ff": {"category": "people", "prompt": "blue"}}
    prompts = read_prompts(write(tmp_path, "meta_data.json", rows), MJHQ)
    assert places(prompts) == ["food/0a1b.jpg", "people/ff.jpg"]


def test_a_draw_keeps_names_and_identity(tmp_path):
    prompts = read_prompts(write(tmp_path, "p.txt", "\n".join(map(str, range(50)))), PLAIN)
    drawn = prompts.draw(5, seed=3)
    assert len(drawn.prompts) == 5 and drawn.digest == prompts.digest
    assert all(one.text == str(int(one.key)) for one in drawn.prompts)
    other = read_prompts(write(tmp_path, "q.txt", "\n".join(map(str, range(1, 51)))), PLAIN)
    assert other.digest != prompts.digest


@pytest.mark.parametrize(
    ("name", "content", "layout", "message"),
    [
        ("p.txt", "\n \n", PLAIN, "p.txt has no prompts; drawing needs a text file with a prompt a line"),
        ("p.txt", "red", GENEVAL, r"p.txt is no .jsonl file; geneval needs GenEval's evaluation_metadata"),
        ("p.jsonl", '{"prompt": "a"}\n', GENEVAL, r"p.jsonl, line 1: no field 'tag'; got \['prompt'\]"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', PLAIN, "line 2: field 'prompt' is 3; expected str"),
        ("m.json", [1], MJHQ, "m.json holds a list, no object; mjhq needs MJHQ-30K's meta_data.json"),
        ("m.json", {"a": {"prompt": "x"}}, MJHQ, "m.json, entry 'a': no field 'category'"),
        ("m.json", {"a": {"prompt": "x", "category": ".."}}, MJHQ, r"entry 'a': '\.\.' cannot name a file"),
        ("m.json", {"../a": {"prompt": "x", "category": "y"}}, MJHQ, r"'\.\./a' cannot name a file"),
        ("g.json", {"00001": "red"}, GENAI_BENCH, "entry '00001': field '00001' is 'red'; expected dict"),
        ("g.json", '{"00001": ', GENAI_BENCH, r"g.json, line 1: no JSON"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, name, content, layout, message):
    with pytest.raises(BenchmarkError, match=message):
        read_prompts(write(tmp_path, name, content), layout)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match="no file .*none.txt; drawing needs"):
        read_prompts(tmp_path / "none.txt", PLAIN)
