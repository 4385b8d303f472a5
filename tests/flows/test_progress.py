import pytest

from flows import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_line_says_how_much_is_done_and_how_long_the_rest_takes(clock, capsys):
    with progress.task("mix", 4320) as task:
        clock(12)
        task.advance(1200, "100.0 images/s  41 device-s")
        assert lines(capsys) == [
            "mix: 1200/4320  100.0 images/s  41 device-s  12 s"
        ]  # workers have to start: one point is no pace
        clock(9)
        task.advance(800, "95.2 images/s  60 device-s")
        assert lines(capsys) == []  # a line in ten seconds at most
        clock(1)
        task.advance(100)
        assert lines(capsys) == ["mix: 2100/4320  95.2 images/s  60 device-s  0:25 left  22 s"]
        clock(8)
        task.advance(2220, "144.0 images/s  100 device-s")
        clock(2)
    assert lines(capsys) == ["mix: 4320/4320  144.0 images/s  100 device-s  32 s"]  # the end sums up


def test_what_was_done_before_does_not_count_for_the_rate(clock, capsys):
    with progress.task("mix", 1000, done=900) as task:
        clock(20)
        task.advance(10)
        assert (task.done, task.made, task.rate) == (910, 10, 0.5)
        clock(10)
        task.advance(10)
    assert lines(capsys) == ["mix: 910/1000  20 s", "mix: 920/1000  1:20 left  30 s"]


def test_a_warning_stands_beside_the_text_until_it_is_over(clock, capsys):
    with progress.task("mix", 100) as task:
        clock(11)
        task.warn("slowest: shard 17 on h2, 43 s")
        clock(11)
        task.advance(10, "0.5 images/s")
        task.warn("")
    assert lines(capsys) == [
        "mix: 0/100  slowest: shard 17 on h2, 43 s  11 s",
        "mix: 10/100  0.5 images/s  slowest: shard 17 on h2, 43 s  22 s",
        "mix: 10/100  0.5 images/s  22 s",
    ]


def test_nothing_made_is_no_rate(clock, capsys):
    with progress.task("mix", 10, done=4) as task:
        clock(11)
        task.advance(0)
    assert lines(capsys) == ["mix: 4/10  11 s"]


@pytest.mark.parametrize(("made", "left"), [(500, "0:10"), (10, "16:29"), (5, "33:08"), (1, "2:46:20"), (998, "0:00")])
def test_long_times_have_hours(clock, capsys, made, left):
    with progress.task("mix", 1000) as task:
        clock(5)
        task.advance(1)
        clock(10)
        task.advance(made)
        assert f"  {left} left  15 s" in lines(capsys)[0]


def test_a_bar_goes_on_from_what_was_done(monkeypatch):
    monkeypatch.setattr(progress, "console", progress.Console(force_terminal=True, width=140, stderr=True))
    with progress.task("mix", 100, done=40) as task:
        task.advance(20, "2.0 images/s  5 device-s")
        (shown,) = task._progress.tasks
        assert (shown.completed, shown.total) == (60, 100)
        assert shown.fields["text"] == "2.0 images/s  5 device-s"
