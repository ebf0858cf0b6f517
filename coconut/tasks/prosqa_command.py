"""The command line of `data/prosqa.py`."""

import argparse
from dataclasses import asdict

from coconut.tasks.generated import write
from coconut.tasks.prosqa import generate, keys
from coconut.tasks.prosqa_graph import STEPS, Options
from coconut.tasks.prosqa_stats import print_stats


def _hops(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def main() -> None:
    """The command line; see the head of this file."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="data/prosqa.py", description="Generate ProsQA items, or compare files of them."
    )
    parser.set_defaults(**asdict(default), hops=(default.min_hops, default.max_hops))
    of_hops = f"hops to the answer ({default.min_hops}-{default.max_hops})"
    add = parser.add_argument
    add("--items", type=int, metavar="N", help="how many items to write")
    add("--seed", type=int, help="0 or more; the same seed gives the same bytes")
    add("--out", metavar="FILE", help="the JSON file to write")
    add("--nodes", type=int, help="raw nodes (%(default)s)")
    add("--hops", type=_hops, metavar="MIN-MAX", help=of_hops)
    add("--swapped", type=float, metavar="SHARE", help="ask the other head (%(default)s)")
    add("--equal-depth", action="store_true", help="both concepts equally deep")
    add("--steps", choices=STEPS, help="(%(default)s)")
    add("--disjoint", nargs="+", default=[], metavar="FILE", help="files to share no item with")
    add("--stats", nargs="+", metavar="FILE", help="compare files, write nothing")
    args = parser.parse_args()
    if args.stats:
        print_stats(args.stats)
        return
    missing = [f"--{name}" for name in ("items", "seed", "out") if getattr(args, name) is None]
    if missing:
        parser.error(f"needed to generate: {', '.join(missing)} (or give --stats FILE)")
    given = {name: getattr(args, name) for name in ("nodes", "swapped", "equal_depth", "steps")}
    options = Options(min_hops=args.hops[0], max_hops=args.hops[1], **given)
    write(args.out, generate, keys, options, args.seed, args.items, args.disjoint)
    print(f"wrote {args.items:,} items | {args.out} | seed {args.seed}")
