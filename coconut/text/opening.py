"""Open a tokenizer by its name, or from the directory of a checkpoint."""

from pathlib import Path

from coconut.errors import UserError
from coconut.text.huggingface import _load_hugging_face
from coconut.text.tiktoken import _load_tiktoken, bytes_encoding, gpt2_encoding, prosqa_encoding
from coconut.text.tokenizer import ENCODING_FILE, RANKS_FILE, Tokenizer


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory, or a built-in one by name: `gpt2`, `prosqa`.

    A directory is read as a tiktoken encoding (encoding.tiktoken, encoding.json) if it holds one,
    else as a Hugging Face tokenizer. Raises UserError.
    """
    directory = Path(path_or_name)
    if directory.is_dir():
        if (directory / RANKS_FILE).exists() or (directory / ENCODING_FILE).exists():
            return _load_tiktoken(directory)
        return _load_hugging_face(directory)
    if str(path_or_name) in ("gpt2", "openai-community/gpt2"):
        return gpt2_encoding()
    if str(path_or_name) == "prosqa":
        return prosqa_encoding()
    if str(path_or_name) == "bytes":
        return bytes_encoding()
    raise UserError(
        str(path_or_name),
        "no such tokenizer: give a directory with tokenizer.json or encoding.tiktoken, "
        "or one of the names gpt2, prosqa, bytes",
    )
