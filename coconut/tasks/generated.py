"""What the generators of questions made of statements share: options by epoch, keys, the file."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from coconut.errors import UserError
from coconut.tasks.files import Item, field, read_records, write_items

T = TypeVar("T")


def of_epoch(kind: type[T], values: Mapping[str, Any], epoch: int) -> T:
    """The options of an epoch, counted from 0, of a training set made anew for each.

    values: field names to a value, or to a list with a value an epoch, the last of which stays.
    """
    one = {n: v[min(epoch, len(v) - 1)] if isinstance(v, list) else v for n, v in values.items()}
    return kind(**one)


def check_not_negative(where: str, **values: int) -> None:
    """Raise UserError for a number below 0."""
    for name, value in values.items():
        if value < 0:
            raise UserError(where, f"{name}: expected 0 or more, got {value}")


def draw_words(draw: Callable[[], float], words: Sequence[str], n: int) -> list[str]:
    """n distinct words, uniformly, in random order."""
    pool = list(words)
    size = len(pool)
    for i in range(n):
        j = i + int(draw() * (size - i))
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:n]


Keys = Callable[[Item], Collection[bytes]]
"""What of an item no other set may hold, as digests; a generator's `keys`."""


def digest_of_facts(facts: Iterable[str]) -> bytes:
    """A digest of statements in any order."""
    return blake2b(". ".join(sorted(facts)).encode(), digest_size=16, person=b"graph").digest()


def read_keys(path: Path | str, keys: Keys) -> set[bytes]:
    """The keys of all items of a file (only `question` is needed)."""
    found: set[bytes] = set()
    for where, item in read_records(path):
        field(item, "question", str, where)
        found.update(keys(item))
    return found


def write(
    path: Path | str,
    generate: Callable[..., Iterator[Item]],
    keys: Keys,
    options: Any,
    seed: int,
    n_items: int,
    disjoint: Iterable[Path | str] = (),
) -> None:
    """Write what a generator makes, with no key in common with the given files; a progress bar.

    The file appears whole or not at all. Raises UserError on bad options or unreadable files.
    """
    from rich.console import Console
    from rich.progress import Progress

    exclude = frozenset[bytes]().union(*(read_keys(other, keys) for other in disjoint))
    items = generate(options, seed, n_items, exclude=exclude)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        write_items(path, progress.track(items, total=n_items, description=str(path)))
