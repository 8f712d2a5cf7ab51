"""The command line: parse, call, render. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from autointerp import __version__
from autointerp.errors import AutointerpError, InputError

if TYPE_CHECKING:
    from autointerp.pipeline import Job
    from autointerp.results import Results

DEFAULT_DB = "results/autointerp.duckdb"
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


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


_TOP = click.option("--top", type=_Top(), help="Latents to select; auto: until they add little.  [default: 50]")
_DB = click.option("--db", type=click.Path(path_type=Path), default=DEFAULT_DB, help="The DuckDB store.")
_RUN_ID = click.option("--run-id", help="A run of the store, by its id or the beginning of one.  [default: the newest]")
_RUN = _options(
    click.option(
        "--run", "path", type=click.Path(path_type=Path), required=True, help="Run directory, or its run.yaml."
    ),
    click.option("--base", help="Base model: path or hub id.  [default: what the adapter names]"),
    click.option("--adapter", help="Adapter: path or hub id.  [default: the run directory]"),
    click.option("--sae", help="SAE: a local folder, or a SAELens release/sae_id."),
    click.option("--hook", help="Hook point.  [default: what the SAE's config says]"),
    click.option("--corpus", help=".jsonl, .parquet, .txt, a folder of them, a saved dataset, or a hub id."),
    click.option("--text-column", help="Column of the text, or of chat messages.  [default: text]"),
    click.option("--context-length", type=click.IntRange(min=8), help="Positions of a sequence.  [default: 128]"),
    click.option("--max-tokens", type=click.IntRange(min=8), help="Document tokens to read.  [default: 1000000]"),
    _TOP,
    click.option("--selector", multiple=True, help="Of several, the first ranks.  [default: change]"),
    click.option("--outcome-column", help="Column of numbers, one a document, for --selector outcome."),
    click.option("--sae-adapted", help="The SAE fine-tuned on the adapted model, for --selector rotation."),
    click.option("--fdr", type=float, help="False discovery rate of the tests.  [default: 0.05]"),
    click.option("--device", help="cpu, cuda, …  [default: a GPU where there is one]"),
    click.option("--dtype", help="float32, bfloat16, float16.  [default: float32]"),
    click.option("--seed", type=click.IntRange(min=0), help="Of document order, sampling and decoys.  [default: 0]"),
    click.option("--scratch", type=click.Path(path_type=Path), help="Folder for large temporary files."),
    _DB,
    click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on standard output."),
    click.option("--quiet", is_flag=True, help="No progress, no table."),
)
_LABELING = _options(
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
    "base", "adapter", "sae", "hook", "corpus", "text_column", "context_length", "max_tokens", "top", "fdr", "device",
    "dtype", "seed", "scratch", "outcome_column", "sae_adapted",
)  # fmt: skip


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="autointerp")
def cli() -> None:
    """What did the training change? Labels for the SAE latents that an adapter changed."""


@cli.command()
@_RUN
@_LABELING
def label(**options: Any) -> int:
    """Select the latents that carry the change, collect their contexts, label and score them."""
    job = _job(options)
    if options["dry_run"]:
        return _dry_run(job, options["as_json"])
    _confirm(job, options)
    return _finish(_run(job, options), options)


@cli.command()
@_RUN
def select(**options: Any) -> int:
    """The change statistics and the selection only: no contexts, no labels."""
    return _finish(_run(_job(options, select_only=True), options), options)


@cli.command()
@_RUN
def check(**options: Any) -> int:
    """Is it real? What the selected latents do by cause, on held-out documents, against random ones."""
    import asyncio

    from autointerp.checking import acheck
    from autointerp.progress import BarReporter, Reporter

    _quiet_libraries()
    shown = not options["quiet"] and not options["as_json"]
    results = asyncio.run(acheck(_job(options), reporter=BarReporter() if shown else Reporter()))
    if options["as_json"]:
        from autointerp.checking import summary

        click.echo(json.dumps(summary(results), default=str))
    elif shown:
        from autointerp.show_checks import checks
        from autointerp.store import Store

        with Store.open(results.path, "read") as store:
            checks(store, results.run_id)
    return results.exit_status


@cli.command()
@click.argument("sql")
@_DB
@click.option("--format", "form", type=click.Choice(["table", "csv", "json", "parquet"]), default="table")
@click.option("--out", type=click.Path(path_type=Path), help="Write here instead of standard output.")
def query(sql: str, db: Path, form: str, out: Path | None) -> int:
    """Read-only SQL over the store; works while a job is writing it. Start with: select * from changed_latents"""
    from autointerp.show import query_table
    from autointerp.store.query import run_query

    query_table(run_query(db, sql), form, out)  # pyright: ignore[reportArgumentType]
    return 0


@cli.command()
@click.argument("latent", type=int, required=False)
@_DB
@_RUN_ID
@click.option("--json", "as_json", is_flag=True, help="As JSON, one object a latent.")
@click.option("--units", is_flag=True, help="What the adapter's hidden units read and write, a sentence each.")
def show(latent: int | None, db: Path, run_id: str | None, as_json: bool, units: bool) -> int:
    """The labelled latents as a table; with LATENT, that one with its contexts."""
    from autointerp import show as render
    from autointerp.store import Store
    from autointerp.store.export import latent_objects

    with Store.open(db, "read") as store:
        wanted = store.run_id(run_id)
        if units:
            from autointerp import show_units

            show_units.table(store, wanted)
        elif as_json:
            found = [item for item in latent_objects(store, wanted) if latent in (None, item["latent"])]
            if latent is not None and not found:
                raise InputError(f"run {wanted} selected no latent {latent}: `autointerp show` lists those it did")
            for item in found:
                click.echo(json.dumps(item, default=str))
        elif latent is None:
            render.table(store, wanted)
        else:
            render.latent(store, latent, wanted)
    return 0


@cli.command()
@click.argument("first")
@click.argument("second")
@_DB
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def compare(first: str, second: str, db: Path, as_json: bool) -> int:
    """Two runs of one dictionary side by side: latents on which the adapters add, cancel or interfere."""
    from autointerp.compare import compare as compared
    from autointerp.show_comparison import comparison
    from autointerp.store import Store

    with Store.open(db, "read") as store:
        found = compared(store, first, second)
    if as_json:
        click.echo(json.dumps(found.summary()))
    else:
        comparison(found)
    return 0


@cli.command()
@click.option("--format", "form", default="jsonl", help="parquet or jsonl.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File or folder to write.")
@_DB
@_RUN_ID
@click.option("--force", is_flag=True, help="Overwrite what is there.")
def export(form: str, out: Path, db: Path, run_id: str | None, force: bool) -> int:
    """Hand the labels on."""
    from autointerp.store.export import export as write

    click.echo(str(write(db, form, out, run_id, force)))  # pyright: ignore[reportArgumentType]
    return 0


@cli.command()
@_DB
@_LABELING
@_TOP
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on standard output.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def demo(**options: Any) -> int:
    """The whole job on the model, SAE, adapter and corpus inside the package: no network, no key."""
    from autointerp.demo import ORGANISM

    options = {"path": ORGANISM, "selector": (), **options}
    job = _job(options)
    if options["dry_run"]:
        return _dry_run(job, options["as_json"])
    _confirm(job, options)
    status = _finish(_run(job, options), options)
    if not options["quiet"] and not options["as_json"]:
        click.echo(_NEXT.format(db="" if str(job.db) == DEFAULT_DB else f" --db {job.db}"))
    return status


_NEXT = """
Next:
  autointerp show LATENT{db}             one latent, with the contexts it fires in
  autointerp query "select latent, label, effect from changed_latents order by rank"{db}
  autointerp label --run YOUR_ADAPTER --sae SAE --corpus TEXTS.jsonl
"""


def _job(options: dict[str, Any], select_only: bool = False) -> Job:
    from autointerp.pipeline import Job
    from autointerp.run import WEIGHTS_ONLY, Run

    flags: dict[str, Any] = {key: options.get(key) for key in _RUN_KEYS}
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


def _run(job: Job, options: dict[str, Any]) -> Results:
    import asyncio

    from autointerp.pipeline import alabel
    from autointerp.progress import BarReporter, Reporter

    _quiet_libraries()
    shown = not options["quiet"] and not options["as_json"]
    return asyncio.run(alabel(job, reporter=BarReporter() if shown else Reporter()))


def _finish(results: Results, options: dict[str, Any]) -> int:
    if options["as_json"]:
        click.echo(json.dumps(results.summary(), default=str))
    elif not options["quiet"] and results.status is not None:
        from autointerp.show import table
        from autointerp.store import Store

        with Store.open(results.path, "read") as store:
            table(store, results.run_id)
    return results.exit_status


def _dry_run(job: Job, as_json: bool) -> int:
    from autointerp.pipeline import estimate_job
    from autointerp.run import AUTO_TOP

    plan = estimate_job(job)
    if as_json:
        click.echo(json.dumps(plan))
    else:
        dollars = "no listed price: give --prices"
        if plan["usd_high"] is not None:
            dollars = f"${plan['usd_low']:.4f} – ${plan['usd_high']:.4f}"
        up_to = "up to " if job.run.settings.top == "auto" and plan["latents"] == AUTO_TOP else ""
        click.echo(
            f"{up_to}{plan['latents']} latents, {plan['calls']} calls to {_asked(job)},"
            f" {plan['input_tokens']} + {plan['output_tokens']} tokens, {dollars},"
            f" {plan['seconds_low']:.0f} – {plan['seconds_high']:.0f} s of calls. Nothing was spent."
        )
    return 0


def _asked(job: Job) -> str:
    return " and ".join(job.labelers) if job.every else job.labeler


def _confirm(job: Job, options: dict[str, Any]) -> None:
    """Before money is spent at a terminal, say how much; scripts and --yes are not asked."""
    if (
        options["yes"]
        or options["quiet"]
        or options["as_json"]
        or not any(":" in spec for spec in job.labelers)
        or not sys.stdin.isatty()
    ):
        return
    from autointerp.labeling.base import check_labeler
    from autointerp.pipeline import estimate_job

    for spec in job.labelers:
        check_labeler(spec, job.settings("?"))
    plan = estimate_job(job)
    cost = "an unknown amount" if plan["usd_high"] is None else f"${plan['usd_low']:.2f} – ${plan['usd_high']:.2f}"
    if not click.confirm(f"{plan['calls']} calls to {_asked(job)}, {cost}. Go on?", default=True, err=True):
        raise SystemExit(0)


def _quiet_libraries() -> None:
    """Their progress bars and warnings would tear ours; errors still come through as exceptions."""
    import logging
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore")
    for name in ("transformers", "sae_lens", "datasets", "httpx", "asyncio", "transformer_lens"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point: every ending is an exit status of the contract, every error of a user one line."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """The command in `args`; its exit status."""
    try:
        return cli.main(args=args, prog_name="autointerp", standalone_mode=False) or 0
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "autointerp"
        return _fail(InputError(f"{error.format_message()} (see {command} --help)"))
    except AutointerpError as error:
        return _fail(error)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        sys.stdout = None  # the reader went away: nobody is left to tell
        return 0


def _fail(error: AutointerpError) -> int:
    click.echo(f"autointerp: {error}", err=True)
    return error.exit_status
