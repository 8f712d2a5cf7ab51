"""Templates of the questions asked of a model, and the escaping of corpus text in them.

Corpus text is hostile: it may hold our own marks, tags that close a fence, a chat template's control tokens, Jinja
syntax, terminal escapes, or orders to the reader. Each quoted text is one line, its marks and tags are replaced, and a
template is rendered once: what a variable holds is never a template.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

import autointerp
from autointerp.errors import InputError

OPEN, CLOSE = "«", "»"
"""Around the tokens on which a latent fires. Corpus text never holds them."""
MAX_TEXT = 2000
"""Longest quoted text in characters; a window of 32 tokens is some 150."""

_RUN, _END = (
    "\ue000",
    "\ue001",
)  # stand for our marks until all else is escaped; `quote` shows those of the corpus as \\ue000
_TAG = re.compile(r"<([^\s<>][^<>]{0,60}?)>")
_CONTROL_TAG = re.compile(r"\[([\ue000\ue001/]*[A-Z][A-Z_\ue000\ue001]{2,})\]")
_VISIBLE = {"\n": "⏎", "\r": "␍", "\t": "⇥", OPEN: "‹", CLOSE: "›", "\u200b": ""}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@dataclass(frozen=True)
class Prompt:
    """A rendered question: `system` never changes from latent to latent, `user` holds the evidence."""

    system: str
    user: str
    template_sha256: str


class Prompts:
    """The templates of the package, replaced file by file by those in `directory`.

    Raises InputError when the directory is not one, or a template in it cannot be read or rendered.
    """

    def __init__(self, directory: Path | None = None):
        if directory is not None and not Path(directory).is_dir():
            raise InputError(f"--prompts {directory} is no directory: give one that holds templates such as explain.j2")
        self._directories = [*([Path(directory)] if directory else []), *_shipped()]
        self._environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
        )
        self._templates: dict[str, tuple[Template, str, Path]] = {}

    def render(self, name: str, **variables: Any) -> Prompt:
        """The question `name`: the blocks `system` and `user` of NAME.j2. `system` sees no variables."""
        template, sha256, path = self._load(name)
        try:
            system = "".join(template.blocks["system"](template.new_context()))
            user = "".join(template.blocks["user"](template.new_context(variables)))
        except KeyError as error:
            raise InputError(f"template {path} has no block {error}: it needs `system` and `user`") from None
        except TemplateError as error:
            raise InputError(f"template {path} cannot be rendered: {error}") from None
        return Prompt(system.strip(), user.strip(), sha256)

    def _load(self, name: str) -> tuple[Template, str, Path]:
        if name not in self._templates:
            path = next((p for d in self._directories if (p := d / f"{name}.j2").is_file()), None)
            if path is None:
                raise InputError(f"there is no template {name}.j2 in {', '.join(map(str, self._directories))}")
            try:
                source = path.read_bytes()
                template = self._environment.from_string(source.decode("utf-8"))
            except (OSError, UnicodeDecodeError, TemplateError) as error:
                raise InputError(f"template {path} cannot be read: {error}") from None
            self._templates[name] = template, hashlib.sha256(source).hexdigest(), path
        return self._templates[name]


def quote(text: str) -> str:
    """`text` on one line, with nothing in it that could be taken for ours: line ends, marks, tags, control characters.

    It stays readable (`<div>` becomes `‹div›`), and is valid UTF-8; quoting it again changes nothing.
    """
    return _break_tags("".join(map(_visible, text[:MAX_TEXT])))


def mark(tokens: Sequence[str], fires: Sequence[bool]) -> str:
    """The window as one quoted line, with each run of firing tokens between marks."""
    pieces: list[str] = []
    for firing, run in itertools.groupby(zip(tokens, fires, strict=True), key=lambda pair: pair[1]):
        text = "".join(map(_visible, "".join(token for token, _ in run)[:MAX_TEXT]))
        pieces.append(f"{_RUN}{text}{_END}" if firing else text)
    # As a whole: the parts of a tag may lie in different runs.
    return _break_tags("".join(pieces)).replace(_RUN, OPEN).replace(_END, CLOSE)


def _break_tags(line: str) -> str:
    while (broken := _CONTROL_TAG.sub(r"⟦\1⟧", _TAG.sub(r"‹\1›", line))) != line:
        line = broken  # one tag may hold another
    return line


def _visible(char: str) -> str:
    if char in _VISIBLE:
        return _VISIBLE[char]
    return f"\\u{ord(char):04x}" if unicodedata.category(char) in _HIDDEN else char


def _shipped() -> list[Path]:
    """Where our templates lie: in the package when installed, beside it in a checkout."""
    package = Path(autointerp.__file__).parent
    return [path for path in (package / "_prompts", package.parent / "prompts") if path.is_dir()]
