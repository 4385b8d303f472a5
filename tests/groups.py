"""How `pytest -n` shares the tests out, and goes on where a test ended its process."""

import re
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class Groups(LoadFileScheduling):
    """Tests of one file go to one process, and files that read the finished workspace all to the same: it is made once.

    Not by the mark ``xdist_group``, which xdist 3.8 loses under pytest 9.2.
    """

    READS = re.compile(r"def \w+\([^)]*\bfinished\b")

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        super().__init__(config, log)
        self._scopes: dict[str, str] = {}  # of each file

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        if file not in self._scopes:
            self._scopes[file] = "finished" if self.READS.search((self.config.rootpath / file).read_text()) else file
        return self._scopes[file]

    def _reschedule(self, node: WorkerController) -> None:
        """Hand ``node`` tests until it has two: a process begins one only when it knows the next one, or that none follows.

        With xdist 3.8 a replaced process that gets the last test of a file waits for ever, and one that has not collected its tests
        yet ends the run.
        """
        if node not in self.registered_collections or self.collection is None:
            return
        super()._reschedule(node)
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)

    def remove_node(self, node: WorkerController) -> str | None:
        """The test in which the process ended counts as run, and what it had done before is not handed out again.

        With xdist 3.8 the test would end one process after the other, and a process that is handed a finished file waits for ever.
        """
        work = self.assigned_work[node]
        ended = next((test for tests in work.values() for test, is_done in tests.items() if not is_done), None)
        if ended is not None:
            work[self._split_scope(ended)][ended] = True
        self.assigned_work[node] = {scope: tests for scope, tests in work.items() if not all(tests.values())}
        super().remove_node(node)
        return ended
