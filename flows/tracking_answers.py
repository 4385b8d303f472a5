"""What an error of a tracking store means: the disk's own, try again, or never."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from flows.masking import masked
from flows.tracking_address import Address

DISK = (("database or disk is full", errno.ENOSPC), ("disk I/O error", errno.EIO), ("readonly database", errno.EACCES))


class AwayError(Exception):
    """The store does not answer, or does not let us in: try again later."""


class RefusedError(Exception):
    """The store will never take this record."""


def short(error: BaseException) -> str:
    """What ``error`` says, in a line of at most 160 characters without secrets."""
    return masked(" ".join(str(error).split()) or type(error).__name__)[:160]


@contextmanager
def answers(address: Address) -> Iterator[None]:
    """Errors of a store, sorted by what to do: the disk's own, try again, or never."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, RequestException) as error:
        raise_disk(error)
        status = _status(error)
        if "is locked" in str(error) or (not address.is_local and (status in (401, 403, 408, 429) or status >= 500)):
            raise AwayError(short(error)) from error
        if status < 500 and not isinstance(error.__cause__, SQLAlchemyError):
            raise RefusedError(short(error)) from error
        raise


def _status(error: Exception) -> int:
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    response = getattr(error, "response", None)  # of requests; none: it did not come to one
    return 503 if response is None else int(response.status_code)


def raise_disk(error: Exception) -> None:
    """What SQLite says of a disk that takes no more becomes the system's own error, which the command line explains."""
    for words, code in DISK:
        if words in str(error):
            raise OSError(code, os.strerror(code), "mlflow.db") from error
