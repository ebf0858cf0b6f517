"""A tokenizer as Hugging Face's `tokenizers` library reads it."""

import json
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
        self, name: str, engine: tokenizers.Tokenizer, eos: str, companions: dict[str, bytes]
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
        self.chat_template, self.special_tokens = _chat_settings(name, companions)

    def encode(self, text: str) -> list[int]:
        return self._ids(self._strict, text, False)

    def encode_question(self, text: str) -> list[int]:
        return self._ids(self._strict, text, True)

    def encode_filled(self, text: str) -> list[int]:
        return self._ids(self._engine, text, False)

    def _ids(self, engine: tokenizers.Tokenizer, text: str, as_question: bool) -> list[int]:
        with _library(self.name, _FAILS):
            return engine.encode(_encodable(text), add_special_tokens=as_question).ids

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
        return HuggingFaceTokenizer(self.name, engine, self._eos, self._companions)

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
        eos = _end_of_text(directory, engine)
        return HuggingFaceTokenizer(directory.name, engine, eos, companions)


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


def _end_of_text(directory: Path, engine: tokenizers.Tokenizer) -> str:
    """The end-of-text token: from the tokenizer's settings, else the model's."""
    for name in (HF_CONFIG_FILE, "special_tokens_map.json"):
        if (directory / name).exists():
            eos = read_json(directory / name).get("eos_token")
            eos = eos.get("content") if isinstance(eos, dict) else eos
            if isinstance(eos, str) and eos not in MARKERS and engine.token_to_id(eos) is not None:
                return eos
    if (directory / "config.json").exists():
        eos_id = read_json(directory / "config.json").get("eos_token_id")
        if type(eos_id) is int and eos_id >= 0 and (eos := engine.id_to_token(eos_id)) is not None:
            return eos
    raise UserError(
        str(directory),
        f"no end-of-text token: set eos_token in {HF_CONFIG_FILE} to a token of the vocabulary",
    )
