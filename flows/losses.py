"""What lost workers cost a stage, as the user is told: when it happens, at the end of the stage, in ``--json`` and in MLflow."""

from dataclasses import dataclass

from flows.progress import say


@dataclass
class Losses:
    """Of one stage, so far.

    Attributes:
        stage: its name.
        workers: that were lost.
        seconds: of work that was done again, added up over workers.
    """

    stage: str
    workers: int = 0
    seconds: float = 0.0

    def lost(self, reason: str, workers: int = 1) -> None:
        """``workers`` were lost, which is said in a line; with 0, something else holds the stage up for a while."""
        self.workers += workers
        say(f"{self.stage}: {reason}")

    def repeated(self, seconds: float, what: str = "", late: float | None = None) -> None:
        """``seconds`` of work are done again; said in a line if it is known ``what`` goes on, and by how many seconds it is ``late``."""
        self.seconds += seconds
        if what:
            later = "" if late is None else f", {late:.0f} s lost in all"
            say(f"{self.stage}: {what}, about {seconds:.0f} s of work repeated{later}")

    @property
    def summary(self) -> str:
        """In one line."""
        return f"{self.workers} worker{'s' if self.workers > 1 else ''} lost, about {self.seconds:.0f} s of work repeated"

    @property
    def values(self) -> dict[str, float]:
        """For ``--json`` and MLflow; none if there were none."""
        return {"lost_workers": float(self.workers), "repeated_seconds": round(self.seconds, 3)} if self.workers else {}
