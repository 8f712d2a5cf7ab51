"""The options that commands share, and the job that their values ask for. Loads nothing heavy until a job is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from autointerp.pipeline import Job

DEFAULT_DB = "results/autointerp.duckdb"


def _options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class _Top(click.ParamType):
    """A number of latents, or `auto`."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return value if value == "auto" else click.IntRange(min=1).convert(value, param, ctx)


TOP = click.option("--top", type=_Top(), help="Latents to select; auto: until they add little.  [default: 50]")
DB = click.option("--db", type=click.Path(path_type=Path), default=DEFAULT_DB, help="The DuckDB store.")
RUN_ID = click.option("--run-id", help="A run of the store, by its id or the beginning of one.  [default: the newest]")
RUN = _options(
    click.option(
        "--run", "path", type=click.Path(path_type=Path), required=True, help="Run directory, or its run.yaml."
    ),
    click.option("--base", help="Base model: path or hub id.  [default: what the adapter names]"),
    click.option(
        "--adapter",
        multiple=True,
        help="Adapter: path or hub id; several PEFT adapters are active together.  [default: the run directory]",
    ),
    click.option("--since", help="Adapter that the base side carries: what was trained since it.  [default: none]"),
    click.option("--sae", help="SAE: a local folder, or a SAELens release/sae_id."),
    click.option("--hook", help="Hook point.  [default: what the SAE's config says]"),
    click.option("--corpus", help=".jsonl, .parquet, .txt, a folder of them, a saved dataset, or a hub id."),
    click.option("--text-column", help="Column of the text, or of chat messages.  [default: text]"),
    click.option("--context-length", type=click.IntRange(min=8), help="Positions of a sequence.  [default: 128]"),
    click.option("--max-tokens", type=click.IntRange(min=8), help="Document tokens to read.  [default: 1000000]"),
    TOP,
    click.option("--selector", multiple=True, help="Of several, the first ranks.  [default: change]"),
    click.option("--outcome-column", help="Column of numbers, one a document, for --selector outcome."),
    click.option("--sae-adapted", help="The SAE fine-tuned on the adapted model, for --selector rotation."),
    click.option("--fdr", type=float, help="False discovery rate of the tests.  [default: 0.05]"),
    click.option(
        "--checkpoints",
        type=click.IntRange(min=0),
        help="Checkpoints of a training to follow the latents over, evenly spaced; 0: none.  [default: 20]",
    ),
    click.option("--device", help="cpu, cuda, …  [default: a GPU where there is one]"),
    click.option("--dtype", help="float32, bfloat16, float16.  [default: float32]"),
    click.option("--seed", type=click.IntRange(min=0), help="Of document order, sampling and decoys.  [default: 0]"),
    click.option("--scratch", type=click.Path(path_type=Path), help="Folder for large temporary files."),
    DB,
    click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on standard output."),
    click.option("--quiet", is_flag=True, help="No progress, no table."),
)
LABELING = _options(
    click.option(
        "--labeler",
        multiple=True,
        help="lexical, openai:MODEL, anthropic:MODEL; a second one takes what the first leaves.  [default: lexical]",
    ),
    click.option("--all", "every", is_flag=True, help="Every --labeler labels everything: second opinions."),
    click.option(
        "--scorer",
        multiple=True,
        help="rule, detection, fuzzing, simulation, intruder, contrast, embedding:MODEL.  [default: the labeler's own]",
    ),
    click.option("--api", type=click.Choice(["chat", "responses"]), help="OpenAI's API to ask.  [default: chat]"),
    click.option("--max-usd", type=float, help="Never spend more than this on the run."),
    click.option("--rpm", type=int, help="Requests per minute."),
    click.option("--tpm", type=int, help="Tokens per minute, input and output together."),
    click.option("--itpm", type=int, help="Input tokens per minute."),
    click.option("--otpm", type=int, help="Output tokens per minute."),
    click.option("--concurrency", type=int, default=8, help="Requests in flight at most."),
    click.option("--batch", is_flag=True, help="Ask in batches: half the price, up to a day."),
    click.option("--prompts", type=click.Path(path_type=Path), help="Folder whose templates replace the package's."),
    click.option("--prices", type=click.Path(path_type=Path), help="JSON file of model prices to add or replace."),
    click.option("--ask-all", is_flag=True, help="Ask the model about token, bigram and trigram features, too."),
    click.option("--dry-run", is_flag=True, help="Say what it would do and cost; spend nothing."),
    click.option("--yes", is_flag=True, help="Do not ask before spending money."),
)
_RUN_KEYS = (
    "base", "since", "sae", "hook", "corpus", "text_column", "context_length", "max_tokens", "top", "fdr", "device",
    "dtype", "seed", "scratch", "outcome_column", "sae_adapted", "checkpoints",
)  # fmt: skip


def job_of(options: dict[str, Any], select_only: bool = False) -> Job:
    """InputError, in one line, for a run that is not one."""
    from autointerp.pipeline import Job
    from autointerp.run import WEIGHTS_ONLY, Run

    flags: dict[str, Any] = {key: options.get(key) for key in _RUN_KEYS}
    flags["adapter"] = options.get("adapter") or None
    selectors = options["selector"] or None
    by_weights = select_only and selectors is not None and set(selectors) <= set(WEIGHTS_ONLY)
    run = Run.load(options["path"], need=() if by_weights else ("base", "corpus"), selector=selectors, **flags)
    labeling = {
        "max_usd": options.get("max_usd"),
        "api": options.get("api"),
        "batch": options.get("batch") or None,
        "rpm": options.get("rpm"),
        "tpm": options.get("tpm"),
        "itpm": options.get("itpm"),
        "otpm": options.get("otpm"),
        "concurrency": options.get("concurrency"),
        "prompts_dir": options.get("prompts"),
        "prices_path": options.get("prices"),
        "ask_all": options.get("ask_all") or None,
    }
    labelers = tuple(options.get("labeler") or ()) or ("lexical",)
    return Job(
        run,
        db=options["db"],
        labeler=labelers[0],
        fallbacks=labelers[1:],
        every=options.get("every", False),
        scorers=tuple(options.get("scorer") or ()),
        labeling={key: value for key, value in labeling.items() if value is not None},
        select_only=select_only,
    )
