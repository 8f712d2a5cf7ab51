"""The typed rows that the two halves exchange through the store.

The evidence half writes contexts and writes; the labeling half reads them back as `LatentEvidence` and writes labels
and scores. Nothing here imports torch, so evidence collected on a GPU machine can be labelled on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["live", "dead", "revived", "silenced"]
Role = Literal["read", "written", "static"]
ContextKind = Literal["top", "top_base", "gain", "loss", "quantile", "silent"]
Foil = Literal["token", "cofiring", "neighbour"]
Split = Literal["explain", "score"]
WriteKind = Literal["raises", "lowers", "promotes", "suppresses"]
UnitSide = Literal["reads", "writes"]
LabelStatus = Literal["ok", "known", "refused", "failed"]
CallStatus = Literal["sent", "ok", "error", "refused", "in_doubt"]

ACTIVATING_KINDS: tuple[ContextKind, ...] = ("top", "top_base", "gain", "loss", "quantile")


@dataclass(frozen=True, slots=True)
class Context:
    """A window of document tokens around one activation peak (or, for `silent`, around no activation at all)."""

    latent: int
    context_id: int
    """Unique within a latent of a run."""
    kind: ContextKind
    rank: int
    """1 is the largest within its kind, both splits ranked together; silent contexts are in drawing order."""
    split: Split
    doc: int
    """Index of the document in the corpus, in corpus order."""
    position: int
    """Index of the peak among the document's tokens."""
    tokens: tuple[str, ...]
    """Decoded tokens of the window; BOS is never among them."""
    act_base: tuple[float, ...]
    """Activation of the latent in the base model at each token of the window."""
    act_adapted: tuple[float, ...]
    peak: int
    """Index of the peak within `tokens`."""
    foil: Foil | None = None
    """Why a silent context is a near miss; None for one drawn at random, and for firing ones. At the peak, `token`: the
    token on which the latent mostly fires; `cofiring`: a latent fires that often fires together with this one;
    `neighbour`: the latent fires whose decoder row is nearest."""


@dataclass(frozen=True, slots=True)
class Write:
    """One thing that the adapter does when a latent fires, read off the latent's row of the change map."""

    latent: int
    kind: WriteKind
    target_latent: int | None
    """The latent raised or lowered."""
    target_token: str | None
    """The token promoted or suppressed."""
    weight: float
    """raises/lowers: change of the target's activation at the latent's mean firing activation. promotes/suppresses:
    mean change of the token's log-probability (nats), read at the hook through the final norm and the unembedding."""
    rank: int
    """1 is the strongest of its kind."""
    target_hint: str | None = None
    """raises/lowers: tokens that the target's decoder row promotes, for a reader to whom its number says nothing."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One latent that a hidden unit of the adapter reads or writes."""

    unit: int
    name: str
    """For people: the module it belongs to and its number there."""
    side: UnitSide
    latent: int
    weight: float
    """Signed. reads: the unit's answer to a unit of the latent's activation; writes: the latent's part in what it
    writes."""
    rank: int
    """1 is the strongest of its side."""


@dataclass(frozen=True, slots=True)
class DecoderToken:
    """A token that a latent's own decoder row makes more or less probable next, in the base model."""

    latent: int
    kind: Literal["promotes", "suppresses"]
    token: str
    weight: float
    """Logit of the token when the row alone is put through the final norm and the unembedding, less that of nothing."""
    rank: int
    """1 is the strongest of its kind."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Most probable next tokens at the peak of a context."""

    latent: int
    context_id: int
    side: Literal["base", "adapted"]
    rank: int
    token: str
    probability: float


@dataclass(frozen=True, slots=True)
class LatentEvidence:
    """All that a labeler may know about one selected latent."""

    run_id: str
    latent: int
    rank: int
    role: Role
    state: State
    gain: float | None
    """Signed change along the latent's own direction: +0.25 is 25 % stronger."""
    change: float | None
    mean_base: float
    mean_adapted: float
    freq_base: float
    freq_adapted: float
    max_base: float
    max_adapted: float
    contexts: tuple[Context, ...]
    writes: tuple[Write, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    decoder: tuple[DecoderToken, ...] = ()

    def of(self, split: Split, *kinds: ContextKind) -> tuple[Context, ...]:
        """Contexts of one split; of all kinds when none is named. In order of context_id."""
        return tuple(c for c in self.contexts if c.split == split and (not kinds or c.kind in kinds))


@dataclass(frozen=True, slots=True)
class Label:
    """What a labeler says of one latent."""

    latent: int
    labeler: str
    """`lexical`, `openai:MODEL` or `anthropic:MODEL`."""
    status: LabelStatus
    label: str | None = None
    explanation: str | None = None
    effect: str | None = None
    error: str | None = None
    prompt_sha256: str | None = None
    rule: dict | None = field(default=None, hash=False)
    """The executable rule behind a lexical label; None for labels in free text."""
    salvaged: bool = False
    """The model's answer held more than was asked for, or was cut off: the label was found in it all the same."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a label predicts where its latent fires, on documents that the labeler never saw."""

    latent: int
    labeler: str
    scorer: str
    value: float | None
    """On the scorer's own scale, 1 is perfect: a balanced accuracy, a share of right answers or an area under a ROC
    curve in [0, 1], a correlation in [−1, 1]. None when nothing could be scored."""
    ci_low: float | None
    ci_high: float | None
    """95 % interval."""
    null_value: float | None
    """The same scorer given another latent's label; None when there is no other label."""
    n_examples: int
    """Examples that it took: buying stops when the interval has decided."""
    n_missing: int
    """Examples asked about without a usable answer."""


@dataclass(frozen=True, slots=True)
class Change:
    """One labelled latent, as a summary of the run reads it."""

    latent: int
    rank: int
    change: float | None
    gain: float | None
    label: str
    explanation: str
    effect: str
    score: float | None
    """Of the best scorer of its label."""
    null_score: float | None
    promotes: tuple[str, ...] = ()
    """Tokens that the adapter makes more probable when it fires, strongest first."""
    suppresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of a summary, and the latents that it rests on: at least one, all among the labelled ones."""

    text: str
    latents: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.text} [{', '.join(map(str, self.latents))}]"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What the training changed, in a few sentences."""

    labeler: str
    status: LabelStatus
    sentences: tuple[Sentence, ...] = ()
    error: str | None = None
    prompt_sha256: str | None = None

    @property
    def text(self) -> str | None:
        return " ".join(map(str, self.sentences)) or None


@dataclass(frozen=True, slots=True)
class CausalEffect:
    """What one edit at the hook does to the predictions, on held-out documents."""

    edit: Literal["added", "removed"]
    """Rows added to the base model, or taken out of the adapted one."""
    part: str
    """none, whole (all of Δx), static, selected, random, matched (random rows, as much written), all (every row),
    directions (decoder directions of the static part) or random directions."""
    k: int
    """Rows or directions written."""
    draw: int
    """Number of the random draw, from 1; 0 for what is not drawn."""
    loss: float
    """Mean next-token loss, nats."""
    kl: float
    """Mean KL(adapted ‖ edited base), or KL(edited adapted ‖ base), nats."""
    loss_share: float | None
    """Share of the whole's effect; None where the whole has no clear one."""
    loss_se: float | None
    """Standard error of the share over documents."""
    kl_share: float | None
    kl_se: float | None
    n_tokens: int
    n_docs: int


@dataclass(frozen=True, slots=True)
class LatentEffect:
    """What one latent's row alone carries, each as a share of the effect of the whole Δx."""

    latent: int
    added_loss: float | None
    added_kl: float | None
    removed_loss: float | None
    removed_kl: float | None
    n_firing: int
    """Held-out sequences in which it fires."""
    n_sequences: int
    """Those that were run."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """How well a probe of one side's stream tells a base latent's activation, on held-out documents."""

    latent: int
    r2: float
    """On the adapted stream."""
    auc: float
    r2_base: float
    """On the base stream: what the same kind of probe can reach."""
    auc_base: float
    r2_shuffled: float
    """On the adapted stream, with the activations of other tokens."""
    auc_shuffled: float
    cosine: float | None
    """Of the probe's direction on the adapted stream with the latent's encoder column; None without such a one."""
    n_tokens: int
    n_firing: int
    """Held-out tokens at which it fires."""


@dataclass(frozen=True, slots=True)
class Ngrams:
    """How much of a latent's activation the token, bigram or trigram that ends there tells, on held-out documents."""

    latent: int
    r2_token: float
    r2_bigram: float
    r2_trigram: float
    length: int | None
    """Tokens of the n-grams, a few of which explain it; None where none do."""
    grams: tuple[tuple[str, ...], ...] = ()
    """The n-grams that make up most of its activation, strongest first, where one length explains it. An empty string
    stands for the start of a sequence."""
