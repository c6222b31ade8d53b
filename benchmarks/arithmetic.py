"""What one long video takes on several GPUs, by arithmetic alone: bytes held and sent, operations, and times of these.

`sequence_parallel.py` prints it. A test compares `layer_elements` with what the processes send.
"""

LENGTHS = [36864, 131072, 262144]
SHAPE_7B = {
    "layers": 28,
    "hidden": 3584,
    "intermediate": 18944,
    "heads": 28,
    "kv_heads": 4,
    "head_dim": 128,
    "vocabulary": 152064,
}
SPARSE = {"block_size": 64, "block_count": 32, "window_size": 256}
LINK = 450e9  # bytes per second that an H100 or H200 sends to the others of a node, by its data sheet
COMPUTE = 400e12  # floating-point operations per second, an assumption: 40 % of the data sheet's 989 TFLOP/s in bf16


def layer_elements(tokens: int, ranks: int, shape: dict) -> int:
    """Numbers that all ranks together put into the all-to-alls of one layer's forward pass; its backward pass has as
    many. One of `ranks` of them stays where it is."""
    heads, groups, dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    sharing = max(1, ranks // groups)  # ranks that need the same keys and values
    return tokens * (2 * heads * dim + 3 * heads + 2 * groups * dim * sharing)


def estimate(tokens: int, ranks: int, shape: dict = SHAPE_7B) -> dict[str, float]:
    """What one rank holds in GB, and sends and computes in the forward pass of a layer, for `tokens` vision tokens.

    Activations are bf16. A trained weight takes 16 bytes: itself, its gradient, and the state of AdamW. Gradient
    checkpointing keeps the input of each layer, and holds one layer's own activations at a time.
    """
    own, hidden, layers = tokens / ranks, shape["hidden"], shape["layers"]
    heads, groups, dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    sharing = max(1, ranks // groups)
    own_heads, own_groups = heads * sharing / ranks, groups * sharing / ranks

    projections = hidden * dim * (2 * heads + 2 * groups)
    gates = hidden * (hidden + 3 * heads)
    linear = projections + gates + 3 * hidden * shape["intermediate"]
    keys = SPARSE["block_size"] * SPARSE["block_count"] + SPARSE["window_size"] + tokens / SPARSE["block_size"] / 2
    parameters = layers * linear + 2 * shape["vocabulary"] * hidden
    operations = own * (2 * linear + 4 * heads * dim * keys)

    moved = 2 * layer_elements(tokens, ranks, shape) / ranks * (ranks - 1) / ranks
    memory = {
        "weights, gradients, AdamW": 16 * parameters / ranks,
        "inputs of all layers": 2 * own * hidden * layers,
        "one layer": 2 * own * (3 * shape["intermediate"] + 4 * hidden),
        "its attention": 2 * tokens * dim * (2 * own_heads + 2 * own_groups),
        "embeddings": 2 * 2 * tokens * hidden,
        "logits of all tokens": 2 * own * shape["vocabulary"],
        "cache": 2 * 2 * tokens * own_groups * dim * layers,
    }
    return {
        **{name: count / 1e9 for name, count in memory.items()},
        "sent, MB": moved / 1e6,
        "sending, ms": 1e3 * moved / LINK,
        "computing, ms": 1e3 * operations / COMPUTE,
    }


def tables(lengths: list[int] = LENGTHS) -> str:
    """Two tables in Markdown: GB that a rank holds, and what it sends and computes in the forward pass of a layer."""
    rows = {(tokens, ranks): estimate(tokens, ranks) for tokens in lengths for ranks in (1, 8)}
    names = list(rows[lengths[0], 1])
    return "\n\n".join(_table(rows, chosen) for chosen in (names[:-3], names[-3:]))


def _table(rows: dict, names: list[str]) -> str:
    lines = [["tokens", "ranks", *names], ["---:"] * (2 + len(names))]
    for (tokens, ranks), row in rows.items():
        lines.append([f"{tokens // 1024}K", str(ranks), *(f"{row[name]:.1f}" for name in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
