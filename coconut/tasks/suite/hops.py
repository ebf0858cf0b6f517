"""Pointer chasing: which concept is so many hops behind a name?

    python data/hops.py --items 300 --seed 2 --out data/hops_valid.json

Every concept has one successor, and all stand on one circle: `Every lempus is a rempus. … Tom is a
lempus. … Is Tom?` is answered by the concept `hops` statements behind the name's. Each hop needs
the one before it, and a transformer looks up only a few in a pass: without what its latents hold it
is left guessing. Item i of a run depends on (seed, i) alone; the same seed gives the same bytes.
"""

import argparse
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from random import Random

from coconut.errors import UserError
from coconut.tasks.files import Item
from coconut.tasks.generated import check_not_negative, digest_of_facts, draw_words, write
from coconut.tasks.words import CONCEPTS, NAMES

STEPS = ("path", "thoughts")
_MAX_TRIES = 1_000


@dataclass(frozen=True)
class Options:
    """What kind of items to make."""

    concepts: int = 8
    """Concepts on the circle; the same words in every item."""
    hops: int = 5
    """Statements to follow behind the name's."""
    steps: str = "path"
    """"path": a concept a step; "thoughts": no steps, a thought for each hop, labelled with it."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("concepts", "hops"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                problems.append(f"{name}: expected a whole number, got {value!r}")
        if self.steps not in STEPS:
            problems.append(f"steps: expected {', '.join(STEPS)}, got {self.steps!r}")
        if not problems:
            if not 3 <= self.concepts <= len(CONCEPTS):
                problems.append(f"concepts: expected 3 to {len(CONCEPTS)}, got {self.concepts}")
            # Once around the circle the answer would stand beside the name.
            elif not 1 <= self.hops < self.concepts:
                problems.append(f"hops: expected 1 to {self.concepts - 1}, got {self.hops}")
        if problems:
            raise UserError("hops options", *problems)


def _item(draw: Callable[[], float], options: Options) -> Item:
    circle = draw_words(draw, CONCEPTS[: options.concepts], options.concepts)
    name = NAMES[int(draw() * len(NAMES))]
    start = int(draw() * options.concepts)
    facts = [f"Every {a} is a {b}." for a, b in zip(circle, [*circle[1:], circle[0]], strict=True)]
    facts = draw_words(draw, [*facts, f"{name} is a {circle[start]}."], options.concepts + 1)
    reached = [circle[(start + k) % options.concepts] for k in range(1, options.hops + 1)]
    steps = [f" is a {concept}." for concept in reached]
    item: Item = {
        "question": " ".join([*facts, f"Is {name}?"]),
        "answer": f"{name} is a {reached[-1]}.",
        "steps": steps,
    }
    if options.steps == "thoughts":
        item |= {"steps": [], "latents": options.hops, "thoughts": steps}
    return item


def keys(item: Item) -> tuple[bytes]:
    """A digest of the item's circle, whatever is asked about it."""
    *facts, _ = item["question"].split(". ")
    return (digest_of_facts(fact for fact in facts if fact.startswith("Every ")),)


def generate(
    options: Options,
    seed: int,
    n_items: int,
    start: int = 0,
    exclude: Collection[bytes] = frozenset(),
) -> Iterator[Item]:
    """Items start … start + n_items - 1 of the run with this seed.

    exclude: keys of items whose circles must not come. Others may come twice, with their statements
    in another order: of eight concepts there are 5,040 circles.
    Raises UserError if seed, start or n_items is negative, or there is nothing but excluded items.
    """
    check_not_negative("hops generator", seed=seed, start=start, n_items=n_items)
    return (_new_item(seed, index, options, exclude) for index in range(start, start + n_items))


def _new_item(seed: int, index: int, options: Options, exclude: Collection[bytes]) -> Item:
    draw = Random(seed << 64 | index).random
    for _ in range(_MAX_TRIES):
        item = _item(draw, options)
        if not any(key in exclude for key in keys(item)):
            return item
    raise UserError(
        "hops options",
        f"item {index}: no circle of {options.concepts} concepts is left beside those held out;"
        " use more concepts",
    )


def main() -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(
        prog="data/hops.py", description="Generate items of pointer chasing."
    )
    parser.set_defaults(**asdict(Options()))
    add = parser.add_argument
    add("--items", type=int, metavar="N", required=True, help="how many to write")
    add("--seed", type=int, required=True, help="the same gives the same bytes")
    add("--out", metavar="FILE", required=True, help="the JSON file to write")
    add("--concepts", type=int, help="on the circle (%(default)s)")
    add("--hops", type=int, help="to follow (%(default)s)")
    add("--steps", choices=STEPS, help="(%(default)s)")
    add("--disjoint", nargs="+", default=[], metavar="FILE", help="files to share no item with")
    args = parser.parse_args()
    options = Options(args.concepts, args.hops, args.steps)
    write(args.out, generate, keys, options, args.seed, args.items, args.disjoint)
    print(f"wrote {args.items:,} items | {args.out} | seed {args.seed}")
