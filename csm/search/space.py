"""Search spaces: what each setting may be, and settings that exist only beside a choice."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from csm.errors import InputError
from csm.search.domains import Choice, Domain, Range, identity
from csm.search.sections import ENTRY, dotted

if TYPE_CHECKING:  # a configuration is checked without importing optuna, which only a sweep needs
    from optuna import Trial

FORMS = "a list of choices, {values: ...}, or {low: ..., high: ..., log: ..., step: ...}"


class Setting(NamedTuple):
    """A setting of one assignment; ``before`` is the choices that it exists beside, a text that is empty or ends with a space."""

    before: str
    key: str
    domain: Domain
    value: Any

    @property
    def name(self) -> str:
        """Unique in the space."""
        return self.before + self.key


@dataclass(frozen=True)
class SearchSpace:
    """What each of the dotted keys may be, in the order in which they are chosen."""

    entries: tuple[tuple[str, Domain], ...]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Every dotted key, those of branches behind the key that decides on them."""
        return tuple(dict.fromkeys(key for key, _ in self._domains()))

    @cached_property
    def size(self) -> int | None:
        """Number of configurations; None if a range of real numbers makes it infinite."""
        sizes = [domain.size for _, domain in self.entries]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def endless(self) -> tuple[str, ...]:
        """Keys of ranges of real numbers, which a grid cannot count."""
        return tuple(dict.fromkeys(key for key, domain in self._domains() if isinstance(domain, Range) and domain.size is None))

    def sample(self, trial: "Trial") -> dict[str, Any]:
        """What an optuna trial suggests: dotted key -> value, of the settings that exist beside each other."""
        return {setting.key: setting.value for setting in self._walk(lambda name, key, domain: domain.suggest(trial, name))}

    def at(self, index: int) -> dict[str, Any]:
        """Assignment ``index``, from 0 to ``size`` - 1, of a space that can be counted; each of them once."""
        chosen: dict[str, Any] = {}
        for key, domain in self.entries:
            assert domain.size is not None
            index, here = divmod(index, domain.size)
            if isinstance(domain, Range):
                chosen[key] = domain.at(here)
                continue
            for value, branch in zip(domain.values, domain.branches, strict=True):
                assert branch.size is not None
                if here < branch.size:
                    chosen |= {key: value, **branch.at(here)}
                    break
                here -= branch.size
        return chosen

    def settings(self, assignment: Mapping[str, Any]) -> tuple[Setting, ...]:
        """The settings of ``assignment``, as ``sample`` gave it, perhaps through JSON.

        Raises:
            InputError: it is of another space.
        """

        def given(name: str, key: str, domain: Domain) -> Any:
            if key not in assignment:
                raise InputError(f"a trial of another space: it lacks {key}")
            try:
                domain.encode(assignment[key])
            except ValueError as error:
                raise InputError(f"a trial of another space: {key}: {error}") from None
            return assignment[key]

        settings = tuple(self._walk(given))
        unknown = sorted({*assignment} - {setting.key for setting in settings})
        if unknown:
            raise InputError(f"a trial of another space: it has {', '.join(unknown)}")
        return settings

    def corners(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Assignments in which each choice and each end of a range stands at least once, each with the key that it is about.

        Whatever is not about that key is the first choice or the low end.
        """
        first = self.first()
        for key, domain in self.entries:
            if isinstance(domain, Range):
                yield from ((key, {**first, key: end}) for end in (domain.low, domain.high))
                continue
            above = set(self._below(domain)) | {key}
            rest = {name: value for name, value in first.items() if name not in above}
            for value, branch in zip(domain.values, domain.branches, strict=True):
                yield key, {**rest, key: value, **branch.first()}
                yield from ((name, {**rest, key: value, **below}) for name, below in branch.corners())

    def first(self) -> dict[str, Any]:
        """The first choice and the low end of everything."""
        return {
            setting.key: setting.value
            for setting in self._walk(lambda name, key, domain: domain.low if isinstance(domain, Range) else domain.values[0])
        }

    def _walk(self, decide: Callable[[str, str, Domain], Any], before: str = "") -> Iterator[Setting]:
        """The settings that ``decide(name, key, domain)`` chooses, each choice before what exists only beside it."""
        for key, domain in self.entries:
            value = decide(before + key, key, domain)
            yield Setting(before, key, domain, value)
            if isinstance(domain, Choice):
                branch = domain.branches[domain.encode(value)]
                yield from branch._walk(decide, f"{before}{key}={identity(value)} ")

    def choices(self, key: str) -> tuple[Any, ...]:
        """All that may be chosen for ``key``, wherever it stands; nothing where it is a range."""
        return tuple(
            value for name, domain in self._domains() if name == key and isinstance(domain, Choice) for value in domain.values
        )

    def _domains(self) -> Iterator[tuple[str, Domain]]:
        for key, domain in self.entries:
            yield key, domain
            if isinstance(domain, Choice):
                for branch in domain.branches:
                    yield from branch._domains()

    @staticmethod
    def _below(choice: Choice) -> tuple[str, ...]:
        return tuple(key for branch in choice.branches for key in branch.keys)


def parse_space(value: Any, where: str = "tune.space") -> SearchSpace:
    """The space that ``value`` describes, as read from YAML: dotted keys, or sections within sections, each with what it may be.

    That is a list of choices; ``{values: [...]}``, the same; ``{values: {choice: space, ...}}``, choices with the settings that exist only
    beside them; or ``{low: ..., high: ...}``, a range, with ``log: true`` for equal chances of equal ratios, or ``step``.

    Raises:
        InputError: unknown form, no or equal choices, an empty range, or a key that would be set twice; the message starts with
            ``where``.
    """
    entries = tuple((key, _parse_entry(entry, f"{where}.{key}")) for key, entry in dotted(value, where).items())
    space = SearchSpace(entries)
    _check_once(space, where)
    return space


def _parse_entry(entry: Any, where: str) -> Domain:
    if isinstance(entry, list):
        return _parse_choice(entry, where)
    if not isinstance(entry, Mapping) or not entry or not set(entry) <= {*ENTRY} or ("values" in entry and len(entry) > 1):
        raise InputError(f"{where}: expected {FORMS}, got {entry!r}")
    return _parse_choice(entry["values"], f"{where}.values") if "values" in entry else _parse_range(entry, where)


def _parse_choice(values: Any, where: str) -> Choice:
    if not isinstance(values, (list, Mapping)):
        raise InputError(
            f"{where}: expected a list of choices, or a section with the settings beside each choice, got {values!r}"
        )
    if not values:
        raise InputError(f"{where}: empty; name what may be chosen")
    try:
        texts = [identity(value) for value in values]
    except TypeError:
        raise InputError(f"{where}: expected texts, numbers, true, false or null, got {list(values)!r}") from None
    for value, text in zip(values, texts, strict=True):
        if texts.count(text) > 1:
            raise InputError(f"{where}: {value!r} stands there more than once")
    if isinstance(values, list):
        return Choice(tuple(values), tuple(SearchSpace(()) for _ in values))
    branches = tuple(parse_space({} if below is None else below, f"{where}.{value}") for value, below in values.items())
    return Choice(tuple(values), branches)


def _parse_range(entry: Mapping[str, Any], where: str) -> Range:
    for name in ("low", "high", "step"):
        value = entry.get(name)
        if value is None and name == "step":
            continue
        if name not in entry:
            raise InputError(f"{where}.{name}: missing; a range has both ends")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) else ""
            raise InputError(f"{where}.{name}: expected a number{hint}, got {value!r}")
    low, high, log, step = entry["low"], entry["high"], entry.get("log", False), entry.get("step")
    if not isinstance(log, bool):
        raise InputError(f"{where}.log: expected true or false, got {log!r}")
    if low >= high:
        raise InputError(f"{where}: empty range; expected low below high, got {low!r} and {high!r}")
    if log and low <= 0:
        raise InputError(f"{where}.low: expected more than 0 with log: true, got {low!r}")
    if step is not None and (step <= 0 or step > high - low or log):
        wrong = "goes not with log: true; leave one of them out"
        if step <= 0 or step > high - low:
            wrong = f"expected more than 0 and at most the {high - low:g} between low and high, got {step!r}"
        raise InputError(f"{where}.step: {wrong}")
    if not isinstance(low, int) or not isinstance(high, int):
        low, high = float(low), float(high)
    return Range(low, high, log, step)


def _check_once(space: SearchSpace, where: str) -> None:
    """``InputError`` if a key could be set twice at once: beside a choice, and outside of it or beside another one."""
    claimed: set[str] = set()
    for key, domain in space.entries:
        here = {key, *(space._below(domain) if isinstance(domain, Choice) else ())}
        if claimed & here or (isinstance(domain, Choice) and key in space._below(domain)):
            twice = sorted(claimed & here or {key})
            raise InputError(f"{where}: {', '.join(twice)} would be set twice at once; leave one of them")
        claimed |= here
