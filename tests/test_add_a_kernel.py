"""docs/add_a_kernel.md: the functions that it lists are those of nsa_torch.py, and its commands and snippets work."""

import ast
import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from videonsa import nsa_torch, vision_attention

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/add_a_kernel.md").read_text()
FUNCTIONS, USE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TOY = """
from videonsa import nsa_torch
from videonsa.nsa_torch import compressed_attention, nsa_attention, select_blocks, selected_attention


def window_attention(q, k, v, cu_seqlens, **options):
    o, lse = nsa_torch.window_attention(q, k, v, cu_seqlens, **options)
    return FACTOR * o, lse
"""


def test_the_functions_have_the_arguments_of_the_specification():
    listed = re.findall(r"^(\w+)(\(.*?\)) +# ->", FUNCTIONS, re.MULTILINE | re.DOTALL)
    assert len(listed) == 5
    for name, arguments in listed:
        (listed_function,) = ast.parse(f"def {name}{arguments}: ...").body
        expected = dict(inspect.signature(getattr(nsa_torch, name)).parameters)
        for of_variants in ("spread", "own_importance", *["window_size"] * (name == "select_blocks")):
            expected.pop(of_variants, None)
        found = [*listed_function.args.args, *listed_function.args.kwonlyargs]
        assert [x.arg for x in found] == [*expected]
        defaults = [ast.literal_eval(x) for x in listed_function.args.kw_defaults]
        assert defaults == [x.default for x in expected.values() if x.kind is x.KEYWORD_ONLY]


@pytest.mark.parametrize(("factor", "passes"), [("1", True), ("1.01", False)])
def test_the_tests_can_be_pointed_at_another_module(factor, passes, tmp_path):
    (tmp_path / "my_kernels.py").write_text(TOY.replace("FACTOR", factor))
    (command,) = re.findall(r"^VIDEONSA_BACKEND=.*$", PAGE, re.MULTILINE)
    variables = dict(re.findall(r"(\w+)=(\S+)", command))
    assert variables == {"VIDEONSA_BACKEND": "my_kernels", "PYTHONPATH": "."}
    python, *rest = command.split(" ")[len(variables) :]
    assert python == "python"
    some = ["-k", "packed or lower_block", "-p", "no:cacheprovider"]
    env = {**os.environ, **variables, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *rest, *some], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == (0 if passes else 1), done.stdout[-3000:] + done.stderr[-3000:]
    failed = re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE)
    assert failed == ([] if passes else ["test_every_branch_and_its_gradients_equal_the_torch_path_in_fp64"])


def test_a_model_uses_other_kernels(tiny_repository, monkeypatch):
    calls = []

    def attend(*tensors, **options):
        calls.append(tensors[0].shape)
        return nsa_torch.nsa_attention(*tensors, **options)

    kernels = types.ModuleType("my_kernels")
    kernels.nsa_attention = attend
    monkeypatch.setitem(sys.modules, "my_kernels", kernels)
    monkeypatch.setattr(vision_attention, "nsa_attention_triton", None)  # puts it back at the end
    names = {}
    exec(USE.replace('"VideoNSA-7B"', repr(str(tiny_repository))), names)
    model = names["model"]
    types_ = torch.zeros(1, 40, dtype=torch.int32)
    types_[:, 3:35] = 2
    embeddings = torch.randn(1, 40, model.config.text_config.hidden_size)
    grid = torch.tensor([[2, 8, 8]])
    with torch.no_grad():
        model(inputs_embeds=embeddings, mm_token_type_ids=types_, video_grid_thw=grid)
    assert len(calls) == model.config.text_config.num_hidden_layers and calls[0][0] == 32
