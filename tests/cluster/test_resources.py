import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.resources import Cap, FitGroup, Group, Pool, ResourcesConfig, fits, group_size, pool_sizes, wanting
from csm.errors import InputError


@pytest.mark.parametrize(
    ("cpus", "gpus", "total", "expected"),
    [
        (1, 0, {"CPU": 3}, 3),
        (0.8, 0, {"CPU": 2}, 2),
        (0.1, 0, {"CPU": 1}, 10),  # 1.0 // 0.1 is 9 in floating point
        (0.3, 0, {"CPU": 0.9}, 3),
        (2, 0, {"CPU": 1}, 0),
        (1, 0.5, {"CPU": 8, "GPU": 2}, 4),
        (4, 0.5, {"CPU": 8, "GPU": 2}, 2),
        (1, 1, {"CPU": 8}, 0),  # a cluster without GPUs has no such key
        (1, 0, {}, 0),
    ],
)
def test_fits_counts_whole_workers(cpus, gpus, total, expected):
    assert fits(cpus, gpus, total) == expected


@pytest.mark.parametrize(
    ("pools", "total", "expected"),
    [
        # the defaults on the two CPUs that their docstring speaks of
        ({"mix": ResourcesConfig().mix, "annotate": ResourcesConfig().annotate}, {"CPU": 2}, {"mix": (1, 2), "annotate": (1, 2)}),
        ({"mix": ResourcesConfig().mix}, {"CPU": 2}, {"mix": (1, 2)}),  # no more than CPUs
        ({"mix": ResourcesConfig().mix, "annotate": ResourcesConfig().annotate}, {"CPU": 1}, {"mix": (1, 1), "annotate": (1, 1)}),
        ({"mix": Pool(cpus=1, gpus=0.5)}, {"CPU": 8, "GPU": 2}, {"mix": (1, 4)}),
        ({"mix": Pool(cpus=1, gpus=1), "annotate": Pool(cpus=1)}, {"CPU": 6, "GPU": 2}, {"mix": (1, 2), "annotate": (1, 4)}),
        ({"mix": Pool(max_actors=2)}, {"CPU": 8}, {"mix": (1, 2)}),
        ({"mix": Pool(min_actors=2, max_actors=9)}, {"CPU": 4}, {"mix": (2, 4)}),
        # they take what is left in turn
        ({"mix": Pool(), "annotate": Pool()}, {"CPU": 5}, {"mix": (1, 3), "annotate": (1, 2)}),
        ({"mix": Pool(cpus=4), "annotate": Pool()}, {"CPU": 8}, {"mix": (1, 1), "annotate": (1, 4)}),
        ({"mix": Pool(max_actors=1), "annotate": Pool()}, {"CPU": 5}, {"mix": (1, 1), "annotate": (1, 4)}),
        ({}, {"CPU": 1}, {}),
    ],
)
def test_pool_sizes(pools, total, expected):
    assert pool_sizes(pools, total) == expected


@pytest.mark.parametrize(
    ("pools", "total", "message"),
    [
        (
            {"mix": Pool(cpus=0.8), "annotate": Pool(cpus=0.25)},
            {"CPU": 1},
            r"mix 1 x 0\.8 \+ annotate 1 x 0\.25 = 1\.05 CPU, but the cluster has 1; lower resources\.\*\.cpus",
        ),
        ({"mix": Pool(min_actors=3)}, {"CPU": 2}, r"mix 3 x 1 = 3 CPU, but the cluster has 2; .*resources\.\*\.min_actors"),
        ({"mix": Pool(gpus=1)}, {"CPU": 2}, r"mix 1 x 1 = 1 GPU, but the cluster has 0; lower resources\.\*\.gpus"),
        ({"mix": Pool(gpus=0.75), "annotate": Pool(gpus=0.5)}, {"CPU": 2, "GPU": 1}, r"= 1\.25 GPU, but the cluster has 1"),
    ],
)
def test_pools_that_do_not_fit_are_refused_with_the_arithmetic(pools, total, message):
    with pytest.raises(InputError, match=message):
        pool_sizes(pools, total)


size = st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.8, 1.0, 2.0])
pool = st.builds(Pool, min_actors=st.integers(1, 3), max_actors=st.integers(0, 4), cpus=size, gpus=st.just(0.0) | size)


@given(st.lists(pool, min_size=1, max_size=3), st.sampled_from([0.5, 1, 2, 5, 16]), st.sampled_from([0, 1, 4]))
def test_pools_never_take_more_than_there_is_and_leave_no_room_unused(pools, cpus, gpus):
    named = {str(number): pool for number, pool in enumerate(pools)}
    total = {"CPU": cpus, "GPU": gpus}
    try:
        sizes = pool_sizes(named, total)
    except InputError:
        least = [sum(p.min_actors * getattr(p, key) for p in pools) for key in ("cpus", "gpus")]
        assert least[0] > cpus or least[1] > gpus
        return
    left = [
        total[kind] - sum(sizes[n][1] * getattr(p, key) for n, p in named.items())
        for kind, key in (("CPU", "cpus"), ("GPU", "gpus"))
    ]
    assert min(left) > -1e-5
    for name, p in named.items():
        least, most = sizes[name]
        assert least == p.min_actors <= most
        assert not p.max_actors or most <= max(p.max_actors, p.min_actors)
        if not p.max_actors and (p.gpus or most < cpus):
            assert left[0] < p.cpus - 1e-9 or left[1] < p.gpus - 1e-9


@pytest.mark.parametrize(
    ("group", "jobs", "total", "expected"),
    [
        (Group(), 10, {"CPU": 2}, 2),
        (Group(), 1, {"CPU": 2}, 1),  # no worker without a job
        (Group(workers=2), 10, {"CPU": 8}, 2),
        (Group(cpus=0.5), 10, {"CPU": 2}, 4),
        (Group(cpus=1, gpus=0.25), 10, {"CPU": 16, "GPU": 1}, 4),
    ],
)
def test_group_size(group, jobs, total, expected):
    assert group_size(group, jobs, total) == expected


def test_the_generator_is_trained_by_one_worker_unless_more_are_asked_for():
    assert ResourcesConfig().fit == FitGroup(workers=1, cpus=1.0, gpus=0.0)
    assert FitGroup(gpus=1).workers == 1


def test_a_group_that_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"resources\.fit: 3 workers .*; lower resources\.fit or add nodes"):
        group_size(Group(workers=3), 5, {"CPU": 2}, "fit")


@pytest.mark.parametrize(
    ("group", "total", "message"),
    [
        (Group(workers=3), {"CPU": 2}, r"3 workers x \(1 CPU, 0 GPU\) do not fit the cluster's 2 CPU and 0 GPU"),
        (Group(cpus=4), {"CPU": 2}, r"1 workers x \(4 CPU, 0 GPU\) do not fit"),
        (Group(gpus=1), {"CPU": 2}, r"1 workers x \(1 CPU, 1 GPU\) do not fit .*; lower resources\.train or add nodes"),
    ],
)
def test_a_group_that_does_not_fit_is_refused(group, total, message):
    with pytest.raises(InputError, match=message):
        group_size(group, 5, total)


@pytest.mark.parametrize(
    ("cap", "total", "expected"),
    [
        (Cap(), {"CPU": 8, "GPU": 2, "memory": 5}, {"CPU": 8, "GPU": 2, "memory": 5}),
        (Cap(cpus=3), {"CPU": 8, "GPU": 2}, {"CPU": 3, "GPU": 2}),
        (Cap(cpus=3, gpus=0.5), {"CPU": 2, "GPU": 2}, {"CPU": 2, "GPU": 0.5}),
        (Cap(gpus=1), {"CPU": 2}, {"CPU": 2}),
    ],
)
def test_a_cap_is_the_most_and_not_the_least(cap, total, expected):
    assert cap.of(total) == expected


@pytest.mark.parametrize(
    ("pools", "nodes", "text"),
    [
        ({"mix": Pool(cpus=0.8), "annotate": Pool(cpus=0.2)}, [{"CPU": 1}], ""),
        ({"mix": Pool(), "annotate": Pool()}, [{"CPU": 1}, {"CPU": 1}], ""),
        ({"annotate": Pool(cpus=1), "mix": Pool(cpus=2)}, [{"CPU": 2}, {"CPU": 1}], ""),  # the large one first
        (
            {"mix": Pool(), "annotate": Pool()},
            [{"CPU": 1}, {}],
            "the 2 node(s) left, with 1 CPU and 0 GPU, have no room for annotate",
        ),
        (
            {"mix": Pool(cpus=2)},
            [{"CPU": 1}, {"CPU": 1}],
            "the 2 node(s) left, with 2 CPU and 0 GPU, have no room for mix (2 CPU",
        ),
        ({"mix": Pool(gpus=0.8), "annotate": Pool(gpus=0.2)}, [{"CPU": 4, "GPU": 1}], ""),
        ({"mix": Pool(gpus=0.8)}, [{"CPU": 4}], "have no room for mix (1 CPU, 0.8 GPU)"),
        ({"mix": Pool()}, [], "the 0 node(s) left, with 0 CPU and 0 GPU, have no room for mix"),
    ],
)
def test_what_is_wanting_for_a_worker_of_each_pool(pools, nodes, text):
    said = wanting(pools, nodes)
    assert text in said
    assert bool(said) == bool(text)
