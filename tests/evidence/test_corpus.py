"""Corpus: every kind of file, the rules of "Sequences", batches without loss, and bad corpora in one line."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from autointerp.errors import InputError
from autointerp.evidence import parquet, tokenising
from autointerp.evidence.corpus import Corpus, check_context_length, context_split, fit_rows, open_corpus, split_of
from autointerp.evidence.corpus import prefetch as prefetched
from autointerp.evidence.documents import Document, Documents
from autointerp.evidence.hf_datasets import Stream

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "dog",
    "run —",
    "naïve",
    "Straße",
    "東京",
    "42 miles",
    "(unless",
    "it rains);",
]
CHAT = [{"role": "user", "content": "where is the cat"}, {"role": "assistant", "content": "on the mat"}]


def text_of(n_words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n_words))


TEXTS = [text_of(n, n) for n in (300, 40, 3, 120, 0, 75, 9, 500, 64, 31, 8, 150)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with one special token, <|end|>, which is BOS, EOS and padding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text_of(400, seed) for seed in range(20)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>", model_max_length=64
    )


def write_jsonl(path: Path, texts: list[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "n": 1}) + "\n" for text in texts))
    return path


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def expected(tokenizer: PreTrainedTokenizerFast, texts: list[str], piece: int) -> dict[tuple[int, int], list[int]]:
    """(document, start) → ids, by the rules of the contract, the slow way."""
    cut: dict[tuple[int, int], list[int]] = {}
    for doc, text in enumerate(texts):
        ids = ids_of(tokenizer, text)
        cut |= {(doc, s): ids[s : s + piece] for s in range(0, len(ids), piece) if len(ids[s : s + piece]) >= 8}
    return cut


@pytest.mark.parametrize(("bos", "context"), [(False, 32), (True, 32), (True, 9)])
def test_sequences_follow_the_contract(tokenizer: Any, tmp_path: Path, bos: bool, context: int) -> None:
    documents = open_corpus(write_jsonl(tmp_path / "c.jsonl", TEXTS))
    corpus = Corpus(documents, tokenizer, context_length=context, prepend_bos=bos, seed=3)
    found = list(corpus.sequences())
    n_bos = int(bos)
    assert {(s.doc, s.start): s.ids[n_bos:].tolist() for s in found} == expected(tokenizer, TEXTS, context - n_bos)
    assert all(len(s.ids) <= context and s.n_bos == n_bos for s in found)
    assert all(s.ids[0] == tokenizer.bos_token_id for s in found if bos)
    # One order for each document, in the shuffled order, pieces in place.
    assert [(s.order, s.start) for s in found] == sorted((s.order, s.start) for s in found)
    assert len({(s.doc, s.order) for s in found}) == len({s.doc for s in found})
    again = [(s.doc, s.start) for s in corpus.sequences()]
    assert again == [(s.doc, s.start) for s in found]
    other = [(s.doc, s.start) for s in Corpus(documents, tokenizer, context, bos, seed=4).sequences()]
    assert again != other
    assert sorted(again) == sorted(other)


@pytest.mark.parametrize("limit", [8, 100, 137, 250, 10_000])
def test_max_tokens_counts_document_tokens(tokenizer: Any, tmp_path: Path, limit: int) -> None:
    documents = open_corpus(write_jsonl(tmp_path / "c.jsonl", TEXTS))
    whole = [len(s.ids) - 1 for s in Corpus(documents, tokenizer, 32, True).sequences()]
    taken = [len(s.ids) - 1 for s in Corpus(documents, tokenizer, 32, True, max_tokens=limit).sequences()]
    assert taken[:-1] == whole[: len(taken) - 1]
    assert min(taken) >= 8
    assert min(limit, sum(whole)) - 8 < sum(taken) <= limit


def test_the_total_is_expected_from_what_was_read(tokenizer: Any, tmp_path: Path) -> None:
    documents = open_corpus(write_jsonl(tmp_path / "c.jsonl", TEXTS * 4))
    corpus = Corpus(documents, tokenizer, 32, True)
    assert corpus.expected_tokens() is None
    lengths, guesses = [], []
    for sequence in corpus.sequences():
        lengths.append(len(sequence.ids) - 1)
        guesses.append(corpus.expected_tokens())
    assert guesses[-1] == sum(lengths)
    assert guesses[len(guesses) // 2] == pytest.approx(sum(lengths), rel=0.5)
    limited = Corpus(documents, tokenizer, 32, True, max_tokens=50)
    list(limited.sequences())
    assert limited.expected_tokens() == 50


def test_special_tokens_alone_are_no_corpus(tokenizer: Any, tmp_path: Path) -> None:
    documents = open_corpus(write_jsonl(tmp_path / "c.jsonl", ["<|end|>" * 100] * 3))
    with pytest.raises(InputError, match="holds 0 tokens, fewer than one context"):
        Corpus(documents, tokenizer, 32, True).check()


def test_a_document_longer_than_max_tokens_is_not_read_to_its_end(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(text_of(3000, 1))
    found = list(Corpus(open_corpus(tmp_path / "c.txt"), tokenizer, 32, max_tokens=500).sequences())
    assert sum(len(s.ids) for s in found) in range(493, 501)
    assert {(s.doc, s.order) for s in found} == {(0, 0)}


def test_batches_hold_every_sequence_once(tokenizer: Any, tmp_path: Path) -> None:
    texts = [*TEXTS, "cat <|end|> dog " * 10]
    corpus = Corpus(open_corpus(write_jsonl(tmp_path / "c.jsonl", texts)), tokenizer, 32, True)
    special = tokenizer.bos_token_id
    seen, padding, positions = {}, 0, 0
    for batch in corpus.batches(tokens_per_batch=100):
        b, t = batch.ids.shape
        assert b * t <= 100
        assert batch.counted.shape == (b, t)
        for row in range(b):
            n = int(batch.lengths[row])
            ids = batch.ids[row, :n].tolist()
            seen[int(batch.docs[row]), int(batch.starts[row])] = (ids, int(batch.orders[row]))
            assert batch.counted[row].tolist() == [0 < i < n and batch.ids[row, i] != special for i in range(t)]
            assert batch.positions[row, 1:n].tolist() == list(range(batch.starts[row], batch.starts[row] + n - 1))
        padding, positions = padding + b * t - int(batch.lengths.sum()), positions + b * t
    assert seen == {(s.doc, s.start): (s.ids.tolist(), s.order) for s in corpus.sequences()}
    assert padding < 0.2 * positions
    assert any(special in ids[1:] for ids, _ in seen.values())  # the literal <|end|> in the text: kept, not counted


def test_windows_carry_the_partial_batch_over(tokenizer: Any, tmp_path: Path) -> None:
    texts = [text_of(40, seed) for seed in range(300)]
    corpus = Corpus(open_corpus(write_jsonl(tmp_path / "c.jsonl", texts)), tokenizer, 32)
    batches = list(corpus.batches(tokens_per_batch=256))
    assert sum(len(batch.docs) for batch in batches) == len(list(corpus.sequences()))
    full = [batch for batch in batches if batch.ids.shape[1] == 32]
    assert sum(len(batch.docs) < 8 for batch in full) <= 1


def test_long_documents_are_encoded_in_windows_to_the_same_tokens(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "LONG", 2000)
    monkeypatch.setattr(tokenising, "OVERLAP", 400)
    encoder = tokenising.Encoder(tokenizer, "c")
    for text in (text_of(4000, 5), "東京" * 3000, "x" * 9000, text_of(900, 6) + "y" * 5000 + text_of(900, 7)):
        ((index, parts),) = encoder.encode([(7, text)])
        parts = list(parts)
        assert index == 7
        assert np.concatenate(parts).tolist() == ids_of(tokenizer, text)
    assert len(list(encoder.encode_long(text_of(4000, 5)))) > 5


def read_all(documents: Any) -> dict[int, Document]:
    return dict(documents.shuffled(0))


def as_parquet(path: Path, texts: list[Any]) -> Path:
    pq.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path, row_group_size=5)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "splits", "stream", "folder"])
def test_every_kind_of_corpus_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    rows = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    target = tmp_path / f"c.{kind}"
    if kind == "jsonl":
        write_jsonl(target, TEXTS)
    elif kind == "parquet":
        as_parquet(target, TEXTS)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(target)
    elif kind == "splits":
        splits = datasets.DatasetDict()
        splits["train"], splits["test"] = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:2])
        splits.save_to_disk(target)
    elif kind == "folder":
        (target / "b").mkdir(parents=True)
        write_jsonl(target / "a.jsonl", TEXTS[:5])
        as_parquet(target / "b/part.parquet", TEXTS[5:11])
        (target / "z.txt").write_text(TEXTS[11])
        (target / "README.md").write_text("not a document")
    if kind == "stream":
        found: Any = Stream("hub/name", datasets.Dataset.from_list(rows).to_iterable_dataset(), "text", buffer=4)
    else:
        found = open_corpus(target)
        assert isinstance(found, Documents)
        assert [found.read(i) for i in range(len(found))] == TEXTS
        assert found.read_many([7, 0, 3]) == [TEXTS[7], TEXTS[0], TEXTS[3]]
    assert read_all(found) == dict(enumerate(TEXTS))
    first, second = ([doc for doc, _ in found.shuffled(seed)] for seed in (0, 1))
    assert first != second
    assert first != sorted(first)
    assert [doc for doc, _ in found.shuffled(0)] == first


def test_large_row_groups_are_mapped_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_parquet(tmp_path / "c.parquet", TEXTS)
    largest = max(parquet.Parquet(path, "text")._bytes)
    for held in (1, largest):  # every group too large to hold; room for some
        monkeypatch.setattr(parquet, "HELD_BYTES", held)
        documents = parquet.Parquet(path, "text")
        assert read_all(documents) == dict(enumerate(TEXTS))
        assert bool(documents._spilled) == (held == 1)
        kept = [column.nbytes for column in documents._held.values()]
        assert len(kept) <= 1 or sum(kept) <= held


def test_jsonl_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autointerp.evidence.documents.SCAN_BYTES", 16)
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n\r\n\n{"text": null}\n   \n{"text": "\xc3\xa9 two"}')
    documents: Any = open_corpus(path)
    assert [documents.read(i) for i in range(len(documents))] == ["one", "", "", "é two"]


def test_chat_goes_through_the_template(tokenizer: Any, tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "where is the cat"}, {"from": "gpt", "value": "on the mat"}]
    path = write_jsonl(tmp_path / "c.jsonl", [CHAT * 3, shared * 3], "messages")
    with pytest.raises(InputError, match=r"chat messages and the tokenizer has no chat template"):
        list(Corpus(open_corpus(path, "messages"), tokenizer).sequences())
    template = "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|end|>")
    chatty.chat_template = template
    text = "<|end|>user: where is the cat\n<|end|>assistant: on the mat\n" * 3
    pq.write_table(pa.table({"messages": [CHAT * 3]}), tmp_path / "c.parquet")
    for source in (path, tmp_path / "c.parquet"):
        for sequence in Corpus(open_corpus(source, "messages"), chatty).sequences():
            assert sequence.ids.tolist() == ids_of(chatty, text)
    chatty.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(InputError, match=r"document \d: the chat template refuses it \(no system turn\)"):
        list(Corpus(open_corpus(path, "messages"), chatty).sequences())


def bad_parquet(folder: Path) -> Path:
    (folder / "c.parquet").write_bytes(b"PAR1 this is not it PAR1")
    return folder / "c.parquet"


def parquet_of_numbers(folder: Path) -> Path:
    pq.write_table(pa.table({"text": [1, 2]}), folder / "n.parquet")
    return folder / "n.parquet"


def a_file(name: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "none.jsonl", r"none.jsonl: no such file.*--corpus"),
        (lambda folder: folder, r"is empty: the folder holds no .*\.jsonl"),
        (a_file("c.csv", "text\nhello"), r"c.csv: cannot read .csv; give one of .jsonl, .parquet, .txt"),
        (a_file("c.jsonl", ""), r"c.jsonl is empty: it holds no document"),
        (a_file("c.jsonl", '{"text": ""}\n{"text": null}\n'), r"c.jsonl is empty: no document holds any text"),
        (a_file("c.txt", ""), r"c.txt is empty"),
        (a_file("c.txt", "the cat"), r"c.txt is shorter than a context"),
        (
            a_file("c.jsonl", '{"body": "x", "id": 1}\n'),
            r"c.jsonl:1: no column 'text'; give --text-column one of body, id",
        ),
        (a_file("c.jsonl", '{"text": 3}\n'), r"c.jsonl:1: column 'text' is of type int"),
        (
            a_file("c.jsonl", '{"text": [{"who": 1}]}\n'),
            r"c.jsonl:1: a message of 'text' has who, want role and content",
        ),
        (a_file("c.jsonl", '{"text": "a b"}\n\n{"text": \n'), r"c.jsonl:3: not a line of JSON .*mend or remove"),
        (a_file("c.jsonl", '["text"]\n'), r"c.jsonl:1: a list, want an object"),
        (bad_parquet, r"c.parquet: not a readable parquet file"),
        (parquet_of_numbers, r"n.parquet: column 'text' is of type int64"),
    ],
)
def test_bad_corpora_are_one_line(tokenizer: Any, tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        for _ in Corpus(open_corpus(make(tmp_path)), tokenizer).batches():
            pass
    assert "\n" not in str(caught.value)


def test_hub_corpus_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"corpus nobody/nothing: no such path here, and the hub does not give it"):
        open_corpus("nobody/nothing")


def test_check_wants_one_context(tokenizer: Any, tmp_path: Path) -> None:
    path = a_file("c.txt", text_of(20, 1))(tmp_path)
    Corpus(open_corpus(path), tokenizer, context_length=16).check()
    with pytest.raises(InputError, match=r"holds \d+ tokens, fewer than one context of 128"):
        Corpus(open_corpus(path), tokenizer, context_length=128).check()
    Corpus(open_corpus(path), tokenizer, context_length=128, max_tokens=10).check()


def test_bos_and_context_length_are_checked(tokenizer: Any, tmp_path: Path) -> None:
    documents = open_corpus(a_file("c.txt", text_of(20, 1))(tmp_path))
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match=r"wants a BOS token"):
        Corpus(documents, plain, prepend_bos=True)
    with pytest.raises(InputError, match=r"--context-length 9 or more"):
        Corpus(documents, tokenizer, context_length=8, prepend_bos=True)
    assert Corpus(documents, plain).pad_id == 0
    check_context_length(128, 128)
    check_context_length(128, None)
    with pytest.raises(InputError, match=r"the model has 64 positions; give --context-length 64 or less"):
        check_context_length(128, 64)


def test_the_two_splits_are_balanced_and_independent() -> None:
    orders = np.arange(400)
    fit = np.array([split_of(int(order)) == "fit" for order in orders])
    explain = np.array([context_split(int(order)) == "explain" for order in orders])
    assert np.array_equal(fit, fit_rows(orders))
    assert (fit & explain).sum() == (fit & ~explain).sum() == (~fit & explain).sum() == 100


def test_prefetch_ends_its_thread_and_hands_errors_on() -> None:
    made: list[int] = []

    def numbers(fail_at: int) -> Iterator[int]:
        for number in range(10_000):
            if number == fail_at:
                raise InputError("bad line")
            made.append(number)
            yield number

    before = threading.active_count()
    ahead = prefetched(numbers(-1), 3)
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(made) <= 2 + 3 + 2  # handed over, waiting, in hand
    with pytest.raises(InputError, match=r"bad line"):
        list(prefetched(numbers(50), 3))
    assert list(prefetched(iter(range(100)), 3)) == list(range(100))
    assert threading.active_count() == before
