"""``python -m jaxtrain serve --model FILE``: an exported model as an HTTP service."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from jaxtrain.cli import SUMMARIES, command_line
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import user_path

PACKAGES = ("starlette", "uvicorn", "prometheus_client", "anyio", "h11")


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain serve", SUMMARIES["serve"])
    parser.add_argument("--model", required=True, metavar="FILE", help="what python -m jaxtrain export wrote")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on; other than this machine only with a token in JAXTRAIN_SERVE_TOKEN; "
        "default: %(default)s",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: a free one; default: %(default)s")
    parser.add_argument(
        "--max-batch",
        type=int,
        default=32,
        metavar="N",
        help="examples in a batch at most; default: %(default)s",
    )
    parser.add_argument(
        "--max-wait",
        type=float,
        default=2.0,
        metavar="MS",
        help="milliseconds that a request waits for others to join its batch; default: %(default)s",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="examples that wait at most, --max-batch or more; requests above get status 429; default: "
        "%(default)s",
    )
    parser.add_argument(
        "--max-body", type=float, default=16, metavar="MB", help="largest request; default: %(default)s MiB"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds until a request without a result gets status 503; default: %(default)s",
    )
    parser.add_argument("--verbose", action="store_true", help="write a line for each request to stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(
        _run, make_parser(), argv, needs_jax=lambda args: not args.model.endswith(".onnx")
    )


def _run(args: argparse.Namespace) -> int:
    try:
        from jaxtrain.serve import server
        from jaxtrain.serve.settings import TOKEN, Settings, is_loopback, loopback_names
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in PACKAGES:
            raise
        raise InputError(f"{error.name} is not installed: pip install 'jaxtrain[serve]'") from error
    from jaxtrain.artifact import engines
    from jaxtrain.serve.model import Servable

    token, local = os.environ.get(TOKEN) or None, is_loopback(args.host)
    if token is None and not local:
        raise InputError(
            f"--host {args.host} lets other machines in: set {TOKEN} to a secret that they must send "
            "(openssl rand -hex 32)"
        )
    if not 0 < args.max_body <= 1024:
        raise InputError(f"--max-body {args.max_body:g}: give MiB above 0, at most 1024")
    settings = Settings(
        max_batch=args.max_batch,
        max_wait=args.max_wait / 1000,
        max_queue=args.max_queue,
        max_body=int(args.max_body * 2**20),
        timeout=args.timeout,
        token=token,
        hosts=loopback_names(args.host) if local else None,
        verbose=args.verbose,
    )
    bound = server.open_socket(args.host, args.port)
    with bound:
        model = Servable(engines.open_model(user_path(args.model), None), args.max_batch)
        return server.serve(model, settings, bound, args.host, server.flush_line)
