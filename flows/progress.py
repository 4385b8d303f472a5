"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere. All of it goes to stderr."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between two plain lines of one task

console = Console(stderr=True)


class Task:
    """One stage's progress; ``made`` of the ``done`` units were done since it began, at ``rate`` units a second."""

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.done, self.text, self.warning = name, total, done, "", ""
        self._lock = threading.Lock()
        self._before, self._started = done, time.monotonic()
        self._first: tuple[int, float] | None = None  # units made, and seconds, when the first ones came

    @property
    def made(self) -> int:
        return self.done - self._before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        return self.made / self.seconds

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes at the pace since the first units came, which a start of workers delays; None until more have."""
        if self._first is None or self.made == self._first[0] or self.done >= self.total:
            return None
        made, seconds = self._first
        return (self.total - self.done) * (self.seconds - seconds) / (self.made - made)

    def advance(self, count: int = 1, text: str = "") -> None:
        """``count`` units more are done; ``text`` says what else is worth knowing."""
        with self._lock:
            self.done += count
            if self._first is None and self.made:
                self._first = (self.made, self.seconds)
            self.text = text or self.text
            self.show()

    def warn(self, text: str) -> None:
        """Show, beside the rest, what holds the work up; "" if nothing does. May be called from any thread."""
        with self._lock:
            self.warning = text
            self.show()

    @property
    def shown(self) -> str:
        """What is worth knowing and what holds the work up."""
        return "  ".join(part for part in (self.text, self.warning) if part)

    def show(self) -> None:
        """Display the state."""

    def finish(self) -> None:
        """Display the end."""


class _Bar(Task):
    def __init__(self, name: str, total: int, done: int, progress: Progress) -> None:
        super().__init__(name, total, done)
        self._progress = progress
        self._id = progress.add_task(name, total=total, completed=done, text="")

    def show(self) -> None:
        self._progress.update(self._id, completed=self.done, text=self.shown)


class _Lines(Task):
    def __init__(self, name: str, total: int, done: int) -> None:
        super().__init__(name, total, done)
        self._shown = 0.0
        self._written = ""

    def show(self) -> None:
        if self.seconds - self._shown >= PLAIN_SECONDS:
            self._line()

    def finish(self) -> None:
        if self._state() != self._written:
            self._line()

    def _state(self) -> str:
        return f"{self.name}: {self.done}/{self.total}{f'  {self.shown}' if self.shown else ''}"

    def _line(self) -> None:
        self._shown, self._written = self.seconds, self._state()
        left = f"  {_clock(self.left)} left" if self.left is not None else ""
        print(f"{self._written}{left}  {self._shown:.0f} s", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


@contextmanager
def task(name: str, total: int, done: int = 0) -> Iterator[Task]:
    """Show the progress of ``total`` units of work, of which ``done`` were done before, for the length of the block."""
    if not console.is_terminal:
        lines = _Lines(name, total, done)
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
        yield _Bar(name, total, done, progress)


def say(text: str) -> None:
    """One line of information."""
    console.print(text, highlight=False, soft_wrap=True)
