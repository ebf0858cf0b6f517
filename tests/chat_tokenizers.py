"""Tokenizers for tests: a token a byte, control tokens, BOS, and chat templates of the known kinds.

The templates are our own, with the structure of the published ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from coconut.text.opening import load_tokenizer
from coconut.text.tokenizer import Tokenizer

TEMPLATES = {
    # As in the golden prompts.
    "golden": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "llama": "{{ bos_token }}{% for m in messages %}"
    "<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}",
    "mistral": "{{- bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'user' %}\n"
    "        {{- '[INST] ' + m['content'] + '[/INST]' }}\n    {%- else %}\n"
    "        {{- ' ' + m['content'] + eos_token }}\n    {%- endif %}\n{%- endfor %}\n",
    "phi": "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ m.role) }}{% endif %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "chatml": "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n"
    "{% endif %}{% for m in messages if m.content %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "features": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.first %}"
    "{% set ns.n = 1 %}{% continue %}{% endif %}{{ m | tojson }}{% break %}{% endfor %}"
    "{{ ns.n }} {{ strftime_now('%Y') }}{% generation %}x{% endgeneration %}",
}
CONTROL = (
    *("<eos>", "<bos>", "<pad>", "<|start|>", "<|stop|>", "<|eot_id|>", "<|end|>"),
    *("<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>"),
)


def chat_tokenizer(
    directory: Path,
    template: str | None = None,
    eos: str = "<eos>",
    pad: str | None = "<pad>",
    control: tuple[str, ...] = CONTROL,
) -> Tokenizer:
    """A tokenizer in Hugging Face files: bytes 0-255, then `control`; BOS opens a plain text."""
    directory.mkdir(parents=True, exist_ok=True)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(sorted(letters))}, [])
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in control])
    if "<bos>" in control:
        engine.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", engine.token_to_id("<bos>"))]
        )
    engine.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>" if "<bos>" in control else None,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)
