"""What every tokenizer of a run can do, and the names of its markers and files."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import tokenizers

from coconut.errors import UserError

START, END, LATENT = MARKERS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")
END_OF_TEXT = "<|endoftext|>"

RANKS_FILE, ENCODING_FILE = "encoding.tiktoken", "encoding.json"
HF_FILE, HF_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# What a Hugging Face tokenizer may bring beside tokenizer.json; saving carries it along.
HF_COMPANIONS = (
    HF_CONFIG_FILE,
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    # Names every token that ends an output; instruction-tuned models have several.
    "generation_config.json",
)


class Tokenizer(ABC):
    """What the rest of the project knows of a tokenizer.

    eos_id ends an answer and pads a batch (pad_id); end_ids are it and whatever else its model's
    files say ends an output. vocab_size counts the text tokens, eos among
    them: one more than their highest id. len() counts the latent markers too, so it is the number
    of embedding rows needed. start_id, end_id and latent_id are None until `with_latents`.
    chat_template is a Jinja text, None if the tokenizer brings none; special_tokens are its
    bos_token, eos_token, pad_token, ..., as far as it names them. coconut/text/chat.py reads both.
    """

    def __init__(self, name: str, eos_id: int, vocab_size: int, markers: dict[str, int]) -> None:
        self.name = name
        self.eos_id = self.pad_id = eos_id
        self.end_ids = frozenset({eos_id})
        self.vocab_size = vocab_size
        self.start_id, self.end_id, self.latent_id = (markers.get(marker) for marker in MARKERS)
        self._markers = markers
        self.chat_template: str | None = None
        self.special_tokens: dict[str, str] = {}

    def __len__(self) -> int:
        return max([self.vocab_size, *(id_ + 1 for id_ in self._markers.values())])

    def decode(self, ids: Iterable[int], keep_markers: bool = False) -> str:
        """Text of the ids, without end-of-text and other control tokens.

        The latent markers go too unless `keep_markers`. Ids without a token (the spare embedding
        rows of some models) have no text. Bytes that are not UTF-8 become U+FFFD.
        """
        markers = self._markers.values()
        return self._text([i for i in ids if (keep_markers if i in markers else self._is_text(i))])

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether new tokens are complete: the last one ends an output."""
        return bool(tokens) and tokens[-1] in self.end_ids

    @abstractmethod
    def _is_text(self, token_id: int) -> bool: ...

    @abstractmethod
    def _text(self, ids: list[int]) -> str: ...

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text that goes on behind a line end: nothing is added, no BOS, no word's start.

        Raises UserError on lone surrogates.
        """

    @abstractmethod
    def encode_question(self, text: str) -> list[int]:
        """Ids of a text that opens a sequence: with BOS where the tokenizer's own template has it.

        GPT-2 and Qwen add nothing, Llama adds BOS.
        """

    @abstractmethod
    def encode_filled(self, text: str) -> list[int]:
        """Ids of a filled chat template, whose control tokens count; nothing is added."""

    @abstractmethod
    def is_control(self, token_id: int) -> bool:
        """Whether the id is a control token: end-of-text, a turn's end, a latent marker."""

    @abstractmethod
    def spelled(self, token_id: int) -> str:
        """A token as its vocabulary spells it; `token_id` reads it back."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Id of the single token spelled so, None if the vocabulary has none."""

    @abstractmethod
    def with_latents(self) -> "Tokenizer":
        """The same tokenizer with the three latent markers, numbered on from the last id.

        Order: start, end, latent. Markers that are there already keep their ids.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the files that `load_tokenizer`, transformers and mlx_lm read.

        The markers are written as ordinary added tokens, as in the published code.
        """


@contextmanager
def _library(where: str, problem: str) -> Iterator[None]:
    """Whatever a tokenizer's library raises as a UserError: what it reads is a download.

    A panic of its Rust side is no Exception.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        why = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(where, f"{problem}: {why[:200]}") from None


def _add_token(engine: tokenizers.Tokenizer, token: str, special: bool) -> None:
    added = tokenizers.AddedToken(token, normalized=False, special=special)
    engine.add_special_tokens([added]) if special else engine.add_tokens([added])


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge gives this one; (token, b"") if merges do not lead to it.

    Byte-pair encoding of the token by the lower ranks alone ends in the pair that made it.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ranks[token]) for a, b in pairwise(parts)]
        best = min(pairs)
        if best >= ranks[token]:
            return token, b""
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else (token, b"")


def _byte_to_char() -> list[str]:
    """One printable character for each byte, as Hugging Face spells byte-level tokens.

    Printable Latin-1 stands for itself; the other bytes, in order, for the characters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b if b in printable else 0x100 + hidden.index(b)) for b in range(256)]


_BYTE_TO_CHAR = _byte_to_char()
_SURROGATE = re.compile("[\ud800-\udfff]")


_FAILS = "the tokenizer's library cannot encode a text"


def _encodable(text: str) -> str:
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise UserError(
            "text",
            f"character {found.start()} is a lone surrogate (U+{ord(found.group()):04X}), "
            "which no encoding can keep: repair the text",
        )
    return text
