"""The page of ``--serve`` in gradio's parts: a conversation, a box to write and to add images, and the settings of a turn.

What has been said lies with the server, in the browser tab's session, and not in what is shown: the page cannot change it, and the
model reads a text to the letter, and a picture to the pixel, as it was.
"""

from __future__ import annotations

import html
import tempfile
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from megatron_bagel.inference.web.chat_session import ChatSession, Reply, Settings, read_image

Message = dict[str, Any]  # of gradio's Chatbot


@dataclass(frozen=True)
class Talk:
    """A conversation: what the model reads of it, and what is shown of it. A turn that could not be is shown only."""

    terms: tuple[str | Image.Image, ...] = ()
    shown: tuple[Message, ...] = ()


def build_page(desk: ChatSession, folder: str) -> gr.Blocks:
    """The page of ``desk``, which keeps drawn pictures in ``folder``; whoever serves it says to whom."""
    with gr.Blocks(title="megatron_bagel", analytics_enabled=False, fill_height=True) as page:
        talk = gr.State(Talk())
        with gr.Row(scale=1):
            with gr.Column(scale=3):
                shown = gr.Chatbot(
                    elem_id="talk", label="Conversation", scale=1, render_markdown=False, latex_delimiters=[], buttons=[],
                    feedback_options=None,
                )  # fmt: skip
                message = gr.MultimodalTextbox(
                    elem_id="message", show_label=False, placeholder="What to draw, to change or to answer", file_types=["image"],
                    file_count="multiple", max_plain_text_length=2**20, autofocus=True,
                )  # fmt: skip
            with gr.Column(scale=1, min_width=240):
                fields = _fields(desk.usual)
                again = gr.Button("Start again", elem_id="again")

        def send(written: dict[str, Any], before: Talk, *filled: Any) -> Iterator[tuple[Any, Any, Any]]:
            asked = (*before.shown, _user(written))
            yield gr.skip(), before, list(asked)
            try:
                said = (*map(read_image, written["files"]), *filter(None, [written["text"]]))
                if not said:
                    raise ValueError("there is nothing to read: write something or add an image")
                reply = yield from _made(desk, (*before.terms, *said), Settings(*filled))
            except ValueError as error:
                after = Talk(before.terms, (*asked, _assistant(_words(str(error)), "This cannot be")))
                yield gr.skip(), after, list(after.shown)
                return
            after = Talk((*before.terms, *said, *reply.terms), (*asked, *_messages(reply, folder)))
            yield None, after, list(after.shown)

        outputs = [message, talk, shown]
        sent = message.submit(send, [message, talk, *fields], outputs, api_visibility="undocumented", show_progress="minimal")
        gr.on([again.click, shown.clear], lambda: (None, Talk(), []), None, outputs, cancels=[sent], api_visibility="undocumented")
    page.queue(default_concurrency_limit=1, api_open=False)
    return page


def _made(desk: ChatSession, terms: tuple[str | Image.Image, ...], settings: Settings) -> Generator[tuple[Any, Any, Any], None, Reply]:
    """A reply of ``desk``, yielding nothing new meanwhile: only there can gradio end a turn, when it is started again or its tab closed."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as worker:
        try:
            made = worker.submit(desk.reply, terms, settings, stop)
            while not wait([made], timeout=0.2).done:
                yield gr.skip(), gr.skip(), gr.skip()
        finally:
            stop.set()
    return made.result()


def _fields(usual: Settings) -> list[gr.components.Component]:
    """The fields, in the order of ``Settings``."""
    choices = [("draw, or change the last picture", "image"), ("answer", "text")]
    output = gr.Radio(choices, value=usual.output, label="What to do", elem_id="output")
    think = gr.Checkbox(usual.think, label="Think first", elem_id="think")
    size = gr.Textbox(usual.size, label="Size", placeholder="HxW; empty: as the model likes", elem_id="size")
    with gr.Row():
        steps = gr.Number(usual.steps, label="Steps", precision=0, min_width=100, elem_id="steps")
        seed = gr.Number(usual.seed, label="Seed", precision=0, min_width=100, elem_id="seed")
    with gr.Row():
        text_scale = gr.Number(usual.text_scale, label="Text guidance", step=0.1, min_width=100, elem_id="text_scale")
        img_scale = gr.Number(usual.img_scale, label="Image guidance", step=0.1, min_width=100, elem_id="img_scale")
    return [output, think, size, steps, seed, text_scale, img_scale]


def _user(written: dict[str, Any]) -> Message:
    images = [{"path": path} for path in written["files"]]
    return {"role": "user", "content": [*images, _words(written["text"])]}


def _messages(reply: Reply, folder: str) -> Iterator[Message]:
    """What is shown of a reply; its picture becomes a file in ``folder``, which gradio may serve."""
    if reply.thought is not None:
        yield _assistant(_words(reply.thought), "Thought")
    if reply.text is not None:
        yield _assistant(_words(reply.text))
    if reply.image is not None:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".png", delete=False) as file:
            reply.image.save(file, format="PNG")
        yield _assistant({"path": file.name})


def _words(text: str) -> Message:
    """A text that is shown letter by letter: without Markdown the chatbot still takes it for HTML."""
    return {"type": "text", "text": html.escape(text, quote=False)}


def _assistant(content: dict[str, Any], title: str | None = None) -> Message:
    return {"role": "assistant", "content": [content], "metadata": {"title": title} if title else {}}
