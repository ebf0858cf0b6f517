"""Chat templates, the tokens that end a turn, the padding token: what a tokenizer's files say.

A template is a Jinja text that the tokenizer brings with it. What it prints holds control tokens,
BOS too, so it is encoded with them and nothing is added: a second BOS would be seen by no model.
"""

from collections.abc import Sequence

from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.text.filling import Filler
from coconut.text.tokenizer import Tokenizer

_FILLER = Filler()
Message = dict[str, str]
_PROBE = "zqxj"
"""An assistant's message that no template writes by itself."""


def _place(config: RunConfig, tokenizer: Tokenizer) -> str:
    """Where a run's tokenizer comes from, as its configuration says it."""
    return config.tokenizer or config.load_model_path or config.model_id or tokenizer.name


def uses_template(config: RunConfig, tokenizer: Tokenizer) -> bool:
    """Whether questions go into a chat template. Raises UserError if one is wanted and missing."""
    has_template = tokenizer.chat_template is not None
    if config.chat_template == "always" and not has_template:
        raise UserError(
            _place(config, tokenizer),
            "the tokenizer has no chat template; choose an instruction-tuned model, or set"
            " chat_template: auto",
        )
    return has_template and config.chat_template != "never"


def render(tokenizer: Tokenizer, messages: Sequence[Message], prompts: bool = True) -> str:
    """The messages in the tokenizer's template.

    prompts: opens the assistant's turn behind them. Raises UserError with the template's complaint.
    """
    assert tokenizer.chat_template is not None, "asked of uses_template"
    given = {"messages": list(messages), "add_generation_prompt": prompts}
    try:
        return _FILLER.fill(tokenizer.chat_template, given | tokenizer.special_tokens)
    except ValueError as error:
        raise UserError(f"chat template of {tokenizer.name}", str(error)) from None


def end_of_turn(tokenizer: Tokenizer, uses_template: bool) -> int:
    """The token an answer ends with: what the template writes behind an assistant, otherwise eos.

    For Phi-3.5 that is <|end|>, though its eos is another token; for most models it is eos.
    """
    if not uses_template:
        return tokenizer.eos_id
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    behind = render(tokenizer, messages, prompts=False).rpartition(_PROBE)[2]
    return next(filter(tokenizer.is_control, tokenizer.encode_filled(behind)), tokenizer.eos_id)


def pad_token(config: RunConfig, tokenizer: Tokenizer) -> int:
    """The id of a padding token that is not eos.

    The key pad_token, the tokenizer's own, or as published: <|end_of_text|> for Llama 3, <unk> for
    Mistral. Raises UserError for any other tokenizer.
    """
    named = config.pad_token or tokenizer.special_tokens.get("pad_token")
    if config.pad_token is None and named in (None, tokenizer.spelled(tokenizer.eos_id)):
        known = ("<|end_of_text|>", "<|eot_id|>"), ("[INST]", "<unk>")
        found = [pad for pad in known if all(tokenizer.token_id(t) is not None for t in pad)]
        llama, mistral = known
        named = llama[0] if llama in found else mistral[1] if mistral in found else named
    pad_id = None if named is None else tokenizer.token_id(named)
    if config.pad_token is not None and pad_id is None:
        raise UserError(
            _place(config, tokenizer), f"pad_token: the tokenizer has no token {config.pad_token!r}"
        )
    if pad_id is None or pad_id == tokenizer.eos_id:
        raise UserError(
            _place(config, tokenizer),
            "the tokenizer has no padding token of its own, and eos must not stand in for it; name"
            " one that is never written (pad_token), or set stop_token: eos",
        )
    return pad_id


def stop_tokens(config: RunConfig, tokenizer: Tokenizer, uses_template: bool) -> frozenset[int]:
    """Every token that ends an output: the end of a turn, and stop_token_ids or stop_token's."""
    stops = {end_of_turn(tokenizer, uses_template)}
    if config.stop_token_ids is not None:
        if beyond := [i for i in config.stop_token_ids if not 0 <= i < len(tokenizer)]:
            raise UserError(
                "stop_token_ids", f"{beyond[0]}: the tokenizer has tokens 0 to {len(tokenizer) - 1}"
            )
        return frozenset(stops | set(config.stop_token_ids))
    if config.stop_token in ("eos", "both"):
        stops |= tokenizer.end_ids
    if config.stop_token in ("pad", "both"):
        stops.add(pad_token(config, tokenizer))
    return frozenset(stops)
