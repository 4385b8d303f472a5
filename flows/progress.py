"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere. All of it goes to stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between two plain lines of one task

console = Console(stderr=True)


class Task:
    """One stage's progress."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.text = name, total, 0, ""

    def advance(self, count: int = 1, text: str = "") -> None:
        """``count`` units more are done; ``text`` says what else is worth knowing."""
        self.done += count
        self.text = text or self.text
        self.show()

    def show(self) -> None:
        """Display the state."""

    def finish(self) -> None:
        """Display the end."""


class _Bar(Task):
    def __init__(self, name: str, total: int, progress: Progress) -> None:
        super().__init__(name, total)
        self._progress = progress
        self._id = progress.add_task(name, total=total, text="")

    def show(self) -> None:
        self._progress.update(self._id, completed=self.done, text=self.text)


class _Lines(Task):
    def __init__(self, name: str, total: int) -> None:
        super().__init__(name, total)
        self._started = self._shown = time.monotonic()
        self._written = ""

    def show(self) -> None:
        if time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._line()

    def finish(self) -> None:
        if self._state() != self._written:
            self._line()

    def _state(self) -> str:
        return f"{self.name}: {self.done}/{self.total}{f'  {self.text}' if self.text else ''}"

    def _line(self) -> None:
        self._shown, self._written = time.monotonic(), self._state()
        print(f"{self._written}  {self._shown - self._started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def task(name: str, total: int) -> Iterator[Task]:
    """Show the progress of ``total`` units of work for the length of the block."""
    if not console.is_terminal:
        lines = _Lines(name, total)
        yield lines
        lines.finish()
        return
    columns = (
        TextColumn("[bold]{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bar(name, total, progress)


def say(text: str) -> None:
    """One line of information."""
    console.print(text, highlight=False, soft_wrap=True)
