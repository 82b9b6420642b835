"""Who is next, and how long that takes: the queue of the serving engine and its measured pace."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
RATE_SECONDS = 60.0  # over which rates are taken
SHARE_OF_NEWEST = 0.2  # of a moving mean


class FairQueue(Generic[Item]):
    """Users take turns; first come, first served within a user. Not thread-safe."""

    def __init__(self) -> None:
        self._users: dict[str, deque[Item]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._users.values()))

    def items(self, user: str) -> tuple[Item, ...]:
        """Of one user, the next one first."""
        return tuple(self._users.get(user, ()))

    def put(self, user: str, item: Item) -> None:
        self._users.setdefault(user, deque()).append(item)

    def take(self) -> Item | None:
        """The next one, None if there is none; its user's next turn comes after everybody else's."""
        if not self._users:
            return None
        user = next(iter(self._users))
        items = self._users.pop(user)
        item = items.popleft()
        if items:
            self._users[user] = items
        return item

    def remove(self, is_meant: Callable[[Item], bool]) -> Item | None:
        """Take out the first item that is meant, whoever's turn it is; None if there is none."""
        for user, items in self._users.items():
            for item in items:
                if is_meant(item):
                    items.remove(item)
                    if not items:
                        del self._users[user]
                    return item
        return None

    def place(self, is_meant: Callable[[Item], bool]) -> int:
        """How many turns until the first item that is meant has been taken, 0 if it is not here."""
        for turn, items in enumerate(self._users.values()):
            for round_, item in enumerate(items):
                if is_meant(item):
                    others = enumerate(self._users.values())
                    before = [min(len(other), round_ + (place < turn)) for place, other in others if place != turn]
                    return sum(before) + round_ + 1
        return 0


class Rate:
    """How often something happened per second, lately: older counts weigh less."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._value = clock, 0.0
        self._start = self._last = clock()

    def add(self, count: int) -> None:
        self._value = self._faded() + count

    def per_second(self) -> float:
        seconds = self._clock() - self._start
        return self._faded() / (RATE_SECONDS * -math.expm1(-seconds / RATE_SECONDS)) if seconds > 0 else 0.0

    def _faded(self) -> float:
        now = self._clock()
        self._value *= math.exp((self._last - now) / RATE_SECONDS)
        self._last = now
        return self._value


class MovingMean:
    """Mean of what was measured lately, None before."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, measured: float) -> None:
        self.value = measured if self.value is None else self.value + SHARE_OF_NEWEST * (measured - self.value)
