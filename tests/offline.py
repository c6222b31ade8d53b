"""Compiles the kernels for a GPU that is not there and reads what came out: registers, spills, shared memory, wgmma.

    python tests/offline.py 90 [CASE ...]

prints, for compute capability 9.0, a JSON list with a row per case and kernel. The public functions are called as
users call them, on CPU tensors; each launch is turned into a compilation with the specialisation that the same
arguments would get on the GPU. Needs neither a driver nor nvcc: ptxas and cuobjdump are in triton's wheel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# name: dtype, head dim, query heads, KV heads, block size, block count
CASES = {
    "7B bf16": (torch.bfloat16, 128, 28, 4, 64, 32),
    "7B bf16 released": (torch.bfloat16, 128, 28, 4, 64, 8),
    "7B fp32": (torch.float32, 128, 28, 4, 64, 8),
    "fp16 dim 80 group 16 block 128": (torch.float16, 80, 16, 1, 128, 5),
    "bf16 dim 32 group 1 block 16": (torch.bfloat16, 32, 2, 2, 16, 5),
}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes per program
LENGTH = 131072  # tokens; their memory is reserved, not touched
TRAINED = 1024  # tokens of a call with a gradient, whose launches do not depend on the length


class Driver:
    """As much of triton's driver as a compilation asks for."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_all(capability: int, names) -> list[dict]:
    import triton
    from triton.runtime.driver import driver

    from videonsa import nsa_released, nsa_triton

    driver.set_active(Driver(capability))
    nsa_triton._can_launch = lambda device: True
    nsa_triton._capability = lambda device: divmod(capability, 10)
    run, compiled = triton.JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        binary = run(self, *args, grid=grid, warmup=True, **options)
        compiled[self.__name__, binary.hash] = binary

    triton.JITFunction.run = compile_only
    rows = []
    for name in names:
        dtype, dim, heads, groups, block_size, block_count = CASES[name]
        compiled.clear()
        for length in (LENGTH, TRAINED) if name == "7B bf16" else (TRAINED,):  # once is enough
            q = torch.zeros(length, heads, dim, dtype=dtype, requires_grad=length == TRAINED)
            k = torch.zeros(length, groups, dim, dtype=dtype, requires_grad=length == TRAINED)
            gates = torch.zeros(length, heads, 3, dtype=dtype)
            cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
            sizes = {"block_size": block_size, "block_count": block_count}
            if "released" in name:
                vision = torch.arange(length) > 9
                stream = nsa_released.Stream.make(vision, length, **sizes)
                out = nsa_released.released_attention(q, k, k.clone(), gates[10:], stream, triton=True, **sizes)
            else:
                out = nsa_triton.nsa_attention(q, k, k.clone(), gates, cu_seqlens, **sizes)
            if out.requires_grad:
                lse = torch.zeros(length, heads)
                nsa_triton.select_blocks(q.detach(), k.detach(), lse, cu_seqlens, **sizes, spread=True)
                out.backward(torch.zeros_like(out))
                if name == "7B bf16":
                    compile_merged(nsa_triton, q, k, cu_seqlens, sizes)
        rows += [{"case": name, "kernel": kernel, **read(binary)} for (kernel, _), binary in compiled.items()]
    return rows


def compile_merged(nsa_triton, q, k, cu_seqlens, sizes) -> None:
    """With either estimate of importance, with and without what changes the choice, and the remainder."""
    text, seen = torch.zeros_like(k[:50]), torch.zeros(len(q), dtype=torch.int32)
    arguments = (q, k, k.clone(), text, text, seen, cu_seqlens, torch.tensor([0, 50], dtype=torch.int32))
    with torch.no_grad():
        nsa_triton.merged_attention(*arguments, **sizes, window_size=16, spread=False)
    sizes = {**sizes, "block_count": 0.5, "mass": 0.9, "window_size": 16, "remainder": True}
    out = nsa_triton.merged_attention(*arguments, **sizes)
    out.backward(torch.zeros_like(out))


def read(kernel) -> dict:
    """What the compiled kernel uses; `arrivals`, per loop with wgmma, is how often it waits for operands to be ready:
    once per dot, unless ptxas serialised its wgmma."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    loops = [
        (int(target[1], 16), address)
        for address, text in code
        if "BRA" in text and (target := re.search(r"0x([0-9a-f]+)", text)) and int(target[1], 16) < address
    ]
    arrivals = []
    for start, end in loops:
        body = [text for address, text in code if start <= address <= end]
        if any("HGMMA" in text for text in body):
            arrivals.append(sum("WARPGROUP.ARRIVE" in text for text in body))
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in code),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": len(code),
        "wgmma": sum("HGMMA" in text for _, text in code),
        "arrivals": arrivals,
    }


if __name__ == "__main__":
    import conftest  # noqa: F401  (makes `videonsa` importable)

    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2:] or CASES), indent=1))
