"""The server of `serve.py`: OpenAI's chat completions about videos, made of the parts of `transformers serve`.

transformers checks the fields of a request, generates in a thread of its own, and writes answers and streams. Different
here are: one model, which requests cannot replace; the settings of videos; no files unless a folder is named; videos
read beside an answer that is being generated; and an end to answers whose client has left, streamed or not.
"""

import asyncio
import base64
import contextlib
import io
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from transformers import BatchFeature
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality
from transformers.generation.streamers import BaseStreamer

from videonsa.video_planner import shorten
from videonsa.video_source import is_data_url, local_path, open_source, opened

from .door import explain

# What a request may say of its videos, in `chat_template_kwargs`; docs/videos.md explains it.
SETTINGS = ("fps", "num_frames", "min_frames", "max_frames", "max_pixels", "frame_tokens", "max_tokens", "prefer")
SETTINGS += ("start", "end")
PARTS = ("text", "image_url", "video_url")
IMAGE_TIMEOUT = 30.0  # seconds that a server may take, as for videos
IMAGE_BYTES = 2**26
# Fields that transformers takes and leaves aside; a request that sets one asks for what it would not get.
UNSUPPORTED = ("logit_bias", "logprobs", "presence_penalty", "tools")
PATIENCE = 0.1  # seconds between two looks whether a client is still there
CLIENT_LEFT = 499  # nobody reads this status


def make_app(handler: "Handler") -> FastAPI:
    """The routes: chat completions, the list of models, and whether the server is up."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: dict):
        answer = asyncio.ensure_future(handler.handle_request(body, str(uuid.uuid4())))
        try:
            while not (await asyncio.wait([answer], timeout=PATIENCE))[0]:
                if await request.is_disconnected():
                    return Response(status_code=CLIENT_LEFT)
            return answer.result()
        except Exception as error:
            line = None if isinstance(error, HTTPException) else explain(error)
            if line is None:
                raise
            raise HTTPException(400, line) from error
        finally:
            answer.cancel()

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": handler.name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException):
        message = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": message}, error.status_code)

    return app


class Handler(ChatCompletionHandler):
    """Answers requests with one model.

    Args:
        name: of the model, as requests give it.
        max_tokens: the most that a request may set as budget of a video, and what it gets if it sets none.
        folder: whose files requests may name; None for no files.
    """

    def __init__(self, name: str, model, processor, max_tokens: int, folder: Path | None = None):
        super().__init__(None, GenerationState())  # None: transformers' manager would load what a request names
        self.name, self.model, self.processor = name, model, processor
        self.max_tokens, self.folder = max_tokens, folder and folder.resolve()
        self.generation = Generation()
        self.reader = ThreadPoolExecutor(1)

    async def handle_request(self, body: dict, request_id: str) -> Response:
        """The response to a request: JSON, or a stream of events.

        Raises:
            HTTPException: the model is another one, or fields are unknown.
            ValueError, OSError: messages, settings or a source are not as they must be.
        """
        self._validate_request(body)
        if body.get("model") not in (None, self.name):
            raise HTTPException(404, f"this server has the model {self.name!r}, not {body['model']!r}")
        ignored = [name for name in UNSUPPORTED if body.get(name)] + ["n"] * (body.get("n") not in (None, 1))
        if ignored:
            raise HTTPException(422, f"this server does not carry out: {', '.join(ignored)}")
        if (most := body.pop("max_completion_tokens", None)) is not None:
            body.setdefault("max_tokens", most)
        inputs = await asyncio.get_running_loop().run_in_executor(self.reader, self.read, body)
        config = self._build_generation_config(body, self.model.generation_config)
        what = (request_id, self.model, self.processor, self.name, inputs, config)
        if body.get("stream"):
            return self._streaming(*what, gen_manager=self.generation)
        return await self._non_streaming(*what, gen_manager=self.generation)

    def read(self, body: dict) -> BatchFeature:
        """The model's inputs for a request."""
        settings = body.get("chat_template_kwargs") or {}
        # Others would reach the template and the reader of images: files, and templates that never end.
        if not isinstance(settings, dict) or settings.keys() - {*SETTINGS}:
            raise ValueError(f"chat_template_kwargs takes {', '.join(SETTINGS)}, got {shorten(settings)}")
        limit = settings.get("max_tokens") or self.max_tokens
        if not isinstance(limit, int) or limit > self.max_tokens:
            raise ValueError(f"chat_template_kwargs: max_tokens is at most {self.max_tokens}, got {shorten(limit)}")
        messages = with_allowed_sources(body.get("messages"), self.folder)
        inputs = self.processor.apply_chat_template(
            self.get_processor_inputs_from_messages(messages, Modality.VLM),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={**settings, "max_tokens": limit},
        )
        length = inputs["input_ids"].shape[1]
        if length > self.max_tokens:
            raise ValueError(f"the prompt has {length:,} tokens, more than this server's limit of {self.max_tokens:,}")
        return inputs.to(self.model.device)


class Generation(GenerateManager):
    """Generates one answer after the other, as in transformers, which ends only streams whose client has left."""

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        stop = Stop()
        inputs = {**inputs, "streamer": stop}
        answer = super().generate_non_streaming(model, processor, inputs, gen_config, request_id=request_id)
        answer = asyncio.ensure_future(answer)
        try:
            return await asyncio.shield(answer)  # its thread reports to it, now or later
        except asyncio.CancelledError:
            stop.asked = True
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise


class Stop(BaseStreamer):
    """Ends `generate` where it hands over the prompt or the next token, once `asked` is set."""

    asked = False

    def put(self, value):
        if self.asked:
            raise InterruptedError("the client has left")

    def end(self):
        pass


def with_allowed_sources(messages, folder: Path | None) -> list[dict]:
    """Messages whose videos and images may be read.

    Args:
        folder: whose files may be named, by paths in it; None for no files.

    Raises:
        ValueError: the messages are not in OpenAI's format, have a part of another kind, or name a file that may not
            be read.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of messages, not empty")
    allowed = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message must be an object with role and content, got {shorten(message)}")
        content = message.get("content")
        if isinstance(content, list):
            message = {**message, "content": [with_allowed_source(part, folder) for part in content]}
        elif not isinstance(content, str | None):
            raise ValueError(f"the content of a message must be a text or a list of parts, got {shorten(content)}")
        allowed.append(message)
    return allowed


def with_allowed_source(part, folder: Path | None) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PARTS:
        raise ValueError(f"a part of a message must be of type {', '.join(PARTS)}, got {shorten(part)}")
    value = part.get(kind)
    url = value.get("url") if isinstance(value, dict) else None
    if not isinstance(value if kind == "text" else url, str):
        form = '"..."' if kind == "text" else '{"url": "..."}'
        raise ValueError(f'a part of type {kind} must have "{kind}": {form}, got {shorten(part)}')
    if kind == "text":
        return part
    if not is_data_url(url) and not url.lower().startswith(("http://", "https://")):
        url = allowed_file(local_path(url), folder)
    return {"type": kind, kind: {"url": read_image(url) if kind == "image_url" else url}}


def read_image(url: str) -> str:
    """An image as a `data:` URL. Read here, since transformers would go to private addresses, and quote bad data."""
    with contextlib.closing(open_source(url, IMAGE_TIMEOUT, keep=False)) as source, opened(source.file) as file:
        data = file.read(IMAGE_BYTES + 1)
    if len(data) > IMAGE_BYTES:
        raise ValueError(f"{shorten(url)}: an image of more than {IMAGE_BYTES:,} bytes")
    try:
        Image.open(io.BytesIO(data)).verify()
    except Exception as error:  # of many kinds, by the format that it seems to have
        raise ValueError(f"{shorten(url)}: not an image that can be read") from error
    return f"data:image/any;base64,{base64.b64encode(data).decode()}"


def allowed_file(path: str, folder: Path | None) -> str:
    name = shorten(path)
    if folder is None:
        raise ValueError(
            f"{name}: this server reads no files, unless it is started with --media_folder; give an http(s) address or "
            "a data: URL"
        )
    file = (folder / path).resolve()  # where links lead
    if not file.is_relative_to(folder):
        raise ValueError(f"{name}: not in the folder whose files this server reads")
    if not file.exists():
        raise ValueError(f"{name}: no such file in the folder that this server reads")
    return str(file)
