"""Passwords, tokens and keys: kept out of what is shown, recorded or sent."""

import os
import re
import sys

from csm.errors import InputError

USER = re.compile(r"(?<=://)\S*@")
PASSWORD = re.compile(
    r"://[^\s/?#@]*:[^\s/?#]*@|https?://[^\s/?#]+@"
)  # a name alone is no secret, but on a web server it may be a token
NAMED = re.compile(r"((?:passw\w*|secret\w*|token|api_?key|access_key\w*|credential\w*|signature)=)[^&\s'\"]+", re.IGNORECASE)
BEARER = re.compile(r"(\b(?:Bearer|Basic) )[\w+/=.~-]{8,}")
VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSW(?:OR)?D|API_?KEY|ACCESS_KEY|KEY_ID|PRIVATE_KEY)(?:_|$)", re.IGNORECASE)
SHORTEST = 8  # characters of a variable's value: shorter ones are words that stand elsewhere too


def masked(text: str) -> str:
    """``text`` without user names, passwords and tokens of URIs and options, and without the secrets of this process's environment."""
    text = BEARER.sub(r"\1***", NAMED.sub(r"\1***", USER.sub("***@", text)))
    for value in _of_environment():
        text = text.replace(value, "***")
    return text


def has_secret(text: str) -> bool:
    """Whether a password or token stands in ``text``; a user name alone is none."""
    return bool(PASSWORD.search(text) or NAMED.search(text) or any(value in text for value in _of_environment()))


def command_line(address: str) -> str:
    """The command of this process without secrets, for records; ``InputError`` if it has some and Ray at ``address`` would show them."""
    given = " ".join(["csm", *sys.argv[1:]])
    if address != "local" and has_secret(given):
        raise InputError(
            "a password or token stands on the command line, which Ray shows to everyone who sees its list of jobs: set "
            "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, in the environment instead"
        )
    return masked(given)


def _of_environment() -> list[str]:
    """Values of the variables whose names say that they are secret, longest first; paths of files that hold a secret are none."""
    # Another thread may change the environment meanwhile.
    values = {os.environ.get(name, "") for name in list(os.environ) if VARIABLE.search(name)}
    return sorted((value for value in values if len(value) >= SHORTEST and not value.startswith("/")), key=len, reverse=True)
