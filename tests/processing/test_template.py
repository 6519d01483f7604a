"""Chat templates as foreign code: what transformers gives them, and what hostile ones get."""

import pytest
from m3_format import TEMPLATE, tokenizer

from openm3.processing import ChatTemplate, TemplateError
from openm3.processing.tokenizer import GUARD


def render(source, **variables):
    return ChatTemplate(source, max_chars=10_000).render(**variables)


def test_rendering_equals_transformers():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    messages = [
        {"role": "root", "content": "R"},
        {"role": "system", "content": "Sei höflich <b>&</b>"},
        {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}]},
        {
            "role": "assistant", "content": "", "reasoning_content": "hm",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, {"b": True}], "c": None, "d": "ü"}}}],
        },
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "description": "Größe <x> & 'y'"}}]
    variables = {"messages": messages, "tools": tools, "thinking_mode": "enabled", "add_generation_prompt": True}
    assert ChatTemplate(TEMPLATE).render(**variables) == _compile_jinja_template(TEMPLATE).render(**variables)


def test_blocks_are_trimmed_and_loop_controls_work():
    source = "a\n  {% for i in range(9) %}\n  {% if i == 2 %}\n{% break %}\n{% endif %}\nx{{ i }}\n{% endfor %}\nb"
    assert render(source) == "a\nx0\nx1\nb"


def test_tojson_keeps_unicode_and_markup():
    assert render("{{ v | tojson }}", v={"a": "ü<'&", "b": None}) == '{"a": "ü<\'&", "b": null}'
    assert render("{{ v | tojson(ensure_ascii=True) }}", v="ü🙂") == '"\\u00fc\\ud83d\\ude42"'
    assert render("{{ v | tojson(indent=1) }}", v=[1]) == "[\n 1\n]"


def test_json_of_guarded_strings_is_the_json_of_the_strings_guarded_as_a_whole():
    guard = tokenizer().guard
    text = ChatTemplate("{{ v | tojson }}", guard=guard).render(v=[guard("[e~[")])
    assert text.replace(GUARD, "") == '["[e~["]'
    assert tokenizer().split(text) == [text]
    text = ChatTemplate("{{ v | tojson(ensure_ascii=True) }}", guard=guard).render(v=[guard("é")])
    assert text.replace(GUARD, "") == '["\\u00e9"]'


def test_a_template_that_raises_is_one_line():
    with pytest.raises(TemplateError) as error:
        render("{{ raise_exception('no tool\nresults') }}")
    assert str(error.value) == "chat_template.jinja: no tool results"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ x.y.z }}",
        "{{ 'a' + 1 }}",
        "{% include 'other' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ none() }}",
    ],
)
def test_a_template_that_fails_is_one_clear_error(source):
    with pytest.raises(TemplateError) as error:
        render(source)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("chat_template.jinja: ")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set x = messages.__init__ %}{{ x.__globals__['os'] }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ 'x' * 100000000 }}",
        "{{ 100000000 * 'x' }}",
        "{{ [1] * 100000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ 9 ** 99 ** 99 }}",
        "{{ range(100000000) }}",
        "{% for i in range(99999) %}{{ 'abcdefghij' * 10 }}{% endfor %}",
    ],
)
def test_hostile_templates_get_nowhere(source):
    with pytest.raises(TemplateError):
        render(source, messages=[])


def test_ordinary_arithmetic_is_left_alone():
    assert (
        render("{{ 20000 * 20000 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 'ab' * 3 }} {{ 1.5 * 2 }}")
        == "400000000 1024 0.5 ababab 3.0"
    )


def test_a_syntax_error_names_the_line():
    with pytest.raises(TemplateError, match="line 2"):
        ChatTemplate("a\n{% if %}")


def test_missing_broken_and_oversized_files_are_clear_errors(tmp_path):
    path = tmp_path / "chat_template.jinja"
    with pytest.raises(TemplateError, match="no such file"):
        ChatTemplate.from_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TemplateError, match="cannot be read"):
        ChatTemplate.from_file(path)
    with pytest.raises(TemplateError, match="at most"):
        ChatTemplate("x" * 1_000_001)
