"""Runs candidates in turns, each in a process of its own.

Taking turns makes a noisy machine noisy for all. Separate processes keep the memory and threads of one candidate away
from the others.
"""

import dataclasses
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TURN, FACTS = "turn", "facts"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """`seconds()` runs it once, `rest()` frees memory until the next turn, `facts()` are read at the end."""
    seconds: Callable[[], float]
    rest: Callable[[], None] = lambda: None
    facts: Callable[[], dict[str, Any]] = dict


def _play(pipe: Connection, make: Callable[[], Candidate]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process gets it too, and ends this one
    try:
        candidate = make()
        candidate.seconds()  # compiles
        candidate.rest()
        pipe.send(None)
        while True:
            asked = pipe.recv()
            if asked == FACTS:
                pipe.send(candidate.facts())
                continue
            candidate.seconds()  # allocates memory again
            pipe.send(candidate.seconds())
            candidate.rest()
    except EOFError:  # the parent has closed the pipe
        pass
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


class _Player:
    """A candidate's process, seen from the parent."""

    def __init__(self, make: Callable[[], Candidate]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_play, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._pipe.recv()


def take_turns(makers: dict[str, Callable[[], Candidate]], rounds: int
               ) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Runs all candidates. Returns seconds of each round, and facts, by name, of those that did not fail.

    Each candidate first runs once to compile, and each turn runs it twice, of which the second counts. `makers` must be
    picklable.
    """
    players, seconds, facts = {}, {}, {}

    def attempt(name: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (EOFError, OSError):
            players.pop(name, None)
            print(f"{name}: failed", file=sys.stderr)

    for name, make in makers.items():
        player = attempt(name, lambda make=make: _Player(make))
        if player:
            players[name], seconds[name] = player, []
    for _ in range(rounds):
        for name, player in list(players.items()):
            spent = attempt(name, lambda player=player: player.ask(TURN))
            if spent:
                seconds[name].append(spent)
    for name, player in list(players.items()):
        facts[name] = attempt(name, lambda player=player: player.ask(FACTS))
    return {name: seconds[name] for name in players}, {name: facts[name] for name in players}
