"""Run a benchmark of lmms-eval twice, with a model's sparse attention and with dense, and test the difference.

    python examples/compare_dense.py VideoNSA-7B lvbench lvbench --model_args fps=4,max_frames=512,frame_tokens=128
    python examples/compare_dense.py VideoNSA-7B mlvu_test mlvu --num_processes 8 --limit 100

Each run is a command of lmms-eval, which is printed; its results and samples are in OUTPUT/dense and in OUTPUT/sparse.
Options that are not listed below go to both, such as --limit, --include_path and --gen_kwargs; give them last.
OUTPUT/comparison.json has for each task
    dense, sparse  mean score of a question in 0 ... 1, the task's own metrics, and lmms-eval's figures of throughput
    difference     sparse less dense, over the same questions: lmms-eval's paired t-test, with a 95 % interval
    agreement      share of answers that are the same, word for word
A task's own metric may be another mean than that over questions: MLVU and VSI-Bench average over types of question.
The test takes questions for independent. Those about one video are not, so p is too small where there are many of them.
Needs lmms-eval: pip install -e ".[eval]".
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import importlib.util
import json
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from lib.fields import add_fields
from lib.folders import check_new, check_source
from lib.options import OptionParser

RUNS = ("dense", "sparse")
SAMPLES = "*_samples_{}.jsonl"
# Where tasks keep the score of a question (Tomato, Video-MME; VSI-Bench), or the letter that they read from an answer.
SCORES = ("score", "accuracy", "MRA:.5:.95:.05")
LETTERS = ("pred_answer", "parsed_pred")


def compare(args, others: list[str]) -> dict:
    """Both runs, and the content of OUTPUT/comparison.json.

    Raises:
        ValueError: the attention is dense without us, a run fails, or a task's scores are not understood.
    """
    model = check_source("model", args.model)
    if importlib.util.find_spec("lmms_eval") is None:
        raise ModuleNotFoundError(name="lmms_eval")
    from videonsa.adapters.lmms_eval import read_config  # here: it imports lmms-eval, which takes seconds

    output = check_new(args.output)
    variant = args.nsa_variant or read_config(model).nsa_variant
    if variant == "dense":
        raise ValueError(f'model {args.model} has nsa_variant="dense"; give --nsa_variant a sparse one')
    variants = dict(zip(RUNS, ("dense", variant), strict=True))
    for run, nsa_variant in variants.items():
        model_args = ",".join(filter(None, (f"pretrained={model}", args.model_args, f"nsa_variant={nsa_variant}")))
        start = ["-m", "lmms_eval"]
        if args.num_processes > 1:
            start = ["-m", "accelerate.commands.launch", "--num_processes", args.num_processes, *start]
        command = [sys.executable, *start, "--model", "videonsa", "--model_args", model_args, "--tasks", args.tasks]
        command += ["--batch_size", args.batch_size, "--log_samples", "--output_path", output / run, *others]
        print(shlex.join(map(str, command)), flush=True)
        status = subprocess.run(list(map(str, command))).returncode
        if status or not any((output / run).rglob(SAMPLES.format("*"))):  # it exits with 0 after an error, too
            raise ValueError(f"lmms-eval wrote no samples of the {run} run; it ended with status {status}")
    versions = {name: version(name) for name in ("lmms-eval", "torch", "transformers")}
    result = {"model": args.model, "variants": variants, "versions": versions, "tasks": {}}
    for path in sorted((output / "dense").rglob(SAMPLES.format("*"))):
        task = path.stem.partition("_samples_")[2]
        result["tasks"][task] = compare_task(task, {run: read_run(output / run, task) for run in RUNS})
    (output / "comparison.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def read_run(folder: Path, task: str) -> tuple[dict, dict[int, dict]]:
    """The results of a run, and the samples of a task by the number of their question."""
    (results,) = folder.rglob("*_results.json")
    (samples,) = folder.rglob(SAMPLES.format(task))
    lines = map(json.loads, samples.read_text().splitlines())
    return json.loads(results.read_text()), {sample["doc_id"]: sample for sample in lines}


def compare_task(task: str, runs: dict[str, tuple[dict, dict]]) -> dict:
    """What is written of a task, from what `read_run` read of both runs."""
    from lmms_eval.api.metrics import paired_ttest  # here: see above

    results, samples = ({run: found[i] for run, found in runs.items()} for i in range(2))
    dense, sparse = (samples[run] for run in RUNS)
    if dense.keys() != sparse.keys():
        raise ValueError(f"{task}: the two runs answered different questions")
    metric = results["dense"]["configs"][task]["metric_list"][0]["metric"]
    scores = {run: [score(samples[run][i].get(metric), task, metric) for i in sorted(dense)] for run in RUNS}
    row = {"metric": metric, "questions": len(dense)}
    for run in RUNS:
        own = {name: x for name, x in results[run]["results"][task].items() if name != "alias"}
        row[run] = {
            "score": statistics.fmean(scores[run]),
            "results": own,
            "throughput": results[run].get("throughput"),
        }
    row["difference"] = paired_ttest(scores["sparse"], scores["dense"])
    row["agreement"] = statistics.fmean(dense[i]["filtered_resps"] == sparse[i]["filtered_resps"] for i in dense)
    return row


def score(kept, task: str, metric: str) -> float:
    """The score of a question, from what the task keeps of its answer for the metric."""
    if isinstance(kept, int | float):
        return float(kept)
    if isinstance(kept, dict):
        for name in SCORES:
            if isinstance(kept.get(name), int | float):
                return float(kept[name])
        for name in LETTERS:
            if name in kept and "answer" in kept:
                return float(str(kept[name]).lower() == str(kept["answer"]).lower())
    raise ValueError(f"task {task} keeps no score of each question for {metric}, but {json.dumps(kept)[:200]}")


def format_task(task: str, row: dict, variants: dict[str, str]) -> str:
    lines = [f"{task}, {row['metric']}, {row['questions']:,} questions"]
    for run, variant in variants.items():
        speed = row[run]["throughput"]
        each = f", {speed['avg_latency']:.3g} s of generation a question" if speed else ""
        lines.append(f"  {variant:<9}{100 * row[run]['score']:5.1f} %{each}")
    test = {name: 100 * row["difference"][name] for name in ("mean_diff", "ci_lower", "ci_upper")}
    return "\n".join([
        *lines,
        "  difference {mean_diff:+.1f} points, 95 % interval {ci_lower:+.1f} to {ci_upper:+.1f}, ".format(**test)
        + f"p = {row['difference']['p_value']:.3g}; {100 * row['agreement']:.0f} % of the answers are the same",
    ])  # fmt: skip


@door
def main() -> None:
    parser = OptionParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="folder or Hub id of a VideoNSA repository")
    parser.add_argument("tasks", help="a task of lmms-eval, or several with commas between")
    parser.add_argument("output", help="folder to make")
    add_fields(parser, "nsa_variant")
    parser.add_argument("--model_args", default="", help="further settings of both runs, as name=value,name=value")
    parser.add_argument("--batch_size", type=int, default=1, help="questions that are answered at a time")
    parser.add_argument("--num_processes", type=int, default=1, help="processes, each with a GPU of its own")
    args, others = parser.parse_known_args()
    result = compare(args, others)
    for task, row in result["tasks"].items():
        print(format_task(task, row, result["variants"]))
    print(f"wrote {Path(args.output) / 'comparison.json'}")


if __name__ == "__main__":
    main()
