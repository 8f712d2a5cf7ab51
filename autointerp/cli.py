"""The command line: parse, call, render. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from autointerp import __version__
from autointerp.cli_options import DB, DEFAULT_DB, LABELING, RUN, RUN_ID, TOP, job_of
from autointerp.errors import AutointerpError, InputError

if TYPE_CHECKING:
    from autointerp.pipeline import Job
    from autointerp.progress import Reporter
    from autointerp.results import Results

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="autointerp")
def cli() -> None:
    """What did the training change? Labels for the SAE latents that an adapter changed."""


@cli.command()
@RUN
@LABELING
def label(**options: Any) -> int:
    """Select the latents that carry the change, collect their contexts, label and score them."""
    job = job_of(options)
    if options["dry_run"]:
        return _dry_run(job, options["as_json"])
    _confirm(job, options)
    return _finish(_run(job, options), options)


@cli.command()
@RUN
def select(**options: Any) -> int:
    """The change statistics and the selection only: no contexts, no labels."""
    return _finish(_run(job_of(options, select_only=True), options), options)


@cli.command()
@RUN
def check(**options: Any) -> int:
    """Is it real? What the selected latents do by cause, on held-out documents, against random ones."""
    import asyncio

    from autointerp.checking import acheck

    results = asyncio.run(acheck(job_of(options), reporter=_reporter(options)))
    if options["as_json"]:
        from autointerp.checking import summary

        click.echo(json.dumps(summary(results), default=str))
    elif not options["quiet"]:
        from autointerp.show_checks import checks
        from autointerp.store import Store

        with Store.open(results.path, "read") as store:
            checks(store, results.run_id)
    return results.exit_status


@cli.command()
@click.argument("sql")
@DB
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
@DB
@RUN_ID
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
@DB
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
@click.argument("runs", nargs=-1, required=True)
@DB
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def lineage(runs: tuple[str, ...], db: Path, as_json: bool) -> int:
    """Selected latents from layer to layer: counterparts in the dictionaries of other RUNS, by their decoder rows."""
    from autointerp.lineage import lineage as followed
    from autointerp.show_lineage import lineage as render
    from autointerp.store import Store

    with Store.open(db, "read") as store:
        found = followed(store, runs)
    if as_json:
        click.echo(json.dumps(found.summary()))
    else:
        render(found)
    return 0


@cli.command()
@click.option("--format", "form", default="jsonl", help="parquet or jsonl.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File or folder to write.")
@DB
@RUN_ID
@click.option("--force", is_flag=True, help="Overwrite what is there.")
def export(form: str, out: Path, db: Path, run_id: str | None, force: bool) -> int:
    """Hand the labels on."""
    from autointerp.store.export import export as write

    click.echo(str(write(db, form, out, run_id, force)))  # pyright: ignore[reportArgumentType]
    return 0


@cli.command()
@DB
@LABELING
@TOP
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on standard output.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def demo(**options: Any) -> int:
    """The whole job on the model, SAE, adapter and corpus inside the package: no network, no key."""
    from autointerp.demo import ORGANISM

    options = {"path": ORGANISM, "selector": (), **options}
    job = job_of(options)
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


def _run(job: Job, options: dict[str, Any]) -> Results:
    import asyncio

    from autointerp.pipeline import alabel

    return asyncio.run(alabel(job, reporter=_reporter(options)))


def _reporter(options: dict[str, Any]) -> Reporter:
    """Bars, unless the command is to be silent or to print JSON; from here on no library prints into them."""
    from autointerp.progress import BarReporter, Reporter

    _quiet_libraries()
    return Reporter() if options["quiet"] or options["as_json"] else BarReporter()


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
