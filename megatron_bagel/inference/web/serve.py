# SPDX-License-Identifier: Apache-2.0
"""Runs ``--serve``: the page of one model, until interrupted. Only this file imports gradio, and late: an extra that takes seconds."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_bagel.inference.batch.arguments import text_limits
from megatron_bagel.inference.batch.run import open_engine, sampling_of
from megatron_bagel.inference.web.chat_session import ChatSession
from megatron_bagel.platform.launch.process_group import launched_world_size


def serve(args: Namespace) -> None:
    """Show the page of ``--serve``. Raises ValueError before the model is loaded for impossible options or without gradio."""
    if launched_world_size() > 1:
        raise ValueError("--serve runs on one process: start it with python, not with torchrun on several ranks")
    sampling, limits = sampling_of(args), text_limits(args)
    with _listening(args.host, args.port) as listener, tempfile.TemporaryDirectory(prefix="megatron_bagel_page_") as folder:
        make_server = _need_gradio(folder)
        server = make_server(ChatSession(open_engine(args), *sampling, args.exif, limits), args.host, folder)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"the page is at http://{host}:{listener.getsockname()[1]}/ until Ctrl-C", flush=True)
        # kill stops the server like Ctrl-C, so that the folder is removed.
        previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            print("stopped")
        finally:
            signal.signal(signal.SIGTERM, previous_handler)


def _need_gradio(folder: str) -> Callable[..., Any]:
    """Return ``make_server`` of server.py, after telling gradio to keep its files in ``folder`` and to send no analytics.

    Gradio reads both settings on import. Its default folder is shared by all users of a machine and is not emptied.
    """
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from megatron_bagel.inference.web.server import make_server
    except ImportError as error:
        raise ValueError(f"--serve needs gradio: pip install megatron_bagel[serve] ({error})") from error
    return make_server


def _listening(host: str, port: int) -> socket.socket:
    """Open a socket that listens on ``host`` and ``port`` (0: any free one)."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen ({error})") from error
