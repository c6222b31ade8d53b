"""The tiny VideoNSA: where its training starts, and the settings of its stages."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoConfig, AutoProcessor

from evaluate import evaluate
from finetune import parse_arguments
from lib.loading import assemble_tiny_model
from lib.needles import QUESTIONS, Settings, ask, make_dataset, place_needles
from make_tiny import NSA

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "start"
    command = [sys.executable, ROOT / "examples/make_tiny.py", folder]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


def test_the_training_starts_from_a_sparse_model_of_the_real_architecture(start):
    config = AutoConfig.from_pretrained(start, trust_remote_code=True)
    assert {name: getattr(config, name) for name in NSA} == NSA
    assert config.nsa_variant == "paper"
    text = config.text_config
    assert text.num_attention_heads // text.num_key_value_heads == 7
    assert text.vocab_size == 64


def test_the_word_tokenizer_has_a_token_for_every_word_of_questions_and_answers(start):
    tokenizer = AutoProcessor.from_pretrained(start, trust_remote_code=True).tokenizer
    settings = Settings(needles=(3,), repeats=0.5, questions=QUESTIONS, turns=100)
    seen = set()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        for question in ask(rng, place_needles(rng, 64, settings), 64, settings):
            seen.add(question["type"])
            for text in (question["question"], question["answer"]):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert len(ids) == len(re.findall(r"\w+|[?,]", text))
                assert tokenizer.decode(ids) == text.lower()
    assert seen == set(QUESTIONS)
    assert tokenizer.unk_token_id in tokenizer("What is the zebra?")["input_ids"]


def test_each_stage_has_a_recipe_and_a_target_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for stage, variant in ((1, "dense"), (2, "dense"), (3, "paper"), (4, "paper")):
        recipe = ROOT / f"examples/recipes/tiny-{stage}.yaml"
        options = ["--model", "start", "--train_data", "train.json", "--output_dir", "out"]
        model, data, args = parse_arguments(["--config", str(recipe), *options])
        assert model.nsa_variant == variant and model.train_vision and args.max_steps > 0
        assert f"$(call stage,{stage}," in makefile


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory):
    """Of the trained tiny VideoNSA, by question type, on unseen clips of the lengths it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    settings = Settings(seconds=(4.0, 8.0), questions=("colour", "shape", "where", "when"))
    data = make_dataset(folder / "data", {"test": 25}, settings, seed=2026, workers=1) / "test.jsonl"
    args = {"model": str(assemble_tiny_model(folder / "tiny")), "data": str(data), "output": str(folder / "out.json")}
    args |= {"media_root": None, "nsa_variant": None, "fps": None, "max_frames": None, "batch_size": 10, "limit": None}
    args |= {"max_new_tokens": 4, "workers": 0, "device": "cpu"}
    return evaluate(SimpleNamespace(**args))["accuracy"]


@pytest.mark.parametrize("kind", ["colour", "shape", "where", "when"])
def test_the_trained_model_answers_right(accuracy, kind):
    assert accuracy[kind]["all"]["questions"] > 20
    assert accuracy[kind]["all"]["accuracy"] >= 0.9


def test_the_trained_model_is_small_and_sparse():
    folder = ROOT / "examples/tiny"
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 25 * 2**20
    assert not list(folder.glob("*.py"))  # the code files are those of the project
