"""What a model knows, and what of a question lies outside of it."""

from coconut.inside.graph import Graph
from coconut.tasks.words import CONCEPTS, NAMES
from coconut.text.tokenizer import Tokenizer

FORM = "Every X is a Y. NAME is a X. ... Is NAME a X or Y?"
"""Of a ProsQA question."""
_PROSQA_WORDS = frozenset((*NAMES, *CONCEPTS))


def knows_only_prosqa(tokenizer: Tokenizer) -> bool:
    """Whether the model has our small encoding, so ProsQA is all it was ever shown."""
    return tokenizer.name == "prosqa"


def strangeness(tokenizer: Tokenizer, graph: Graph | None) -> str | None:
    """What is unlike anything this model was ever shown; None if nothing is known to be.

    graph: the question's, None of a text that has no graph (`read_graph`).
    """
    if not knows_only_prosqa(tokenizer):
        return None
    if graph is None:
        return f"not a ProsQA question ({FORM}), and this model knows no others"
    unknown = [word for word in graph.nodes if word not in _PROSQA_WORDS]
    if not unknown:
        return None
    return (
        f"words that this model was not trained on: {', '.join(unknown)}; it knows"
        f" {len(_PROSQA_WORDS)}, such as {NAMES[0]} and {CONCEPTS[-1]}"
    )


def warnings(tokenizer: Tokenizer, graph: Graph | None) -> list[str]:
    """Why this question's answers mean nothing, if they do. graph: as in `strangeness`."""
    found = [] if (problem := strangeness(tokenizer, graph)) is None else [problem]
    if graph is not None and graph.choices and graph.right is None:
        found.append("by its statements the asked name is both of the choices, or neither")
    return found
