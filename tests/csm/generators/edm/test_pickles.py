import io
import os
import pickle
import struct
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csm import pickles
from csm.errors import InputError
from csm.generators.edm.pickles import read_pickle
from csm.pickles import Record

COMMAND = "touch side-effect"


@pytest.fixture(autouse=True)
def nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "side-effect").exists()


def read(content: bytes) -> Any:
    Path("net.pkl").write_bytes(content)
    return read_pickle(Path("net.pkl"))


def refused(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(content)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("net.pkl")


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def raw(*parts: bytes) -> bytes:
    return b"".join([pickle.PROTO, b"\x04", *parts, pickle.STOP])


def test_the_side_effect_is_real(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Call(os.system, COMMAND)))
    (tmp_path / "side-effect").unlink()


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_of_a_dangerous_function_is_refused_and_named(protocol: int) -> None:
    refused(
        pickle.dumps({"ema": Call(os.system, COMMAND)}, protocol=protocol),
        r"net.pkl holds posix.system, which is not part of an EDM network: nothing was run$",
    )


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(eval, "open('side-effect', 'w')"), "builtins.eval"),
        (Call(__import__, "os"), "builtins.__import__"),
        (Call(getattr, Call(__import__, "os"), "system"), "builtins.getattr"),
        (Call(map, abs, [1]), "builtins.map"),
        (Call(np.save, "side-effect", np.zeros(1)), "numpy.save"),
        (Call(torch.save, 1, "side-effect"), "torch.serialization.save"),
        (Call(torch.load, "net.pkl"), "torch.serialization.load"),
        (Path("/etc"), "pathlib.PosixPath"),
    ],
)
def test_other_functions_are_refused_too(value: Any, name: str) -> None:
    refused(pickle.dumps(value), rf"holds {name}, which")


def test_a_path_of_names_out_of_a_known_module_is_not_followed() -> None:
    assert read_dotted("torch.nn", "modules.module.torch.os.system").arguments == (COMMAND,)
    with pytest.raises(InputError, match=r"holds builtins.dict.__class__.__base__, which"):
        read_dotted("builtins", "dict.__class__.__base__")


def read_dotted(module: str, name: str) -> Any:
    return read(raw(text(module), text(name), pickle.STACK_GLOBAL, text(COMMAND), pickle.TUPLE1, pickle.REDUCE))


def test_known_names_are_records_and_never_called() -> None:
    record = read(pickle.dumps(Call(torch.nn.Linear, 10**9, 10**9, state={"weight": 1})))
    assert isinstance(record, Record)
    assert record.name == "torch.nn.modules.linear.Linear"
    assert record.arguments == (10**9, 10**9)
    assert record.state == {"weight": 1}


def test_torchs_own_loading_is_not_done_while_reading() -> None:
    inner = io.BytesIO()
    torch.save(Call(os.system, COMMAND), inner, _use_new_zipfile_serialization=False)
    record = read(pickle.dumps(Call(torch.storage._load_from_bytes, inner.getvalue())))
    assert record.arguments == (inner.getvalue(),)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_as_they_are(protocol: int) -> None:
    value = {"a": [1, 2.5, None, True], "b": (b"bytes \xff", b"", "text"), "c": {3, 4}, "d": frozenset([5]), "e": 2**70}
    assert read(pickle.dumps(value, protocol=protocol)) == value


@pytest.mark.parametrize("protocol", range(2, 6))
def test_ordered_dictionaries_sizes_devices_and_dtypes(protocol: int) -> None:
    ordered = OrderedDict(a=1, b=OrderedDict())
    ordered._metadata = {"version": 1}  # as the state dict of a module has
    value = read(pickle.dumps([ordered, torch.Size([2, 3]), torch.device("cuda", 0), torch.float32], protocol=protocol))
    assert value[0] == {"a": 1, "b": {}}
    assert isinstance(value[1], Record)
    assert value[1].arguments == ((2, 3),)
    assert value[2].arguments == ("cuda", 0)
    assert value[3].name == "torch.float32"


def test_numpys_arrays_and_scalars_are_records() -> None:
    array, scalar = read(pickle.dumps([np.arange(3.0), np.float64(2.5)], protocol=2))
    assert array.name.endswith("multiarray._reconstruct")
    assert scalar.arguments[1] == struct.pack("<d", 2.5)


@pytest.mark.parametrize("code", [pickle.PERSID + b"side-effect\n", b"N" + pickle.BINPERSID, pickle.EXT1 + b"\x01"])
def test_names_by_number_or_by_somebody_elses_rule_are_refused(code: bytes) -> None:
    refused(raw(code), r"net.pkl is not a whole pickle of an EDM network \(KeyError\): get it again")


@pytest.mark.parametrize(
    "target", [b"c_codecs\nencode\n", b"cbuiltins\nset\n", b"ccollections\nOrderedDict\n", b"ctorch.nn\nModule\n"]
)
def test_a_state_for_what_is_no_object_changes_nothing_of_ours(target: bytes) -> None:
    state = b"N}\x8c\x0c__defaults__\x8c\x06latin1\x85s\x86"  # (None, {"__defaults__": ("latin1",)})
    refused(raw(target, state, pickle.BUILD), r"is not a whole pickle")
    assert pickles._encode.__defaults__ is None


def test_a_length_that_the_file_does_not_have_takes_no_memory() -> None:
    huge = struct.pack("<Q", 2**40)
    for code in (pickle.BINBYTES8, pickle.BINUNICODE8, pickle.BYTEARRAY8, pickle.FRAME):
        refused(raw(code, huge), r"is not a whole pickle")


def test_a_huge_number_in_the_memo_takes_no_memory() -> None:
    content = raw(b"N", pickle.LONG_BINPUT, struct.pack("<I", 2**32 - 1), b"0", pickle.LONG_BINGET, struct.pack("<I", 2**32 - 1))
    started = time.monotonic()
    assert read(content) is None
    assert time.monotonic() - started < 5


def test_every_truncation_is_one_line() -> None:
    value = {"a": np.float64(1), "b": [torch.nn.Parameter(torch.ones(2))], "c": OrderedDict(d=(1, 2, 3))}
    content = pickle.dumps(value, protocol=4)
    for end in range(0, len(content), 5):
        refused(content[:end], r"is not a whole pickle of an EDM network \(\w+\): get it again")


def test_noise_is_refused_or_read_in_one_line() -> None:
    random = np.random.default_rng(0)
    lines = []
    content = bytearray(pickle.dumps({"a": np.float64(1), "b": [torch.nn.Parameter(torch.ones(2))]}, protocol=2))
    for _ in range(300):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 3):
            damaged[place] = random.integers(0, 256)
        try:
            read(bytes(damaged))
        except InputError as error:
            lines.append(str(error))
    assert len(lines) > 100
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 what torch.save writes", b"<html>not found</html>", b"version https://git-lfs"]
)
def test_what_is_no_pickle_is_named(content: bytes) -> None:
    refused(content, r"net.pkl is not a whole pickle of an EDM network")


def test_names_that_cannot_be_printed_are_escaped() -> None:
    refused(raw(text("a\nb\x1bc"), text("d"), pickle.STACK_GLOBAL), r"holds 'a\\nb\\x1bc.d', which")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.pkl does not exist"):
        read_pickle(tmp_path / "none.pkl")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_pickle(tmp_path)
