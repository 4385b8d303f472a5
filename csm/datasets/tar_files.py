"""Tar files, packed or not, read through once and to their true end."""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from csm.errors import InputError


def members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in the tar file ``file``, in its order.

    Raises:
        InputError: it is damaged or ends too early, which may show only behind its last member.
    """
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content.read()
            # tarfile takes a header that is damaged or cut off for the end; the true end is a block of zeros. What follows is read for
            # the checksum of a packed file, which stands at its end.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends too early")
            while tar.fileobj.read(2**20):
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise InputError(f"data.path: {file} is no whole tar file ({reason}): get it again") from None
