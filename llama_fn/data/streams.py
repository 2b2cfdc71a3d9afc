"""Files as streams of bytes, unpacked where their names say that they are packed, and how far they have been read."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_fn.errors import UserError

PACKED = (".gz", ".xz", ".zst")


@dataclass
class Reading:
    """What reading a corpus may do, and what it has met. `key`: of a text in JSON and tables, "a.b" for b within a;
    `errors`: what becomes of bytes that are not UTF-8: an error, U+FFFD, or the document is left out."""

    key: str = "text"
    errors: Literal["error", "replace", "skip"] = "error"
    replaced: int = 0
    skipped: int = 0
    finished_bytes: int = 0
    _raw: Any = field(default=None, repr=False)

    def text(self, raw: bytes) -> str | None:
        """Decoded; None for a document that is left out. UnicodeDecodeError where errors are errors."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            if self.errors == "error":
                raise
            if self.errors == "skip":
                self.skipped += 1
                return None
            self.replaced += 1
            return raw.decode("utf-8", "replace")

    @property
    def bytes(self) -> int:
        """Read so far, of the files as they are on disk."""
        return self.finished_bytes + (self._raw.tell() if self._raw is not None and not self._raw.closed else 0)

    @contextmanager
    def opened(self, file: Path) -> Iterator[Any]:
        """The bytes of a file, unpacked. UserError naming the file where they are not what its name says."""
        with open(file, "rb") as raw:
            self._raw = raw
            try:
                yield _unpacked(file, raw)
            except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
                raise UserError(f"{file} cannot be unpacked: {error}. Copy it again") from None
            finally:
                self.finished_bytes += file.stat().st_size
                self._raw = None


def kind(file: Path) -> str:
    """The suffix of what a file holds: .jsonl of a.jsonl.gz."""
    name = file.with_suffix("") if file.suffix.lower() in PACKED else file
    return name.suffix.lower()


def _unpacked(file: Path, raw: Any) -> Any:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix != ".zst":
        return raw
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file} needs the package zstandard: pip install 'llama_fn[data]'") from None
    return io.BufferedReader(_Zstandard(zstandard, file, raw))


class _Zstandard(io.RawIOBase):
    """Frames one after the other. The library's own reader takes a file that was cut off for one that ends there."""

    def __init__(self, zstandard: Any, file: Path, raw: Any) -> None:
        self.zstandard, self.file, self.raw = zstandard, file, raw
        self.frame: Any = None
        self.packed, self.held = b"", b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some bytes; 0 at the end. UserError for what is damaged, or ends within a frame."""
        while not self.held:
            self.packed = self.packed or self.raw.read(1 << 18)
            if not self.packed:
                if self.frame is not None:
                    raise UserError(f"{self.file} cannot be unpacked: it was cut off. Copy it again")
                return 0
            self.frame = self.frame or self.zstandard.ZstdDecompressor().decompressobj()
            try:
                self.held = self.frame.decompress(self.packed)
            except self.zstandard.ZstdError as error:
                raise UserError(f"{self.file} cannot be unpacked: {error}. Copy it again") from None
            self.packed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        size = min(len(buffer), len(self.held))
        buffer[:size], self.held = self.held[:size], self.held[size:]
        return size
