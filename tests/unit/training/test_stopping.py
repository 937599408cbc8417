"""Signals and the clock as wishes to stop, in this process."""

import os
import signal
import threading
import time

import pytest

from megatron_metro.training.stopping import SAME_SIGNAL_SECONDS, SIGNALS, StopRequest

WAIT_SECONDS = 20.0


def wait_for(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def ends():
    return []


@pytest.fixture
def request_(ends):
    stop = StopRequest(None, lambda name, number: ends.append((name, number)))
    before = [signal.getsignal(number) for number in SIGNALS], threading.active_count()
    stop.install()
    yield stop
    stop.restore()
    wait_for(lambda: threading.active_count() == before[1])
    assert [signal.getsignal(number) for number in SIGNALS] == before[0]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish(request_, ends, number):
    assert not request_.is_wanted() and request_.signal_name is None
    os.kill(os.getpid(), number)
    wait_for(request_.is_wanted)
    assert request_.signal_name == number.name and ends == []


def test_one_wish_may_come_twice_but_a_second_one_ends(request_, ends):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(request_.is_wanted)
    time.sleep(SAME_SIGNAL_SECONDS + 0.1)
    assert ends == []
    os.kill(os.getpid(), signal.SIGINT)
    wait_for(lambda: ends)
    assert ends == [("SIGINT", 2)] and request_.signal_name == "SIGTERM"


def test_the_clock_is_a_wish_without_a_signal():
    stop = StopRequest(0.001 / 60.0, lambda name, number: None)
    wait_for(stop.is_wanted)
    assert stop.signal_name is None
    assert not StopRequest(1000.0, lambda name, number: None).is_wanted()
