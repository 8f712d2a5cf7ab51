"""Selected latents from dictionary to dictionary, as of the layers of one model: one label carried along.

For each run its selected latents, and whatever they lead to, are looked up in the dictionaries before and behind it by
the cosine of decoder rows. A step is taken where the nearest row is nearer than random directions find one. Reads the
store and the dictionaries' decoders; stores nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from autointerp.errors import InputError
from autointerp.show_units import latent_names
from autointerp.store import Store

if TYPE_CHECKING:
    from autointerp.evidence.counterparts import Chance, Counterparts
    from autointerp.evidence.directions import Directions


@dataclass(frozen=True)
class Layer:
    """One of the runs."""

    run_id: str
    hook: str
    sae: str
    n_selected: int


@dataclass(frozen=True)
class Member:
    """A latent of a chain."""

    layer: int
    """Position of its run among the layers."""
    latent: int
    rank: int | None
    """Among the selected latents of its run; None where that did not select it."""
    label: str | None
    carried: str | None
    """Label of the nearest member that has one, where this one has none."""


@dataclass(frozen=True)
class Step:
    """From one member of a chain to the next."""

    cosine: float
    """Of the decoder rows."""
    mutual: bool
    """Whether each is the other's nearest in its dictionary."""


@dataclass(frozen=True)
class Chain:
    """A latent through the layers, as far as it has counterparts."""

    members: list[Member]
    """In the order of the layers."""
    steps: list[Step]
    """Between them, one fewer."""


@dataclass(frozen=True)
class Lineage:
    """What `autointerp lineage` prints."""

    layers: list[Layer]
    chances: list[tuple[Chance, Chance]]
    """What random directions find between neighbouring layers: forwards, backwards."""
    chains: list[Chain]
    """Of two members or more, by rank in the first layer that selected one."""
    alone: list[Chain]
    """Selected latents without a counterpart on either side."""

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        chances = [{"forward": asdict(forward), "backward": asdict(back)} for forward, back in self.chances]
        return {
            "runs": [asdict(layer) for layer in self.layers],
            "chance": chances,
            "chains": [asdict(chain) for chain in self.chains],
            "alone": [asdict(chain.members[0]) for chain in self.alone],
        }


def lineage(store: Store, wanted: Sequence[str], seed: int = 0) -> Lineage:
    """Of runs, by their ids or beginnings of them, in the order of their layers.

    InputError for fewer than two, two on one dictionary, dictionaries of different width, and those that are not here.
    """
    if len(wanted) < 2:
        raise InputError("a lineage takes two runs or more: name them in the order of their layers")
    ids = [store.run_id(name) for name in wanted]
    layers, directions = _opened(store, ids)
    selected = [store.selected(run_id) for run_id in ids]
    for layer, latents in zip(layers, selected, strict=True):
        if not latents:
            raise InputError(f"run {layer.run_id} selected no latent: there is nothing to follow from it")
    forward = _sweep(selected, directions, seed)
    back = _sweep(selected[::-1], directions[::-1], seed)[::-1]
    names = [latent_names(store, run_id) for run_id in ids]
    links = _Links(forward, back)
    chains = [_chain(path, selected, names) for path in _paths(selected, links)]
    return Lineage(
        layers,
        [(there.chance, here.chance) for there, here in zip(forward, back, strict=True)],
        [chain for chain in chains if chain.steps],
        [chain for chain in chains if not chain.steps],
    )


def _opened(store: Store, ids: list[str]) -> tuple[list[Layer], list[Directions]]:
    from autointerp.evidence.directions import open_directions

    layers, directions = [], []
    for run_id in ids:
        (run,) = store.read("SELECT sae, hook, d_model, d_sae FROM runs WHERE run_id = ?", [run_id])
        layers.append(Layer(run_id, run["hook"], run["sae"], len(store.selected(run_id))))
        same = next((layer for layer in layers[:-1] if (layer.sae, layer.hook) == (run["sae"], run["hook"])), None)
        if same is not None:
            raise InputError(
                f"runs {same.run_id} and {run_id} are on one dictionary, where every latent is its own counterpart:"
                " `autointerp compare` sets them side by side"
            )
        opened = open_directions(run["sae"], run["hook"], decoder_only=True)
        if (opened.m, opened.d) != (run["d_sae"], run["d_model"]):
            raise InputError(
                f"SAE {run['sae']} is not the one of run {run_id}: {opened.m} latents of width {opened.d}, the run's"
                f" had {run['d_sae']} of {run['d_model']}; put it back, or run it again"
            )
        directions.append(opened)
        if opened.d != directions[0].d:
            raise InputError(
                f"runs {ids[0]} and {run_id} have no stream in common: widths {directions[0].d} and {opened.d}; name"
                " runs on layers of one model"
            )
    return layers, directions


def _sweep(selected: list[list[int]], directions: list[Directions], seed: int) -> list[Counterparts]:
    """For each layer but the last, counterparts in the next one of its selected latents and of those led to there."""
    from autointerp.evidence.counterparts import counterparts

    found: list[Counterparts] = []
    reached: set[int] = set()
    for at, (mine, other) in enumerate(pairwise(directions)):
        found.append(counterparts(sorted(reached | set(selected[at])), mine, other, seed))
        limit = found[-1].chance.limit
        reached = {target for target, cosine, _ in found[-1].found.values() if cosine > limit}
    return found


Place = tuple[int, int]
"""(layer, latent)."""


@dataclass(frozen=True)
class _Links:
    """Steps between neighbouring layers that are beyond chance."""

    forward: list[Counterparts]
    back: list[Counterparts]

    def step(self, place: Place, towards: int) -> tuple[Place, Step] | None:
        """One layer on (1) or back (−1)."""
        layer, latent = place
        hop = layer if towards > 0 else layer - 1
        if not 0 <= hop < len(self.forward):
            return None
        through = (self.forward if towards > 0 else self.back)[hop]
        target, cosine, mutual = through.found[latent]
        return ((layer + towards, target), Step(cosine, mutual)) if cosine > through.chance.limit else None

    def walk(self, place: Place, towards: int) -> Iterator[tuple[Place, Step]]:
        """As far as it goes."""
        while (found := self.step(place, towards)) is not None:
            yield found
            place = found[0]


Path = tuple[list[Place], list[Step]]


def _paths(selected: list[list[int]], links: _Links) -> list[Path]:
    """From every selected latent, in both directions; each way once, and none that is part of another."""
    paths: dict[frozenset[Place], Path] = {}
    for layer, latents in enumerate(selected):
        for latent in latents:
            before = list(links.walk((layer, latent), -1))[::-1]
            behind = list(links.walk((layer, latent), 1))
            places = [place for place, _ in before] + [(layer, latent)] + [place for place, _ in behind]
            paths.setdefault(frozenset(places), (places, [step for _, step in (*before, *behind)]))
    return [path for places, path in paths.items() if not any(places < other for other in paths)]


def _chain(path: Path, selected: list[list[int]], names: list[dict[int, str]]) -> Chain:
    places, steps = path
    labels = [names[layer].get(latent) for layer, latent in places]
    members: list[Member] = []
    for at, (layer, latent) in enumerate(places):
        named = [other for other, label in enumerate(labels) if label is not None]
        near = min(named, key=lambda other: abs(other - at), default=None)
        rank = selected[layer].index(latent) + 1 if latent in selected[layer] else None
        carried = labels[near] if near is not None and labels[at] is None else None
        members.append(Member(layer, latent, rank, labels[at], carried))
    return Chain(members, steps)
