"""Telling somebody: by mail, by a webhook of a chat, or through a command; and not again for a while."""

from __future__ import annotations

import json
import shlex
import smtplib
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path

from llama_fn.errors import UserError
from llama_fn.files import atomic

TELL_S = 30
# What each chat calls a plain text; Slack's form is what most others take as well.
BODIES: dict[str, Callable[[str], dict[str, object]]] = {
    "slack": lambda text: {"text": text},
    "feishu": lambda text: {"msg_type": "text", "content": {"text": text}},
    "dingtalk": lambda text: {"msgtype": "text", "text": {"content": text}},
}


@dataclass(frozen=True)
class Mail:
    """`server`: HOST or HOST:PORT; without a password, as servers of a cluster's own network are."""

    server: str
    sender: str
    receivers: tuple[str, ...]

    def send(self, subject: str, text: str) -> None:
        """OSError or SMTPException where the server does not take it."""
        message = EmailMessage()
        message["Subject"], message["From"], message["To"] = subject, self.sender, ", ".join(self.receivers)
        message.set_content(text)
        host, _, port = self.server.partition(":")
        with smtplib.SMTP(host, int(port or 25), timeout=TELL_S) as server:
            server.send_message(message)


def post(url: str, shape: str, text: str) -> None:
    """To a webhook; OSError where it does not take it."""
    body = json.dumps(BODIES[shape](text)).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TELL_S):
        pass


def run(command: str, text: str) -> None:
    """A command with the text as its last argument, without a shell; OSError where it fails."""
    try:
        done = subprocess.run([*shlex.split(command), text], capture_output=True, text=True, timeout=TELL_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command} did not end within {TELL_S} s") from None
    if done.returncode:
        raise OSError(f"{command} ended with status {done.returncode}: {done.stderr.strip()[:200]}")


def checked(url: str) -> str:
    """A webhook's address; UserError for what is none. (urllib opens files as well.)"""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--webhook={url} is no http or https address")
    return url


class Quiet:
    """When which status was last told, in a file: the same one is told again after `seconds`, another one at once, and
    a recovery once."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds

    def due(self, status: int) -> bool:
        """Whether to tell now."""
        was, when = self._last()
        return status != was or (bool(status) and time.time() - when >= self.seconds)

    def told(self, status: int) -> None:
        """It was."""
        with atomic(self.path) as file:
            json.dump({"status": status, "time": time.time()}, file)

    def _last(self) -> tuple[int, float]:
        try:
            known = json.loads(self.path.read_bytes())
            return int(known["status"]), float(known["time"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0.0


def tell(tellers: dict[str, Callable[[], None]]) -> list[str]:
    """Call each; returns what went wrong, one sentence each."""
    wrong = []
    for name, call in tellers.items():
        try:
            call()
        except (OSError, smtplib.SMTPException, urllib.error.URLError, ValueError) as error:
            wrong.append(f"{name}: {error}")
    return wrong
