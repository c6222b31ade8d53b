"""The tiny VideoNSA: where its training starts, and the settings of its stages."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
from trainings import weights
from transformers import AutoConfig, AutoProcessor

from evaluate import evaluate
from finetune import parse_arguments
from lib.conversion import code_files, convert
from lib.folders import TINY
from lib.loading import CLIP, UNSEEN, load
from lib.needles import QUESTIONS, Settings, ask, make_dataset, make_sample, place_needles
from make_tiny import NSA

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "start"
    done = forks.run(ROOT / "examples/make_tiny.py", folder)
    assert done.returncode == 0, done.stderr
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
    args = {"model": "tiny", "data": str(data), "output": str(folder / "out.json")}
    args |= {"media_root": None, "nsa_variant": None, "fps": None, "max_frames": None, "batch_size": 10, "limit": None}
    args |= {"max_new_tokens": 4, "workers": 0, "device": "cpu"}
    return evaluate(SimpleNamespace(**args))["accuracy"]


@pytest.mark.parametrize("kind", ["colour", "shape", "where", "when"])
def test_the_trained_model_answers_right(accuracy, kind):
    assert accuracy[kind]["all"]["questions"] > 20
    assert accuracy[kind]["all"]["accuracy"] >= 0.9


LOAD = """
import sys
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "video", "video": sys.argv[2]}, {"type": "text", "text": sys.argv[3]}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def test_the_folder_of_the_trained_model_loads_as_it_is(tmp_path, run_fresh):
    sample = make_sample(tmp_path / "clip", CLIP, (1, UNSEEN, 0))
    asked = next(item for item in sample["questions"] if item["question"].startswith("What colour"))
    assert run_fresh(LOAD, TINY, sample["video"], asked["question"]).strip() == asked["answer"]


def test_the_trained_model_is_converted_to_another_variant(tmp_path, capsys):
    merged = convert("tiny", tmp_path / "merged", nsa_variant="merged")
    model, processor = load(str(merged), "cpu")
    assert model.config.nsa_variant == "merged" and model.config.block_size == 16
    sparse = convert("tiny", tmp_path / "sparse", window_size=48)
    assert "run the custom code" not in capsys.readouterr().out
    assert "gates are those of the source" in (sparse / "README.md").read_text()
    before, after = weights(TINY), weights(sparse)
    assert before.keys() == after.keys() and all(after[name].equal(x) for name, x in before.items())
    before, after = (
        json.loads((Path(f) / "processor_config.json").read_text())["video_processor"] for f in (TINY, sparse)
    )
    assert {name for name in before if after.get(name) != before[name]} <= {"auto_map"}


def test_the_trained_model_is_small_and_sparse():
    folder = ROOT / "examples/tiny"
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 25 * 2**20
    # Its code files are links to those of the project: no second copy, and none is missing.
    assert {path.name: path.resolve() for path in folder.glob("*.py")} == {path.name: path for path in code_files()}
    assert all(path.is_symlink() for path in folder.glob("*.py"))
