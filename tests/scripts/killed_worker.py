"""Tests of which one kills its process; test_environments copies this file."""

import os
import signal


def test_before():
    pass


def test_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_after():
    pass
