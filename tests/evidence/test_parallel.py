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
            for parameter in changed.get_decoder().layers[1].parameters():
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
    together = in_order(lambda mine, ids: mine.activations(ids), models, batches)
    for (base, adapted), (its_base, its_adapted) in zip(alone, together, strict=True):
        assert torch.equal(base, its_base)
        assert torch.equal(adapted, its_adapted)
        assert not torch.equal(base, adapted)


def test_results_come_in_order_and_each_model_has_one_thread() -> None:
    models, running, most = [object() for _ in range(3)], set(), 0
    lock = threading.Lock()

    def work(model: object, item: int) -> int:
        nonlocal most
        with lock:
            assert model not in running
            running.add(model)
            most = max(most, len(running))
        time.sleep(0.002 * (item % 4))
        with lock:
            running.remove(model)
        return item

    assert list(in_order(work, models, range(60))) == list(range(60))  # type: ignore[type-var]
    assert most == 3


def test_errors_are_raised_and_items_are_not_read_far_ahead(threads: int) -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for read in range(1000):
            yield read

    def work(_model: object, item: int) -> int:
        assert torch.get_num_threads() == threads // 2
        if item == 5:
            raise ValueError("five")
        return item

    found = in_order(work, [object(), object()], items())  # type: ignore[list-item]
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="five"):
        next(found)
    assert read < 12
    assert torch.get_num_threads() == threads
