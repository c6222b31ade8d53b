"""Makes the flat files at the repository root importable as the package `videonsa`, ahead of any installed copy, and
gives tests a miniature stock checkpoint and fresh processes."""

import functools
import gc
import importlib.util
import logging
import os
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import forks
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

spec = importlib.util.spec_from_file_location("videonsa", ROOT / "__init__.py")
sys.modules["videonsa"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["videonsa"])
sys.path.insert(0, str(ROOT / "examples"))


def pytest_configure(config):
    # Tensors in tests are so small that threads would mostly wait for each other.
    torch.set_num_threads(1)
    # Without a GPU, kernels run in triton's interpreter; the variable is read when triton is imported.
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter

        interpreter.install()


def pytest_collection_finish():
    # What libraries keep for good need not be looked through at each collection of garbage.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips a test that `needs` a package that is not there. `make test-extras` chooses these tests, and fails them."""
    named = [package for mark in item.iter_markers("needs") for package in mark.args]
    if missing := [package for package in named if not importlib.util.find_spec(package)]:
        reason = f"needs {', '.join(missing)}: make test-extras"
        if item.config.option.markexpr == "needs":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


# What transformers says of its own calls, and of the old names in a published configuration.
NOT_OURS = (
    "Image decoding with `torchvision` is deprecated",
    "Passing `generation_config` together with generation-related arguments",
    "`torch_dtype` is deprecated",
)


@pytest.fixture(autouse=True)
def no_deprecated_calls():
    """Fails a test if transformers logs that a call is deprecated; where it warns instead, setup.cfg makes an error."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())

    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)

    assert not [message for message in messages if "deprecat" in message and not message.startswith(NOT_OURS)]


@pytest.fixture(scope="session")
def stock_checkpoint(tmp_path_factory):
    """Folder of a stock Qwen2.5-VL repository with random weights: 2 layers, 7 query heads, 1 KV head."""
    return make_stock(tmp_path_factory, "Qwen2.5-VL")


@pytest.fixture(scope="session")
def qwen3_checkpoint(tmp_path_factory):
    """The same of Qwen3-VL: 2 layers, 8 query heads, 2 KV heads."""
    return make_stock(tmp_path_factory, "Qwen3-VL")


def make_stock(tmp_path_factory, shape):
    from lib.tiny import make_stock_checkpoint
    from prompts import SHAPES

    folder = tmp_path_factory.mktemp("stock")
    return make_stock_checkpoint(folder, num_hidden_layers=2, vision_hidden_size=32, **SHAPES[shape])


@pytest.fixture(scope="session")
def checkpoints(stock_checkpoint, qwen3_checkpoint):
    """Stock checkpoint folder of each backbone."""
    return {"Qwen2.5-VL": stock_checkpoint, "Qwen3-VL": qwen3_checkpoint}


@pytest.fixture(scope="session")
def models(checkpoints):
    """Our model of each backbone."""
    from prompts import load

    return {backbone: load(folder) for backbone, folder in checkpoints.items()}


@pytest.fixture
def inputs_for(monkeypatch):
    """Has `make_inputs` make the inputs of a backbone."""
    return lambda backbone: monkeypatch.setattr("prompts.current", backbone)


@pytest.fixture(params=["Qwen2.5-VL", "Qwen3-VL"])
def backbone(request, inputs_for):
    """The name of each backbone."""
    inputs_for(request.param)
    return request.param


@pytest.fixture
def both(backbone, models, checkpoints):
    """A model of each backbone, and the stock model with the same weights."""
    from transformers import AutoModelForImageTextToText

    stock = AutoModelForImageTextToText.from_pretrained(checkpoints[backbone]).eval()
    # Weights in a mapped file may stand anywhere, and on some processors products round by where they stand.
    return deepcopy(models[backbone]), deepcopy(stock)


@pytest.fixture
def model(backbone, models):
    """A fresh model of each backbone."""
    return deepcopy(models[backbone])


@pytest.fixture
def small(models):
    """The model of Qwen2.5-VL, where the backbone does not matter."""
    return deepcopy(models["Qwen2.5-VL"])


@pytest.fixture(scope="session")
def tiny_repository(stock_checkpoint, tmp_path_factory):
    """Folder of a VideoNSA repository made of it: most blocks of a clip of a few seconds are not visible."""
    from lib.conversion import convert

    return convert(
        stock_checkpoint, tmp_path_factory.mktemp("videonsa") / "tiny", block_size=16, block_count=3, window_size=20
    )


@pytest.fixture(scope="session")
def qwen3_repository(qwen3_checkpoint, tmp_path_factory):
    """The same of Qwen3-VL."""
    from lib.conversion import convert

    return convert(
        qwen3_checkpoint, tmp_path_factory.mktemp("videonsa") / "tiny", block_size=16, block_count=3, window_size=20
    )


@pytest.fixture(scope="session")
def needles(tmp_path_factory):
    """Folder of generated clips of 2 and 3 seconds and stills: train.json and .jsonl (12), validation (4), test (4)."""
    from lib.needles import Settings, make_dataset

    settings = Settings(seconds=(2.0, 3.0), needles=(1, 2), stills=0.25, size=84, turns=3)
    counts = {"train": 12, "validation": 4, "test": 4}
    return make_dataset(tmp_path_factory.mktemp("data") / "needles", counts, settings, workers=1)


@pytest.fixture
def train(tiny_repository, needles, tmp_path, capsys):
    """Runs finetune.py in this process and returns (trainer, output folder, what it printed)."""
    import finetune

    def run(*options, data=None, output="out", model=tiny_repository):
        folder = tmp_path / output
        data = needles / "train.json" if data is None else data
        given = ["--model", model, "--train_data", data, "--output_dir", folder, *options]
        capsys.readouterr()
        trainer = finetune.finetune(*finetune.parse_arguments([*map(str, given)]))
        return trainer, folder, capsys.readouterr().out

    return run


@pytest.fixture
def published_config():
    """The configuration of Qwen2.5-VL-7B-Instruct as published: flat, written by transformers 4.41."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 152064,
    }


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    """Where `run_fresh` has its caches: the same for all its processes, so that they can be forked from one."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run_fresh(tmp_path, cache_folder):
    """Runs a program as a user would who has only a model folder: a new process somewhere else, an empty cache of
    remote code, and this repository nowhere on the path. Returns what it printed."""

    def run(program: str, *args) -> str:
        shutil.rmtree(cache_folder, ignore_errors=True)
        cache = {"HF_HOME": str(cache_folder), "HF_MODULES_CACHE": str(cache_folder / "modules")}
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = forks.run("-c", program, *args, cwd=tmp_path, env={**inherited, **cache, "HF_HUB_OFFLINE": "1"})
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    """The processor of the miniature checkpoint."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from lib import tiny
    from videonsa.processing_videonsa import VideoNSAProcessor, VideoNSAVideoProcessor

    stock = tiny.make_stock_checkpoint(tmp_path_factory.mktemp("stock"), hidden_size=112, num_hidden_layers=1)
    return VideoNSAProcessor(
        image_processor=AutoImageProcessor.from_pretrained(stock),
        tokenizer=AutoTokenizer.from_pretrained(stock),
        video_processor=VideoNSAVideoProcessor(),
        chat_template=tiny.CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with `clip.mp4`: H.264, 8 s of 64 frames, 224 x 224."""
    from lib import tiny

    folder = tmp_path_factory.mktemp("clips")
    tiny.make_clip(folder / "clip.mp4")
    return folder


@pytest.fixture(scope="session")
def corpus_clip(tmp_path_factory):
    """The path of a clip of corpus.py, by name; made when first asked for."""
    import corpus

    folder = tmp_path_factory.mktemp("corpus")
    return functools.cache(lambda name: corpus.make(folder, name))


@pytest.fixture
def threads():
    """Sets the number of threads, which is 1 in other tests."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def side_by_side(threads, monkeypatch):
    """Lets even clips of a few frames be decoded by several threads, each from key frames of its own."""
    from videonsa import video_reader

    monkeypatch.setattr(video_reader, "MIN_WORK", 1)
    threads(3)


@pytest.fixture(params=["one", "several"])
def decoders(request):
    """Reads by one decoder in the thread that asks, or by several in threads of their own."""
    if request.param == "several":
        request.getfixturevalue("side_by_side")
    return request.param


@pytest.fixture
def larger_tiles(monkeypatch):
    """The interpreter takes as long for a small tile as for a large one; those of fp32 are small."""
    from videonsa import nsa_launches

    if not torch.cuda.is_available():
        config = {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}
        monkeypatch.setattr(nsa_launches, "FP32", dict.fromkeys(nsa_launches.FP32, config))


@pytest.fixture
def poison(monkeypatch):
    """Outputs and workspaces start as NaN or far-off indices, so that what is not written shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(x):
        x.detach().fill_(torch.nan if x.is_floating_point() else 2**30)
        return x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
