"""Progress: lines where nobody watches, a bar on a terminal, the rate at the end."""

import eval.progress
from eval.progress import counted


def test_lines_now_and_then_and_at_the_end(monkeypatch):
    monkeypatch.setattr(eval.progress, "LINE_SECONDS", 0.0)
    lines = []
    with counted(5, "answers", lines.append, bar=False) as advance:
        advance(2)
        advance(3)
    assert lines[0].startswith("2 of 5 answers, ") and lines[0].endswith(" answers/s")
    assert len(lines) == 2 and lines[1].startswith("5 answers in ") and " s, " in lines[1]
    with counted(0, "answers", lines.append, bar=False):
        pass
    assert len(lines) == 2


def test_the_bar_is_drawn_on_standard_error(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    lines = []
    with counted(4, "answers", lines.append, bar=True) as advance:
        advance(4)
    captured = capsys.readouterr()
    assert "4/4" in captured.err and "answers/s" in captured.err and not captured.out
    assert len(lines) == 1 and lines[0].startswith("4 answers in ")
