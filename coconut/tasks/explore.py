"""Exploration: ProsQA items that teach a small model what a thought is for.

An item says how many latents it is asked with (`latents`). Three kinds are mixed:

    final   all latents, no steps: the question as the last stage of Coconut asks it
    facts   k latents, then concepts that k hops lead to; a walk that meets a leaf stays there
    walk    no latents: a random walk down, a concept a step, so that printing a step and thinking
            one are the same operation, from concepts to their children

Items with `thoughts` (`name_thoughts`) teach the same more directly: asked as a `final`, and every
thought on the way is labelled with a concept that so many hops lead to.

Because walks stay at leaves, the last thought holds the leaves that the asked name leads to, and
the answer can be read from it whatever the depth.

Source: after the breadth-first variant of Zhu et al. 2025 (arXiv 2505.12514), which labels a random
node of the frontier as each thought's target; several facts, and leaves that stay, are ours.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

SHARE_FINAL, SHARE_FACTS = 0.4, 0.5
"""Of the items; the rest are walks."""
SHARE_LAST = 0.4
"""Of the facts: asked with all latents; the others with 1 to all, uniformly."""
N_FACTS, N_WALKED = 4, 6
"""Facts, at most, or walked concepts printed before the answer."""


def explore(
    item: dict[str, Any], max_hops: int, draw: Callable[[], float], only_walks: bool = False
) -> dict[str, Any]:
    """An exploration item on a ProsQA item's graph; draw gives uniform numbers in [0, 1)."""
    kind = 1.0 if only_walks else draw()
    if kind < SHARE_FINAL:
        return item | {"steps": [], "latents": max_hops}
    symbols, root = item["idx_to_symbol"], item["root"]
    children = _children(item)
    if kind < SHARE_FINAL + SHARE_FACTS:
        latents = max_hops if draw() < SHARE_LAST else 1 + int(draw() * max_hops)
        frontier = _frontier(children, root, latents)
        keys = {node: draw() for node in frontier}
        # None comes twice: a repeat could be copied from the first time.
        told = sorted(frontier, key=keys.__getitem__)[:N_FACTS]
        steps = [f"{symbols[root]} is a {symbols[node]}." for node in told]
    else:
        latents, frontier = 0, children[root]
        steps = _walk(children, symbols, root, draw)
    # The answer is a further fact: a right answer behind facts could be read off them.
    answer = f"{symbols[root]} is a {symbols[_one(frontier, draw)]}."
    return item | {"steps": steps, "latents": latents, "answer": answer}


def name_thoughts(item: dict[str, Any], max_hops: int, draw: Callable[[], float]) -> dict[str, Any]:
    """The question asked with max_hops latents, and what each of their thoughts should name.

    Thought k names a concept, drawn uniformly, of those that walks of k hops may end at.
    """
    symbols, children = item["idx_to_symbol"], _children(item)
    frontiers = [_frontier(children, item["root"], k) for k in range(1, max_hops + 1)]
    thoughts = [f" is a {symbols[_one(frontier, draw)]}." for frontier in frontiers]
    return item | {"steps": [], "latents": max_hops, "thoughts": thoughts}


def _children(item: dict[str, Any]) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for parent, child in item["edges"]:
        children.setdefault(parent, []).append(child)
    return children


def _frontier(children: dict[int, list[int]], root: int, n_hops: int) -> list[int]:
    """Nodes that walks of n_hops from the root may end at; a walk stays at a leaf."""
    frontier = [root]
    for _ in range(n_hops):
        frontier = sorted({child for node in frontier for child in children.get(node, [node])})
    return frontier


def _walk(
    children: dict[int, list[int]], symbols: Sequence[str], root: int, draw: Callable[[], float]
) -> list[str]:
    """A walk down from the asked name; from a leaf, told twice, it starts again anywhere."""
    inner = sorted(children)
    below = {child for group in children.values() for child in group}
    node, subject = root, ""
    steps: list[str] = []
    while len(steps) < N_WALKED:
        node = _one(children[node], draw)
        # The subject goes without saying unless the walk starts anew.
        steps.append(f"{subject} is a {symbols[node]}.")
        subject = ""
        if node not in children:
            steps.append(f" is a {symbols[node]}.")
            node = _one(inner, draw)
            subject = f"Every {symbols[node]}" if node in below else symbols[node]
    return steps[:N_WALKED]


def _one(nodes: Collection[int], draw: Callable[[], float]) -> int:
    return sorted(nodes)[int(draw() * len(nodes))]
