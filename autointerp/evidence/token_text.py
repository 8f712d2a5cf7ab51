"""The text of a single token, as it stands in a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """A function from token id to text, its leading space kept.

    Decoding one token drops the leading space of SentencePiece tokenizers (`▁the`), so those are read from the
    vocabulary.
    """

    def text(token: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return f"[{token}]"  # embedding rows beyond the vocabulary
        if byte := _BYTE.match(piece):
            return bytes([int(byte[1], 16)]).decode("utf-8", "replace")
        return piece.replace("▁", " ") if "▁" in piece else str(tokenizer.decode([token]))

    return text
