"""What people meet on the Hub: the snippets of cards and pages run as they stand, the model works in the tools around
transformers, the package and the remote code agree, and neither reads pickles nor the network unasked."""

import configparser
import contextlib
import functools
import http.server
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import peft
import processes
import pytest
import torch
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, CompileConfig, TorchAoConfig
from transformers.pipelines import check_task

import analyze
import finetune
from lib import card, conversion
from lib.loading import CLIP, UNSEEN, assemble_tiny_model
from lib.needles import make_sample
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / folder / "README.md" for folder in ("", "benchmarks", "examples")]
PAGES = [*READMES, *sorted((ROOT / "docs").glob("*.md"))]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def snippets(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the trained tiny model, as on the Hub."""
    return assemble_tiny_model(tmp_path_factory.mktemp("hub") / "tiny-videonsa")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A clip of 8 s and its questions, which the trained model answers."""
    return make_sample(tmp_path_factory.mktemp("clip") / "clip", CLIP, (1, UNSEEN, 0))


@pytest.fixture(scope="module")
def processor(trained):
    return AutoProcessor.from_pretrained(trained, trust_remote_code=True)


@pytest.fixture(scope="module")
def inputs(processor, sample):
    """What a model takes for the first question."""
    return processor.apply_chat_template(
        conversation(sample), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.fixture(scope="module")
def ask(processor, inputs):
    """Asks a model the first question; returns its answer."""

    def ask(model, **options):
        output = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False, **options)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask


def conversation(sample) -> list[dict]:
    content = [
        {"type": "video", "video": sample["video"]},
        {"type": "text", "text": sample["questions"][0]["question"]},
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture
def serve_folder():
    """Serves a folder over HTTP; returns its address."""
    with contextlib.ExitStack() as stack:

        def serve(folder):
            handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield serve


# Every snippet as typed into one session, in the folder that holds the model: a failure shows which.
SESSION = """
import json, sys

names = {}
for snippet in json.loads(sys.argv[1]):
    print("-" * 20, snippet, sep="\\n", file=sys.stderr)
    exec(compile(snippet, "snippet", "exec"), names)
"""


def test_every_python_snippet_of_a_card_runs_as_pasted(
    tiny_repository, trained, sample, tmp_path, run_fresh, serve_folder
):
    folder = shutil.copytree(trained, tmp_path / "trained")
    config = VideoNSAForConditionalGeneration.config_class.from_pretrained(folder)
    card.write_card(folder, folder, config, base=str(folder), name="trained", note=conversion.TRAINED)
    converted = shutil.copytree(tiny_repository, tmp_path / tiny_repository.name)
    shutil.copy(sample["video"], tmp_path / "clip.mp4")
    written = snippets(folder / "README.md", "python") + snippets(converted / "README.md", "python")
    assert len(written) == 6 and all(card.VIDEO in snippet for snippet in written)
    url = f"{serve_folder(tmp_path)}/clip.mp4"
    question = sample["questions"][0]
    run = [s.replace(card.VIDEO, url).replace("What happens in this video?", question["question"]) for s in written]
    printed = run_fresh(SESSION, json.dumps(run))
    first, second, *_ = printed.splitlines()
    assert first == question["answer"] and second.startswith(f"{question['answer']} 0:0")
    assert printed.split().count(question["answer"]) >= 3


# Words of the snippets that need a package more than `make test` installs.
MORE = ("torchao", "BitsAndBytes")


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.needs("bitsandbytes", "torchao"))])
def test_every_python_snippet_of_the_pages_runs(trained, sample, tmp_path, run_fresh, more):
    shutil.copytree(trained, tmp_path / "VideoNSA-7B")
    model = VideoNSAForConditionalGeneration.from_pretrained(trained)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "tuned/adapter")
    shutil.copy(sample["video"], tmp_path / "talk.mp4")
    # That page is about a module which the reader has: test_add_a_kernel.py.
    pages = [page for page in PAGES if page.name != "add_a_kernel.md"]
    # What asks a server: test_serve.py.
    written = [snippet for page in pages for snippet in snippets(page, "python") if "OpenAI" not in snippet]
    written = [snippet for snippet in written if any(word in snippet for word in MORE) == more]
    assert len(written) >= 2
    given = "messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt'"
    installed = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest"
    written = [s.replace("(...", f"({given}").replace('"Enxin/VideoNSA"', '"VideoNSA-7B"') for s in written]
    # As torchrun does for one process.
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    written = [f"import os; os.environ |= {ranks}\n{s}" if "LOCAL_RANK" in s else s for s in written]
    run_fresh(SESSION, json.dumps([installed, *written]))


def commands(page: Path) -> list[str]:
    """The commands of a page's sh blocks, without comments; what is quoted may go over several lines."""
    text = "\n".join(snippets(page, "sh")).replace("\\\n", " ")
    text = re.sub(r"'[^']*'", lambda quoted: quoted[0].replace("\n", " "), text)
    return [line.split("  #")[0].strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


@functools.cache
def help_of(script: str) -> str:
    """What a script of this project prints for --help, also for each of its commands."""
    if script == "examples/analyze.py":
        commands = analyze.make_parser()._subparsers._group_actions[0].choices.values()
        return "".join(command.format_help() for command in commands)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend(str((ROOT / script).parent))
        if script == "examples/finetune.py":
            finetune.parse_arguments(["--help"])
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_the_pages_names_files_options_and_extras_that_there_are(page):
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(page):
        subprocess.run(["bash", "-n", "-c", command], check=True)
        for extra in re.findall(r'pip install.* "\.\[(.*?)\]"', command):
            assert extra in SETUP["options.extras_require"], command
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}\b.*:", makefile, re.MULTILINE), command
        for path in re.findall(r"\b(?:examples|benchmarks|tests)/[\w/.-]+\.(?:py|yaml)\b", command):
            assert (ROOT / path).is_file(), command
        if script := re.search(r"\b(?:examples|benchmarks)/\w+\.py\b", command):
            options = re.findall(r" (--[\w-]+)", command[script.end() :])
            missing = [option for option in options if option not in help_of(script[0])]
            assert not missing, command


def test_a_card_states_licence_base_model_and_what_the_checkpoint_can_run(tiny_repository, tmp_path):
    source = shutil.copytree(tiny_repository, tmp_path / "source")
    stated = (
        "license: other\nlicense_name: qwen-research\nlicense_link: LICENSE\nbase_model: Qwen/Qwen2.5-VL-3B-Instruct"
    )
    (source / "README.md").write_text(f"---\n{stated}\n---\n# Source\n")
    config = VideoNSAForConditionalGeneration.config_class.from_pretrained(source)
    folder = shutil.copytree(tiny_repository, tmp_path / "out")
    card.write_card(source, folder, config, base=str(source), name="me/out", note="A note.", nsa_variant="dense")
    written = ModelCard.load(folder / "README.md")
    data = written.data.to_dict()
    for line in stated.splitlines():
        name, value = line.split(": ")
        assert data[name] == value
    assert data["pipeline_tag"] == "video-text-to-text" and data["library_name"] == "transformers"
    assert "arxiv:2510.02295" in data["tags"]
    assert 'repo = "me/out"' in written.text and "A note." in written.text
    assert written.text.count('nsa_variant="dense"') >= 2 and '"nsa_variant": "dense"' in written.text
    weights = sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
    assert f"| weights, GB | {weights / 1e9:.2g}" in written.text
    for variant in card.VARIANTS:
        config.nsa_variant = variant
        try:
            VideoNSAForConditionalGeneration(config)
        except ValueError:
            assert f'| `"{variant}"` |' not in written.text
        else:
            assert f'| `"{variant}"` |' in written.text


def test_cards_explain_every_variant_that_there_is():
    assert set(card.VARIANTS) == set(card.NSA_VARIANTS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device_map": "auto"},
        {"cache": "static"},
        {"cache": "static", "compiled": True},
        {"assistant": "dense"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_the_answer_does_not_depend_on_how_it_is_generated(trained, sample, ask, options):
    load = functools.partial(VideoNSAForConditionalGeneration.from_pretrained, trained)
    options = dict(options)
    model = load(device_map=options.pop("device_map", None))
    if options.pop("cache", None):
        options["cache_implementation"] = "static"
    if options.pop("compiled", None):  # as it does of itself on a GPU, but without a C++ compiler
        options["compile_config"] = CompileConfig(backend="eager", mode="default", fullgraph=True)
        options["compile_config"]._compile_all_devices = True
    if variant := options.pop("assistant", None):
        options["assistant_model"] = load(nsa_variant=variant)
    assert ask(model, **options) == sample["questions"][0]["answer"]


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    "quantize",
    [
        pytest.param(torchao_int8, marks=pytest.mark.needs("torchao")),
        pytest.param(lambda: BitsAndBytesConfig(load_in_8bit=True), marks=pytest.mark.needs("bitsandbytes")),
    ],
    ids=["torchao", "bitsandbytes"],
)
def test_a_quantized_model_answers_saves_and_loads_again(trained, sample, ask, tmp_path, quantize):
    quantization = quantize()
    model = VideoNSAForConditionalGeneration.from_pretrained(trained, quantization_config=quantization)
    assert ask(model) == sample["questions"][0]["answer"]
    model.save_pretrained(tmp_path)
    assert not pickles(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 0.6 * sum(
        path.stat().st_size for path in trained.glob("*.safetensors")
    )
    assert ask(VideoNSAForConditionalGeneration.from_pretrained(tmp_path)) == sample["questions"][0]["answer"]


@pytest.mark.needs("bitsandbytes")
def test_a_model_in_4_bits_answers(trained, sample, ask):
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[".*visual", "lm_head"])
    model = VideoNSAForConditionalGeneration.from_pretrained(trained, quantization_config=quantization)
    for module in model.modules():  # packed weights must be multiples of 64 wide
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert ask(model) == sample["questions"][0]["answer"]


TENSOR_PARALLEL = """
import json, sys
import torch
from transformers import AutoModel, AutoProcessor

folder, messages = sys.argv[1], json.loads(sys.argv[2])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
whole = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
halves = AutoModel.from_pretrained(folder, trust_remote_code=True, tp_plan="auto").eval()
gates, whole_gates = (m.model.language_model.layers[0].self_attn.g_proj_2.weight for m in (halves, whole))
assert 2 * len(gates.to_local()) == len(whole_gates)
with torch.no_grad():
    torch.testing.assert_close(halves(**inputs).logits, whole(**inputs).logits, rtol=0, atol=1e-4)
"""


def test_two_processes_share_a_model_by_its_tensor_parallel_plan(sample, tmp_path):
    from lib.tiny import make_stock_checkpoint

    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    stock = make_stock_checkpoint(tmp_path / "stock", vision_hidden_size=32, **shape)
    folder = conversion.convert(stock, tmp_path / "two", block_size=16, block_count=3, window_size=20)
    program = tmp_path / "program.py"
    program.write_text(TENSOR_PARALLEL)
    processes.run(processes.script, 2, program, folder, json.dumps(conversation(sample)))


def pickles(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", path.name)]


def test_weights_in_pickles_are_refused_and_none_are_written(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match="safetensors"):
            VideoNSAForConditionalGeneration.from_pretrained(folder, local_files_only=True, **options)
    saved = tmp_path / "saved"
    VideoNSAForConditionalGeneration.from_pretrained(trained).save_pretrained(saved)
    assert list(saved.glob("*.safetensors")) and not pickles(saved)


def test_no_code_of_ours_unpickles():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("adapters/*.py"), *ROOT.glob("examples/**/*.py")]:
        assert not re.search(r"torch\.load|pickle\.load|import pickle|joblib|np\.load|eval\(|exec\(", path.read_text()
                             .replace(".eval()", "")), path  # fmt: skip


BLOCKED = """
import json, os, socket, sys

os.environ.pop("HF_HUB_OFFLINE")

def blocked(*args, **kwargs):
    raise SystemExit(f"network: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = blocked
from transformers import pipeline

folder, messages, again = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
for task in ("image-text-to-text", "any-to-any"):
    pipe = pipeline(task, model=folder, trust_remote_code=True)
    assert type(pipe.model).__module__.startswith("transformers_modules."), type(pipe.model)
    for chat in (messages, [messages, messages]):
        answers = pipe(text=chat, max_new_tokens=4, return_full_text=False, processor_kwargs={"fps": 4})
        print(*(answer["generated_text"].strip() for answer in (answers if chat is messages else sum(answers, []))))
    pipe.model.save_pretrained(again)
    pipe.processor.save_pretrained(again)
    folder = again
messages[0]["content"][0]["video"] = "http://127.0.0.1:9/clip.mp4"
try:
    pipe(text=messages)
except SystemExit as stop:
    print(stop)
"""


def test_pipelines_answer_about_videos_and_use_the_network_for_urls_only(trained, sample, tmp_path, run_fresh):
    *answers, network = run_fresh(BLOCKED, trained, json.dumps(conversation(sample)), tmp_path / "again").splitlines()
    assert " ".join(answers).split() == [sample["questions"][0]["answer"]] * 6
    assert network.startswith("network: ") and "127.0.0.1" in network


def test_no_pipeline_has_the_name_of_the_tag_on_the_hub():
    with pytest.raises(KeyError, match="video-text-to-text"):
        check_task("video-text-to-text")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, from a copy: building leaves folders behind."""
    pytest.importorskip("setuptools", minversion="70.1")  # the first that builds wheels by itself
    source = shutil.copytree(
        ROOT,
        tmp_path_factory.mktemp("source") / "videonsa",
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "tiny"),
    )
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


PROBE = """
import hashlib, json, sys

messages = json.loads(sys.argv[1])
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
digests = {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in inputs.items()}
digests["logits"] = hashlib.sha256(model.eval()(**inputs).logits.detach().numpy().tobytes()).hexdigest()
modules = [type(model).__module__, type(processor.video_processor).__module__]
print(json.dumps([modules, digests, {**model.config.to_dict(), "_name_or_path": None}], default=str))
"""


def test_the_wheel_holds_the_code_files_and_agrees_with_the_remote_code(
    wheel, trained, processor, sample, tmp_path, run_fresh
):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.startswith("videonsa/")}
        archive.extractall(tmp_path / "site")
    code = [*ROOT.glob("*.py"), *ROOT.glob("adapters/*.py")]
    assert packed == {f"videonsa/{path.relative_to(ROOT)}": path.read_bytes() for path in code}
    remote = {path.name: path.read_bytes() for path in trained.glob("*.py")}
    assert remote == {path.name: path.read_bytes() for path in conversion.code_files()}
    messages = json.dumps(conversation(sample))
    (register,) = (s for s in snippets(ROOT / "docs/trust.md", "python") if ".register(" in s)
    first = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
    package = json.loads(run_fresh(first + register.replace("VideoNSA-7B", str(trained)) + PROBE, messages))
    names = {"model": AutoModel.from_pretrained(trained, trust_remote_code=True), "processor": processor}
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", messages])
        exec(PROBE, names)
    remote = json.loads(printed.getvalue())
    assert package[0] == ["videonsa.modeling_videonsa", "videonsa.processing_videonsa"]
    assert all(module.startswith("transformers_modules.") for module in remote[0])
    assert package[1:] == remote[1:]


def test_the_version_stands_in_one_place_and_has_an_entry_in_the_changelog(wheel):
    version = SETUP["metadata"]["version"]
    assert wheel.name.startswith(f"videonsa-{version}-")
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert version not in (ROOT / "pyproject.toml").read_text()


def test_the_wheel_asks_for_the_versions_that_setup_cfg_allows(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    asked = {Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")}
    assert {need for need in asked if need.marker is None} == {Requirement(line) for line in card.requirements()}


def test_code_files_listed_as_trusted_are_those_of_a_repository():
    page = (ROOT / "docs/trust.md").read_text()
    listed = re.findall(r"^\| `(\w+\.py)` \|", page, re.MULTILINE)
    assert sorted(listed) == [path.name for path in conversion.code_files()]


def test_every_dependency_has_its_licence_on_the_page():
    page = (ROOT / "docs/trust.md").read_text()
    lists = [SETUP["options"]["install_requires"], *SETUP["options.extras_require"].values()]
    names = {re.match(r"[\w.-]+", line)[0] for text in lists for line in text.split("\n") if re.match(r"\w", line)}
    for name in sorted(names):
        assert re.search(rf"^\| `{re.escape(name)}` \|", page, re.MULTILINE), name
