"""The processes of one run: who this one is, what they tell each other, how they end together."""

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from coconut import files
from coconut.errors import UserError, of_disk

Part = TypeVar("Part")
DEVICES = ("cpu", "gpu")


def wanted_device(key: str | None) -> str | None:
    """cpu, gpu, or None for the library's own choice: the key, else COCONUT_DEVICE.

    Raises UserError for another word there.
    """
    wanted = key or os.environ.get("COCONUT_DEVICE") or None
    if wanted not in (None, *DEVICES):
        raise UserError("COCONUT_DEVICE", f"expected {' or '.join(DEVICES)}, got {wanted!r}")
    return wanted


class AgreedError(UserError):
    """An error that every process of the run has been told of."""


class World:
    """The processes that train one model together; by itself a single one.

    A back end's `Processes` says how bytes and arrays travel between several. Every process makes
    the same calls in the same order: each of them waits for all others.
    """

    rank = 0
    """Number of this process; 0 writes files and speaks."""
    size = 1
    """How many there are."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def gather(self, own: bytes) -> list[bytes]:
        """The bytes of every process, in order of rank."""
        return [own]

    def sum(self, arrays: Any) -> Any:
        """The sums over all processes of a back end's arrays."""
        return arrays

    def close(self) -> None:
        """Leave the others."""

    def exchange(self, value: Any = None) -> list[Any]:
        """The values (anything JSON has a form for) of all processes, in order of rank.

        Raises UserError, the same in every process, if one of them has met an error meanwhile.
        """
        return self._exchange({"value": value})

    def share(self, parts: Sequence[Part]) -> Sequence[Part]:
        """This process's parts of a work that is dealt out: number rank, rank + size, ..."""
        return parts[self.rank :: self.size]

    def collect(self, own: list[Any]) -> list[Any]:
        """The results of all parts in their order, from what each process made of its share."""
        every = self.exchange(own)
        return [every[i % self.size][i // self.size] for i in range(sum(map(len, every)))]

    def deal(
        self,
        parts: Sequence[Any],
        do: Callable[[Any], Any],
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[Any]:
        """What `do` makes of each part (anything JSON has a form for), each done by one process.

        The parts are those of one process, so that results do not depend on how many there are.
        advance: told how many elements of parts are done, as far as this process can tell.
        """
        own = []
        for i, part in enumerate(self.share(parts)):
            own.append(do(part))
            advance(sum(map(len, parts[i * self.size : (i + 1) * self.size])))
        return self.collect(own)

    def wait(self) -> None:
        """Go on when all others are here too; raises like `exchange`."""
        self.exchange()

    def check_same_file(self, path: Path) -> None:
        """Raise UserError unless a file has the same content for all processes."""
        if self.size > 1:
            self.check_same(str(path), files.sha256(path))

    def check_same(self, what: str, value: str) -> None:
        """Raise UserError unless all processes have the same value."""
        first, *others = self.exchange([value, platform.node()])
        for rank, other in enumerate(others, 1):
            if other[0] != first[0]:
                raise AgreedError(
                    what,
                    f"process {rank} (on {other[1]}) has another one than process 0 (on"
                    f" {first[1]}); give all machines the same files",
                )

    def tell(self, error: UserError) -> UserError:
        """Tell the others of an error; they raise it at their next exchange.

        Returns what all end with.
        """
        if isinstance(error, AgreedError) or self.size == 1:
            return error
        try:
            self._exchange({"where": error.where, "problems": error.problems})
        except AgreedError as agreed:
            return agreed
        except RuntimeError:
            pass  # the others are gone already
        return error

    def _exchange(self, message: dict[str, Any]) -> list[Any]:
        if self.size == 1:
            return [message["value"]]
        own = json.dumps(message | {"host": platform.node()}).encode()
        try:
            messages = [json.loads(m) for m in self.gather(own)]
        except ValueError:
            # A broken ring of MLX gives what its memory holds.
            raise RuntimeError("another process of this run is gone; it says why") from None
        failed = [(rank, m) for rank, m in enumerate(messages) if "problems" in m]
        if failed:
            rank, first = failed[0]
            where = first["where"]
            if len(failed) < self.size:
                where = f"process {rank} of {self.size}, on {first['host']}: {where}"
            raise AgreedError(where, *first["problems"])
        return [m["value"] for m in messages]


def together(run: Callable[[World], None], make_world: Callable[[], World]) -> None:
    """Call `run` in every process of a run; a UserError in one ends all, said once."""
    world = make_world()
    try:
        run(world)
    except (UserError, OSError) as error:
        told = world.tell(error if isinstance(error, UserError) else of_disk(error))
        if world.is_first or not isinstance(told, AgreedError):
            print(told, file=sys.stderr, flush=True)
        if isinstance(told, AgreedError):
            # A launcher ends all processes when one leaves: not before the line is out.
            world.gather(b"")
        sys.exit(2)
    except KeyboardInterrupt:
        if world.is_first:
            raise
        sys.exit(130)
    finally:
        world.close()
