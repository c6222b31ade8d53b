"""The tiny VideoNSA: where its training starts, and the settings of its stages."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoProcessor

import tiny
from finetune import parse_arguments
from make_needle_videos import QUESTIONS, Settings, ask, place_needles

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "start"
    command = [sys.executable, ROOT / "examples/tiny.py", folder]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


def test_the_training_starts_from_a_sparse_model_of_the_real_architecture(start):
    config = AutoConfig.from_pretrained(start, trust_remote_code=True)
    assert {name: getattr(config, name) for name in tiny.NSA} == tiny.NSA
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
    for stage, variant in ((1, "dense"), (2, "dense"), (3, "paper")):
        recipe = ROOT / f"examples/recipes/tiny-{stage}.yaml"
        options = ["--model", "start", "--train_data", "train.json", "--output_dir", "out"]
        model, data, args = parse_arguments(["--config", str(recipe), *options])
        assert model.nsa_variant == variant and model.train_vision and args.max_steps > 0
        assert f"$(call stage,{stage}," in makefile
        assert f"$(TINY)/data-{stage}:" in makefile
