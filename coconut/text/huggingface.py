"""A tokenizer as Hugging Face's `tokenizers` library reads it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from coconut.errors import UserError
from coconut.files import library_writes, read_bytes, read_json
from coconut.text.tokenizer import (
    _FAILS,
    HF_COMPANIONS,
    HF_CONFIG_FILE,
    HF_FILE,
    MARKERS,
    RANKS_FILE,
    Tokenizer,
    _add_token,
    _encodable,
    _library,
)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json through the tokenizers library; `companions` are copied on saving."""

    def __init__(
        self,
        name: str,
        engine: tokenizers.Tokenizer,
        eos: str,
        companions: dict[str, bytes],
        end_ids: Iterable[int] = (),
    ) -> None:
        self._engine, self._eos, self._companions = engine, eos, companions
        engine.no_padding()
        engine.no_truncation()
        # In memory the markers count as control tokens, so that text cannot spell them either.
        spec = json.loads(engine.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["special"] or token["content"] in MARKERS
        self._strict = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._strict.encode_special_tokens = True
        vocabulary = engine.get_vocab(with_added_tokens=True)
        markers = {m: vocabulary[m] for m in MARKERS if m in vocabulary}
        added = self._strict.get_added_tokens_decoder()
        self._control_ids = {id_ for id_, token in added.items() if token.special}
        self._text_ids = set(vocabulary.values()) - self._control_ids
        vocab_size = max(id_ for token, id_ in vocabulary.items() if token not in markers) + 1
        super().__init__(name, vocabulary[eos], vocab_size, markers)
        self.end_ids |= self._control_ids & set(end_ids)
        self.chat_template, self.special_tokens = _chat_settings(name, companions)
        # Llama 2, Mistral, Phi-3: "a" alone is read as " a" and so is another token than within a
        # text. What is encoded is the continuation of one, mostly behind a line end.
        self._before: list[int] | None = None
        before, inside = self.encode("\n"), self.encode("\na")
        if inside[: len(before)] == before and inside[len(before) :] != self.encode("a"):
            self._before = before

    def encode(self, text: str) -> list[int]:
        if self._before is not None and text:
            ids = self._ids(self._strict, "\n" + text)
            if ids[: len(self._before)] == self._before:
                return ids[len(self._before) :]
        return self._ids(self._strict, text)

    def encode_question(self, text: str) -> list[int]:
        with _library(self.name, _FAILS):
            found = self._strict.encode(_encodable(text), add_special_tokens=True)
        # A token that the template puts behind a text would end what only begins here.
        behind = found.special_tokens_mask[::-1].index(0) if 0 in found.special_tokens_mask else 0
        return found.ids[: len(found.ids) - behind]  # type: ignore[no-any-return]

    def encode_filled(self, text: str) -> list[int]:
        return self._ids(self._engine, text)

    def _ids(self, engine: tokenizers.Tokenizer, text: str) -> list[int]:
        with _library(self.name, _FAILS):
            return engine.encode(_encodable(text), add_special_tokens=False).ids

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control_ids

    def spelled(self, token_id: int) -> str:
        return self._engine.id_to_token(token_id) or ""

    def _is_text(self, token_id: int) -> bool:
        return token_id in self._text_ids

    def _text(self, ids: list[int]) -> str:
        return self._strict.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def with_latents(self) -> Tokenizer:
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        for marker in MARKERS:
            if engine.token_to_id(marker) is None:
                _add_token(engine, marker, special=False)
        return HuggingFaceTokenizer(self.name, engine, self._eos, self._companions, self.end_ids)

    def save(self, directory: Path) -> None:
        with library_writes(directory / HF_FILE, Exception):
            self._engine.save(str(directory / HF_FILE))
        for name, content in self._companions.items():
            (directory / name).write_bytes(content)


def _load_hugging_face(directory: Path) -> Tokenizer:
    path = directory / HF_FILE
    if path.exists():
        with _library(str(path), "not a tokenizer"):
            engine = tokenizers.Tokenizer.from_str(read_bytes(path).decode())
    elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        engine = _engine_from_transformers(directory)
    else:
        raise UserError(
            str(directory),
            f"holds no tokenizer: expected {HF_FILE} or {RANKS_FILE}; name one (key tokenizer)",
        )
    companions = {
        name: read_bytes(directory / name) for name in HF_COMPANIONS if (directory / name).exists()
    }
    _chat_settings(str(directory), companions)  # first: what is damaged in them is named
    with _library(str(path), "no tokenizer that can be used"):
        ends = _end_ids(directory, engine)
        eos = _end_of_text(directory, engine, ends)
        return HuggingFaceTokenizer(directory.name, engine, eos, companions, ends)


def _engine_from_transformers(directory: Path) -> tokenizers.Tokenizer:
    """An old-style directory (vocab.json and merges.txt only), converted by transformers."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            str(directory),
            f"holds vocab.json and merges.txt but no {HF_FILE}; to convert them install "
            "transformers, or save the tokenizer anew with a current one",
        ) from error
    try:
        converted = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return tokenizers.Tokenizer.from_str(converted.backend_tokenizer.to_str())
    # Its converters raise whatever the broken file makes them stumble over.
    except Exception as error:
        raise UserError(
            str(directory), f"transformers cannot read the tokenizer: {error}"
        ) from error


def _chat_settings(folder: str, companions: dict[str, bytes]) -> tuple[str | None, dict[str, str]]:
    """(chat template, special tokens by name) that a tokenizer's companion files hold."""
    tokens, template = {}, None
    for name in ("special_tokens_map.json", HF_CONFIG_FILE):
        settings = _json_object(f"{folder}/{name}", companions.get(name, b"{}"))
        for key, value in settings.items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                tokens[key] = value
        found = settings.get("chat_template")
        if isinstance(found, list) and all(isinstance(f, dict) for f in found):
            # Several by name; the others are for tools and retrieval.
            found = next((f.get("template") for f in found if f.get("name") == "default"), None)
        if not isinstance(found, str | None):
            problem = "chat_template: expected a text, or a list of name and template"
            raise UserError(f"{folder}/{name}", problem)
        template = template if found is None else found
    # A file of its own is the newer form and comes first, as in transformers.
    own = companions.get("chat_template.jinja")
    try:
        return template if own is None else own.decode(), tokens
    except UnicodeDecodeError:
        problem = "not UTF-8 text, the file is damaged"
        raise UserError(f"{folder}/chat_template.jinja", problem) from None


def _json_object(where: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate is no token
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"not JSON, the file is damaged ({error})") from error
    if not isinstance(found, dict):
        raise UserError(where, f"expected a JSON object, got {type(found).__name__}")
    return found


def _end_ids(directory: Path, engine: tokenizers.Tokenizer) -> list[int]:
    """The tokens that a model's files say end an output: one or a list, in either file."""
    found: list[Any] = []
    for name in ("config.json", "generation_config.json"):
        if (directory / name).exists():
            ids = read_json(directory / name).get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
    return [i for i in found if type(i) is int and i >= 0 and engine.id_to_token(i) is not None]


def _end_of_text(directory: Path, engine: tokenizers.Tokenizer, ends: Sequence[int]) -> str:
    """The end-of-text token: from the tokenizer's settings, else the first of the model's."""
    for name in (HF_CONFIG_FILE, "special_tokens_map.json"):
        if (directory / name).exists():
            eos = read_json(directory / name).get("eos_token")
            eos = eos.get("content") if isinstance(eos, dict) else eos
            if isinstance(eos, str) and eos not in MARKERS and engine.token_to_id(eos) is not None:
                return eos
    if ends:
        return str(engine.id_to_token(ends[0]))
    raise UserError(
        str(directory),
        f"no end-of-text token: set eos_token in {HF_CONFIG_FILE} to a token of the vocabulary",
    )
