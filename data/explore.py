"""Exploration: ProsQA items that teach what a thought is for, before any answer needs six of them.

An item says how many latents it is asked with (`latents`: k) and its steps are not the way to the
answer but facts that k thoughts should hold: concepts the asked name reaches in at most k hops.
k = 0 prints a random walk instead, a concept a step, so that printing a step and thinking one are
the same operation: from a concept to its children.

Source: after the breadth-first variant of Zhu et al. 2025 (arXiv 2505.12514), which labels a random
node of the frontier; ours asks for several and for nearer ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data.graphs import distances

N_STEPS = 8
"""Facts or walked concepts of an item."""
SHARE_AT_FRONTIER = 0.5
"""Of the facts: exactly k hops away; the others are spread over 1 to k."""


def explore(item: dict[str, Any], max_hops: int, draw: Callable[[], float]) -> dict[str, Any]:
    """The exploration item on a ProsQA item's graph; draw gives uniform numbers in [0, 1)."""
    symbols, edges = item["idx_to_symbol"], item["edges"]
    hops = [distances(edges, [head]) for head in (0, 1)]
    latents = int(draw() * (max_hops + 1))
    root = int(draw() * 2)
    picked = [_pick(hops[head], hops[1 - head], latents, draw) for head in (0, 1)]
    target, neg_target = picked[root], picked[1 - root]
    first, second = (target, neg_target) if draw() < 0.5 else (neg_target, target)
    statements = item["question"].rsplit(" Is ", 1)[0]
    name = symbols[root]
    if latents:
        steps = [f"{name} is a {symbols[node]}." for node in _facts(hops[root], latents, draw)]
    else:
        steps = _walk(edges, symbols, root, draw)
    return item | {
        "question": f"{statements} Is {name} a {symbols[first]} or {symbols[second]}?",
        "answer": f"{name} is a {symbols[target]}.",
        "steps": steps,
        "latents": latents,
        "root": root,
        "target": target,
        "neg_target": neg_target,
    }


def _pick(
    own: dict[int, int], other: dict[int, int], latents: int, draw: Callable[[], float]
) -> int:
    """A concept below this head alone, at a uniformly drawn distance that the latents reach."""
    by_distance: dict[int, list[int]] = {}
    for node, hops in own.items():
        if hops and node not in other:
            by_distance.setdefault(hops, []).append(node)
    # Every distance up to the greatest occurs: a node's nearest parent is below this head alone.
    farthest = min(max(by_distance), max(latents, 1))
    return _choose(by_distance[1 + int(draw() * farthest)], draw)


def _facts(own: dict[int, int], latents: int, draw: Callable[[], float]) -> list[int]:
    by_distance: dict[int, list[int]] = {}
    for node, hops in own.items():
        by_distance.setdefault(hops, []).append(node)
    farthest = min(max(by_distance), latents)
    facts = []
    for _ in range(N_STEPS):
        far = draw() < SHARE_AT_FRONTIER
        hops = farthest if far else 1 + int(draw() * farthest)
        facts.append(_choose(by_distance[hops], draw))
    return facts


def _walk(
    edges: Sequence[Sequence[int]],
    symbols: Sequence[str],
    root: int,
    draw: Callable[[], float],
) -> list[str]:
    """Concepts of a walk down from the asked name; from a leaf it starts again anywhere."""
    children: dict[int, list[int]] = {}
    for parent, child in edges:
        children.setdefault(parent, []).append(child)
    inner = sorted(children)
    below = {child for _, child in edges}
    node, subject, steps = root, "", []
    for _ in range(N_STEPS):
        if node not in children:
            node = _choose(inner, draw)
            subject = f"Every {symbols[node]}" if node in below else symbols[node]
        node = _choose(children[node], draw)
        # The subject goes without saying unless the walk starts anew.
        steps.append(f"{subject} is a {symbols[node]}.")
        subject = ""
    return steps


def _choose(nodes: Sequence[int], draw: Callable[[], float]) -> int:
    return nodes[int(draw() * len(nodes))]
