# SPDX-License-Identifier: Apache-2.0
"""The page of ``--serve`` in gradio's parts: a conversation, a box to write and to add images, and the settings of a turn.

The server keeps the conversation in the browser tab's session, apart from the display. The page cannot change it, and the model reads
every text and picture exactly as it was.
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
    """A conversation as the model reads it and as the page shows it. A refused turn is only shown."""

    terms: tuple[str | Image.Image, ...] = ()
    messages: tuple[Message, ...] = ()


def build_page(session: ChatSession, folder: str) -> gr.Blocks:
    """Build the page of ``session``, which keeps drawn pictures in ``folder``."""
    with gr.Blocks(title="megatron_bagel", analytics_enabled=False, fill_height=True) as page:
        talk = gr.State(Talk())
        with gr.Row(scale=1):
            with gr.Column(scale=3):
                chatbot = gr.Chatbot(
                    elem_id="talk", label="Conversation", scale=1, render_markdown=False, latex_delimiters=[], buttons=[],
                    feedback_options=None,
                )  # fmt: skip
                message = gr.MultimodalTextbox(
                    elem_id="message", show_label=False, placeholder="What to draw, to change or to answer", file_types=["image"],
                    file_count="multiple", max_plain_text_length=2**20, autofocus=True,
                )  # fmt: skip
            with gr.Column(scale=1, min_width=240):
                fields = _fields(session.default_settings)
                start_again = gr.Button("Start again", elem_id="again")

        def send(message_value: dict[str, Any], talk_before: Talk, *field_values: Any) -> Iterator[tuple[Any, Any, Any]]:
            yield from _turn(session, folder, message_value, talk_before, field_values)

        outputs = [message, talk, chatbot]
        submission = message.submit(send, [message, talk, *fields], outputs, api_visibility="undocumented", show_progress="minimal")
        gr.on(
            [start_again.click, chatbot.clear],
            lambda: (None, Talk(), []),
            None,
            outputs,
            cancels=[submission],
            api_visibility="undocumented",
        )
    page.queue(default_concurrency_limit=1, api_open=False)
    return page


def _turn(
    session: ChatSession, folder: str, message_value: dict[str, Any], talk_before: Talk, field_values: tuple[Any, ...]
) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the changes of the message box, the conversation and its display during a turn."""
    asked_messages = (*talk_before.messages, _user(message_value))
    yield gr.skip(), talk_before, list(asked_messages)
    try:
        new_terms = (*(read_image(path, session.exif) for path in message_value["files"]), *filter(None, [message_value["text"]]))
        if not new_terms:
            raise ValueError("there is nothing to read; write something or add an image")
        reply = yield from _reply_in_thread(session, (*talk_before.terms, *new_terms), Settings(*field_values))
    except ValueError as error:
        talk_after = Talk(talk_before.terms, (*asked_messages, _assistant(_plain_text(str(error)), "This cannot be")))
        yield gr.skip(), talk_after, list(talk_after.messages)
        return
    talk_after = Talk((*talk_before.terms, *new_terms, *reply.terms), (*asked_messages, *_messages(reply, folder)))
    yield None, talk_after, list(talk_after.messages)


def _reply_in_thread(
    session: ChatSession, terms: tuple[str | Image.Image, ...], settings: Settings
) -> Generator[tuple[Any, Any, Any], None, Reply]:
    """Make a reply in a thread and yield no changes meanwhile: gradio can end a turn only at a yield."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as worker:
        try:
            reply_future = worker.submit(session.reply, terms, settings, stop)
            while not wait([reply_future], timeout=0.2).done:
                yield gr.skip(), gr.skip(), gr.skip()
        finally:
            stop.set()
    return reply_future.result()


def _fields(defaults: Settings) -> list[gr.components.Component]:
    """Return the fields in the order of ``Settings``."""
    choices = [("draw, or change the last picture", "image"), ("answer", "text")]
    output = gr.Radio(choices, value=defaults.output, label="What to do", elem_id="output")
    think = gr.Checkbox(defaults.think, label="Think first", elem_id="think")
    size = gr.Textbox(defaults.size, label="Size", placeholder="HxW; empty: as the model likes", elem_id="size")
    with gr.Row():
        steps = gr.Number(defaults.steps, label="Steps", precision=0, min_width=100, elem_id="steps")
        seed = gr.Number(defaults.seed, label="Seed", precision=0, min_width=100, elem_id="seed")
    with gr.Row():
        text_scale = gr.Number(defaults.text_scale, label="Text guidance", step=0.1, min_width=100, elem_id="text_scale")
        img_scale = gr.Number(defaults.img_scale, label="Image guidance", step=0.1, min_width=100, elem_id="img_scale")
    return [output, think, size, steps, seed, text_scale, img_scale]


def _user(message_value: dict[str, Any]) -> Message:
    images = [{"path": path} for path in message_value["files"]]
    return {"role": "user", "content": [*images, _plain_text(message_value["text"])]}


def _messages(reply: Reply, folder: str) -> Iterator[Message]:
    """Yield the messages that show a reply; its picture becomes a file in ``folder``, which gradio may serve."""
    if reply.thought is not None:
        yield _assistant(_plain_text(reply.thought), "Thought")
    if reply.text is not None:
        yield _assistant(_plain_text(reply.text))
    if reply.image is not None:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".png", delete=False) as file:
            reply.image.save(file, format="PNG")
        yield _assistant({"path": file.name})


def _plain_text(text: str) -> Message:
    """Return a text that is shown literally; even without Markdown the chatbot treats text as HTML."""
    return {"type": "text", "text": html.escape(text, quote=False)}


def _assistant(content: dict[str, Any], title: str | None = None) -> Message:
    return {"role": "assistant", "content": [content], "metadata": {"title": title} if title else {}}
