"""A chat template renders as transformers renders it, and reaches nothing outside of it."""

import json

import pytest
import tokenizers
import transformers

from hosl.errors import TaskError
from hosl.tasks import TextTokenizer
from hosl.tasks.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']}}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if system_message %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{%- elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported, not ' + message['role']) }}{% endif %}
{% endfor %}"""
MARKED = """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' + message['role']) }}
    {%- endif %}
<|{{ message['role'] }}|>
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{% else %}{{ message['content'] | trim }} {{ {'a': '<é>', 'b': [1, dict(c=none)]} | tojson(indent=1) }}
{% endif %}{% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
RICH = """{% set ns = namespace(seen=0) %}{% for message in messages %}{% set ns.seen = ns.seen + 1 %}
{% if message.reasoning_content is defined %}<think>{{ message.thinking }}</think>{% endif %}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
{% set calls = message.tool_calls %}
{% if calls is defined %}{{ calls | tojson(sort_keys=true, separators=(',', ':')) }}{% endif %}
{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{{ ns.seen }}"""
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "marked": MARKED, "rich": RICH}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT = [
    {"role": "user", "content": "Hi <there> "},
    {"role": "assistant", "content": "Hello, thëre."},
    {"role": "user", "content": "Bye\n\n"},
    {"role": "assistant", "content": "Good bye"},
]
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "Sum"}], "name": None},
    {
        "role": "assistant", "content": "", "thinking": "Hm",
        "tool_calls": [{"name": "add", "arguments": {"b": 1, "a": 2}}],
    },
]  # fmt: skip


def saved_tokenizer(folder, template, **tokens):
    """A byte-level BPE with special tokens, saved by transformers; it opens every text with <s>."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["Hello there", "Good bye bye", "system user assistant\n\n"], trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | tokens
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    loaded.chat_template = template
    loaded.save_pretrained(folder)
    return loaded


@pytest.mark.parametrize("answer_follows", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_has_the_text_and_the_tokens_that_transformers_gives_it(tmp_path, name, answer_follows):
    theirs = saved_tokenizer(tmp_path, TEMPLATES[name])
    ours, template = TextTokenizer.load(tmp_path), ChatTemplate.load(tmp_path)
    text = template.text(CHAT, answer_follows=answer_follows)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=answer_follows)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=answer_follows, return_dict=False)
    assert list(ours.encode_as_is(text)) == ids
    assert text.endswith(("assistant\n", "assistant<|end_header_id|>\n\n", "<|assistant|>\n")) == (
        answer_follows and name not in ("mistral", "rich")
    )


def test_tools_parts_and_reasoning_are_given_as_transformers_gives_them(tmp_path):
    theirs = saved_tokenizer(tmp_path, RICH)
    tools = [{"type": "function", "function": {"name": "add", "description": "a < b"}}]
    text = ChatTemplate.load(tmp_path).text(CALLS, answer_follows=False, tools=tools)
    assert text == theirs.apply_chat_template(CALLS, tools=tools, tokenize=False)
    assert '[{"arguments":{"a":2,"b":1},"name":"add"}]' in text
    assert "<think>Hm</think>" in text


def test_the_text_between_the_marks_of_a_template_is_what_transformers_masks(tmp_path):
    theirs = saved_tokenizer(tmp_path, MARKED)
    template, ours = ChatTemplate.load(tmp_path), TextTokenizer.load(tmp_path)
    text, spans = template.answers(CHAT)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False)
    assert [text[start:stop] for start, stop in spans] == ["Hello, thëre.</s>", "Good bye</s>"]
    masked = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    theirs_answers = [i for i, of in zip(masked["input_ids"], masked["assistant_masks"], strict=True) if of]
    assert theirs_answers == [i for start, stop in spans for i in ours.encode_as_is(text[start:stop])]


def test_a_template_stands_in_its_own_file_in_the_settings_or_where_the_user_says(tmp_path):
    named = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ eos_token }}{{ messages[0].content }}"},
    ]
    settings = {"chat_template": named, "eos_token": {"content": "<e>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.load(tmp_path).text(CHAT, answer_follows=True) == "<e>Hi <there> "
    (tmp_path / "chat_template.jinja").write_text("own")
    assert ChatTemplate.load(tmp_path).text(CHAT, answer_follows=True) == "own"
    (tmp_path / "mine.jinja").write_text("mine {{ eos_token }}")
    assert ChatTemplate.load(tmp_path, tmp_path / "mine.jinja").text(CHAT, answer_follows=True) == "mine <e>"


def test_the_time_in_a_template_is_known():
    template = ChatTemplate("{{ strftime_now('%Y') }}", {})
    assert template.asks_for_the_time
    assert template.text([], answer_follows=False).isdigit()
    assert not ChatTemplate(CHATML, {}).asks_for_the_time


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% set n = namespace(_a=1) %}", "underscore"),
        ("{% set n = namespace() %}{% set n._a = 1 %}", "underscore"),
        ("{{ messages.append(1) }}", "append"),
        (MARKED, "no role tool"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(source, fault):
    with pytest.raises(TaskError, match=fault):
        ChatTemplate(source, {}).text([{"role": "tool", "content": ""}], answer_follows=True)


def test_a_missing_or_broken_template_is_said(tmp_path):
    with pytest.raises(TaskError, match="no chat template"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(TaskError, match="no Jinja2 template"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(TaskError, match="cannot be read"):
        ChatTemplate.load(tmp_path, tmp_path / "none.jinja")
