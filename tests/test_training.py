"""Labels for a model in memory: the same as from its files, and a training that never notices."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import autointerp
from autointerp import cli
from autointerp.demo import ORGANISM
from autointerp.errors import InputError
from autointerp.in_memory import bare
from autointerp.progress import Reporter
from autointerp.results import Results
from autointerp.training import LabelCallback, check_inputs, label_model

SAE, CORPUS = ORGANISM / "sae", ORGANISM / "corpus.jsonl"
SMALL: dict[str, Any] = {"sae": SAE, "corpus": CORPUS, "max_tokens": 12_000, "top": 5}


def _example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "train_with_callback.py"
    spec = importlib.util.spec_from_file_location("train_with_callback", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = _example()


class Watch(TrainerCallback):
    """Notes, at the end of the training, all that labelling could disturb."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = state_of(kwargs["model"]) | {"tokenizer": str(kwargs["processing_class"].padding_side)}


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {name: (weight.detach().clone(), weight.data_ptr()) for name, weight in model.named_parameters()},
        "gradients": {name: (weight.requires_grad, weight.grad is None) for name, weight in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "patched": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "off": [name for name, module in model.named_modules() if getattr(module, "disable_adapters", None) is True],
        "checkpointing": [n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", None) is True],
        "random": random.getstate(),
        "numpy": tuple(map(str, np.random.get_state())),
        "torch": torch.get_rng_state(),
        "on SIGINT": signal.getsignal(signal.SIGINT),
        "filters": list(logging.getLogger("transformers.modeling_utils").filters),
    }


def check_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, (weight, address) in before["weights"].items():
        assert torch.equal(weight, after["weights"][name][0]), name
        assert address == after["weights"][name][1], name
    assert torch.equal(before["torch"], after["torch"])
    for key in before.keys() - {"weights", "torch"}:
        assert before[key] == after[key], key


class Trained(NamedTuple):
    trainer: Trainer
    callback: LabelCallback
    run_dir: Path
    db: Path
    before: Watch
    after: Watch

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def tokenizer(self) -> Any:
        return self.trainer.processing_class


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: where cores are shared, two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The example's LoRA after a few steps with gradient checkpointing, labelled by the callback."""
    out = tmp_path_factory.mktemp("trained")
    callback = LabelCallback(**SMALL, db=out / "a.duckdb")
    before, after = Watch(), Watch()
    callbacks = [before, callback, after]
    arguments = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "gradient_checkpointing": True}
    trainer = EXAMPLE.trainer(out, 6, callbacks, **arguments)
    trainer.train()
    return Trained(trainer, callback, out / "autointerp", out / "a.duckdb", before, after)


def results_of(trained: Trained) -> Results:
    assert trained.callback.results is not None
    return trained.callback.results


def tables(db: Path) -> dict[str, list[Any]]:
    stored = Results(db)
    names = ("latents", "writes", "contexts", "predictions", "labels", "scores")
    found = {name: sorted(map(repr, stored.sql(f"SELECT * FROM {name}").fetchall())) for name in names}
    return found | {"runs": stored.sql("SELECT * EXCLUDE (finished_at) FROM runs").fetchall()}


def test_the_callback_leaves_labelled_latents_in_the_store(trained: Trained):
    results = results_of(trained)
    assert results.status == "done"
    assert [row[0] for row in results.sql("SELECT rank FROM changed_latents ORDER BY rank").fetchall()] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert results.sql("SELECT count(*) FROM labels WHERE label IS NOT NULL").fetchone() == (5,)
    assert results.sql("SELECT path FROM runs").fetchone() == (str(trained.run_dir.resolve()),)


def test_the_training_is_left_as_it_was(trained: Trained):
    assert any(trained.before.seen["modes"].values()), "the model is in train mode when the training ends"
    assert trained.before.seen["checkpointing"]
    check_same(trained.before.seen, trained.after.seen)


def test_the_command_line_finds_the_same_run_and_has_nothing_to_do(trained: Trained):
    before = tables(trained.db)
    written = (trained.run_dir / "run.yaml").read_text().splitlines()[1].lstrip("# ")
    assert written.startswith("autointerp label --run ")
    assert cli.run([*shlex.split(written)[1:], "--quiet"]) == 0
    assert tables(trained.db) == before


def test_labels_from_memory_are_those_from_the_files(trained: Trained, tmp_path: Path):
    db = tmp_path / "disk.duckdb"
    command = ["select", "--run", str(trained.run_dir), "--top", "5", "--db", str(db), "--device", "cpu", "--quiet"]
    assert cli.run(command) == 0
    disk, memory = Results(db), results_of(trained)
    assert disk.run_id == memory.run_id
    columns = "latent, selected, mean_base, mean_adapted, freq_adapted"
    query = f"SELECT {columns} FROM latents WHERE run_id = ? ORDER BY latent"
    there, here = (np.array(r.sql(query, [r.run_id]).fetchall(), float) for r in (disk, memory))
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6)


def test_bad_inputs_are_one_warning_each_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):  # at an address of its own a server may ask for no key
        monkeypatch.delenv(variable, raising=False)
    foreign = tmp_path / "foreign.duckdb"
    foreign.write_text("no database")
    sae = tmp_path / "vanishing"
    shutil.copytree(SAE, sae)
    wrong = {
        "no such file": {"sae": tmp_path / "none"},
        "corpus": {"corpus": tmp_path / "none.jsonl"},
        "unknown option 'tpo'": {"tpo": 5},
        "does not see the adapter": {"hook": "blocks.0.hook_resid_pre"},
        "blocks.9": {"hook": "blocks.9.hook_resid_post"},
        "unknown labeler": {"labeler": "lexcial"},
        "OPENAI_API_KEY": {"labeler": "openai:some-model"},
        "the model in memory is float32": {"dtype": "bfloat16"},
        "unknown selector": {"selector": "chnage"},
        "context length": {"context_length": 4096},
        str(foreign): {"db": foreign},
    }
    callbacks = [LabelCallback(**{**SMALL, "db": tmp_path / "a.duckdb", **options}) for options in wrong.values()]
    vanishing = LabelCallback(**{**SMALL, "db": tmp_path / "b.duckdb", "sae": sae})

    class Vanish(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shutil.rmtree(sae)

    with caplog.at_level(logging.INFO, "autointerp"):
        trainer = EXAMPLE.trainer(tmp_path / "out", 1, [*callbacks, vanishing, Vanish()], per_device_train_batch_size=1)
        assert trainer.train().global_step == 1
    ours = [record for record in caplog.records if record.name.startswith("autointerp")]
    warnings = [record.getMessage() for record in ours if record.levelno == logging.WARNING]
    assert len(warnings) == len(wrong) + 1
    for says, warning in zip([*wrong, "vanishing"], warnings, strict=True):
        assert says in warning
        assert "\n" not in warning
    assert all(callback.results is None for callback in [*callbacks, vanishing])
    assert not (tmp_path / "a.duckdb").exists()


def test_only_the_main_process_labels(trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    callback = LabelCallback(sae="none", corpus="none", run_dir=tmp_path)
    args, state = TrainingArguments(str(tmp_path), report_to=[]), TrainerState(is_world_process_zero=False)
    for event in (callback.on_train_begin, callback.on_train_end):
        event(args, state, None, model=trained.trainer.model)
    assert not caplog.records
    assert not list(tmp_path.iterdir())


class Interrupting(Reporter):
    """Presses Ctrl-C once the corpus is being read, and gives the other thread time to notice."""

    def __init__(self) -> None:
        self.pressed = False

    def advance(self, stage: str, n: int = 1, note: str = "") -> None:
        if not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)  # on a busy machine it takes its time


def test_ctrl_c_ends_the_labelling_and_not_the_training(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("autointerp.training._Log", Interrupting)
    model = trained.model
    options = {**SMALL, "tokens_per_batch": 256, "db": tmp_path / "a.duckdb"}
    callback = LabelCallback(**options, run_dir=tmp_path / "run")
    args, state = TrainingArguments(str(tmp_path), report_to=[]), TrainerState()
    callback.on_train_begin(args, state, None, model=model, processing_class=trained.tokenizer)
    before = state_of(model)
    callback.on_train_end(args, state, None, model=model, processing_class=trained.tokenizer)
    check_same(before, state_of(model))
    assert callback.results is None
    assert ["interrupted" in record.getMessage() for record in caplog.records] == [True]
    assert str(tmp_path / "run" / "run.yaml") in caplog.text


def test_it_works_inside_a_running_event_loop(trained: Trained, tmp_path: Path):
    async def cell() -> Results:
        options = {**SMALL, "selector": "random", "top": 2, "max_tokens": 3000, "db": tmp_path / "a.duckdb"}
        return label_model(trained.model, trained.tokenizer, run_dir=tmp_path, **options)

    results = asyncio.run(cell())
    assert results.status == "done"
    assert results.sql("SELECT count(*) FROM labels").fetchone() == (2,)


def test_a_fully_trained_model_is_held_against_its_base(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(ORGANISM / "model", dtype=torch.float32).train()
    torch.manual_seed(0)
    with torch.no_grad():
        weight = model.transformer.h[1].mlp.c_proj.weight
        weight += 0.3 * weight.std() * torch.randn_like(weight)
    with pytest.raises(InputError, match="give base="):
        check_inputs(model, **SMALL)
    options = {**SMALL, "selector": "random", "top": 2, "max_tokens": 3000, "base": ORGANISM / "model"}
    check_inputs(model, **options)
    before = state_of(model)
    results = label_model(model, run_dir=tmp_path, db=tmp_path / "a.duckdb", **options)
    check_same(before, state_of(model))
    assert results.sql("SELECT adapter_format, count(*) FROM runs, labels GROUP BY 1").fetchone() == ("checkpoint", 2)
    again = ["label", "--run", str(tmp_path), "--selector", "random", "--top", "2", "--db", str(tmp_path / "a.duckdb")]
    assert cli.run([*again, "--quiet"]) == 0
    assert results.sql("SELECT count(*) FROM runs").fetchone() == (1,)


def test_adapters_that_are_active_together_are_one_change(tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(ORGANISM / "model", dtype=torch.float32)
    config = LoraConfig(target_modules=["mlp.c_proj"], layers_to_transform=[1], init_lora_weights=False)
    model: Any = get_peft_model(base, config, "style")
    model.add_adapter("facts", config)
    model.base_model.set_adapter(["style", "facts"])
    before = state_of(model)
    options = {**SMALL, "selector": "random", "top": 2, "max_tokens": 3000, "db": tmp_path / "a.duckdb"}
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM / "model")
    check_inputs(model, tokenizer, **options)
    results = label_model(model, tokenizer, run_dir=tmp_path / "run", **options)
    check_same(before, state_of(model))
    assert results.sql("SELECT status, adapters->>'$[*].name' FROM runs").fetchone() == ("done", ["facts", "style"])
    again = ["label", "--run", str(tmp_path / "run"), "--selector", "random", "--top", "2"]
    assert cli.run([*again, "--db", str(tmp_path / "a.duckdb"), "--quiet"]) == 0
    assert results.sql("SELECT count(*) FROM runs").fetchone() == (1,)


def test_what_was_trained_since_another_adapter_in_memory(tmp_path: Path):
    """As DPO has it: `ref` is the adapter that `default` began as. In memory, and from the files that are left."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(ORGANISM / "model", dtype=torch.float32)
    configs = [
        LoraConfig(target_modules=["mlp.c_proj"], layers_to_transform=layers, modules_to_save=saved, r=4)
        for layers, saved in (([1], ["ln_f"]), ([0, 1], None))
    ]
    model: Any = get_peft_model(base, configs[0])
    model.add_adapter("ref", configs[1])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=draw))
    before = state_of(model)
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM / "model")
    options = {**SMALL, "max_tokens": 6000, "db": tmp_path / "a.duckdb"}
    with pytest.raises(InputError, match="beside the active adapter the model in memory holds ref"):
        check_inputs(model, tokenizer, since="start", **options)
    check_inputs(model, tokenizer, since="ref", **options)
    results = label_model(model, tokenizer, run_dir=tmp_path / "run", since="ref", **options)
    check_same(before, state_of(model))
    columns = "SELECT latent, round(mean_base, 3), round(mean_adapted, 3) FROM latents WHERE freq_base > .01 ORDER BY 1"
    found = results.sql(columns).fetchall()
    assert results.sql("SELECT since FROM runs").fetchone() == (str(tmp_path / "run/since/ref"),)
    again = ["label", "--run", str(tmp_path / "run"), "--top", "5", "--quiet", "--db"]
    assert cli.run([*again, str(tmp_path / "a.duckdb")]) == 0
    assert results.sql("SELECT count(*) FROM runs").fetchone() == (1,), "the same run"
    assert cli.run([*again, str(tmp_path / "b.duckdb")]) == 0
    files = autointerp.open(tmp_path / "b.duckdb")
    assert files.sql(columns).fetchall() == found
    whole = label_model(model, tokenizer, run_dir=tmp_path / "whole", **{**options, "db": tmp_path / "c.duckdb"})
    assert whole.sql(columns).fetchall() != found, "since the base it is another change"


def test_wrappers_are_taken_off_and_shards_refused(trained: Trained):
    model = trained.model
    assert bare(nn.DataParallel(model)) is model
    wrapped = nn.Module()
    wrapped._orig_mod = model  # as torch.compile leaves it
    assert bare(wrapped) is model
    with pytest.raises(InputError, match="Linear is no PEFT"):
        bare(nn.Linear(1, 1))
    weight = next(model.parameters())
    weight.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with pytest.raises(InputError, match="spread over processes"):
            bare(model)
    finally:
        del weight.ds_id  # pyright: ignore[reportAttributeAccessIssue]


def test_the_example_prints_the_changed_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    EXAMPLE.main(tmp_path, steps=2, max_tokens=10_000, top=3)
    printed = capsys.readouterr().out
    assert "latent" in printed
    assert f"{autointerp.open(tmp_path / 'labels.duckdb').sql('FROM changed_latents').table.num_rows} rows" in printed


def test_importing_the_package_loads_no_torch():
    code = "import sys, autointerp; assert 'LabelCallback' in dir(autointerp); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
