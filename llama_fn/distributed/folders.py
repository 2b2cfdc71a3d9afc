"""Folders of files from one process to another, over gloo: in blocks, so that neither holds a file in memory."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_fn.files import files_below, sync

BLOCK = 16 << 20


class Folders:
    """Messages of their own between the processes of a run, which threads may send beside collectives. All processes
    make one at the same time. RuntimeError of gloo where the other is gone, OSError of a disk."""

    def __init__(self) -> None:
        self.group: Any = dist.new_group(backend="gloo")

    def send(self, folder: Path, to: int) -> None:
        """All files below `folder`."""
        files = files_below(folder)
        self._send_text(json.dumps({name: path.stat().st_size for name, path in files.items()}), to)
        for path in files.values():
            with open(path, "rb") as f:
                while block := f.read(BLOCK):
                    dist.send(torch.frombuffer(bytearray(block), dtype=torch.uint8), to, self.group)

    def receive(self, folder: Path, sender: int) -> None:
        """What `send` sends, flushed to disk; `folder` must not be there. Where the disk does not take it, the rest
        still comes, so that the sender is not left waiting, and the OSError follows."""
        error: OSError | None = None
        for name, size in json.loads(self._receive_text(sender)).items():
            sink = None
            try:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                sink = open(path, "wb")  # noqa: SIM115
            except OSError as wrong:
                error = wrong
            for begin in range(0, size, BLOCK):
                block = torch.empty(min(BLOCK, size - begin), dtype=torch.uint8)
                dist.recv(block, sender, self.group)
                try:
                    if sink is not None and error is None:
                        sink.write(block.numpy().data)
                except OSError as wrong:
                    error = wrong
            if sink is not None:
                error = _flushed(sink) or error
        if error is not None:
            raise error
        sync(folder)

    def exchange(self, sent: Path, to: int, received: Path, sender: int) -> None:
        """Both at once."""
        with ThreadPoolExecutor(1) as thread:
            sending = thread.submit(self.send, sent, to)
            self.receive(received, sender)
            sending.result()

    def _send_text(self, text: str, to: int) -> None:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        dist.send(torch.tensor(len(data)), to, self.group)
        dist.send(data, to, self.group)

    def _receive_text(self, sender: int) -> str:
        size = torch.tensor(0)
        dist.recv(size, sender, self.group)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, sender, self.group)
        return data.numpy().tobytes().decode()


def _flushed(sink: Any) -> OSError | None:
    """Close a file; what the disk says to that."""
    try:
        with sink:
            sink.flush()
            os.fsync(sink.fileno())
    except OSError as error:
        return error
    return None
