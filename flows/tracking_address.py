"""Where the runs go: the workspace's own MLflow store, or the address of another one. No secret of an address is shown or kept."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from csm.errors import InputError
from csm.locations import is_remote
from flows.masking import masked

EXPERIMENT = "csm"
SERVERS = ("http", "https")
DATABASES = ("postgresql", "mysql", "mssql", "sqlite")


@dataclass(frozen=True)
class Address:
    """A tracking store: its MLflow URI ("": the store of the workspace) and the experiment there.

    Raises:
        InputError: MLflow keeps no runs at such a URI.
    """

    uri: str = ""
    experiment: str = EXPERIMENT

    def __post_init__(self) -> None:
        if not self.experiment.strip():
            raise InputError("--experiment: needs a name")
        if not self.uri:
            return
        where = f"--tracking-uri {masked(self.uri)}"
        scheme, _, rest = self.uri.partition("://")
        if not rest or scheme == "file":
            raise InputError(
                f"{where}: runs are kept on a server or in a database, not in a folder; for example sqlite:///mlflow.db"
            )
        if scheme.split("+")[0] not in (*SERVERS, *DATABASES):
            known = ", ".join(f"{name}://" for name in (*SERVERS, *DATABASES))
            raise InputError(f"{where}: no known kind of tracking store; one of {known}")
        if self.is_sqlite:
            if not rest.strip("/") or rest.endswith("/") or not rest.startswith("/"):
                raise InputError(f"{where}: needs a file, as in sqlite:///mlflow.db or sqlite:////folder/mlflow.db")
            return
        try:
            parts = urlsplit(self.uri)
            port = parts.port
        except ValueError as error:
            raise InputError(f"{where}: not an address ({masked(str(error))})") from None
        if not parts.hostname or port == 0:
            raise InputError(f"{where}: needs a host, as in {scheme}://HOST:PORT")
        if not self.is_server:
            _check_driver(self.uri, where)

    @property
    def is_local(self) -> bool:
        """Whether it is a file on this machine, of which a failure is the disk's and not a network's."""
        return not self.uri or self.is_sqlite

    @property
    def is_sqlite(self) -> bool:
        return self.uri.split("://")[0].split("+")[0] == "sqlite"

    @property
    def is_server(self) -> bool:
        """Whether it is an MLflow server, which keeps the artifacts too."""
        return self.uri.split("://")[0] in SERVERS

    @property
    def name(self) -> str:
        """Of its files in a workspace: another store or experiment, other files."""
        if self == OWN:
            return "tracking"
        return f"tracking-{hashlib.blake2b(f'{masked(self.uri)} {self.experiment}'.encode(), digest_size=4).hexdigest()}"

    def check_workspace(self, workspace: Path) -> None:
        """``InputError`` if the runs would be kept in ``workspace`` and it is on a store, which holds no database."""
        if not self.uri and is_remote(workspace):
            raise InputError(
                f"--workspace {workspace}: MLflow keeps no runs there; give --tracking-uri http://HOST:5000 or MLFLOW_TRACKING_URI"
            )

    def __str__(self) -> str:
        return masked(self.uri) or "the workspace's store"


def _check_driver(uri: str, where: str) -> None:
    """Whether SQLAlchemy can load what speaks to the database."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        hint = "install it, or name one that is installed, as in postgresql+psycopg2:// (pip install 'csm[postgres]')"
        raise InputError(f"{where}: needs the Python package {error.name}; {hint}") from None
    except SQLAlchemyError as error:
        raise InputError(f"{where}: not an address of a database ({masked(' '.join(str(error).split()))})") from None


OWN = Address()
