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
from collections.abc import Sequence
from typing import NoReturn

from featsharp.cli.arguments import DEFAULT_BACKBONE, add_device, parse_count
from featsharp.errors import ConfigError, MissingDependencyError
from featsharp.terminal import say

OFFLINE = (DEFAULT_BACKBONE, "mobilenetv2")
HOST, PORT, MAX_UPLOAD = "127.0.0.1", 7860, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone", nargs="+", metavar="NAME",
        help=f"backbones to choose from; default: those of {' '.join(OFFLINE)} whose weights are here",
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
        page = build_page(
            Demo(arguments.backbone or installed_backbones(OFFLINE), device), max_upload=f"{arguments.max_upload} MB"
        )
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


def installed_backbones(names: Sequence[str]) -> list[str]:
    """List those of some backbones whose weights are here; raises MissingDependencyError where there is none."""
    from featsharp.backbones.local_weights import has_local_weights

    found = [name for name in names if has_local_weights(name)]
    if not found:
        raise MissingDependencyError(
            f"no weights of {' or '.join(names)} are here; install those of vits14-focus (featsharp doctor --backbone "
            "vits14-focus says how), or name a backbone with --backbone"
        )
    return found


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _stop(*unused: object) -> NoReturn:
    raise KeyboardInterrupt
