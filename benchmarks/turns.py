"""Candidates that take turns, each in a process of its own: a noisy machine is noisy for all, and what one keeps of
memory and threads is in no other's way."""

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
    """`seconds()` of one go; `rest()` gives memory back until the next turn; `facts()` are told at the end."""
    seconds: Callable[[], float]
    rest: Callable[[], None] = lambda: None
    facts: Callable[[], dict[str, Any]] = dict


def _play(pipe: Connection, make: Callable[[], Candidate]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks gets it too, and ends this one
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
            candidate.seconds()  # takes memory again
            pipe.send(candidate.seconds())
            candidate.rest()
    except EOFError:  # nobody asks any more
        pass
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


class _Player:
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
    """Seconds of each round and facts, by name, of those that did not fail; what `makers` hold must be picklable.

    Each first has a go that compiles, and in each turn one before the one that counts.
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
