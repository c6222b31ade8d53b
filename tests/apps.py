"""Apps and running pages that tests share."""

import contextlib
import json
import time
import urllib.request
from types import SimpleNamespace

import pytest

import app as app_module
from lib.loading import assemble_tiny_model, load
from lib.visits import App, Limits
from videonsa.video_chat import VideoChat


def make_chat(folder) -> VideoChat:
    return VideoChat(*load(str(assemble_tiny_model(folder / "model")), "cpu"))


@contextlib.contextmanager
def serving(chat, folder, limits: Limits):
    """A running app whose model takes its time, and the address of its page."""
    gradio = pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')
    app = App(chat, folder / "files", limits, examples=True)
    handle = chat.model.register_forward_hook(lambda *_: time.sleep(0.05))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # launch() sets them
        _, url, _ = app_module.launch(app, "<tiny>", prevent_thread_lock=True, quiet=True)
        yield app, url
        gradio.close_all(verbose=False)
    handle.remove()


def listing(app) -> list[str]:
    return sorted(str(path.relative_to(app.files)) for path in app.files.rglob("*") if path.is_file())


def endless(chat, monkeypatch) -> None:
    """Let answers go on to their longest."""
    config = chat.model.generation_config
    monkeypatch.setattr(config, "suppress_tokens", [*config.suppress_tokens, config.eos_token_id])
    monkeypatch.setattr(config, "eos_token_id", 10**6)


class Client:
    """Calls events of a page as a browser does. Controls have their first values, or those given under their ids."""

    def __init__(self, url: str, session: str):
        self.url, self.session = url, session
        with urllib.request.urlopen(f"{url}config") as response:
            self.page = json.load(response)
        self.values = {component["id"]: component["props"].get("value") for component in self.page["components"]}
        self.ids = {component["props"].get("elem_id"): component["id"] for component in self.page["components"]}

    def __call__(self, name: str, event: dict | None = None, **given) -> SimpleNamespace:
        """What the event returns, under the ids of the controls; what is left as it is is missing or an update."""
        number, called = next((i, x) for i, x in enumerate(self.page["dependencies"]) if x["api_name"] == name)
        values = self.values | {self.ids[control]: value for control, value in given.items()}
        data = [values[i] for i in called["inputs"]]
        data = {"data": data, "event_data": event, "fn_index": number, "session_hash": self.session}
        request = urllib.request.Request(
            f"{self.url}gradio_api/queue/join", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).close()
        with urllib.request.urlopen(f"{self.url}gradio_api/queue/data?session_hash={self.session}") as stream:
            messages = (json.loads(line[5:]) for line in stream if line.startswith(b"data:"))
            done = next(message for message in messages if message["msg"] == "process_completed")
        assert done["success"], done
        names = {number: name for name, number in self.ids.items() if name}
        outputs = zip(called["outputs"], done["output"]["data"], strict=True)
        return SimpleNamespace(**{names[i]: value for i, value in outputs if i in names})
