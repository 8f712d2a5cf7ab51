"""Text of the demo: three domains cut from the running Python's own standard library, split by file.

`code`   library modules with their docstrings taken out;
`docs`   those docstrings, and the language reference that `help()` prints (`pydoc_data.topics`);
`tests`  modules that define `unittest.TestCase` subclasses.

A file is wholly training text or wholly held out: `split_of(source)` decides from a hash of its path, so anyone can
check where a document of the shipped corpus belongs without the training text at hand.
"""

import ast
import hashlib
import importlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOMAINS = ("code", "docs", "tests")
HELD_OUT_PERCENT = 15
DOCUMENT_CHARS = 3000
MIN_CHARS = 600

# Not prose and not code that anyone writes: generated tables, this machine's build settings, wheels, sample data.
SKIPPED_DIRS = {
    "site-packages", "lib-dynload", "__pycache__", "idlelib", "turtledemo", "encodings", "ensurepip", "pydoc_data",
    "encoded_modules", "data", "cjkencodings", "decimaltestdata", "crashers",
}  # fmt: skip
SKIPPED_STEMS = {
    "entities",
    "stringprep",
    "this",
    "antigravity",
    "keysyms",
    "pygram",
    "_pydecimal",
    "test_unicode_identifiers",
}
TEST_DIRS = {"test", "tests", "idle_test"}


class Document(NamedTuple):
    """One piece of text: its domain, the file it comes from (path in the library, `#topic` for a help topic)."""

    domain: str
    source: str
    text: str


def split_of(source: str) -> str:
    """`train` or `held-out`, by a hash of `source`; the same on every machine and in every Python version."""
    bucket = int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") % 100
    return "held-out" if bucket < HELD_OUT_PERCENT else "train"


def cut_at_lines(text: str, size: int = DOCUMENT_CHARS) -> list[str]:
    """Pieces of about `size` characters that end at line boundaries; a remainder under `MIN_CHARS` is dropped."""
    pieces, lines, length = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            pieces.append("".join(lines))
            lines, length = [], 0
    if length >= MIN_CHARS:
        pieces.append("".join(lines))
    return pieces


def is_table(text: str) -> bool:
    """Whether a piece is numbers, escapes or very long lines rather than something to read."""
    letters = sum(c.isalpha() and c.isascii() for c in text)
    digits = sum(c.isdigit() for c in text)
    visible = sum(not c.isspace() for c in text) or 1
    return letters < 0.55 * visible or digits > 0.12 * visible or max(map(len, text.splitlines())) > 300


def split_docstrings(source_code: str, tree: ast.Module) -> tuple[str, str]:
    """The module without its docstrings, and the docstrings, each under the name it documents.

    Apart, so that `code` and `docs` share no text and a latent's contexts belong to one of them.
    """
    lines = source_code.splitlines(keepends=True)
    docstrings = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        place = node.body[0]
        docstrings.append((place.lineno, docstring))
        for i in range(place.lineno - 1, place.end_lineno or place.lineno):
            lines[i] = ""
    long_ones = [text for _, text in sorted(docstrings) if len(text) >= 60]
    return "".join(lines), "\n\n".join(long_ones) + "\n"


def defines_tests(tree: ast.Module) -> bool:
    """Whether a module defines a subclass of `TestCase` (any base whose name ends so)."""
    bases = [base for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
    return any(ast.unparse(base).endswith("TestCase") for base in bases)


def texts_of(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    """(domain, whole text) of one module; nothing for files that are not UTF-8 or do not parse."""
    try:
        source_code = path.read_text(encoding="utf-8")
        tree = ast.parse(source_code)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return  # test fixtures that are broken on purpose
    if TEST_DIRS & set(path.relative_to(root).parts[:-1]):
        if defines_tests(tree):
            yield "tests", source_code
        return
    code, docs = split_docstrings(source_code, tree)
    yield "code", code
    yield "docs", docs


def library_documents(root: Path | None = None) -> list[Document]:
    """All documents of the standard library, by domain then source; `root` defaults to the running Python's library.

    Raises RuntimeError where the library has no test suite (some distributions ship it as a package of its own).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_DIRS & set(relative.parts) or path.stem in SKIPPED_STEMS or path.stem.startswith("_sysconfigdata"):
            continue
        for domain, text in texts_of(path, root):
            documents += [Document(domain, relative.as_posix(), piece) for piece in cut_at_lines(text)]
    for name, text in importlib.import_module("pydoc_data.topics").topics.items():
        documents += [Document("docs", f"pydoc_data/topics.py#{name}", piece) for piece in cut_at_lines(text)]
    documents = [d for d in documents if not is_table(d.text)]
    if missing := set(DOMAINS) - {d.domain for d in documents}:
        raise RuntimeError(
            f"no {'/'.join(sorted(missing))} text under {root}: use a Python that comes with its test suite"
        )
    return sorted(documents, key=lambda d: (d.domain, d.source))


def corpus_documents(documents: list[Document], chars_per_domain: int, seed: int = 0) -> list[Document]:
    """A held-out corpus: about `chars_per_domain` of each domain, one per source in turn, so no file dominates."""
    order = random.Random(seed)
    corpus: list[Document] = []
    for domain in DOMAINS:
        sources: dict[str, list[Document]] = {}
        for document in documents:
            if document.domain == domain and split_of(document.source) == "held-out":
                sources.setdefault(document.source, []).append(document)
        for pieces in sources.values():
            order.shuffle(pieces)
        length = 0
        while length < chars_per_domain and any(sources.values()):
            for pieces in sources.values():
                if pieces and length < chars_per_domain:
                    corpus.append(pieces.pop())
                    length += len(corpus[-1].text)
    return sorted(corpus, key=lambda d: (d.domain, d.source))
