"""Labels for a model that has just been trained and is still in memory: a callback, and a function for one's own loop.

Both write a run directory first, the adapter included, so that `autointerp label --run DIR` finds the same run again.
Then they label from the weights in memory, of which no copy is made, and leave the training as it was, to the bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import logging
import os
import shlex
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from autointerp.api import make_job
from autointerp.errors import AutointerpError, InputError
from autointerp.in_memory import (
    Trained,
    bare,
    device_and_dtype,
    pair_of,
    save,
    save_placeholder,
    undisturbed,
    untrained_pair_of,
)
from autointerp.pipeline import DEFAULT_DB, Job, alabel, check_scorers
from autointerp.progress import BarReporter, Reporter
from autointerp.results import Results
from autointerp.run import KEYS, RUN_FILE, Settings
from autointerp.stopping import Stop
from autointerp.terminal import visible

if TYPE_CHECKING:
    from autointerp.evidence.model_pair import ModelPair

logger = logging.getLogger("autointerp")

ADAPTER, SINCE = "adapter", "since"
"""Folders of the run directory: what was trained, and the adapter that the base side carries."""
SHOWN = 5
"""Labels in the summary."""
_FLAGS = ("top", "selector", "fdr", "seed", "dtype", "outcome_column", "sae_adapted")
"""Settings that are part of a run's id and not of run.yaml."""


class LabelCallback(TrainerCallback):
    """Labels what the training changed, at its end: `trainer.add_callback(LabelCallback(sae=…, corpus=…))`.

    `run_dir` is `autointerp` in the trainer's output directory unless given; all other options are `label_model`'s.
    They are checked when the training begins. Whatever is wrong with them, or goes wrong later, is one warning of the
    logger `autointerp`, and the training goes on. The main process labels, the others do not.
    """

    def __init__(
        self,
        *,
        sae: str | os.PathLike[str],
        corpus: str | os.PathLike[str],
        run_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ):
        self._run_dir, self._options = run_dir, {"sae": sae, "corpus": corpus, **options}
        self._checked = False
        self.results: Results | None = None
        """What was found; None before the end of the training, and where nothing was labelled."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.results, self._checked = None, False
        if not state.is_world_process_zero or state.is_hyper_param_search:  # nobody asked for every trial's labels
            return
        try:
            check_inputs(kwargs["model"], kwargs.get("processing_class"), **self._options)
        except Exception as error:  # nothing here may end a training
            logger.warning("autointerp: this training will not be labelled: %s", _cause(error))
        else:
            self._checked = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._checked:
            return
        run_dir = Path(args.output_dir) / "autointerp" if self._run_dir is None else Path(self._run_dir)
        tokenizer = kwargs.get("processing_class")
        try:
            self.results = label_model(kwargs["model"], tokenizer, run_dir=run_dir, **self._options)
            for line in summary(self.results):
                _tell(line)
        except (Exception, KeyboardInterrupt) as error:  # the trained model is still to be saved
            later = f"; the command to label it is in {run_dir / RUN_FILE}" if (run_dir / RUN_FILE).exists() else ""
            logger.warning("autointerp: this training was not labelled: %s%s", _cause(error), later)
            logger.debug("autointerp: where that was", exc_info=error)


def label_model(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    sae: str | os.PathLike[str],
    corpus: str | os.PathLike[str],
    run_dir: str | os.PathLike[str],
    since: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Results:
    """What the training changed in `model`: a run in `run_dir`, its labels in the store.

    model: a PEFT model; or, with `base=` (a path or hub id, loaded beside it), a transformers model all of which was
    trained. Wrappers of accelerate, DDP and torch.compile may be around it. tokenizer: the base's own where None.
    since: the name of another adapter in the PEFT model, which the base side carries: `ref` asks what DPO or GRPO
    changed in the adapter that it began with.
    `options`: as `autointerp.label`; device and dtype are the model's.

    In an event loop it may be called too; the loop waits. Afterwards the model and all generators of random numbers are
    as they were. InputError for bad input. Ctrl-C lets what is under way be finished: `Results.status` says so.
    """
    trained = bare(model)
    folder = Path(run_dir).expanduser().resolve()
    with undisturbed(trained):
        pair = pair_of(trained, options.get("base"), since)
        adapter = save(trained, folder / ADAPTER)
        start = None if since is None else save(trained, folder / SINCE, [since])
        job = _job(adapter, trained, sae=sae, corpus=corpus, since=start, **options)
        job = dataclasses.replace(job, run=dataclasses.replace(job.run, path=folder))
        own = _own_tokenizer(tokenizer, job, adapter)
        _write_run_file(job)
        results = _in_own_loop(job, pair, own, BarReporter() if progress else _Log())
    if job.run.hook is None:  # a dictionary from the hub names it once it is loaded
        hook = results.sql("SELECT hook FROM runs WHERE run_id = ?", [results.run_id]).fetchone()
        _write_run_file(dataclasses.replace(job, run=job.run.with_hook(hook[0] if hook else None)))
    if results.exit_status:
        logger.warning("autointerp: ended as %s; to finish: %s", results.status, command(job))
    return results


def check_inputs(
    model: nn.Module, tokenizer: Any = None, *, since: str | None = None, progress: bool = False, **options: Any
) -> None:
    """InputError for what would stop `label_model` after the training, as far as it can be seen before.

    Options, SAE, corpus, hook and store are opened and held against the model; nothing is written.
    """
    from autointerp.evidence.gather import Evidence
    from autointerp.labeling.base import check_labeler
    from autointerp.store import Store

    trained = bare(model)
    with undisturbed(trained), tempfile.TemporaryDirectory() as folder:
        pair = untrained_pair_of(trained, options.get("base"), since)
        start = None if since is None else save_placeholder(Path(folder) / SINCE)
        job = _job(save_placeholder(Path(folder)), trained, since=start, **options)
        check_labeler(job.labeler, job.settings("?"))
        check_scorers(job)
        if job.db.exists():
            Store.open(job.db, "read").close()
        settings = dataclasses.replace(job.run.settings, device="cpu")  # the dictionary's: leave a GPU's memory alone
        run = dataclasses.replace(job.run, settings=settings)
        Evidence.load(run, pair=pair, tokenizer=_own_tokenizer(tokenizer, job)).close()


def summary(results: Results) -> list[str]:
    """A few lines to print: how much was found, the labels of the first latents, where the rest is."""
    run = results.sql("SELECT * FROM runs WHERE run_id = ?", [results.run_id]).arrow().to_pylist()[0]
    rows = results.sql(
        "SELECT latent, label, effect FROM changed_latents WHERE run_id = ? ORDER BY rank", [results.run_id]
    ).fetchall()
    covered = "" if run["coverage"] is None else f", {run['coverage']:.0%} of the change"
    lines = [f"autointerp: {len(rows)} of {run['d_sae']:,} latents selected{covered} ({run['n_tokens']:,} tokens read)"]
    for latent, label, effect in rows[:SHOWN]:
        lines.append(visible(f"  {latent:>6}  {label or 'no label'}{f' → {effect}' if effect else ''}"))
    return [*lines, shlex.join(["autointerp", "show", "--run-id", results.run_id, "--db", results.path])]


def command(job: Job) -> str:
    """The command line that does this job, or what is left of it."""
    words = ["autointerp", "label", "--run", str(job.run.path)]
    for name in _FLAGS:
        value = getattr(job.run.settings, name)
        if value != getattr(Settings(), name):
            for one in value if isinstance(value, tuple) else (value,):
                words += [f"--{name.replace('_', '-')}", str(one)]
    words += ["--labeler", job.labeler] if job.labeler != "lexical" else []
    words += ["--db", str(job.db)] if str(job.db) != DEFAULT_DB else []
    return shlex.join(words)


def _job(adapter: Path, model: Trained, **options: Any) -> Job:
    """The job on the adapter's files, with the device and dtype that the model in memory has."""
    device, dtype = device_and_dtype(model)
    if options.setdefault("dtype", dtype) not in (None, dtype):
        raise InputError(f"dtype {options['dtype']}: the model in memory is {dtype}; leave dtype out")
    need = ("corpus",) if isinstance(model, PeftModel) else ("base", "corpus")
    return make_job(adapter, need=need, **{**options, "device": device, "dtype": dtype})


def _write_run_file(job: Job) -> None:
    values = {key: getattr(job.run, key) for key in KEYS}
    for key in ("adapter", "since"):
        values[key] = values[key] and os.path.relpath(values[key], job.run.path)
    lines = yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False)
    header = f"# Written at the end of the training. To finish its labels, or see them again:\n#   {command(job)}\n"
    (job.run.path / RUN_FILE).write_text(header + lines)


def _own_tokenizer(tokenizer: Any, job: Job, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """A copy, since encoding alters a tokenizer's padding and truncation; saved beside the adapter, as trainers do."""
    from autointerp.evidence.loading import load_tokenizer

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = getattr(tokenizer, "tokenizer", None)  # a processor of text and images has one
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        if job.run.base is None:
            raise InputError("no tokenizer: give the base model's, to the trainer as processing_class")
        return load_tokenizer(job.run.base)
    if adapter is not None:
        tokenizer.save_pretrained(str(adapter))
    return copy.deepcopy(tokenizer)


def _in_own_loop(job: Job, pair: ModelPair, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> Results:
    """The job in a thread with a loop of its own, whether or not this one runs a loop, as notebooks do.

    The signal handlers and the loop of this thread stay as they are. Ctrl-C asks the job to stop, and waits for it.
    """
    stop, loops = Stop(), []

    async def work() -> Results:
        loops.append(asyncio.get_running_loop())
        return await alabel(job, pair=pair, tokenizer=tokenizer, reporter=reporter, stop=stop)

    with ThreadPoolExecutor(1, "autointerp") as thread:
        working = thread.submit(lambda: asyncio.run(work()))
        while True:
            try:
                return working.result()
            except KeyboardInterrupt:
                stop.asked = True
                with contextlib.suppress(RuntimeError):  # closed: it is done
                    for loop in loops:
                        loop.call_soon_threadsafe(stop.ask)


class _Log(Reporter):
    """No bars; what the job says goes to the log."""

    def say(self, line: str) -> None:
        _tell(f"autointerp: {line}")


def _tell(line: str) -> None:
    """To the log, or to standard error where nobody has set logging up, in which case it would be lost."""
    if logger.hasHandlers():
        logger.info(line)
    else:
        print(line, file=sys.stderr)


def _cause(error: BaseException) -> str:
    """One line, whatever was raised."""
    if isinstance(error, AutointerpError):
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{': ' if first else ''}{first[:300]}"
