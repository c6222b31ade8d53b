"""What TensorBoard and Weights & Biases get of a training beside its logs, and how a resumed run goes on there."""

import json
import os
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)

# In each checkpoint: the folder of TensorBoard, relative to that of the checkpoints, and the id of the run of wandb.
KEPT = "trackers.json"


def check_trackers(names: list[str]) -> None:
    """Refuse names of --report_to that Trainer does not know, or whose package is not installed.

    Raises:
        ValueError
    """
    available = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report_to must be none, all, or some of {known}; got {name}")
        if name in ("wandb", "tensorboard") and name not in available:
            raise ValueError(f"--report_to {name} needs a package that is not installed: pip install {name}")
        if name not in available:
            package = name.replace("_", "-")
            raise ValueError(f"--report_to {name} needs a package that is missing or not set up: pip install {package}")


class Tracking(TrainerCallback):
    """Gives trackers all arguments and sample answers, and has a resumed run go on in the same ones.

    Args:
        trainer: which has the callbacks of the trackers; this one is added to them.
        arguments: those that are not Trainer's, by group.
        resume: the checkpoint that the training goes on from.
    """

    def __init__(self, trainer, arguments: dict[str, dict], resume: str | None):
        self.arguments = arguments
        self.main = trainer.is_world_process_zero()
        self.wandb = self.main and "wandb" in trainer.args.report_to
        callbacks = trainer.callback_handler.callbacks
        self.tensorboard = next((x for x in callbacks if self.main and isinstance(x, TensorBoardCallback)), None)
        trainer.add_callback(self)
        kept = Path(resume) / KEPT if resume else None
        if self.main and kept and kept.is_file():
            self.go_on(trainer.args, json.loads(kept.read_text()), Path(resume))

    def go_on(self, args, kept: dict, checkpoint: Path) -> None:
        """Open the trackers of the run that a checkpoint is of."""
        if self.tensorboard and "tensorboard" in kept:
            from torch.utils.tensorboard import SummaryWriter

            # What the interrupted run logged after the checkpoint is not shown.
            step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
            folder = checkpoint.resolve().parent / kept["tensorboard"]
            self.tensorboard.tb_writer = SummaryWriter(str(folder), purge_step=step + 1)
        if self.wandb and "wandb" in kept and "WANDB_RUN_ID" not in os.environ:
            import wandb

            project = os.environ.get("WANDB_PROJECT", "huggingface")  # as Trainer has it
            wandb.init(project=project, name=args.run_name, id=kept["wandb"], resume="allow")

    def on_train_begin(self, args, state, control, **kwargs):
        # Trainer's own arguments are there by now.
        if writer := self.writer():
            for group, values in self.arguments.items():
                writer.add_text(group, f"```json\n{json.dumps(values, indent=2, default=str)}\n```")
        if self.wandb:
            import wandb

            wandb.config.update(self.arguments, allow_val_change=True)

    def on_save(self, args, state, control, **kwargs):
        kept = {}
        if writer := self.writer():
            folder, runs = Path(args.output_dir).resolve(), Path(writer.log_dir).resolve()
            kept["tensorboard"] = os.path.relpath(runs, folder) if runs.is_relative_to(folder) else str(runs)
        if self.wandb:
            import wandb

            kept["wandb"] = wandb.run.id
        if kept:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / KEPT).write_text(json.dumps(kept) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        if self.wandb:
            import wandb

            wandb.finish()

    def show_answers(self, answers: list[dict], step: int) -> None:
        """Give trackers a table of {"question", "expected", "answered", "correct"}."""
        columns = ["question", "expected", "answered", "correct"]
        rows = [[str(answer[column]) for column in columns] for answer in answers]
        if writer := self.writer():
            lines = [columns, ["---"] * 4, *rows]
            cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
            writer.add_text("eval/answers", "\n".join(f"| {' | '.join(line)} |" for line in cells), step)
        if self.wandb:
            import wandb

            wandb.log({"eval/answers": wandb.Table(columns, rows), "train/global_step": step})

    def writer(self):
        """TensorBoard's, while there is one."""
        return self.tensorboard and self.tensorboard.tb_writer
