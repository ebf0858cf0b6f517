"""Which layers of a model the parts of a rule read."""

import math

from coconut.feedback.catalogue import Part, Span

# ---- layers by number


def layer_index(layer: int | float, n_layers: int) -> int:
    """Number 0..L of a layer: negative counts from L, a share of the depth is rounded down.

    Raises ValueError if there is no such layer.
    """
    if isinstance(layer, float):
        return math.floor(layer * n_layers)
    index = n_layers + 1 + layer if layer < 0 else layer
    if not 0 <= index <= n_layers:
        raise ValueError(
            f"layer {layer}: the model has the layers 0 to {n_layers} (or {-n_layers - 1} to -1)"
        )
    return index


def depth_index(share: float, n_layers: int) -> int:
    """Number of the layer nearest to a share of the depth; halves go up."""
    return math.floor(share * n_layers + 0.5)


def hf_index(n: int | float, n_layers: int) -> int:
    """Index 0..L into transformers' list (h^0, ..., h^{L-1}, ĥ): L means ĥ, h^L is not in it."""
    if isinstance(n, float):
        return min(math.floor(n * (n_layers + 1)), n_layers)
    return layer_index(n, n_layers)


def span_layers(span: Span, n_layers: int) -> tuple[int, int]:
    """(first, last) layer of a span. Raises ValueError if it is empty or leaves the model."""
    first = layer_index(span.start, n_layers)
    last = n_layers if span.stop is None else layer_index(span.stop, n_layers)
    if first > last:
        raise ValueError(f"layers {span}: from {first} to {last} there are none")
    return first, last


def transitions(part: Part, n_layers: int) -> list[tuple[int, int]]:
    """Pairs of layers that `suppressed` compares: neighbours, or for agg=net the two ends."""
    first, last = span_layers(part["layers"], n_layers)
    if first == last:
        raise ValueError(f"layers {part['layers']}: a transition needs two layers")
    if part["agg"] == "net":
        return [(first, last)]
    return [(i, i + 1) for i in range(first, last)]


def fork_indices(part: Part, n_layers: int) -> range:
    """l of the differences H[l+1] - H[l] that `suppressed_fork` adds up."""
    where = part["from"]
    if isinstance(where, float):
        return range(min(math.floor(where * (n_layers + 1)), n_layers - 1), n_layers)
    index = n_layers + where if where < 0 else where
    if not 0 <= index < n_layers:
        raise ValueError(f"difference {where}: the model has 0 to {n_layers - 1}")
    return range(index, index + 1)


def _layers_of(part: Part, n_layers: int) -> set[int]:
    try:
        if part.name == "layer":
            return {layer_index(part["n"], n_layers)}
        if part.name == "depth":
            return {depth_index(part["f"], n_layers)}
        if part.name == "hf":
            return {hf_index(part["n"], n_layers)} - {n_layers}
        if part.name == "mean":
            first, last = span_layers(part["layers"], n_layers)
            return set(range(first, last + 1))
        if part.name == "suppressed":
            return {i for pair in transitions(part, n_layers) for i in pair}
        if part.name == "suppressed_fork":
            found = fork_indices(part, n_layers)
            return {*found, found[-1] + 1} - {n_layers}
    except ValueError as error:
        raise ValueError(f"{part.name}: {error}") from None
    return set()
