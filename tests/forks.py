"""Fresh processes without the seconds of imports: `run` forks them from a process that has only imported libraries.

Such a process has nothing of this repository and nothing of the tests; its arguments, folder, environment and output
are its own. It ends as any process of Python does.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

# Libraries read these when they are imported: processes that differ in them are forked from different ones.
IMPORTED = ("HF_HOME", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "OMP_", "TRANSFORMERS_")

_servers = {}  # by the values of these


def run(*command, cwd=None, env=None, timeout=300) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *command], capture_output=True, text=True, ...)`, for a script or -c.

    Without a network, on one thread, and without what pytest and the interpreter of kernels set.
    """
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(os.environ if env is None else env)}
    env = {name: x for name, x in env.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    key = tuple(sorted(x for x in env.items() if x[0].startswith(IMPORTED)))
    server = _servers.get(key)
    if server is None or server.poll() is not None:
        # Not in the folder of a test, which may go, nor with the paths of one.
        own = {**env, "PYTHONPATH": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent}
        server = _servers[key] = subprocess.Popen([sys.executable, __file__], env=own, **pipes)

    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        command = [str(x) for x in command]
        print(json.dumps([command, str(cwd or os.getcwd()), env, [*map(str, outputs)]]), file=server.stdin, flush=True)
        pid = int(server.stdout.readline())
        timer = threading.Timer(timeout, os.killpg, (pid, signal.SIGKILL))
        timer.start()
        code = int(server.stdout.readline())
        timer.cancel()
        return subprocess.CompletedProcess(command, code, *(x.read_text() for x in outputs))


def serve() -> list[str]:
    """Fork a process for every request; returns in these processes alone, with what is to run."""
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        command, folder, env, outputs = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(env)
            sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
            for descriptor, file in enumerate([os.devnull, *outputs]):
                opened = os.open(file, os.O_RDWR | os.O_CREAT)
                os.dup2(opened, descriptor)
                os.close(opened)
            replies.close()
            return command
        print(pid, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=replies, flush=True)
    sys.exit()


if __name__ == "__main__":
    import gc
    import runpy
    import types

    import av  # noqa: F401
    import peft  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401
    from transformers import AutoModel, AutoProcessor, Trainer  # noqa: F401
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl, processing_qwen2_5_vl  # noqa: F401

    import accelerate  # noqa: F401

    del sys.path[0]
    gc.freeze()  # or each process copies all that it collects when it ends
    what, *sys.argv = serve()
    if what == "-c":
        program, sys.argv[0] = sys.argv[0], what
        sys.path.insert(0, "")
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv.insert(0, what)
        sys.path.insert(0, str(Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")
