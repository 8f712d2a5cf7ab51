"""The batch endpoints of OpenAI and Anthropic on the fault server: half price, answered in any order."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .server import Fault, FaultServer


@dataclass
class Job:
    """One batch as the server knows it."""

    batch_id: str
    lines: list[dict[str, Any]]
    """{custom_id, path, body} of each request."""
    metadata: dict[str, str]
    created: float
    input_file: str = ""
    results: list[str] | None = None
    errors: list[str] = field(default_factory=list)
    status: str = "in_progress"
    completed: int = 0


class Desk:
    """Takes batches and answers each `delay_s` later. The lines meet the server's own plan, one fault each."""

    def __init__(self, server: FaultServer):
        self.server = server
        self.jobs: dict[str, Job] = {}
        self.files: dict[str, str] = {}
        self.delay_s = 0.02
        self.operations: list[str] = []
        """`POST /v1/batches` and the like, in the order of arrival."""
        self.fails: list[str] = []
        """Messages for the next batches that fail their validation as a whole."""

    def handle(self, method: str, target: str, raw: bytes) -> tuple[int, str] | None:
        """(status, body) of a request to a batch endpoint; None for other requests."""
        path = target.split("?")[0]
        for prefix, answer in (("/v1/messages/batches", self._anthropic), ("/v1/batches", self._openai)):
            if path.startswith(prefix):
                self.operations.append(f"{method} {path}")
                return answer(method, path[len(prefix) :].strip("/").split("/"), raw)
        if path.startswith("/v1/files"):
            self.operations.append(f"{method} {path}")
            return self._files(method, path.removeprefix("/v1/files").strip("/").split("/"), raw)
        return None

    def _files(self, method: str, parts: list[str], raw: bytes) -> tuple[int, str]:
        if method == "POST":
            file_id = f"file-{len(self.files)}"
            self.files[file_id] = _uploaded(raw)
            return 200, json.dumps({"id": file_id, "object": "file", "bytes": len(raw), "purpose": "batch"})
        if parts[-1] == "content":
            return 200, self.files[parts[0]]
        self.files.pop(parts[0], None)
        return 200, json.dumps({"id": parts[0], "object": "file", "deleted": True})

    def _openai(self, method: str, parts: list[str], raw: bytes) -> tuple[int, str]:
        if method == "POST" and parts == [""]:
            asked = json.loads(raw)
            lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
            job = self._take(
                [{"custom_id": line["custom_id"], "path": line["url"], "body": line["body"]} for line in lines],
                asked.get("metadata") or {},
                asked["input_file_id"],
            )
            return 200, json.dumps(self._openai_batch(job))
        if parts == [""]:
            return 200, json.dumps(_page([self._openai_batch(job) for job in self._newest()]))
        job = self.jobs[parts[0]]
        if parts[-1] == "cancel":
            job.status = "cancelled"
        return 200, json.dumps(self._openai_batch(job))

    def _openai_batch(self, job: Job) -> dict[str, Any]:
        self._finish(job, self._openai_line)
        done = job.results is not None
        output, errors = f"{job.batch_id}-output", f"{job.batch_id}-errors"
        if done:
            self.files[output] = "\n".join(job.results or []) + "\n"
            self.files[errors] = "\n".join(job.errors) + "\n"
        failed = [{"code": "invalid", "message": job.metadata["fails"], "line": 1}] if job.status == "failed" else None
        return {
            "id": job.batch_id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "input_file_id": job.input_file,
            "completion_window": "24h",
            "created_at": int(job.created),
            "status": job.status,
            "errors": {"object": "list", "data": failed} if failed else None,
            "output_file_id": output if done and job.results else None,
            "error_file_id": errors if done and job.errors else None,
            "request_counts": {"total": len(job.lines), "completed": job.completed, "failed": len(job.errors)},
            "metadata": job.metadata,
        }

    def _openai_line(self, job: Job, line: dict[str, Any], fault: Fault) -> None:
        answered = {"id": "batch_req", "custom_id": line["custom_id"], "response": None, "error": None}
        if fault.breaks == "expire":
            error = {"code": "batch_expired", "message": "This request could not be executed before it expired."}
            job.errors.append(json.dumps(answered | {"error": error}))
            job.status = "expired"
            return
        body = fault.body if fault.body is not None else self.server.answer(line["path"], line["body"], fault, 0.5)
        try:
            decoded: Any = json.loads(body)
        except ValueError:
            decoded = body
        response = {"status_code": fault.status, "request_id": "req", "body": decoded}
        assert job.results is not None
        (job.results if fault.status == 200 else job.errors).append(json.dumps(answered | {"response": response}))

    def _anthropic(self, method: str, parts: list[str], raw: bytes) -> tuple[int, str]:
        if method == "POST" and parts == [""]:
            lines = [
                {"custom_id": line["custom_id"], "path": "/v1/messages", "body": line["params"]}
                for line in json.loads(raw)["requests"]
            ]
            return 200, json.dumps(self._anthropic_batch(self._take(lines, {}, "")))
        if parts == [""]:
            return 200, json.dumps(_page([self._anthropic_batch(job) for job in self._newest()]))
        job = self.jobs[parts[0]]
        if parts[-1] == "results":
            return 200, "\n".join(job.results or []) + "\n"
        if parts[-1] == "cancel":
            job.status = "cancelled"
        return 200, json.dumps(self._anthropic_batch(job))

    def _anthropic_batch(self, job: Job) -> dict[str, Any]:
        self._finish(job, self._anthropic_line)
        ended = job.results is not None
        created = datetime.fromtimestamp(job.created, UTC)
        counts = {"processing": 0 if ended else len(job.lines), "succeeded": len(job.lines) if ended else 0}
        return {
            "id": job.batch_id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts | {"errored": 0, "canceled": 0, "expired": 0},
            "created_at": created.isoformat(),
            "expires_at": (created + timedelta(days=1)).isoformat(),
            "ended_at": created.isoformat() if ended else None,
            "results_url": f"{self.server.url}/v1/messages/batches/{job.batch_id}/results" if ended else None,
        }

    def _anthropic_line(self, job: Job, line: dict[str, Any], fault: Fault) -> None:
        assert job.results is not None
        if fault.breaks == "expire":
            result: dict[str, Any] = {"type": "expired"}
        elif fault.status != 200:
            result = {"type": "errored", "error": json.loads(fault.body or "{}")}
        else:
            body = fault.body if fault.body is not None else self.server.answer(line["path"], line["body"], fault, 0.5)
            result = {"type": "succeeded", "message": json.loads(body)}
        job.results.append(json.dumps({"custom_id": line["custom_id"], "result": result}))

    def _take(self, lines: list[dict[str, Any]], metadata: dict[str, str], input_file: str) -> Job:
        job = Job(f"batch_{len(self.jobs)}", lines, dict(metadata), time.time(), input_file)
        self.jobs[job.batch_id] = job
        if self.fails:
            job.metadata["fails"], job.status = self.fails.pop(0), "failed"
        return job

    def _newest(self) -> list[Job]:
        return sorted(self.jobs.values(), key=lambda job: -job.created)

    def _finish(self, job: Job, add: Callable[[Job, dict[str, Any], Fault], None]) -> None:
        """Answers all lines once the batch is old enough, each by the next fault of the server's plan."""
        if job.results is not None or job.status != "in_progress" or time.time() < job.created + self.delay_s:
            return
        job.results, job.status = [], "completed"
        for line in job.lines:
            fault = self.server.next_fault()
            self.server.requests.append({"path": line["path"], "batch": job.batch_id, **line["body"]})
            if fault.breaks == "lose":
                continue
            add(job, line, fault)
            job.completed += 1
            if fault.breaks == "twice":
                job.results.append(job.results[-1])
        random.Random(0).shuffle(job.results)


def _page(items: list[dict[str, Any]]) -> dict[str, Any]:
    ids = [item["id"] for item in items]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return {"object": "list", "data": items, "has_more": False, **ends}


def _uploaded(raw: bytes) -> str:
    """The file in a multipart form."""
    boundary = raw.split(b"\r\n", 1)[0]
    for part in raw.split(boundary):
        head, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return content.removesuffix(b"\r\n").decode()
    raise ValueError("no file in the form")
