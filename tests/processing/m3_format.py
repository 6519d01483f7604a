"""M3's format in small, for the tests of processing: a trained byte-level BPE, a template, and calls as text."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

from hypothesis import settings

from openm3.config import M3Config
from openm3.processing import ChatTemplate, Processor, Tokenizer

settings.register_profile("shared-machine", deadline=None)  # a slow example is not a wrong one
settings.load_profile("shared-machine")

NS = "]<]minimax[>["
SPECIALS = ("]!p~[", "]~b]", "[e~[", "]!d~[", "]<]image[>[", "]<]video[>[", "]<]start of image[>[",
            "]<]end of image[>[", "]~!b[", NS, "<mm:think>", "</mm:think>")  # fmt: skip
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "The weather in Paris is sunny today, and tomorrow it will rain.\n\nWhat is the weather in Berlin?",
    'user\nai\ntool\nsystem\ndeveloper\n<tool_call>\n<invoke name="get_weather">\n</invoke>\n</tool_call>',
    "]<]0.0 seconds[>[ 12.5 seconds. A picture: a red circle, left of a blue square. Ça va? Größe, 日本語, 🙂",
    'You are a small model. Think before you answer. Tools: {"name": "f", "parameters": {"type": "object"}}',
] * 4

# The shape of the released template (spec section 5), in words of our own.
TEMPLATE = r"""
{%- set ns = ']<]minimax[>[' -%}
{%- macro tree(value) -%}
  {%- if value is mapping -%}
    {%- for k, v in value.items() if v is not none -%}{{ ns }}<{{ k }}>{{ tree(v) }}{{ ns }}</{{ k }}>{%- endfor -%}
  {%- elif value is string -%}{{ value }}
  {%- elif value is iterable -%}
    {%- for v in value -%}{{ ns }}<item>{{ tree(v) }}{{ ns }}</item>{%- endfor -%}
  {%- elif value is boolean or value is none -%}{{ value | tojson }}
  {%- else -%}{{ value }}
  {%- endif -%}
{%- endmacro -%}
{%- macro shown(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'text' -%}{{ part.text }}
      {%- elif part.type == 'image' -%}]<]image[>[
      {%- elif part.type == 'video' -%}]<]video[>[
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set found = namespace(root='A test model.', developer='Answer well.') -%}
{%- for m in messages -%}
  {%- if m.role == 'root' %}{% set found.root = shown(m.content) %}{% endif -%}
  {%- if m.role in ('system', 'developer') %}{% set found.developer = shown(m.content) %}{% endif -%}
{%- endfor -%}
]~!b[]~b]system
{{ found.root }}
Thinking is {{ thinking_mode }}: either <mm:think> ... </mm:think> or </mm:think> alone.[e~[
]~b]developer
{{ found.developer }}
{%- if tools %}

Tools:
{% for t in tools %}<tool>{{ t.function | tojson(ensure_ascii=False) }}</tool>
{% endfor %}Call them so: {{ ns }}<tool_call>.
{%- endif %}[e~[
{% for m in messages -%}
  {%- if m.role == 'user' -%}
]~b]user
{{ shown(m.content) }}[e~[
{% elif m.role == 'assistant' -%}
]~b]ai
{{ '<mm:think>' ~ m.reasoning_content if m.reasoning_content }}</mm:think>{{ shown(m.content) }}
    {%- if m.tool_calls -%}
      {{ ns }}<tool_call>{{ '\n' }}
      {%- for c in m.tool_calls -%}
        {{ ns }}<invoke name="{{ c.function.name }}">{{ tree(c.function.arguments) }}{{ ns }}</invoke>{{ '\n' }}
      {%- endfor -%}
      {{ ns }}</tool_call>
    {%- endif -%}
[e~[
{% elif m.role == 'tool' -%}
    {%- if loop.previtem is not defined or loop.previtem.role != 'tool' -%}]~b]tool{% endif %}
<response>{{ shown(m.content) }}</response>
    {%- if loop.nextitem is not defined or loop.nextitem.role != 'tool' -%}[e~[
{% endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
]~b]ai
{{ {'enabled': '<mm:think>', 'disabled': '</mm:think>'}.get(thinking_mode, '') }}
{%- endif -%}
"""


@functools.cache
def tokenizer_json() -> str:
    """A tokenizer.json with M3's pre-tokenizer and special tokens, trained on a few lines."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    # as in the released file, the think markers are added tokens that are not "special"
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS[:-2]])
    backend.add_tokens([AddedToken(text, normalized=False) for text in SPECIALS[-2:]])
    return backend.to_str()


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json())


@functools.cache
def processor() -> Processor:
    return make_processor(TEMPLATE)


def make_processor(template: str) -> Processor:
    own = tokenizer()
    return Processor(own, ChatTemplate(template, guard=own.guard), config())


def config() -> M3Config:
    own, nano = tokenizer(), M3Config.preset("nano")
    return replace(nano, image_token_id=own.special_id("]<]image[>["), video_token_id=own.special_id("]<]video[>["))


def reference_ids(text: str) -> list[int]:
    """What the reference does with a rendered prompt: one call of the whole tokenizer."""
    from tokenizers import Tokenizer as Backend

    return Backend.from_str(tokenizer_json()).encode(text, add_special_tokens=False).ids


def tool(name: str = "get_weather", properties: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A tool in OpenAI's shape."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}} if properties is None else properties}
    return {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": parameters | more},
    }


def call(name: str, arguments: Any, call_id: str = "c1") -> dict[str, Any]:
    """A tool call in OpenAI's shape."""
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tree(value: Any) -> str:
    """A value as M3 writes it in a call."""
    if isinstance(value, dict):
        return "".join(f"{NS}<{k}>{tree(v)}{NS}</{k}>" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return "".join(f"{NS}<item>{tree(v)}{NS}</item>" for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def invoke(name: str, arguments: dict[str, Any]) -> str:
    return f'{NS}<invoke name="{name}">{tree(arguments)}{NS}</invoke>'


def block(*invokes: str) -> str:
    return f"{NS}<tool_call>\n" + "".join(text + "\n" for text in invokes) + f"{NS}</tool_call>"
