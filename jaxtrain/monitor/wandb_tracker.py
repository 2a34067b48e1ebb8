"""Send a run's records to Weights & Biases."""

from __future__ import annotations

import netrc
import os
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.monitor.trackers import FINISH, Record, RunInfo

MODES = ("online", "offline")
HOST = "https://api.wandb.ai"
INIT_TIMEOUT = 20.0  # seconds; W&B holds the process for so long when its server does not answer


class WandbTracker:
    """One W&B run for each run, whose id is that of ``config.json``, continued after a resume.

    Only the redacted settings and the records are sent: no code, no git state, no console output, no command
    line, no host name. The project is ``WANDB_PROJECT``, or the experiment's name.

    Offline each start writes a folder ``RUN/wandb/offline-run-...`` with all records from the first, so that
    ``wandb sync RUN/wandb/latest-run`` sends the complete run. Online the server says which steps it has, and
    the others are sent.

    Args:
      mode: ``"online"`` or ``"offline"``; None is ``WANDB_MODE``, or online.

    Raises:
      InputError: another mode, or online without an API key.
    """

    def __init__(self, mode: str | None = None) -> None:
        self.spec = f"wandb:{mode}" if mode else "wandb"
        self._mode: Any = mode or os.environ.get("WANDB_MODE") or "online"
        if self._mode not in MODES:
            raise InputError(
                f"--track wandb:{self._mode}: give {' or '.join(MODES)} (WANDB_MODE is read too)"
            )
        if self._mode == "online" and not _has_key():
            raise InputError(
                "--track wandb: there is no API key: set WANDB_API_KEY, run wandb login, or write files to "
                "send later with --track wandb:offline"
            )
        self._run: Any = None
        self._next = 0

    def start(self, run: RunInfo) -> None:
        """Start the W&B run, or resume it."""
        import wandb

        self.close()
        project = os.environ.get("WANDB_PROJECT") or re.sub(r"[/\\#?%:]", "-", run.name)
        self._run = wandb.init(
            project=project,
            id=run.id,
            name=run.folder.resolve().name,
            dir=str(run.folder),
            mode=self._mode,
            resume="allow" if self._mode == "online" else None,
            reinit="create_new",  # a run that the caller has open stays theirs
            config={**run.config, "jaxtrain_run": run.id},
            allow_val_change=True,  # a longer run has other epochs
            settings=private_settings(),
        )
        self._next = self._run.starting_step if self._mode == "online" else 0

    def write(self, records: Sequence[Record]) -> None:
        """Log the records of steps that the server has not got; W&B joins those of one step."""
        for step, values in records:
            if step >= self._next:
                self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        """Upload what is left."""
        run, self._run = self._run, None
        run.finish(exit_code=0 if status == "finished" else 1)

    def close(self) -> None:
        """Leave a run whose ``write`` failed."""
        if self._run is not None:
            self.finish("failed")


def private_settings() -> Any:
    """Return W&B settings that send nothing but what is logged, print nothing, and wait a limited time."""
    import wandb

    return wandb.Settings(
        console="off",
        disable_code=True,
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,  # the command line, the host, the user
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        host="",
        silent=True,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH,
    )


def _has_key() -> bool:
    """Return whether W&B finds an API key without asking for one on the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or HOST).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
