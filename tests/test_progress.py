"""What a terminal shows while a prompt is read, and what is forecast of it."""

import io
import re
import sys

import pytest
import torch
from transformers.utils import logging

import demo
import evaluate
from lib import progress
from lib.progress import Forecast, prefill_progress
from lib.times import duration


def test_a_forecast_finds_the_linear_and_the_quadratic_part():
    forecast = Forecast()
    assert forecast.between(1000) is None
    for n in (1000, 2000, 8000):
        forecast.add(n, 2e-3 * n + 1e-7 * n**2)
    assert forecast.between(100_000) == pytest.approx((1200, 1200))


@pytest.mark.parametrize(("power", "seconds"), [(0.5, 26), (1, 32), (2, 1024), (3, 1229)])
def test_a_forecast_grows_with_the_length_and_at_most_with_its_square(power, seconds):
    forecast = Forecast()
    for n in (1000, 2000):
        forecast.add(n, (n / 1000) ** power)
    least, most = forecast.between(32_000)
    assert least == most == pytest.approx(seconds, rel=0.01)


def test_several_prompts_are_forecast_in_all():
    forecast = Forecast()
    for n in (1000, 4000):
        forecast.add(n, 1e-3 * n)
    assert forecast.between(1000, 2000, 3000) == pytest.approx((6.0, 6.0))


def test_one_length_gives_both_extremes():
    forecast = Forecast()
    forecast.add(1000, 1.0)
    forecast.add(1200, 1.2)
    least, most = forecast.between(10_000)
    assert least == pytest.approx(10.0) and 80 < most < 101


def test_the_layers_of_every_prompt_are_counted_and_the_line_goes_when_it_is_read(small, monkeypatch):
    for name in ("PATIENCE", "INTERVAL"):
        monkeypatch.setattr(progress, name, 0)
    shown = []
    ids = torch.arange(20, 80)[None]
    with prefill_progress(small, shown.append):
        for _ in range(2):
            small.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert [re.sub(r", about \d+ s left", "", text) for text in shown] == 2 * [
        "layer 1 of 2, 60 tokens, 0 s so far",
        "layer 2 of 2, 60 tokens, 0 s so far",
        "",
    ]
    assert "left" in shown[1] and "left" not in shown[0]
    del shown[:]
    small.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert shown == []


def test_times_are_read_in_seconds_minutes_and_hours():
    assert [duration(seconds) for seconds in (0.4, 59.6, 83, 7384)] == ["0 s", "1:00", "1:23", "2:03:04"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Called in a test, makes stderr a terminal, and returns what tells what is on it."""

    def open_terminal():
        for name in ("PATIENCE", "INTERVAL"):
            monkeypatch.setattr(progress, name, 0)
        logging.disable_progress_bar()
        file = Terminal()
        monkeypatch.setattr(sys, "stderr", file)
        return file.getvalue

    yield open_terminal
    logging.enable_progress_bar()


def test_the_demo_shows_progress_on_a_terminal(terminal, monkeypatch, capsys):
    on_terminal = terminal()
    question = "What colour was the star?"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "tiny", "--seed", "1", "--question", question])
    demo.main()
    shown, printed = on_terminal(), capsys.readouterr().out
    assert "reading   layer 3 of 4, 283 tokens, " in shown
    assert "reading   vision tower, block 1 of 2, 0 s so far\r" in shown and shown.endswith("\r\x1b[K")
    assert "\nanswer    yellow\n" in printed and "reading" not in printed


def test_an_evaluation_forecasts_the_rest_of_its_questions(terminal, needles, tmp_path, monkeypatch):
    on_terminal = terminal()
    monkeypatch.setattr(evaluate, "REFRESH", 0)
    options = ["--workers", "0", "--limit", "3"]
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "tiny", str(needles / "test.json"), str(tmp_path / "out.json"), *options]
    )
    evaluate.main()
    shown = on_terminal()
    assert re.search(r"\[00:\d\d, layer 2 of 4, \d+ tokens, 0 s so far, about 0 s left\]", shown)
    assert re.search(r"\[00:\d\d, (about )?\d+ s (to \d+ s )?left\]", shown)
