"""Tokens and dollars per label and per scored label on the demo, as the ledger counts them at listed prices.

A loopback server stands in for the provider: it counts the tokens of what it is sent and of what it says with a real
tokenizer (cl100k_base), caches nothing, and bills that. Its labels have the length of real ones. Its verdicts are coin
flips: a judge without a clue is among the dear ones, since little is decided early; the last column has the dearest
case that there is, every example bought.

    python benchmarks/cost.py --write results/cost.md      needs: pip install -e ".[benchmarks]"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tiktoken  # pyright: ignore[reportMissingImports]

from autointerp.api import make_job
from autointerp.demo import ORGANISM
from autointerp.labeling.llm.estimate import estimate
from autointerp.labeling.llm.prices import find_price
from autointerp.pipeline import alabel
from autointerp.results import Results
from autointerp.store import Store

MODEL = "gpt-6-luna"
SCORERS = ("detection", "fuzzing", "contrast", "intruder", "simulation")
CHAT_TOKENS, MESSAGE_TOKENS = 3, 4
"""Of the chat format, each question and each message."""
LABEL = {
    "label": "assertion method called on self",
    "explanation": "Fires on the dot after ` self` where a method of a unittest.TestCase is called, most strongly at "
    "the beginning of a line inside a test method; silent on attributes that are only read.",
    "effect": "Pushes the names of assertion methods such as ` assertEqual` and ` assertTrue`, suppresses plain "
    "attribute names, and the old use fades.",
}


def answer(system: str, user: str) -> str:
    """A label of real length, or coin flips that are the same for the same question."""
    coin = random.Random(user)
    n = len(re.findall(r"^\d+: ", user, re.MULTILINE))
    if '"fires"' in system or '"right"' in system:
        return json.dumps({"fires" if '"fires"' in system else "right": [coin.randrange(2) for _ in range(n)]})
    if '"after"' in system:
        return json.dumps({"after": [coin.choice("AB") for _ in range(n)]})
    if '"intruder"' in system:
        return json.dumps({"intruder": coin.randint(1, 4)})
    if '"1":[' in system:
        rows = re.findall(r"^(\d+)\t(.*)$", user, re.MULTILINE)
        digits = {n: [coin.choice((0, 0, 0, 0, 7)) for _ in row.split("\t")] for n, row in rows}
        return json.dumps(digits, separators=(",", ":"))  # as the question shows it
    if '"sentences"' in system:
        listed = [int(latent) for latent in re.findall(r"^\[(\d+)\]", user, re.MULTILINE)]
        return json.dumps({"sentences": [{"text": LABEL["effect"], "latents": listed[i : i + 5]} for i in (0, 5, 10)]})
    # Each latent another label: one that is everybody's would leave no wrong one to score.
    return json.dumps(LABEL | {"label": f"{LABEL['label']} {coin.randrange(1000)}"})


class Provider(BaseHTTPRequestHandler):
    """Chat completions with honest usage."""

    encoding: Any = None

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = [message["content"] for message in request["messages"]]
        schema = request.get("response_format", {}).get("json_schema", {})  # sent, so counted
        read = CHAT_TOKENS + sum(MESSAGE_TOKENS + self.count(text) for text in said)
        read += self.count(json.dumps(schema.get("schema"))) if schema else 0
        text = answer(said[0], said[-1])
        usage = {"prompt_tokens": read, "completion_tokens": self.count(text)}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = json.dumps({"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def count(self, text: str) -> int:
        return len(self.encoding.encode(text, disallowed_special=()))

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def spent(results: Results, purpose: str, since: int) -> tuple[int, int, int, float]:
    """(calls, input tokens, output tokens, dollars) of the calls of a purpose beyond the first `since`."""
    sql = """SELECT count(*), sum(input_tokens), sum(output_tokens), sum(usd) FROM
    (SELECT * FROM calls WHERE purpose = ? ORDER BY started_at, call_id OFFSET ?)"""
    return results.sql(sql, [purpose, since]).fetchall()[0]  # pyright: ignore[reportReturnType]


def measure(folder: Path) -> list[str]:
    """The rows of the table."""
    rows: list[str] = []
    price = find_price(MODEL)
    assert price is not None
    db, since, label_usd = folder / "store.duckdb", 0, 0.0
    for scorer in SCORERS:
        job = make_job(ORGANISM, labeler=f"openai:{MODEL}", scorer=scorer, db=db, ask_all=True)
        results = asyncio.run(alabel(job))
        with Store.open(db, "read") as store:
            k = len(store.selected(results.run_id))
            n_examples = store.read("SELECT avg(n_examples) AS n FROM scores WHERE scorer = ?", [scorer])[0]["n"]
            evidence = [store.evidence(results.run_id, j) for j in store.selected(results.run_id)]
        if not rows:
            calls, read, wrote, label_usd = spent(results, "label", 0)
            rows.append(f"| label | {calls / k:.1f} | {read / k:,.0f} | {wrote / k:,.0f} | | {label_usd / k:.6f} | |")
        calls, read, wrote, usd = spent(results, "score", since)
        since += calls
        whole = estimate(job.labeler, [], (scorer,), job.settings(results.run_id), {scorer: evidence})
        dearest = price.usd(whole.input_tokens, whole.output_tokens) / k
        rows.append(
            f"| {scorer} | {calls / k:.1f} | {read / k:,.0f} | {wrote / k:,.0f} | {n_examples:.0f} | "
            f"{(label_usd + usd) / k:.6f} | {label_usd / k + dearest:.6f} |"
        )
    calls, read, wrote, usd = spent(results, "summary", 0)
    rows.append(f"| summary of the run | 1 | {read / calls:,.0f} | {wrote / calls:,.0f} | | {usd / calls:.6f} | |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Write the table here instead of printing it.")
    arguments = parser.parse_args()
    names = tiktoken.list_encoding_names()
    Provider.encoding = tiktoken.get_encoding(
        next((n for n in names if "cl100k" in n and "offline" in n), "cl100k_base")
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1", "OPENAI_API_KEY": "none"}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    head = [
        "# What a label and a scored label cost",
        "",
        f"The demo's latents, known ones too, {MODEL} at its listed price ($.10 / $.50 a million tokens), one by one,",
        "nothing cached; tokens by cl100k_base, dollars by the ledger. A scored label is the label, its score and the",
        "wrong label's. The stand-in labels share one effect, so contrast is without its wrong label (about twice its",
        "score with it). The server tells no probabilities, which are not billed. In a batch, where larger looks are",
        "bought, it is half of the last column at most.",
        "Published figures: explanation 963 + 30 tokens, detection 778 + 12 for five examples.",
        "",
        "| for each latent | calls | input tokens | output tokens | examples | $ a (scored) label |"
        " $ at most, estimated |",
        "|---|---|---|---|---|---|---|",
    ]
    table = "\n".join([*head, *rows]) + "\n"
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(table)
    else:
        print(table)


if __name__ == "__main__":
    main()
