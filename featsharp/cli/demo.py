"""A page on this machine to try features of pictures: PCA, similarity by click, clusters, text.

    featsharp demo
    featsharp demo --backbone dinov2-s open_clip:ViT-B-16/openai --port 8000

Serves http://127.0.0.1:7860, to this machine alone unless --host says otherwise: whoever reaches the page can compute
with the backbones that are listed. It works without a network where the weights are here, sends nothing, and keeps
nothing: uploads and pictures lie in a temporary folder that is deleted at the end. Ctrl-C ends it.
"""

import argparse
import contextlib
import os
import signal
import tempfile
import threading
from typing import NoReturn

from featsharp.cli.arguments import DEFAULT_BACKBONE, add_device, parse_count
from featsharp.errors import ConfigError
from featsharp.terminal import say

HOST, PORT, MAX_UPLOAD = "127.0.0.1", 7860, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone", nargs="+", metavar="NAME", default=[DEFAULT_BACKBONE, "mobilenetv2"],
        help=f"backbones to choose from; default: {DEFAULT_BACKBONE} mobilenetv2",
    )  # fmt: skip
    parser.add_argument("--host", default=HOST, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=parse_count, default=PORT, metavar="N", help="port (%(default)s)")
    parser.add_argument(
        "--max-upload", type=parse_count, default=MAX_UPLOAD, metavar="MB", help="largest upload, in MB (%(default)s)"
    )
    parser.add_argument("--open", action="store_true", help="open a browser")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from featsharp.device import find_device
    from featsharp.visualization.page import CSS, Demo, build_page, import_gradio

    device = find_device(arguments.device)
    with contextlib.ExitStack() as block:
        folder = block.enter_context(tempfile.TemporaryDirectory(prefix="featsharp-demo-"))
        # Read when gradio is imported, and when a component is made.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        gradio = import_gradio()
        limit = f"{arguments.max_upload}mb"
        page = build_page(Demo(arguments.backbone, device), max_upload=f"{arguments.max_upload} MB")
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the web
        previous = signal.signal(signal.SIGTERM, _stop) if _is_main_thread() else None
        try:
            page.queue(max_size=16).launch(
                server_name=arguments.host,
                server_port=arguments.port,
                share=False,
                quiet=True,
                inbrowser=arguments.open,
                prevent_thread_lock=True,
                max_file_size=limit,
                enable_monitoring=False,
                ssr_mode=False,
                footer_links=[],
                theme=gradio.themes.Default(**fonts),
                css=CSS,
            )
            say(f"featsharp demo: http://{arguments.host}:{arguments.port} (Ctrl-C ends it)")
            threading.Event().wait()
        except OSError as error:  # of the address
            address = f"{arguments.host}:{arguments.port}"
            raise ConfigError(f"cannot listen on {address} ({error}); give another --port") from error
        finally:
            page.close(verbose=False)
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _stop(*unused: object) -> NoReturn:
    raise KeyboardInterrupt
