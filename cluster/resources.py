"""What each kind of worker takes of the cluster, and whether it fits."""

import math
from collections.abc import Mapping, Sequence

from pydantic import Field
from pydantic.dataclasses import dataclass

from csm.errors import InputError
from csm.parameters import STRICT


@dataclass(frozen=True, config=STRICT)
class Pool:
    """An actor pool: between ``min_actors`` and ``max_actors``, each with ``cpus`` and ``gpus`` (fractions allowed).

    ``max_actors`` 0: as many as fit, without GPUs no more than there are CPUs.
    """

    min_actors: int = Field(default=1, ge=1)
    max_actors: int = Field(default=0, ge=0)
    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, config=STRICT)
class Group:
    """A group of training workers: ``workers`` (0: as many as fit), each with ``cpus`` and ``gpus``."""

    workers: int = Field(default=0, ge=0)
    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, config=STRICT)
class FitGroup(Group):
    """The group that trains one generator together: a single worker unless more are asked for."""

    workers: int = Field(default=1, ge=0)


@dataclass(frozen=True, config=STRICT)
class Cap:
    """The most ``cpus`` and ``gpus`` that a run takes of the cluster; 0: all that there are."""

    cpus: float = Field(default=0.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)

    def of(self, total: Mapping[str, float]) -> dict[str, float]:
        """The resources of a cluster that has ``total``, as far as the run may take them."""
        limits = {"CPU": self.cpus, "GPU": self.gpus}
        return {kind: min(amount, limits.get(kind) or amount) for kind, amount in total.items()}


@dataclass(frozen=True, config=STRICT)
class ResourcesConfig:
    """Resources of each stage that runs on Ray.

    The defaults give one mixing and one annotation actor for every CPU: labels may cost more than images. ``fit`` is the group that trains
    one generator together, ``train`` the one that shares many classifiers. All of them are sized to ``cap``, this run's share of a cluster
    that others use too. While a run of higher ``priority`` is on the cluster, this one waits: mixing and annotation from one shard to the
    next, trainings and sweeps before they start.
    """

    mix: Pool = Pool(cpus=0.6)
    annotate: Pool = Pool(cpus=0.4)
    train: Group = Group()
    fit: FitGroup = FitGroup()
    cap: Cap = Cap()
    priority: int = 0


def fits(cpus: float, gpus: float, total: dict[str, float]) -> int:
    """How many workers of this size the cluster holds."""
    by_cpu = int((total.get("CPU", 0.0) + 1e-6) // cpus)
    return by_cpu if gpus == 0 else min(by_cpu, int((total.get("GPU", 0.0) + 1e-6) // gpus))


def pool_sizes(pools: dict[str, Pool], total: dict[str, float]) -> dict[str, tuple[int, int]]:
    """(minimum, maximum) actors of pools that run at once.

    Every pool first gets its minimum; of what is left they take one actor each, in turn, until nothing fits. Without GPUs a pool has no
    more actors than there are CPUs, if ``max_actors`` does not say so: each computes in a thread of its own.

    Args:
        pools: name -> pool.
        total: resources of the cluster, as ``ray.cluster_resources()`` gives them.

    Raises:
        InputError: the minima do not fit; the message has the arithmetic.
    """
    needed = {key: sum(p.min_actors * getattr(p, key) for p in pools.values()) for key in ("cpus", "gpus")}
    for key, kind in (("cpus", "CPU"), ("gpus", "GPU")):
        have = total.get(kind, 0.0)
        if needed[key] > have + 1e-6:
            sums = " + ".join(f"{name} {p.min_actors} x {getattr(p, key):g}" for name, p in pools.items())
            raise InputError(
                f"resources: {sums} = {needed[key]:g} {kind}, but the cluster has {have:g}; "
                f"lower resources.*.{key} or resources.*.min_actors, raise resources.cap if it is set, or add nodes"
            )
    most = {name: pool.min_actors for name, pool in pools.items()}
    left = {kind: total.get(kind, 0.0) - needed[key] for key, kind in (("cpus", "CPU"), ("gpus", "GPU"))}
    growing = list(pools)
    while growing:
        for name in growing.copy():
            pool = pools[name]
            limit = pool.max_actors or (math.inf if pool.gpus else math.ceil(total.get("CPU", 0.0)))
            if most[name] >= limit or not fits(pool.cpus, pool.gpus, left):
                growing.remove(name)
                continue
            most[name] += 1
            left["CPU"] -= pool.cpus
            left["GPU"] -= pool.gpus
    return {name: (pool.min_actors, most[name]) for name, pool in pools.items()}


def wanting(pools: Mapping[str, Pool], nodes: Sequence[Mapping[str, float]]) -> str:
    """What ``nodes``, with these resources each, lack for one worker of each of ``pools``; "" if they have room."""
    free = [{"CPU": node.get("CPU", 0.0), "GPU": node.get("GPU", 0.0)} for node in nodes]
    for name, pool in sorted(pools.items(), key=lambda item: (-item[1].gpus, -item[1].cpus)):
        node = next((node for node in free if fits(pool.cpus, pool.gpus, node)), None)
        if node is None:
            have = f"{sum(n.get('CPU', 0.0) for n in nodes):g} CPU and {sum(n.get('GPU', 0.0) for n in nodes):g} GPU"
            return f"the {len(nodes)} node(s) left, with {have}, have no room for {name} ({pool.cpus:g} CPU, {pool.gpus:g} GPU)"
        node["CPU"] -= pool.cpus
        node["GPU"] -= pool.gpus
    return ""


def group_size(group: Group, jobs: int, total: dict[str, float], name: str = "train") -> int:
    """Number of workers of the training group ``resources.NAME``, at most one for each of ``jobs``; ``InputError`` if it does not fit."""
    room = fits(group.cpus, group.gpus, total)
    wanted = group.workers or room
    if room == 0 or wanted > room:
        have = f"{total.get('CPU', 0.0):g} CPU and {total.get('GPU', 0.0):g} GPU"
        raise InputError(
            f"resources.{name}: {max(wanted, 1)} workers x ({group.cpus:g} CPU, {group.gpus:g} GPU) do not fit the cluster's {have}; "
            f"lower resources.{name} or add nodes"
        )
    return max(1, min(wanted, jobs))
