"""One video over several GPUs: what it should take by arithmetic, and what it takes.

    python benchmarks/sequence_parallel.py                                     # the tables of docs/parallel.md, no GPU
    torchrun --nproc_per_node 8 benchmarks/sequence_parallel.py                # 36K, 128K and 256K vision tokens
    torchrun --nproc_per_node 2 benchmarks/sequence_parallel.py --device cpu --dtype fp32 --lengths 256 --layers 2 \\
        --hidden 64 --heads 4 --kv_heads 2

Under torchrun, every rank first computes a short prompt alone, and then together with the others: the largest
differences of hidden states and of gradients are printed. Then a step of the decoder layers, forward and backward, is
timed at each length, on all ranks together. Rows are as of `train_step.py`.
"""

import os
import sys

import torch
import torch.distributed as dist
from arithmetic import LENGTHS, tables
from common import (
    OptionParser,
    add_model_options,
    add_options,
    announce,
    append_rows,
    door,
    environment,
    make_models,
    make_prompt,
    measure,
    parse_model_options,
    print_table,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.utils import logging

from videonsa.sequence_parallel import own_tokens

# Largest allowed difference in fp32, over the largest value. In 16 bits, near ties of the choice of blocks may fall
# otherwise.
TOLERANCE = 1e-3


def step_of(model, prompt: dict, mesh: DeviceMesh | None):
    """A function that computes the decoder layers forward and backward, and returns the last hidden states of a rank's
    tokens."""
    _, length, hidden = prompt["inputs_embeds"].shape
    own = slice(0, length) if mesh is None else own_tokens(length, mesh.size(), mesh.get_local_rank())
    weights = torch.linspace(-1, 1, hidden, device=model.device, dtype=model.dtype)

    def step() -> torch.Tensor:
        states = model.model(**prompt, use_cache=False).last_hidden_state[:, : own.stop - own.start]
        (states * weights).sum().backward()
        return states.detach()

    return step


def compare(model, mesh: DeviceMesh, tokens: int, question: int) -> dict[str, float]:
    """The largest differences between one rank and all, over the largest values: of this rank's states, and of the
    sum over ranks of the gradients."""
    prompt = make_prompt(model, tokens, question)
    for x in prompt.values():
        dist.broadcast(x, 0)
    layers = model.model.language_model.layers
    found = []
    for used in (None, mesh):
        model.shard_sequence(used)
        model.zero_grad()
        states = step_of(model, prompt, used)()
        found.append((states, torch.cat([p.grad.flatten() for p in layers.parameters()])))
    (alone, gradients), (together, gradients_together) = found
    dist.all_reduce(gradients_together)

    alone = alone[:, own_tokens(alone.shape[1], mesh.size(), mesh.get_local_rank())]
    model.zero_grad()
    return {
        "states": float((together - alone).abs().max() / alone.abs().max()),
        "gradients": float((gradients_together - gradients).abs().max() / gradients.abs().max()),
    }


@door
def main() -> None:
    parser = OptionParser(__doc__)
    parser.add_argument("--layers", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--compared", type=int, default=4096, help="vision tokens that are compared (%(default)s)")
    add_model_options(parser, LENGTHS)
    add_options(parser)
    args = parse_model_options(parser, timed="RANK" in os.environ)
    if "RANK" not in os.environ:
        print(tables(args.lengths))
        return

    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("sequence",))
    first = mesh.get_local_rank() == 0
    logging.set_verbosity_error()
    model = make_models(args, device, args.layers, vocabulary=16)["VideoNSA"].train()

    differences = compare(model, mesh, args.compared, args.question)
    worst = torch.tensor(max(differences.values()), device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    about = {**environment(device, args.date), "dtype": args.dtype, "ranks": mesh.size(), "layers": args.layers}
    same = {"benchmark": "sequence_parallel", **about}
    if first:
        announce(same)
        print(", ".join(f"difference of {name} {x:.1e}" for name, x in differences.items()), flush=True)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for tokens in args.lengths:
        figures = measure(step_of(model, make_prompt(model, tokens, args.question), mesh), device, seconds=0, least=5)
        if first:
            row = {"tokens": tokens, **figures}
            print_table(("tokens", "ms", "ms_low", "ms_high", "peak_mb", "skipped"), [row])
            append_rows(args.output / "sequence_parallel.json", [{**same, **row}])
    dist.destroy_process_group()
    if args.dtype == "fp32" and float(worst) > TOLERANCE:
        sys.exit(f"sequence_parallel.py: the ranks differ from one by {float(worst):.1e}")


if __name__ == "__main__":
    main()
