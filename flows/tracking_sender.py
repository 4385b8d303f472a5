"""What sends the records of tracking: a spool on disk, and a thread that hands them to the store one by one, when it answers."""

import threading
import time
from pathlib import Path

from flows.progress import say
from flows.tracking_address import Address
from flows.tracking_answers import AwayError, RefusedError, short
from flows.tracking_spool import Record, Spool
from flows.tracking_store import Store

PATIENCE = 5.0  # seconds without a record sent that the end of a command waits for a server
LONGEST = 15.0  # seconds that it waits in all
RETRY = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds between tries of a store that does not answer
SAVE_SECONDS = 5.0  # between two writes of the index while records wait, or to a store


class Sender:
    """Sends what is appended to ``spool`` to ``store``, in order, in a thread of its own; what was left there by an earlier command first.

    ``error`` is what ended the thread: a fault of this machine, which ``append``, ``flush`` and ``close`` raise.
    """

    def __init__(self, spool: Spool, store: Store, address: Address) -> None:
        self.spool = spool
        self._store, self._address = store, address
        self.error: BaseException | None = None
        self.change = threading.Condition(threading.RLock())  # held by whoever touches the spool
        self._ending = self._gone = False
        self._tries = 0  # that failed since the store last answered
        self._said: set[str] = set()
        self._saved, self._unsaved = time.monotonic(), False  # when the index was written, and whether more was sent since
        threading.Thread(target=self._send_all, name="tracking", daemon=True).start()

    def append(self, record: Record, source: Path | None = None) -> None:
        """Add ``record``, and with ``source`` a file or folder as it is now.

        Raises:
            InputError, OSError: as ``error``, or the disk takes no more.
        """
        with self.change:
            self._raise()
            self.spool.append({**record, "file": self.spool.keep(source)} if source else record)
            self.change.notify_all()

    def flush(self) -> bool:
        """Wait until all is sent, at most a few seconds if the store is not this machine's; whether it is.

        Raises:
            InputError, OSError: the store is damaged, or the disk takes no more.
        """
        began = moved = time.monotonic()
        with self.change:
            left = self.spool.waiting
            self.change.notify_all()
            while self.spool.waiting and self.error is None:
                self.change.wait(0.1)
                now = time.monotonic()
                if self.spool.waiting < left:
                    left, moved = self.spool.waiting, now
                is_away = self._tries > 1 and now - began > 1.0
                if not self._address.is_local and (is_away or now - moved > PATIENCE or now - began > LONGEST):
                    return False
            self._raise()
            return True

    def close(self) -> None:
        """Send what can be sent, and say what waits."""
        with self.change:
            self._ending = True
            self.change.notify_all()
        try:
            if not self.flush():
                say(
                    f"tracking: {self.spool.waiting:,} records for {self._address} wait in {self.spool.path}; "
                    "the next command with the same options sends them"
                )
            elif self._unsaved:  # the thread sleeps
                self._save()
        finally:
            with self.change:
                self._gone = True
                self.change.notify_all()
                self.spool.close()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _send_all(self) -> None:
        """The sender's work: the records in their order, each until the store took it or refused it for good."""
        while True:
            try:
                with self.change:
                    while not self._gone and (record := self.spool.first()) is None:
                        if self._ending:
                            return
                        if self._unsaved and self._is_due():
                            self._save()
                        self.change.wait(SAVE_SECONDS if self._unsaved else None)
                    if self._gone:
                        return
                failure = self._send(record)
                with self.change:
                    if self._gone:
                        return
                    if isinstance(failure, AwayError):
                        self._tries += 1
                        if self._unsaved:
                            self._save()
                        self._say_once(
                            "away",
                            f"{self._address} does not answer ({failure}); work goes on, records wait in {self.spool.path}",
                        )
                        self._pause(RETRY[min(self._tries, len(RETRY)) - 1])
                        continue
                    self._tries = 0
                    if failure is None:
                        self.spool.pop()
                    else:
                        self._say_once(
                            str(failure),
                            f"{self._address} refused a record ({failure}); it is put aside in {self.spool.refused}",
                        )
                        self.spool.refuse()
                    self._unsaved = True
                    if self._is_due() or not (self.spool.waiting or self._store.is_remote):
                        self._save()
                    if not self.spool.waiting:
                        self.spool.cut()
                    self.change.notify_all()
            except Exception as error:  # of this machine: the driver raises it
                with self.change:
                    self.error = error
                    self.change.notify_all()
                return

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved > SAVE_SECONDS

    def _save(self) -> None:
        """Write the index."""
        self._store.save()
        self._saved, self._unsaved = time.monotonic(), False

    def _send(self, record: Record) -> AwayError | RefusedError | None:
        """Why ``record`` was not sent; None: it was."""
        try:
            self._store.send(record, self.spool)
        except (AwayError, RefusedError) as error:
            return error
        except OSError:
            raise
        except Exception as error:  # what a network or a storage service can say is beyond counting
            if self._address.is_local:
                raise
            return AwayError(short(error))
        return None

    def _pause(self, seconds: float) -> None:
        """Wait with the lock given back; at the end of the command at most a little."""
        end = time.monotonic() + seconds
        while (
            not self._gone and (left := (min(end, time.monotonic() + RETRY[0]) if self._ending else end) - time.monotonic()) > 0
        ):
            self.change.wait(left)

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            say(f"tracking: {text}")
