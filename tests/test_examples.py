"""convert.py as a user runs it, on checkpoints and clips that the project makes."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import weights
from transformers import Qwen2_5_VLForConditionalGeneration
from videos import REAL_CLIP, needs_real_clip

import convert
from lib import conversion, tiny
from lib.folders import check_source
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden_size": 112, "num_hidden_layers": 2, "vision_hidden_size": 64}
NSA = {"block_size": 16, "block_count": 3, "window_size": 20}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return tiny.make_stock_checkpoint(tmp_path_factory.mktemp("stock") / "Qwen2.5-VL-tiny", **SIZES)


@pytest.fixture(scope="module")
def repository(stock, tmp_path_factory):
    return conversion.convert(stock, tmp_path_factory.mktemp("out") / "VideoNSA-tiny", **NSA)


def run(script, *args, cwd=None, **env):
    """Run a script of examples/, or a snippet, in a fresh process without a terminal."""
    command = [ROOT / "examples" / script] if script.endswith(".py") else ["-c", script]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "examples"), "HF_HUB_OFFLINE": "1", **env}
    return forks.run(*command, *args, cwd=cwd, env=env)


def rewrite_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(change(config) or config))


def flat_config(config):
    """The layout of the published checkpoints: text fields at the top, old names for dtype and rotary settings."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types", "dtype"):
        text.pop(name, None)
    vision = {
        name: config["vision_config"][name] for name in config["vision_config"] if name not in ("model_type", "dtype")
    }
    return {
        **text,
        **config,
        "torch_dtype": config.pop("dtype"),
        "vision_config": vision,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


@pytest.mark.parametrize("layout", ["single file", "shards", "flat config", "new keys", "bf16"])
def test_convert_keeps_every_weight_and_adds_only_gates(stock, tmp_path, layout):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        stock, dtype=torch.bfloat16 if layout == "bf16" else torch.float32
    )
    source = tmp_path / "source"
    model.save_pretrained(
        source,
        max_shard_size="200KB" if layout in ("shards", "flat config") else "5GB",
        save_original_format=layout != "new keys",
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        (source / file).write_bytes((stock / file).read_bytes())
    if layout == "flat config":
        rewrite_config(source, flat_config)
    if layout in ("shards", "flat config"):
        assert len(list(source.glob("*.safetensors"))) > 2

    output = conversion.convert(source, tmp_path / "out", **NSA)
    converted, info = VideoNSAForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert converted.dtype == model.dtype == converted.model.language_model.layers[0].self_attn.g_proj_1.weight.dtype
    weights = converted.state_dict()
    for key, weight in model.state_dict().items():
        assert torch.equal(weights.pop(key), weight), key
    assert len(weights) == 4 * SIZES["num_hidden_layers"]
    for key, gate in weights.items():
        assert "g_proj_" in key
        assert gate.count_nonzero() == 0 if key.endswith("bias") else abs(gate.float().std() - 0.02) < 2e-3
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "videonsa"
    assert config["architectures"] == ["VideoNSAForConditionalGeneration"]
    assert {name: config["text_config"][name] for name in NSA} == NSA
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [1, 1, 6]


def test_convert_writes_code_processor_generation_config_and_card(stock, repository):
    files = {path.name for path in repository.iterdir()}
    assert {"config.json", "processor_config.json", "tokenizer.json", "README.md"} <= files
    assert (repository / "generation_config.json").read_text() == (stock / "generation_config.json").read_text()
    code = {path.name: path.read_text() for path in ROOT.glob("*.py") if path.name != "__init__.py"}
    assert {path.name: path.read_text() for path in repository.glob("*.py")} == code
    auto_map = json.loads((repository / "config.json").read_text())["auto_map"]
    for name in ("AutoModel", "AutoModelForImageTextToText"):
        assert auto_map[name] == "modeling_videonsa.VideoNSAForConditionalGeneration"
    card = (repository / "README.md").read_text()
    assert card.startswith("---\n") and "VideoNSA-tiny" in card and "gates are untrained" in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert '"nsa_variant": "dense"' in card
    index = json.loads((repository / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {path.name for path in repository.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("hidden_size", "heads", "kv_heads", "layers", "tied"),
    [(2048, 16, 2, 36, True), (3584, 28, 4, 28, False), (5120, 40, 8, 64, False), (8192, 64, 8, 80, False)],
    ids=["3B", "7B", "32B", "72B"],
)
def test_published_configurations_give_the_shapes_of_their_sizes(
    tmp_path, published_config, hidden_size, heads, kv_heads, layers, tied
):
    published = published_config | {
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden_size,
        "max_window_layers": layers,
        "tie_word_embeddings": tied,
        "vision_config": published_config["vision_config"] | {"out_hidden_size": hidden_size},
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = VideoNSAConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = VideoNSAForConditionalGeneration(config)
    attention = model.model.language_model.layers[layers - 1].self_attn
    assert attention.g_proj_1.weight.shape == (hidden_size, hidden_size)
    assert attention.g_proj_2.weight.shape == (3 * heads, hidden_size)
    assert attention.num_key_value_groups == heads // kv_heads and attention.head_dim == 128
    assert (config.block_size, config.block_count, config.window_size) == (64, 32, 256)
    assert config.vision_config.tokens_per_second == 2 and config.tie_word_embeddings == tied


def test_convert_takes_qwen3_by_its_type(qwen3_checkpoint, qwen3_repository):
    before, after = weights(qwen3_checkpoint), weights(qwen3_repository)
    gates = {name for name in after if "g_proj_" in name}
    layers = {name.partition(".self_attn")[0] for name in before if ".self_attn.q_proj" in name}
    assert after.keys() - gates == before.keys() and len(gates) == 4 * len(layers)
    assert all(after[name].equal(x) for name, x in before.items())
    config = json.loads((qwen3_repository / "config.json").read_text())
    assert config["model_type"] == "videonsa_qwen3"
    assert config["architectures"] == ["VideoNSAQwen3ForConditionalGeneration"]
    assert config["auto_map"]["AutoModel"] == "modeling_videonsa_qwen3.VideoNSAQwen3ForConditionalGeneration"
    assert (qwen3_repository / "modeling_videonsa_qwen3.py").is_file()
    card = (qwen3_repository / "README.md").read_text()
    assert "dense attention of Qwen3-VL" in card and "arXiv:2511.21631" in card and "65,536 pixels" in card
    assert '| `"released"` |' not in card and "Qwen2.5" not in card


def test_convert_splits_the_gates_of_large_models_into_shards(stock, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_SHARD", 1)
    output = conversion.convert(stock, tmp_path / "out")
    assert len(list(output.glob("*.safetensors"))) == 1 + SIZES["num_hidden_layers"]
    _, info = VideoNSAForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_code_is_copied_from_a_repository_and_what_it_lacks_from_the_package(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    (source / "video_chat.py").write_text("# of the repository\n")
    conversion.copy_code(output, source=str(source))
    assert (output / "video_chat.py").read_text() == "# of the repository\n"
    assert (output / "video_moments.py").read_text() == (ROOT / "video_moments.py").read_text()


def test_convert_keeps_gates_and_settings_that_the_source_has(stock, tmp_path, monkeypatch):
    source = tmp_path / "source"
    model = VideoNSAForConditionalGeneration.from_pretrained(stock)
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.g_proj_2.bias.fill_(3.0)
    model.save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        (source / file).write_bytes((stock / file).read_bytes())
    rewrite_config(source, lambda config: config.update(model_type="qwen2_5_vl", block_counts=5))
    rewrite_config(source, lambda config: config["text_config"].pop("block_count") and None)
    output = tmp_path / "out"
    run_convert(monkeypatch, Hub(), source, output, "--window_size", 99)
    converted = VideoNSAForConditionalGeneration.from_pretrained(output)
    assert converted.model.language_model.layers[1].self_attn.g_proj_2.bias.eq(3.0).all()
    assert (converted.config.block_count, converted.config.window_size) == (5, 99)
    assert "those of the source" in (output / "README.md").read_text()


def test_convert_memory_does_not_grow_with_the_model(stock, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in stock.iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    shards = {"a.safetensors": load_file(stock / "model.safetensors")}
    shards |= {f"{name}.safetensors": {name: torch.zeros(2**26)} for name in "bc"}  # 256 MB each
    for file, tensors in shards.items():
        save_file(tensors, source / file)
    weight_map = {key: file for file, tensors in shards.items() for key in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    measure = (
        "import sys, resource; from lib import conversion;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; conversion.convert(*sys.argv[1:]);"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = run(measure, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200  # MB, of 512 MB of weights
    for path in [*source.glob("*"), *(tmp_path / "out").glob("*.safetensors")]:
        path.unlink()


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle_weights(folder):
    remove_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def truncate_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def other_model(folder):
    rewrite_config(folder, lambda config: config.update(model_type="qwen2_vl"))


def quantize(folder):
    rewrite_config(folder, lambda config: config.update(quantization_config={"quant_method": "fp8"}))


def quantize_unsaid(folder):
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if key.endswith("layers.0.self_attn.q_proj.weight"))
    weights[key] = weights[key].to(torch.uint8)
    save_file(weights, folder / "model.safetensors")


def more_layers(folder):
    rewrite_config(folder, lambda config: config["text_config"].update(num_hidden_layers=3, layer_types=None))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, "no weights in safetensors"),
        (pickle_weights, "pytorch_model.bin; safetensors are needed. Rewrite"),
        (truncate_weights, "model.safetensors is missing or damaged"),
        (lose_a_shard, "model-00002-of-00002.safetensors is missing or damaged"),
        (other_model, "must be a checkpoint of Qwen2.5-VL or of dense Qwen3-VL"),
        (quantize, "is quantized"),
        (quantize_unsaid, "must be bf16, fp16 or fp32, got torch.uint8"),
        (more_layers, "2 decoder layers, config.json 3"),
    ],
)
def test_convert_refuses_a_bad_source_and_leaves_nothing(stock, tmp_path, damage, message):
    source = tmp_path / "source"
    source.mkdir()
    for path in stock.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    damage(source)
    with pytest.raises(ValueError, match=message):
        conversion.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("analyze", ["gates", "{model}", "--output", "{folder}"]),
        ("app", ["--model", "{model}"]),
        ("compare_dense", ["{model}", "task", "{folder}/out"]),
        ("compare_sparse", ["{model}", "data.json", "{folder}/out.json"]),
        ("convert", ["{model}", "{folder}/out"]),
        ("demo", ["--model", "{model}"]),
        ("evaluate", ["{model}", "data.json", "{folder}/out.json"]),
        ("finetune", ["--model", "{model}", "--train_data", "data.json", "--output_dir", "{folder}/out"]),
        ("measure_gates", ["{model}", "data.json", "{folder}/out.json"]),
    ],
)
def test_a_model_that_is_no_folder_is_refused_without_a_download(script, options, tmp_path, monkeypatch):
    if script == "app":
        pytest.importorskip("gradio")

    def connect(*args):
        raise AssertionError("a connection is tried")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(script).main
    for model in ("nothere", "./nothere", "../nothere", "runs/nothere/last", f"{tmp_path}/nothere", "~/nothere"):
        given = [option.format(model=model, folder=tmp_path) for option in options]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *given])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert str(stopped.value).startswith(f"{script}.py: ") and "\n" not in str(stopped.value)
        assert str(stopped.value).endswith(f"{model} is no folder, nor a Hub id, which is OWNER/NAME")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "me/VideoNSA_7B.v2"])
def test_what_may_be_a_hub_id_is_looked_up(name):
    check_source("model", name)


def test_convert_refuses_to_overwrite_and_bad_settings(stock, repository, tmp_path):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in repository.iterdir())
    done = run("convert.py", stock, repository)
    assert done.returncode == 1 and "exists already" in done.stderr and "Traceback" not in done.stderr
    assert sorted((path.name, path.stat().st_mtime_ns) for path in repository.iterdir()) == before
    done = run("convert.py", stock, tmp_path / "out", "--block_size", 24)
    assert done.returncode == 1 and "block_size must be a power of two, got 24" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_convert_leaves_nothing(stock, tmp_path, number):
    wait = (
        "import sys, time, convert; from lib import conversion; conversion.load_processor = lambda *_: time.sleep(60);"
        "sys.argv = ['convert.py', *sys.argv[1:]]; convert.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", wait, str(stock), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples")},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out-*/model.safetensors.index.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(tmp_path.glob(".out-*"))
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    assert not list(tmp_path.iterdir())


class Hub:
    """Stands in for the Hub, which tests cannot reach: what convert.py asks of it, in order."""

    def __init__(self, upload_error=None):
        self.calls, self.upload_error = [], upload_error

    def __call__(self):
        return self

    def create_repo(self, repo_id, private):
        self.calls.append(("create", repo_id, private))
        if repo_id == "taken":
            raise OSError("409: you already created this model repo: me/taken")
        return type("Url", (), {"repo_id": f"me/{repo_id}", "__str__": lambda url: f"https://hub/{url.repo_id}"})()

    def delete_repo(self, repo_id):
        self.calls.append(("delete", repo_id))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        if self.upload_error:
            raise self.upload_error


def run_convert(monkeypatch, hub, *args):
    monkeypatch.setattr(convert, "HfApi", hub)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, args)])
    convert.main()


def test_convert_makes_the_hub_repository_first_and_fills_it_last(stock, tmp_path, monkeypatch, capsys):
    hub = Hub()
    run_convert(monkeypatch, hub, stock, tmp_path / "out", "--push_to_hub", "new", "--private")
    assert [call[:2] for call in hub.calls] == [("create", "new"), ("upload", "me/new")]
    assert hub.calls[0][2] is True
    assert {"config.json", "modeling_videonsa.py", "README.md"} <= set(hub.calls[1][2])
    assert 'repo = "me/new"' in (tmp_path / "out/README.md").read_text()
    assert "https://hub/me/new" in capsys.readouterr().out


def test_convert_converts_nothing_for_a_hub_repository_that_exists(stock, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="409"):
        run_convert(monkeypatch, Hub(), stock, tmp_path / "out", "--push_to_hub", "taken")
    assert not list(tmp_path.iterdir())


def test_convert_leaves_no_empty_hub_repository_when_it_fails(tmp_path, monkeypatch):
    hub = Hub()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="must be a checkpoint of Qwen2.5-VL or of dense Qwen3-VL"):
        run_convert(monkeypatch, hub, tmp_path / "empty", tmp_path / "out", "--push_to_hub", "new")
    assert hub.calls[-1] == ("delete", "me/new")


def test_convert_says_how_to_resume_an_upload_that_failed(stock, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="hf upload me/new .*out"):
        run_convert(monkeypatch, Hub(OSError("503")), stock, tmp_path / "out", "--push_to_hub", "new")
    assert (tmp_path / "out/config.json").exists()


def test_convert_fetches_what_is_small_first_and_refuses_before_the_weights(stock, tmp_path, monkeypatch):
    fetched = []

    def snapshot_download(repo_id, revision, allow_patterns):
        fetched.append((repo_id, revision, "*.safetensors" in allow_patterns))
        return str(stock)

    monkeypatch.setattr(conversion, "snapshot_download", snapshot_download)
    conversion.convert("Qwen/any", tmp_path / "out", revision="main")
    assert fetched == [("Qwen/any", "main", False), ("Qwen/any", "main", True)]
    assert "base_model: Qwen/any" in (tmp_path / "out/README.md").read_text()
    fetched.clear()
    with pytest.raises(ValueError, match="block_size"):
        conversion.convert("Qwen/any", tmp_path / "other", block_size=48)
    assert not fetched


FRESH = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

folder, clip, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
autos = (AutoModel, AutoModelForImageTextToText)
models = [auto.from_pretrained(folder, trust_remote_code=True).eval() for auto in autos]
messages = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = [model(**inputs).logits for model in models]
assert torch.equal(*logits)
answer = models[0].generate(**inputs, max_new_tokens=4)
assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
for thing in (config, processor, *models):
    assert type(thing).__module__.startswith("transformers_modules"), type(thing)
    assert "VideoNSA" in type(thing).__name__
models[0].save_pretrained(again)
processor.save_pretrained(again)
print(json.dumps([logits[0].double().sum().item(), answer.tolist(), inputs["video_grid_thw"].tolist()]))
"""


@pytest.mark.parametrize(
    ("source", "times", "grid"), [("repository", 2, [8, 16, 16]), ("qwen3_repository", 1, [8, 14, 14])]
)
def test_a_repository_loads_in_fresh_processes_saves_and_loads_again(request, tmp_path, run_fresh, source, times, grid):
    clip = tiny.make_clip(tmp_path / "clip.mp4", seconds=4)
    results = []
    for i, folder in enumerate([request.getfixturevalue(source), tmp_path / "again-0"][:times]):
        results.append(json.loads(run_fresh(FRESH, folder, clip, tmp_path / f"again-{i}")))
    assert results[0] == results[-1]
    assert results[0][2] == [grid]


@needs_real_clip
def test_the_demo_reads_a_real_clip(repository):
    done = run("demo.py", "--model", repository, "--video", REAL_CLIP, "--max_new_tokens", 1)
    assert done.returncode == 0, done.stderr
    assert "490 frames of 280 × 168, 2.99 per second" in done.stdout
    assert f"{245 * 6 * 10:,} vision" in done.stdout
