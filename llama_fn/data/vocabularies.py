"""Tokenizers of other families behind sentencepiece's names: Hugging Face's tokenizer.json, Llama 3's tiktoken file.

Text that spells a special token ("<|end_of_text|>") is text, and becomes no special token: a corpus must not be able to
end documents.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from llama_fn.errors import UserError

_ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")
_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>")
# Meta's tokenizer of Llama 3: how text is cut before bytes are merged, and how many special tokens follow the ranks.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = 256


class Tokenizer(Protocol):
    """What is asked of a tokenizer; sentencepiece's SentencePieceProcessor is one."""

    def encode(self, input: Any) -> Any:
        """Ids of a text, or of each text of a list."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def vocab_size(self) -> int:
        """How many ids there are."""

    def bos_id(self) -> int:
        """The token before a text, -1 for none."""

    def eos_id(self) -> int:
        """The token behind a document, -1 for none."""


class HuggingFaceTokenizer:
    """A tokenizer.json. Its first and last tokens are those of tokenizer_config.json beside it, or of usual names."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path} needs the package tokenizers: pip install 'llama_fn[data]'") from None
        try:
            self.held = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"--data.tokenizer={path} is no tokenizer.json: {str(error)[:120]}") from None
        self.held.encode_special_tokens = True
        self.held.no_truncation()
        self.held.no_padding()
        config = _beside(path)
        self.begin = self._id("bos_token", config, _BEGINS)
        self.end = self._id("eos_token", config, _ENDS)

    def _id(self, name: str, config: dict[str, Any], usual: Sequence[str]) -> int:
        given = config.get(name)
        given = given.get("content") if isinstance(given, dict) else given
        found = (self.held.token_to_id(word) for word in ([given] if given else usual))
        return next((number for number in found if number is not None), -1)

    def encode(self, input: Any) -> Any:
        """Without special tokens."""
        if isinstance(input, str):
            return self.held.encode(input, add_special_tokens=False).ids
        return [each.ids for each in self.held.encode_batch_fast(list(input), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none."""
        return str(self.held.decode(list(ids), skip_special_tokens=True))

    def vocab_size(self) -> int:
        """Added tokens included."""
        return int(self.held.get_vocab_size(with_added_tokens=True))

    def bos_id(self) -> int:
        """As tokenizer_config.json says."""
        return self.begin

    def eos_id(self) -> int:
        """As tokenizer_config.json says."""
        return self.end


class TiktokenTokenizer:
    """Meta's tokenizer.model of Llama 3: a line for each token, its bytes in base 64 and its rank. The special tokens
    follow: the first begins a text, the second ends one."""

    def __init__(self, path: Path, ranks: dict[bytes, int]) -> None:
        try:
            import tiktoken
        except ImportError:
            raise UserError(f"{path} needs the package tiktoken: pip install 'llama_fn[data]'") from None
        self.ranks = len(ranks)
        special = {f"<|special_{i}|>": self.ranks + i for i in range(LLAMA3_SPECIAL)}
        self.held = tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, input: Any) -> Any:
        """Without special tokens."""
        one = isinstance(input, str)
        return self.held.encode_ordinary(input) if one else self.held.encode_ordinary_batch(list(input))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none."""
        return self.held.decode([number for number in ids if number < self.ranks])

    def vocab_size(self) -> int:
        """Special tokens included: 128,256 of Llama 3."""
        return self.ranks + LLAMA3_SPECIAL

    def bos_id(self) -> int:
        """<|begin_of_text|>"""
        return self.ranks

    def eos_id(self) -> int:
        """<|end_of_text|>"""
        return self.ranks + 1


def tiktoken_ranks(data: bytes) -> dict[bytes, int] | None:
    """Those of a tiktoken file; None for another file."""
    ranks: dict[bytes, int] = {}
    lines = data.splitlines()
    for number, line in enumerate(lines):
        parts = line.split()
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (IndexError, ValueError, binascii.Error):
            return None
        if len(parts) != 2 or rank != number or token in ranks:
            return None
        ranks[token] = rank
    return ranks if len(ranks) >= 256 else None


def _beside(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.with_name("tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
