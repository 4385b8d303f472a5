"""The page of a report, once for the tests of a module."""

import pytest

from flows.reporting import render
from tests.flows.reported import Page, report


@pytest.fixture(scope="module")
def html():
    return render(report())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)
