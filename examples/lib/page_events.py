"""What the controls of the page of `app.py` call: between Gradio and `visits.py`."""

from functools import partial

import gradio as gr

from .html import error_html, note_html, plan_html, player_html, save_html, sheet_html, timing_text, wait_html
from .times import seconds_of
from .transcript import as_json, as_messages, as_text
from .visits import App, Visitor

HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}
QUICK = {**HIDDEN, "queue": False}
SLOW = {"api_visibility": "private", "concurrency_limit": 4}
# A tab remembers, until it is closed, under which name its visitor is known.
REMEMBER = "(name) => { sessionStorage.setItem('videonsa-visitor', name); }"
RECALL = "() => [sessionStorage.getItem('videonsa-visitor') ?? '']"


class Events:
    """What the controls call.

    Gradio passes the request of a visitor, and then the values of controls. What is returned says which controls
    change, and how; `values` are those of `Sampling.controls`.
    """

    def __init__(self, app: App, name: str):
        self.app, self.name = app, name

    # ------------------------------------------------------------------------------------------------------------------
    # Which control calls what
    # ------------------------------------------------------------------------------------------------------------------

    def connect(self, blocks: gr.Blocks, source, sampling, talk, sheet: gr.HTML) -> None:
        """Connect the controls that `page.py` makes."""
        self.source, self.sampling, self.talk, self.sheet = source, sampling, talk, sheet
        self.settings = list(sampling.controls.values())
        self.seen = [
            source.chooser, source.zone, source.back, source.shown, source.player, source.panel, sampling.box,
            talk.chat, talk.status, talk.questions, talk.save, sheet,
        ]  # fmt: skip
        self.connect_source()
        self.connect_talk()

        former = gr.Textbox(visible=False, elem_id="former")
        entering = blocks.load(self.enter, former, [*self.seen, *self.settings, former], **HIDDEN, js=RECALL)
        entering = entering.then(None, former, None, js=REMEMBER)
        entering.then(self.preview, None, source.player, **HIDDEN, concurrency_limit=2)
        blocks.unload(self.part)
        self.former = former

    def connect_source(self) -> None:
        """What happens when a video is chosen, and when its settings change."""
        source, settings, slow = self.source, self.settings, {**SLOW, "show_progress_on": self.source.panel}
        for event in (
            # Gradio would leave an empty file behind for each upload that it prepares.
            source.zone.upload(self.take, [source.zone, *settings], self.seen, **slow, preprocess=False),
            gr.on([source.load.click, source.url.submit], self.fetch, [source.url, *settings], self.seen, **slow),
            source.clips.click(self.example, settings, self.seen, **slow),
        ):
            event.then(self.preview, None, source.player, **HIDDEN, concurrency_limit=2)

        columns = [source.chooser, source.back, source.shown]
        source.other.click(lambda: self.columns(choose=True), None, columns, **QUICK)
        source.back.click(lambda: self.columns(choose=False), None, columns, **QUICK)
        gr.on(
            [control.change for control in settings],
            self.plan,
            settings,
            source.panel,
            **HIDDEN,
            trigger_mode="always_last",
            concurrency_limit=8,
        )

    def connect_talk(self) -> None:
        """What happens when a question is asked, asked again, stopped or forgotten."""
        talk = self.talk
        buttons = [talk.ask, talk.halt, talk.question]
        talk.questions.click(lambda sample: sample[0], talk.questions, talk.question, **HIDDEN)
        asking = gr.on([talk.ask.click, talk.question.submit], self.begin, None, buttons, **QUICK)
        again = talk.chat.retry(self.retry, None, [talk.question, talk.chat], **QUICK)
        for event in (asking, again.then(self.begin, None, buttons, **QUICK)):
            event = event.then(
                self.answer,
                [talk.question, self.sampling.new_tokens, *self.settings],
                [talk.chat, talk.question, self.sheet, talk.status, talk.save, self.source.panel],
                **HIDDEN,
                # `App.ask` has a line of its own, in which everybody sees how many are before.
                concurrency_limit=self.app.limits.queue + 2,
            )
            event.then(self.finish, None, buttons, **QUICK)
        talk.halt.click(self.stop, None, [talk.halt, talk.status], **QUICK)
        talk.chat.clear(self.forget, self.settings, [self.sheet, talk.status, talk.save, self.source.panel], **QUICK)

    # ------------------------------------------------------------------------------------------------------------------
    # A page is opened and closed
    # ------------------------------------------------------------------------------------------------------------------

    def enter(self, request: gr.Request, former: str) -> dict:
        """A page that is loaded again shows what it showed."""
        visitor = request.session_hash
        found = self.app.rejoin(visitor, former) if former else None
        if found is None:
            return {self.former: visitor}
        values = dict(zip(self.settings, found.values, strict=True))
        return {self.former: visitor, **values, **self.view(found, self.plan(request, *found.values))}

    def part(self, request: gr.Request) -> None:
        self.app.part(request.session_hash)

    # ------------------------------------------------------------------------------------------------------------------
    # A video is chosen
    # ------------------------------------------------------------------------------------------------------------------

    def take(self, request: gr.Request, upload, *values) -> dict:
        path = upload["path"] if isinstance(upload, dict) else ""
        return self.change(partial(self.app.take, request.session_hash, path), request, *values)

    def fetch(self, request: gr.Request, url, *values) -> dict:
        return self.change(partial(self.app.fetch, request.session_hash, url), request, *values)

    def example(self, request: gr.Request, event: gr.EventData, *values) -> dict:
        seed = (event._data or {}).get("seed")
        seed = int(seed) if seed else None
        return self.change(partial(self.app.make_example, request.session_hash, seed), request, *values)

    def change(self, action, request: gr.Request, *values) -> dict:
        """Show what there is after an action that changes the video."""
        try:
            action()
        except ValueError as error:
            return {self.source.panel: error_html(str(error)), self.source.zone: None}
        found = self.app.visitors[request.session_hash]
        found.values = values
        return self.view(found, self.plan(request, *values))

    def view(self, found: Visitor, panel: str) -> dict:
        """What the page shows of a visitor's video and conversation, without the settings."""
        source, talk = self.source, self.talk
        return {
            **self.columns(choose=False),
            source.zone: None,
            source.player: player_html(found.shown) if found.shown else wait_html("Preparing a preview…"),
            source.panel: panel,
            self.sampling.box: gr.update(visible=True),
            talk.chat: as_messages(found.turns),
            talk.questions: gr.Dataset(samples=[[text] for text in found.questions], visible=True),
            **self.results(found),
        }

    def columns(self, choose: bool) -> dict:
        """Show what chooses another video and the way back, or the player."""
        source = self.source
        return {
            source.chooser: gr.update(visible=choose),
            source.back: gr.update(visible=choose),
            source.shown: gr.update(visible=not choose),
        }

    def preview(self, request: gr.Request):
        """Yields the player while a copy of the video is made that browsers can play, if it takes one."""
        found = self.app.visitors.get(request.session_hash)
        if found is None or found.shown:
            yield gr.skip()
            return
        try:
            for share in self.app.make_preview(request.session_hash):
                yield wait_html(f"Preparing a preview, since browsers cannot play this kind of file: {share:.0%}")
            yield player_html(found.shown) if found.shown else gr.skip()
        except ValueError as error:
            yield wait_html(f"There is no preview: {error}. Questions work all the same.")

    def plan(self, request: gr.Request, *values) -> str:
        """What would be read of the video."""
        visitor, app = request.session_hash, self.app
        found = app.visitors.get(visitor)
        if found is None:
            return ""
        try:
            settings = self.settings_of(values)
            return plan_html(app.plan(visitor, **settings), found.truth, app.forgets(visitor, **settings))
        except ValueError as error:
            return error_html(str(error))

    def settings_of(self, values: tuple) -> dict:
        """Settings of the processor; 0 and nothing stand for the default."""
        settings = dict(zip(self.sampling.controls, values, strict=True))
        settings |= {name: seconds_of(settings[name]) for name in ("start", "end")}
        return {name: value or None for name, value in settings.items()}

    # ------------------------------------------------------------------------------------------------------------------
    # A question is asked
    # ------------------------------------------------------------------------------------------------------------------

    def begin(self, request: gr.Request) -> dict:
        self.app.begin(request.session_hash)
        return self.buttons(asking=True)

    def finish(self) -> dict:
        return self.buttons(asking=False)

    def buttons(self, asking: bool) -> dict:
        return {
            self.talk.ask: gr.update(visible=not asking),
            self.talk.halt: gr.update(visible=asking, value="Stop", interactive=True),
            self.talk.question: gr.update(interactive=not asking),
        }

    def answer(self, request: gr.Request, question, new_tokens, *values):
        """Yields the conversation while the answer grows."""
        app, talk, visitor = self.app, self.talk, request.session_hash
        found = app.visitors.get(visitor)
        if found is not None:
            found.values = values
        try:
            for messages in app.ask(visitor, question, new_tokens, **self.settings_of(values)):
                yield {talk.chat: messages, talk.question: "", talk.status: note_html(found.notice)}
        except ValueError as error:
            yield {talk.chat: app.messages(visitor), talk.question: question, talk.status: error_html(str(error))}
            return

        panel = self.plan(request, *values)
        if found.notice:  # there is no answer
            yield {talk.question: question, talk.status: note_html(found.notice), self.source.panel: panel}
        else:
            yield {**self.results(found), self.source.panel: panel}

    def results(self, found: Visitor) -> dict:
        """What stands below a conversation."""
        conversation, empty = found.conversation, not found.turns
        answer = conversation.answer if conversation else None
        about = (found.path.name, found.metadata.duration, self.name)
        name = f"{found.path.stem}-conversation"
        return {
            self.talk.status: note_html(timing_text(answer.timing) if answer and answer.timing else ""),
            self.talk.save: ""
            if empty
            else save_html(name, as_text(found.turns, *about), as_json(found.turns, *about)),
            self.sheet: "" if empty else sheet_html(conversation),
        }

    def retry(self, request: gr.Request) -> dict:
        try:
            question = self.app.retract(request.session_hash)
        except ValueError:
            question = ""
        return {self.talk.question: question, self.talk.chat: self.app.messages(request.session_hash)}

    def stop(self, request: gr.Request) -> dict:
        self.app.stop(request.session_hash)
        return {
            self.talk.halt: gr.update(value="Stopping…", interactive=False),
            self.talk.status: note_html("Stopping…"),
        }

    def forget(self, request: gr.Request, *values) -> dict:
        self.app.forget(request.session_hash)
        cleared = dict.fromkeys([self.sheet, self.talk.status, self.talk.save], "")
        return {**cleared, self.source.panel: self.plan(request, *values)}
