"""Runs a function in several processes that talk over gloo, on the CPU."""

import importlib
import os
import runpy
import sys
import tempfile
from pathlib import Path

import forks


def run(function, ranks: int, *args) -> str:
    """Call a function of a module in `ranks` processes, with the arguments as text. Returns what they print, or raises
    it if one of them fails.

    They are forked from a process of their own, which imports the libraries once.
    """
    done = forks.run(__file__, function.__module__, function.__name__, ranks, len(args), *args, *sys.path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def script(path: str, *args: str) -> None:
    """Run a script: `run(script, 2, path, ...)` does what torchrun does, which imports all for each process."""
    sys.argv = [path, *args]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def _run(rank: int, ranks: int, meeting: str, function, args: list[str]) -> None:
    # As torchrun does.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    function(*args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    module, name, ranks, count, *rest = sys.argv[1:]
    args, sys.path[:] = rest[: int(count)], rest[int(count) :]
    import conftest  # noqa: F401  finds the package
    import torch
    import torch.distributed as dist
    import torch.multiprocessing

    torch.set_num_threads(1)
    function = getattr(importlib.import_module(module), name)
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "ranks").as_uri()
        torch.multiprocessing.start_processes(
            _run, (int(ranks), meeting, function, args), int(ranks), start_method="fork"
        )
