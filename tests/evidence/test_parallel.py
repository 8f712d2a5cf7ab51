"""Several models at once give, in order, what one gives alone; they share their weights and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from autointerp.evidence.model_pair import ModelPair, TwoModels
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import in_order, replicas
from tests import tiny


def make(family: str, full: bool) -> PairedModel:
    if full:
        changed = tiny.model(family)
        with torch.no_grad():
            for parameter in changed.get_submodule("model.layers.1").parameters():
                parameter.add_(0.1)
        return PairedModel(TwoModels(tiny.model(family), changed), "blocks.2.hook_resid_post", tiny.tokenizer())
    peft = tiny.add_lora(tiny.model(family), [1]).eval()
    return PairedModel(ModelPair.from_peft(peft), "blocks.2.hook_resid_post", tiny.tokenizer())


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


@pytest.mark.parametrize(("family", "full"), [*((f, False) for f in tiny.FAMILIES), ("llama", True)])
def test_replicas_agree_with_the_model_alone(family: str, full: bool, threads: int) -> None:
    model = make(family, full)
    models = replicas(model)
    assert len(models) == threads
    weights = [[t.data_ptr() for pair in m.pair.models for t in pair.parameters()] for m in models]
    assert all(mine == weights[0] for mine in weights)
    batches = [(tiny.token_ids() + shift) % tiny.VOCAB for shift in range(24)]
    torch.set_num_threads(1)  # one thread each way, so that products are split alike
    alone = [model.activations(ids) for ids in batches]
    together: list[tuple[torch.Tensor, torch.Tensor]] = []
    in_order(lambda mine, ids: mine.activations(ids), together.append, models, batches)
    for (base, adapted), (its_base, its_adapted) in zip(alone, together, strict=True):
        assert torch.equal(base, its_base)
        assert torch.equal(adapted, its_adapted)
        assert not torch.equal(base, adapted)


def test_results_come_in_order_one_after_the_other_and_each_model_has_one_thread() -> None:
    models, busy, most, found = [object() for _ in range(3)], set(), 0, []
    handing_on = threading.Lock()

    def work(model: object, item: int) -> int:
        nonlocal most
        assert model not in busy
        busy.add(model)
        most = max(most, len(busy))
        time.sleep(0.002 * (item % 4))
        busy.remove(model)
        return item

    def then(item: int) -> None:
        assert handing_on.acquire(blocking=False)
        time.sleep(0.001 * (item % 3))
        found.append(item)
        handing_on.release()

    in_order(work, then, models, range(100))  # type: ignore[type-var]
    assert found == list(range(100))
    assert most == 3


def test_a_single_model_does_not_wait_for_what_is_handed_on() -> None:
    """The second item is worked on while the first is handed on: else this would never end."""
    second = threading.Event()
    found: list[int] = []

    def then(item: int) -> None:
        assert second.wait(60)
        found.append(item)

    in_order(lambda _model, item: (second.set() if item else None, item)[1], then, [object()], range(3))  # type: ignore
    assert found == [0, 1, 2]


@pytest.mark.parametrize("at", ["work", "then", "items"])
def test_errors_are_raised_and_items_are_not_read_far_ahead(at: str, threads: int) -> None:
    read, found = 0, []

    def failing(place: str, item: int) -> int:
        if place == at and item == 5:
            raise ValueError("five")
        return item

    def items() -> Iterator[int]:
        nonlocal read
        for read in range(1000):
            yield failing("items", read)

    def work(_model: object, item: int) -> int:
        assert torch.get_num_threads() == threads // 2
        return failing("work", item)

    with pytest.raises(ValueError, match="five"):
        in_order(work, lambda item: found.append(failing("then", item)), [object(), object()], items())  # type: ignore
    assert found == list(range(5)) or at != "then"
    assert len(found) <= 5
    assert read < 16
    assert torch.get_num_threads() == threads
