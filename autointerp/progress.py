"""What a person sees while a job runs: bars with counts, dollars and time left, or nothing."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from autointerp.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Reporter:
    """Shows nothing. The base of those that do."""

    def start(self, stage: str, total: int | None) -> None:
        """A stage begins; `total` is None when it cannot be known."""

    def advance(self, stage: str, n: int = 1, note: str = "") -> None:
        """`n` more are done; `note` is shown beside the bar."""

    def expect(self, stage: str, total: int | None) -> None:
        """A better guess of a stage's total."""

    def finish(self, stage: str) -> None:
        """A stage is over: what is done of it was all."""

    def say(self, line: str) -> None:
        """One line above the bars."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


class BarReporter(Reporter):
    """Bars on standard error, so that standard output stays for results."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from autointerp.terminal import console

        self._progress: Progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def start(self, stage: str, total: int | None) -> None:
        self._tasks[stage] = self._progress.add_task(stage, total=total, note="")

    def advance(self, stage: str, n: int = 1, note: str = "") -> None:
        fields: dict[str, Any] = {"note": note} if note else {}
        self._progress.update(self._tasks[stage], advance=n, **fields)

    def expect(self, stage: str, total: int | None) -> None:
        self._progress.update(self._tasks[stage], total=total)

    def finish(self, stage: str) -> None:
        task = self._tasks[stage]
        self._progress.update(task, total=self._progress.tasks[task].completed)

    def say(self, line: str) -> None:
        from rich.text import Text

        self._progress.console.print(Text(line))

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, InputError):  # its one line is to stand alone
            self._progress.live.transient = True
            return self._progress.live.stop()
        for stage, task in self._tasks.items():
            if self._progress.tasks[task].total is None:
                self.finish(stage)
        self._progress.stop()
