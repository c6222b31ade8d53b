"""Which checkpoint a run of `finetune.py` goes on from, and what keeps it from doing so."""

import hashlib
import json
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

from .data import Sample


def find_resume(args: TrainingArguments) -> str | None:
    """The checkpoint to resume: the named one, or the last complete one.

    Raises:
        ValueError: there is none, it lacks something, or the folder holds checkpoints of another run.
    """
    output = Path(args.output_dir)
    found = sorted(output.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        if found:
            raise ValueError(
                f"--output_dir {output} holds {found[0].name}: resume it with "
                "--resume_from_checkpoint last, or name another folder"
            )
        return None

    last = str(asked).lower() in ("last", "true")
    if not last:
        if not Path(asked).is_dir():
            raise ValueError(f"--resume_from_checkpoint must be a folder or last, got {asked}")
        found = [Path(asked)]
    refused = []
    for folder in found:
        reason = why_not_resumed(folder, args)
        if reason is None:
            if refused:
                print(f"resumed from {folder.name}; " + "; ".join(refused))
            return str(folder)
        refused.append(f"{folder.name} {reason}")
    if refused:
        older = f"; nor are {len(refused) - 1} older ones" if len(refused) > 1 else ""
        raise ValueError(f"--resume_from_checkpoint {asked}: {refused[0]}{older}")
    raise ValueError(f"--resume_from_checkpoint {asked}: there is no checkpoint in {output}")


def why_not_resumed(folder: Path, args: TrainingArguments) -> str | None:
    """What keeps a run from going on at a checkpoint, or None. Trainer would go on without what is missing."""
    # DeepSpeed writes a file for each process. FSDP writes optimizer.bin or a folder.
    shards = list(folder.glob("global_step*/*_optim_states.pt"))
    deepspeed = args.deepspeed_plugin is not None
    if shards and not deepspeed:
        return "is of DeepSpeed: resume it with the same accelerate configuration"
    if shards and len(shards) != args.world_size:
        return f"is of {len(shards)} processes under DeepSpeed, and must be resumed by as many, not {args.world_size}"

    weights = ["model.safetensors"]
    if shards or list(folder.glob("pytorch_model_fsdp*")):
        weights = []
    elif (folder / "adapter_config.json").exists():
        weights = ["adapter_model.safetensors"]
    elif (index := folder / "model.safetensors.index.json").exists():
        weights = sorted(set(json.loads(index.read_text())["weight_map"].values())) if is_whole(index) else [index.name]
    missing = [name for name in (*weights, "scheduler.pt", "trainer_state.json") if not is_whole(folder / name)]
    if deepspeed and not shards:
        missing.append("global_step*/*_optim_states.pt")
    elif not deepspeed and not any(is_whole(folder / f"optimizer{end}") for end in (".pt", ".bin", "_0")):
        missing.append("optimizer.pt")
    if not missing:
        return None
    hint = "" if "trainer_state.json" in missing else " (--save_only_model saves neither optimizer nor scheduler)"
    return f"is not complete: {', '.join(missing)} missing or damaged{hint if 'scheduler.pt' in missing else ''}"


def is_whole(path: Path) -> bool:
    """Whether a file of a checkpoint is there to its end; a folder, whether it holds anything."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.is_dir():
            return any(path.iterdir())
        else:
            return zipfile.is_zipfile(path)  # what torch.save writes; its directory stands at the end
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def describe_data(samples: list[Sample], *, packing: bool, max_length: int, **options) -> dict:
    """What the order of the data depends on."""
    digest = hashlib.sha256(repr([(sample.id, sample.tokens) for sample in samples]).encode()).hexdigest()[:16]
    described = {"samples": len(samples), "packing": packing, "max_length": max_length}
    return {**described, "digest": digest, **options}


def check_options(options: dict, data: dict, args: TrainingArguments, resume: str | None) -> None:
    """Refuse to resume with other options, or on other data, which would be in another order; keep what tells them in
    data.json."""
    now = json.loads(json.dumps({**options, **data}))  # lists for tuples, as in the file
    if resume:
        path = Path(resume).resolve().parent / "data.json"
        if not path.is_file():
            raise ValueError(
                f"{path} is missing, which says how {Path(resume).name} was trained and on what: copy it from the "
                "folder of that run"
            )
        before = {**now, **json.loads(path.read_text())}
        changed = [name for name in now if before[name] != now[name]]
        others = "; ".join(f"{name} {before[name]}, not {now[name]}" for name in changed if name in options)
        if others:
            raise ValueError(f"the checkpoint was trained with {others}")
        if changed and not args.ignore_data_skip:
            others = [name for name in changed if name not in ("samples", "digest")]
            others = "".join(f"; {name} {before[name]} then, {now[name]} now" for name in others)
            raise ValueError(
                f"the data is not what the checkpoint was trained on ({before['samples']:,} samples then, "
                f"{now['samples']:,} now{others}), so that the rest of it is not known; --ignore_data_skip "
                "starts it over"
            )
    (Path(args.output_dir) / "data.json").write_text(json.dumps(now, indent=2) + "\n")


def check_weights(model, folder: Path) -> None:
    """Refuse a checkpoint whose weights are not those of the model, which Trainer would log and go on with.

    Raises:
        ValueError: names or shapes differ.
    """
    shapes = {}
    for file in folder.glob("*model*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    wrong = f"{folder.name} does not hold the weights of this model"
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        expected = get_peft_model_state_dict(model).keys()
        missing, unexpected = expected - shapes.keys(), shapes.keys() - expected
    else:
        # A model without memory takes the names as the true one will.
        with torch.device("meta"):
            skeleton = type(model)(model.config)
            tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        try:
            result = skeleton.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise ValueError(f"{wrong}: {str(error).splitlines()[-1].strip()}") from error
        missing = {name for name, _ in model.named_parameters()} & set(result.missing_keys)  # but tied ones
        unexpected = result.unexpected_keys
    for names, kind in ((missing, "not in it"), (unexpected, "not of the model")):
        if names:
            raise ValueError(f"{wrong}: {len(names)} are {kind}, such as {min(names)}")
