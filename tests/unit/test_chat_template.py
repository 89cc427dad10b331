"""A chat template renders as transformers renders it, and reaches nothing outside of it."""

import json

import pytest
import tokenizers
import transformers

from hosl.errors import TaskError
from hosl.tasks.chat_template import ChatTemplate

TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' + message['role']) }}
    {%- endif %}
<|{{ message['role'] }}|>
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{% else %}{{ message['content'] | trim }} {{ {'a': '<é>'} | tojson }}
{% endif %}{% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi <there>"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


def folder_with(folder, template):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    loaded = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    loaded.chat_template = template
    loaded.save_pretrained(folder)
    return loaded


@pytest.mark.parametrize("answer_follows", [False, True])
def test_a_chat_is_the_text_that_transformers_makes(tmp_path, answer_follows):
    loaded = folder_with(tmp_path, TEMPLATE)
    theirs = loaded.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=answer_follows)
    assert ChatTemplate.load(tmp_path).text(CHAT, answer_follows=answer_follows) == theirs
    assert "<é>" in theirs


def test_a_template_of_tokenizer_config_is_read_too(tmp_path):
    named = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).text(CHAT[1:], answer_follows=True) == "Hi <there>"


def test_what_cannot_be_rendered_is_said(tmp_path):
    with pytest.raises(TaskError, match="no chat template"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(TaskError, match="no Jinja2 template"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(TaskError, match="no role tool"):
        ChatTemplate(TEMPLATE, {}).text([{"role": "tool", "content": ""}], answer_follows=True)
    with pytest.raises(TaskError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}).text(
            CHAT, answer_follows=True
        )
