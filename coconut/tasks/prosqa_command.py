"""The command line of `data/prosqa.py`."""

import argparse

from coconut.tasks.generated import write
from coconut.tasks.prosqa import _hops, generate, keys
from coconut.tasks.prosqa_graph import STEPS, Options


def main() -> None:
    """The command line; see the head of this file."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="data/prosqa.py", description="Generate ProsQA items, or compare files of them."
    )
    parser.add_argument("--items", type=int, metavar="N", help="how many items to write")
    parser.add_argument("--seed", type=int, help="0 or more; the same seed gives the same bytes")
    parser.add_argument("--out", metavar="FILE", help="the JSON file to write")
    parser.add_argument("--nodes", type=int, default=default.nodes, help="raw nodes (%(default)s)")
    parser.add_argument(
        "--hops",
        type=_hops,
        default=(default.min_hops, default.max_hops),
        metavar="MIN-MAX",
        help=f"hops to the answer ({default.min_hops}-{default.max_hops})",
    )
    parser.add_argument(
        "--swapped",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="ask the other head (%(default)s)",
    )
    parser.add_argument("--equal-depth", action="store_true", help="both concepts equally deep")
    parser.add_argument("--steps", choices=STEPS, default="path", help="(%(default)s)")
    parser.add_argument(
        "--disjoint", nargs="+", default=[], metavar="FILE", help="files to share no item with"
    )
    parser.add_argument("--stats", nargs="+", metavar="FILE", help="compare files, write nothing")
    args = parser.parse_args()
    if args.stats:
        from coconut.tasks.prosqa_stats import print_stats

        print_stats(args.stats)
        return
    missing = [f"--{name}" for name in ("items", "seed", "out") if getattr(args, name) is None]
    if missing:
        parser.error(f"needed to generate: {', '.join(missing)} (or give --stats FILE)")
    options = Options(
        nodes=args.nodes,
        min_hops=args.hops[0],
        max_hops=args.hops[1],
        swapped=args.swapped,
        equal_depth=args.equal_depth,
        steps=args.steps,
    )
    write(args.out, generate, keys, options, args.seed, args.items, args.disjoint)
    print(f"wrote {args.items:,} items | {args.out} | seed {args.seed}")
