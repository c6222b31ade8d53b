"""The Hub kernel that export_kernel.py writes, loaded by `kernels`; what needs no package is also tested without it."""

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, assert_all_equal, assert_close, assert_gradients_close, gradients, inputs

import export_kernel
from videonsa import nsa_launches, nsa_torch, nsa_triton

ROOT = Path(__file__).resolve().parents[1]
REPO = "owner/native-sparse-attention"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that a user's call writes."""
    return export_kernel.export(tmp_path_factory.mktemp("export") / "kernel", REPO)


@pytest.fixture
def kernel(folder):
    import kernels

    return kernels.get_local_kernel(folder, backend="cpu")


def load(path: Path, name: str, monkeypatch):
    """A file of the kernel as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_code_is_ours_and_imports_nothing_else(folder):
    for backend in ("cpu", "cuda"):
        files = {path.name: path for path in (folder / "build" / f"torch-{backend}").iterdir()}
        described = json.loads(files.pop("metadata.json").read_text())
        assert described["backend"] == {"type": backend} and {*described["digest"]["files"]} == {*files}
        assert re.fullmatch(rf"_native_sparse_attention_{backend}_[0-9a-f]{{7}}", described["id"])
        for name, path in files.items():
            own = ROOT / ("examples/hub_kernel" if name == "__init__.py" else ".") / name
            assert path.read_bytes() == own.read_bytes()
    for path in (folder / "build/torch-cpu").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {x.split(".")[0] for x in names} <= {*sys.stdlib_module_names, "torch", "triton"}, path


def test_a_wrong_name_or_folder_is_named(folder):
    with pytest.raises(ValueError, match="--repo_id must be OWNER/NAME, got me"):
        export_kernel.export(folder, "me")
    with pytest.raises(FileExistsError, match="exists already"):
        export_kernel.export(folder)


def test_it_runs_where_nothing_else_is_installed(folder, monkeypatch):
    for name in ("huggingface_hub", "kernels", "transformers", "videonsa"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    nsa = load(folder / "build/torch-cpu/__init__.py", "_any_name", monkeypatch)
    assert nsa.nsa_triton._namespace == "_any_name"  # of its operators
    tensors, cu, _, options = inputs([40], 2, 1, 16, 16, 3, 9, torch.float32)
    assert all(x.isfinite().all() for x in gradients(nsa.nsa_attention(*tensors, cu, **options), tensors))


@pytest.mark.needs("kernels")
def test_kernels_reads_its_metadata(folder, kernel):
    from kernels import Metadata

    for backend in export_kernel.BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert (str(metadata.name), metadata.version) == (export_kernel.NAME, export_kernel.VERSION)
        metadata.digest.validate(metadata.digest.hash_variant(metadata.digest.algorithm, variant))
        if backend == "cpu":
            assert metadata.id == kernel.__name__ == kernel.nsa_triton._namespace


@pytest.mark.needs("kernels")
def test_outputs_and_gradients_are_ours(kernel, larger_tiles, monkeypatch):
    tensors, cu, _, options = inputs([64, 130], 14, 2, 16, 16, 3, 9, torch.float32)
    ours = nsa_torch if DEVICE == "cpu" else nsa_triton
    out, expected = (module.nsa_attention(*tensors, cu, **options) for module in (kernel, ours))
    assert torch.equal(out, expected)
    assert_all_equal(gradients(out, tensors), gradients(expected, tensors))

    monkeypatch.setattr(kernel.nsa_launches, "FP32", nsa_launches.FP32)  # the larger tiles
    tensors, cu, _, options = inputs([60], 1, 1, 16, 16, 3, 9, torch.float32)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    out, expected = (
        kernel.nsa_triton.nsa_attention(*tensors, cu, **options),
        nsa_torch.nsa_attention(*doubles, cu, **options),
    )
    assert_close(out, expected, 1e-5)
    assert_gradients_close(out, tensors, expected, doubles)


@pytest.mark.needs("kernels")
def test_its_card_its_test_and_its_benchmark_run(folder, kernel, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={folder}")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["o"].shape == names["q"].grad.shape

    tests = load(folder / "tests/test_native_sparse_attention.py", "its_test", monkeypatch)
    for case in tests.CASES.values():
        tests.test_outputs_and_gradients_are_those_of_masked_softmaxes(case)
    tests.test_a_wrong_shape_is_named()

    benchmark = load(folder / "benchmarks/benchmark.py", "its_benchmark", monkeypatch).NativeSparseAttention()
    benchmark.kernel = kernel
    benchmark.setup()
    benchmark.benchmark_forward_and_backward()
    benchmark.benchmark_dense()
    benchmark.setup_exact()
    benchmark.benchmark_exact()
    assert torch.allclose(benchmark.out, benchmark.verify_exact(), atol=1e-2)  # as the runner compares
