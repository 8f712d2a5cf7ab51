"""A training followed through the selected latents: what each of its checkpoints had made of them, on one text.

The text is the head of the shuffled corpus. The base reads it once; each checkpoint then reads the same batches, and
the change map restricted to the selected latents (as `latents.gain` and `latents.write_size` are) is fitted to
Δx = x_checkpoint − x_base: rows on all of the text, coverage with rows of its fit half on the held-out one. Only the
right-hand side B differs between checkpoints. k latents, d residual width; halves are fit and held-out, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from autointerp.evidence.change_map import RIDGE, explained_energy, solved
from autointerp.evidence.corpus import Batch, Corpus, fit_rows
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.fitted import MIN_VARYING
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import in_order, tokens_per_batch
from autointerp.evidence.stream import ENCODE_ROWS, OUTLIER, to_codes

MAX_TOKENS = 1 << 15
"""Document tokens that each checkpoint reads at most."""
MAX_NUMBERS = 1 << 27
"""Numbers of the base stream that are kept in memory for it."""
Progress = Callable[[int], None]
"""Called with the number of tokens of each batch that is done."""


@dataclass(frozen=True)
class Piece:
    """One batch of the text with what the base makes of it; n counted tokens."""

    ids: Tensor
    """[b, t]."""
    counted: Tensor
    """[b, t]."""
    x_base: Tensor
    """[n, d] in the model's dtype, on the CPU: where the dictionary writes."""
    z: csr_matrix
    """Base codes of the selected latents [n, k]."""
    fit: np.ndarray
    """Whether each token is of the fit half [n]."""


@dataclass(frozen=True)
class Reading:
    """What one checkpoint has made of the latents."""

    rows: Tensor
    """c_j [k, d] of the map restricted to the latents, float64."""
    gain: np.ndarray
    """⟨c_j, d_j⟩ / ‖d_j‖² [k]."""
    size: np.ndarray
    """‖c_j‖ · √E[z_j²] [k], in residual-norm units."""
    mean: np.ndarray
    """Mean activation in the checkpoint's model [k]."""
    freq: np.ndarray
    """Share of tokens on which each fires there [k]."""
    coverage: float | None
    """Held-out share of Δx that the rows explain; None where nothing varies, or no half has text."""
    change: float
    """Root mean square ‖Δx‖."""
    static_share: float | None
    """Share of E‖Δx‖² that is the same on every token."""

    def cosines(self, other: Reading) -> np.ndarray:
        """Of the rows with those of another checkpoint [k]; NaN where one is zero."""
        lengths = self.rows.norm(dim=1) * other.rows.norm(dim=1)
        cosine = (self.rows * other.rows).sum(1) / lengths
        return torch.where(lengths > 0, cosine, torch.nan).numpy()


class Sample:
    """The text, and the sums over it that are the same for every checkpoint. Made by `Sample.read`."""

    def __init__(self, dictionary: Dictionary, latents: Sequence[int], pieces: list[Piece], diagonal: float):
        """diagonal: mean over all latents of the dictionary of Σ (z − z̄)²."""
        self.dictionary, self.pieces = dictionary, pieces
        self.columns = torch.as_tensor(list(latents), device=dictionary.W_dec.device)
        self.directions = dictionary.W_dec[self.columns].detach().double().cpu()
        k = len(latents)
        self.n, self.z, self.G = np.zeros(2), np.zeros((2, k)), np.zeros((2, k, k))
        square, fired = np.zeros(k), np.zeros(k)
        for piece in pieces:
            for half, mine in enumerate((piece.fit, ~piece.fit)):
                z = _rows(piece.z, mine)
                self.n[half] += np.count_nonzero(mine)
                self.z[half] += np.asarray(z.sum(0)).ravel()
                self.G[half] += (z.T @ z).toarray()
            square += np.asarray(piece.z.power(2).sum(0)).ravel()
            fired += np.bincount(piece.z.indices[piece.z.data > 0], minlength=k)
        self.mean, self.freq = self.z.sum(0) / self.n_tokens, fired / self.n_tokens
        self.scale = np.sqrt(square / self.n_tokens)
        self.shrink = RIDGE * diagonal / self.n_tokens
        """Ridge of the whole map [for each token], which rows fitted for some latents alone share."""

    @property
    def n_tokens(self) -> int:
        """Counted tokens."""
        return int(self.n.sum())

    @classmethod
    def read(
        cls,
        models: Sequence[PairedModel],
        dictionary: Dictionary,
        corpus: Corpus,
        latents: Sequence[int],
        progress: Progress = lambda _n: None,
    ) -> Sample:
        """Runs the base over the text once."""
        model = models[0]
        head = corpus.head(min(MAX_TOKENS, max(MAX_NUMBERS // model.d_model, corpus.piece)))
        read: list[tuple[Batch, Tensor, csr_matrix]] = []

        def work(model: PairedModel, batch: Batch) -> tuple[Batch, Tensor, csr_matrix]:
            x = model.activations_of("base", batch.ids).flatten(0, 1)[batch.counted.flatten().to(model.device)]
            return batch, x[:, : model.d_model].cpu(), to_codes(dictionary, x.float())

        def then(done: tuple[Batch, Tensor, csr_matrix]) -> None:
            read.append(done)
            progress(len(done[1]))

        in_order(work, then, models, head.batches(tokens_per_batch(model.device)))
        norms = [x.float().norm(dim=1) for _, x, _ in read]
        limit = OUTLIER * float(torch.cat(norms).median())
        total, square, n = np.zeros(dictionary.d_sae), np.zeros(dictionary.d_sae), 0
        pieces: list[Piece] = []
        for norm in norms:
            (batch, x, codes), kept = read.pop(0), norm <= limit  # popped: the stream is never held twice
            counted = batch.counted.clone()
            counted[batch.counted] = kept
            z = _rows(codes, kept.numpy())
            n += int(kept.sum())
            total += np.asarray(z.sum(0)).ravel()
            square += np.asarray(z.power(2).sum(0)).ravel()
            fit = np.repeat(fit_rows(batch.orders), counted.sum(1).numpy())
            pieces.append(Piece(batch.ids, counted, x[kept], csr_matrix(z[:, list(latents)]), fit))
        return cls(dictionary, latents, pieces, float((square - total**2 / max(n, 1)).mean()))

    def base(self) -> Reading:
        """Before the training: nothing is written, and the latents fire as they do in the base."""
        nothing = np.zeros(len(self.columns))
        return Reading(torch.zeros_like(self.directions), nothing, nothing, self.mean, self.freq, None, 0.0, None)

    def at(self, models: Sequence[PairedModel], progress: Progress = lambda _n: None) -> Reading:
        """The adapted side of `models`, replicas of one pair with this sample's base."""
        sums = _Sums(*self.z.shape, models[0].d_model)

        def work(model: PairedModel, piece: Piece) -> tuple[Piece, np.ndarray, np.ndarray]:
            x = model.activations_of("adapted", piece.ids).flatten(0, 1)[piece.counted.flatten().to(model.device)]
            codes = [self.dictionary.encode_columns(rows.float(), self.columns) for rows in x.split(ENCODE_ROWS)]
            z = torch.cat(codes).float().cpu().numpy() if codes else np.zeros((0, len(self.columns)), np.float32)
            return piece, (x[:, : model.d_model].cpu().float() - piece.x_base.float()).numpy(), z

        def then(done: tuple[Piece, np.ndarray, np.ndarray]) -> None:
            sums.add(*done)
            progress(len(done[1]))

        in_order(work, then, models, self.pieces)
        return self._reading(sums)

    def _reading(self, sums: _Sums) -> Reading:
        n, mean, static = self.n_tokens, self.mean, sums.change.sum(0) / self.n_tokens
        G, B, energy = [], [], []
        for half in range(2):
            # Centred on the means of both halves, as the map of the whole corpus is.
            z, change = self.z[half], sums.change[half]
            left = change - self.n[half] * static
            G.append(self.G[half] - np.outer(z, mean) - np.outer(mean, z) + self.n[half] * np.outer(mean, mean))
            B.append(sums.B[half] - np.outer(z, static) - np.outer(mean, left))
            energy.append(float(sums.square[half] - change @ static - static @ left))
        G, B = torch.from_numpy(np.stack(G)), torch.from_numpy(np.stack(B))
        rows = solved(G.sum(0), B.sum(0), self.shrink * n)
        gain = (rows * self.directions).sum(1) / self.directions.square().sum(1).clamp_min(1e-30)
        coverage, square = None, float(sums.square.sum())
        if self.n.all() and min(energy) > MIN_VARYING * square:
            fitted = solved(G[0], B[0], self.shrink * float(self.n[0]))
            coverage = explained_energy(G[1], B[1], fitted) / energy[1]
        return Reading(
            rows=rows,
            gain=gain.numpy(),
            size=rows.norm(dim=1).numpy() * self.scale,
            mean=sums.z / n,
            freq=sums.fired / n,
            coverage=coverage,
            change=float(np.sqrt(square / n)),
            static_share=n * float(static @ static) / square if square else None,
        )


def _rows(codes: csr_matrix, mine: np.ndarray) -> csr_matrix:
    """The codes of some tokens; mine: whether each is one of them."""
    return csr_matrix(codes[np.flatnonzero(mine)])  # pyright: ignore[reportOptionalSubscript] - scipy's stubs


class _Sums:
    """What is summed over one checkpoint's batches."""

    def __init__(self, halves: int, k: int, d: int):
        self.B, self.change, self.square = np.zeros((halves, k, d)), np.zeros((halves, d)), np.zeros(halves)
        self.z, self.fired = np.zeros(k), np.zeros(k)

    def add(self, piece: Piece, change: np.ndarray, z: np.ndarray) -> None:
        """change [n, d] and the checkpoint's own codes z [n, k] of the tokens of `piece`."""
        for half, mine in enumerate((piece.fit, ~piece.fit)):
            self.B[half] += _rows(piece.z, mine).T @ change[mine]
            self.change[half] += change[mine].sum(0, dtype=np.float64)
            self.square[half] += np.einsum("ij,ij->", change[mine], change[mine], dtype=np.float64)
        self.z += z.sum(0, dtype=np.float64)
        self.fired += (z > 0).sum(0)
