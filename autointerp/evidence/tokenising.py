"""Documents to token ids: chat templates, batches of documents, and documents too long to encode in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from autointerp.errors import InputError
from autointerp.evidence.documents import Document, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = 1 << 18
"""Characters from which a document is encoded window by window, so that memory does not grow with it."""
OVERLAP = 1 << 12
"""Characters that two windows share; their tokens must agree somewhere in it."""
AGREE = 8
"""Equal tokens wanted on both sides of a seam."""
CHUNK_DOCUMENTS = 64
CHUNK_CHARACTERS = 1 << 19

_Seam = tuple[int, int]


class Encoder:
    """Encodes documents one by one, without special tokens, as `tokenizer(text, add_special_tokens=False)` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, corpus_name: str):
        self.tokenizer = tokenizer
        self.corpus_name = corpus_name
        # The first call may reset the truncation and padding that a fast tokenizer was saved with: here, where it
        # meets no thread that decodes with it.
        self._tokenise(["a"])

    def encode(self, documents: Iterable[tuple[int, Document]]) -> Iterator[tuple[int, Iterable[np.ndarray]]]:
        """(index, parts) of each document in order; the parts [n] int64, concatenated, are its token ids.

        Documents go to the tokenizer in chunks, which fast tokenizers encode in parallel. The parts of a long document
        are encoded as they are asked for.
        """
        chunk: list[tuple[int, str]] = []
        for index, document in documents:
            text = _encodable(document if isinstance(document, str) else self.render(index, document))
            if len(text) > LONG:
                yield from self._encode_chunk(chunk)
                chunk = []
                yield index, self.encode_long(text)
                continue
            chunk.append((index, text))
            if len(chunk) == CHUNK_DOCUMENTS or sum(len(text) for _, text in chunk) > CHUNK_CHARACTERS:
                yield from self._encode_chunk(chunk)
                chunk = []
        yield from self._encode_chunk(chunk)

    def render(self, index: int, messages: Messages) -> str:
        """`messages` through the tokenizer's chat template; InputError when it has none or refuses them."""
        from jinja2 import TemplateError

        if not messages:
            return ""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"corpus {self.corpus_name}: the text column holds chat messages and the tokenizer has no chat"
                " template; give a text column, or a tokenizer that has one"
            )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            where = f"corpus {self.corpus_name}: document {index}"
            raise InputError(f"{where}: the chat template refuses it ({error}); mend or remove it") from error

    def encode_long(self, text: str) -> Iterator[np.ndarray]:
        """Token ids of `text` in parts: windows joined where the tokens of both agree, ids and places alike."""
        if not self.tokenizer.is_fast:  # no places in the text to join at
            yield np.asarray(self._tokenise([text])["input_ids"][0], np.int64)
            return
        begin, skip = 0, 0
        ids, places = self._window(text, begin, LONG)
        while begin + LONG < len(text):
            following = begin + LONG - OVERLAP
            next_ids, next_places = self._window(text, following, LONG)
            seam = _seam(ids, places, next_ids, next_places, following)
            if seam is None:  # nothing to join at (one unbroken run of characters): encode the rest as one
                next_ids, next_places = self._window(text, begin, len(text) - begin)
                yield next_ids[skip:]
                return
            yield ids[skip : seam[0]]
            begin, skip, ids, places = following, seam[1], next_ids, next_places
        yield ids[skip:]

    def _window(self, text: str, begin: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [n] of text[begin : begin + length], and the character of `text` at which each token starts [n]."""
        encoded = self._tokenise([text[begin : begin + length]], return_offsets_mapping=True)
        places = np.asarray(encoded["offset_mapping"][0], np.int64).reshape(-1, 2)[:, 0] + begin
        return np.asarray(encoded["input_ids"][0], np.int64), places

    def _encode_chunk(self, chunk: list[tuple[int, str]]) -> Iterator[tuple[int, Iterable[np.ndarray]]]:
        if chunk:
            encoded = self._tokenise([text for _, text in chunk])["input_ids"]
            for (index, _), ids in zip(chunk, encoded, strict=True):
                yield index, (np.asarray(ids, np.int64),)

    def _tokenise(self, texts: list[str], **options: Any) -> Any:
        # verbose=False: a document longer than the model's context is no mistake here, it is cut into sequences.
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,
            **options,
        )


def _encodable(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs, which JSON may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _seam(
    ids: np.ndarray, places: np.ndarray, next_ids: np.ndarray, next_places: np.ndarray, shared: int
) -> _Seam | None:
    """Where two windows join: token i of the first and j of the second start at one character, and AGREE tokens on both
    sides are the same. Searched from the middle of the shared text, where neither edge is near. None: nowhere."""
    for i in range(int(np.searchsorted(places, shared + OVERLAP // 2)), len(ids) - AGREE):
        j = int(np.searchsorted(next_places, places[i]))
        if j < AGREE or j + AGREE > len(next_ids) or i < AGREE or places[i - 1] == places[i]:
            continue
        here, there = slice(i - AGREE, i + AGREE), slice(j - AGREE, j + AGREE)
        if np.array_equal(ids[here], next_ids[there]) and np.array_equal(places[here], next_places[there]):
            return i, j
    return None
