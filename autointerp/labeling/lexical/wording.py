"""A rule in words: a label of a few, an explanation of a sentence or two."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from autointerp.labeling.lexical.choice import Found
from autointerp.labeling.lexical.positions import Positions
from autointerp.labeling.lexical.rule import Atom, Clause, Rule
from autointerp.labeling.lexical.tokens import quote, quote_some, visible

LABEL_VALUES = (3, 2)
LABEL_LENGTH = 100
EXPLANATION_VALUES = 8
EXAMPLES = 3
BEFORE, AFTER = 5, 2

_CLASS_NOUNS: dict[str, str] = {
    "newline": "a newline",
    "blank line": "a blank line",
    "blank": "spaces",
    "digits": "digits",
    "letters with digits": "letters mixed with digits",
    "punctuation": "punctuation",
    "opening bracket": "an opening bracket",
    "closing bracket": "a closing bracket",
    "quote": "a quotation mark",
    "sentence end": "a sentence end",
    "underscore": "an underscore",
    "letters": "letters",
    "spaced word": "a word after a space",
    "non-ASCII": "non-ASCII text",
    "single letter": "a single letter",
    "lower case": "lower-case letters",
    "ALL CAPS": "ALL CAPS",
    "Capitalised": "a capitalised word",
    "capital start": "a capitalised piece",
    "capital letter": "a single capital letter",
    "continuation": "a piece inside a word",
    "word start": "the start of a word",
    "camelCase piece": "a capitalised piece inside a word",
}
_LINE_PLACES = {
    "first": "at the start of a line",
    "second": "second on its line",
    "third": "third on its line",
    "later": "late in a line",
}
_TEXTURES = {"words": "amid letters", "punctuation": "amid punctuation", "spaced words": "in running prose"}
_REPEATS = {"seen": "seen earlier in the passage", "copy": "repeating an earlier pair"}

Phrase = Callable[[list, int], str]

_HEADS: dict[str, Phrase] = {
    "token": quote_some,
    "core": quote_some,
    "class": lambda v, n: _joined(_named(_CLASS_NOUNS, v)),
    "prefix": lambda v, n: f"a piece that begins {quote_some(v, n)}",
    "suffix": lambda v, n: f"a piece that ends in {quote_some(v, n)}",
    "word": lambda v, n: f"the word {quote_some(v, n)}",
    "word_prefix": lambda v, n: f"inside a word that begins {quote_some(v, n)}",
    "bigram": lambda v, n: _ngrams(v, n),
    "trigram": lambda v, n: _ngrams(v, n),
}
_CONTEXTS: dict[str, Phrase] = {
    "token": lambda v, n: f"after {quote_some(v, n)}",
    "core": lambda v, n: f"after {quote_some(v, n)}",
    "class": lambda v, n: f"after {_joined(_named(_CLASS_NOUNS, v))}",
    "previous_word": lambda v, n: f"after the word {quote_some(v, n)}",
    "near": lambda v, n: f"soon after {quote_some(v, n)}",
    "line": lambda v, n: f"later on a line with {quote_some(v, n)}",
    "line_start": lambda v, n: f"on a line that begins {quote_some(v, n)}",
    "line_place": lambda v, n: _joined(_named(_LINE_PLACES, v)),
    "indent": lambda v, n: _indent(v),
    "above_start": lambda v, n: f"below a line that begins {quote_some(v, n)}",
    "above_end": lambda v, n: f"below a line that ends {quote_some(v, n)}",
    "inside": lambda v, n: f"inside {_joined(v)}",
    "document_start": lambda v, n: (
        "at the very start of a document" if v[0] == 1 else f"among a document's first {v[0]} tokens"
    ),
    "repeat": lambda v, n: _joined(_named(_REPEATS, v)),
    "texture": lambda v, n: _joined(_named(_TEXTURES, v)),
}


def _named(names: dict[str, str], values: list) -> list[str]:
    return [names.get(value, str(value)) for value in values]


def _joined(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " or " + phrases[-1]


def _indent(depths: list[str]) -> str:
    if len(depths) == 3 and "none" not in depths:
        return "on an indented line"
    if depths == ["none"]:
        return "on an unindented line"
    return f"on a line indented by {_joined(['0' if d == 'none' else d for d in sorted(depths)])}"


def _ngrams(values: list[tuple[str, ...]], limit: int) -> str:
    """ "`.` after `self`": the last token of each n-gram after the ones before it."""
    groups: dict[str, list[str]] = {}
    for value in values[:limit]:
        groups.setdefault("".join(value[:-1]), []).append(value[-1])
    phrases = [f"{quote_some(last, limit)} after {quote(before)}" for before, last in groups.items()]
    return ", ".join(phrases) + "…" if len(values) > limit else _joined(phrases)


def short_label(rule: Rule) -> str:
    """The rule in a few words: where they would be too many, fewer values, then fewer clauses."""
    for limit in LABEL_VALUES:
        label = describe(rule, limit)
        if len(label) <= LABEL_LENGTH:
            return label
    first = describe(Rule(rule.clauses[:1]), LABEL_VALUES[-1])
    return first if len(rule.clauses) == 1 else f"{first}; or …"


def describe(rule: Rule, limit: int = EXPLANATION_VALUES) -> str:
    """The rule as a phrase that goes on after "fires on", naming at most `limit` values of a view."""
    return "; or ".join(_describe_clause(clause, limit) for clause in rule.clauses)


def _describe_clause(clause: Clause, limit: int) -> str:
    heads = [a for a in clause.atoms if a.at == 0 and a.view in _HEADS]
    contexts = sorted((a for a in clause.atoms if a not in heads), key=lambda a: -a.at)
    phrases = [_HEADS[a.view](_values(a), limit) for a in heads]
    noun = ", ".join(phrases) if phrases else "any token"
    return " ".join([noun, *(_context_phrase(a, limit) for a in contexts)])


def _context_phrase(atom: Atom, limit: int) -> str:
    phrase = _CONTEXTS[atom.view](_values(atom), limit) if atom.view in _CONTEXTS else f"after {atom.view}"
    if atom.at < -1:
        return f"{-atom.at} tokens {phrase}"
    return phrase


def _values(atom: Atom) -> list:
    """Values for display: ` def` and `def` side by side are one, and so are their n-grams."""
    if atom.view not in ("token", "bigram", "trigram"):
        return list(atom.values)
    cores: dict = {}
    for value in atom.values:
        tokens = value if isinstance(value, tuple) else (value,)
        cores.setdefault(tuple(str(t).strip() or t for t in tokens), value)
    return list(cores.values())


def fixed_ngram(rule: Rule) -> str | None:
    """`token`, `bigram` or `trigram` when that is all the rule is: one clause of fixed tokens without gaps."""
    if len(rule.clauses) != 1:
        return None
    atoms = rule.clauses[0].atoms
    depth = 0
    for atom in atoms:
        length = {"token": 1, "core": 1, "bigram": 2, "trigram": 3}.get(atom.view)
        if length is None or len(_values(atom)) != 1:
            return None
        depth = max(depth, length - atom.at)
    covered = {-a.at + k for a in atoms for k in range({"bigram": 2, "trigram": 3}.get(a.view, 1))}
    if covered != set(range(depth)):
        return None
    return {1: "token", 2: "bigram", 3: "trigram"}.get(depth)


def explain(found: Found, positions: Positions) -> str:
    """What the rule of `found` says in full, examples from the explain split, and how it fared there."""
    assert found.rule is not None
    shown = _examples(found.rule, positions)
    examples = f", as in {'; '.join(shown)}" if shown else ""
    return (
        f"Fires on {describe(found.rule)}{examples}. On documents held out from the search the rule finds "
        f"{found.recall:.0%} of the firing tokens and holds on {found.fallout:.1%} of the silent ones "
        f"(balanced accuracy {found.accuracy:.2f})."
    )


def explain_nothing(found: Found, positions: Positions) -> str:
    """What can be said when no rule holds up: how far the best one got, and where the latent mostly fires."""
    said = "No rule over tokens, their form or what stands before them tells its firing tokens apart"
    if found.rule is not None:
        said += f" (the best reached balanced accuracy {found.accuracy:.2f} on held-out documents)"
    tokens = positions.reading.ids[positions.chosen][positions.fires]
    if not len(tokens):
        return "It does not fire in the contexts at hand."
    common = Counter(tokens.tolist()).most_common(4)
    shares = ", ".join(f"{quote(positions.reading.vocabulary[t])} ({n / len(tokens):.0%})" for t, n in common)
    return f"{said}. Its most frequent firing tokens are {shares}."


def _examples(rule: Rule, positions: Positions) -> list[str]:
    """Snippets around the strongest firings where the rule holds, of different documents and different tokens."""
    said = rule.holds(positions.reading)[positions.chosen] & positions.fires
    order = [i for i in (-positions.activation).argsort(kind="stable").tolist() if said[i]]
    snippets: dict[str, None] = {}
    for distinct_tokens in (True, False):
        documents: set[int] = set()
        tokens: set[int] = set()
        for i in order:
            place = int(positions.chosen[i])
            document, token = int(positions.document[i]), int(positions.reading.ids[place])
            if len(snippets) == EXAMPLES or document in documents or (distinct_tokens and token in tokens):
                continue
            documents.add(document)
            tokens.add(token)
            snippets[_snippet(positions, place)] = None
    return list(snippets)


def _snippet(positions: Positions, place: int) -> str:
    """The token in «», a few around it: "(`self«.»assertEqual(a`)"."""
    tokens = list(positions.reading.windows[int(positions.reading.window[place])])
    i = int(positions.reading.index[place])
    before, after = "".join(tokens[max(0, i - BEFORE) : i]), "".join(tokens[i + 1 : i + 1 + AFTER])
    return quote_text(before.lstrip(" ") + "«" + tokens[i] + "»" + after.rstrip())


def quote_text(text: str) -> str:
    """A snippet in backticks, runs of spaces shortened."""
    shown = re.sub(" {3,}", "  ", visible(text))
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"
