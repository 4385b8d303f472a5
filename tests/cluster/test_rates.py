"""A measurement on a worker: its threads, its errors, and a worker that no node can hold."""

import pytest
import torch

from cluster.rates import in_threads, on_worker
from csm.errors import InputError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def threads() -> float:
    return float(torch.get_num_threads())


def wrong() -> float:
    raise InputError("generator.path: x does not exist")


def test_a_worker_measures_with_the_threads_of_its_cpus() -> None:
    assert on_worker(threads, 2.0, 0.0) == 2
    assert on_worker(threads, 0.2, 0.0) == 1


def test_what_the_user_can_mend_is_said_as_it_is() -> None:
    with pytest.raises(InputError, match=r"^generator.path: x does not exist$"):
        on_worker(wrong, 1.0, 0.0)


def test_a_worker_that_fits_no_node_is_refused_rather_than_waited_for() -> None:
    with pytest.raises(InputError, match="no node of the cluster has 1 CPU and 1 GPU"):
        on_worker(threads, 1.0, 1.0)


def test_this_process_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    assert in_threads(threads, before + 1.0) == before + 1
    assert torch.get_num_threads() == before
