"""benchmarks/campaign.py walks all of its parts on a CPU, and goes on where it was cut short."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def run(*command, **variables):
    inherited = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


def test_a_dry_run_walks_every_part_and_resumes(tmp_path):
    program = (FOLDER / "campaign.py", "--dry_run", "--output", tmp_path)
    done = run(*program, "--minutes", 0)
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "campaign.json").read_text())
    assert {x["result"].split(":")[0] for x in state["parts"].values()} == {"not begun", "skipped"}

    done = run(*program, "--resume", "--minutes", 60)
    assert done.returncode == 0, done.stderr
    resumed = json.loads((tmp_path / "campaign.json").read_text())
    logs = (tmp_path / "campaign.txt").read_text()
    results = {x["result"].split(":")[0] for x in resumed["parts"].values()}
    assert resumed["date"] == state["date"] and results == {"finished", "skipped"}, logs
    report = (tmp_path / "campaign.md").read_text()
    for what in ("| whole | torch | 64 |", "| released | torch |", "| merged | torch |", "| warm |", "| overlap 0.8 |",
                 "| prefill | VideoNSA |", "| train_step | Qwen2.5-VL |", "forward+backward"):  # fmt: skip
        assert what in report

    assert run(*program, "--resume").returncode == 0  # has nothing left to do
    assert json.loads((tmp_path / "campaign.json").read_text()) == resumed


def test_a_part_that_takes_too_long_or_fails_is_said_so_and_leaves_its_output(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import pathlib, sys, time, campaign

folder = pathlib.Path({str(tmp_path)!r})
log = folder / "log.txt"
say = "print('so far', flush=True); "
slow = campaign.run("slow", [sys.executable, "-c", say + "import time; time.sleep(60)"], 2, log)
assert slow["result"] == "stopped after 2 s" and 2 <= slow["seconds"] < 30
failing = campaign.run("failing", [sys.executable, "-c", say + "sys"], 30, log)
assert failing["result"] == "failed: exit code 1"
assert [part.count("so far") for part in log.read_text().split("# ")[1:]] == [2, 2]  # what was run, and its output

# What a part has started ends with it.
begun, late = folder / "begun.txt", folder / "late.txt"
child = f"import time; open({{str(begun)!r}}, 'w'); time.sleep(6); open({{str(late)!r}}, 'w')"
parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', " + repr(child) + "])"
assert campaign.run("parent", [sys.executable, "-c", parent], 4, log)["result"] == "stopped after 4 s"
assert begun.exists()
time.sleep(5)
assert not late.exists()
""")
    done = run(script, PYTHONPATH=str(FOLDER))
    assert done.returncode == 0, done.stderr
