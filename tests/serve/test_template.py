"""Chat templates: tokens as Hugging Face makes them, and nothing a person writes is a special token."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster import folder
from serve.load import load
from serve.template import DEFAULT, Template

SPECIALS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
# In the manner of a well-known one: trimmed contents, a check of the roles, the tags that only Hugging Face has.
TEMPLATE = """{{- bos_token }}
{%- set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('System messages come first') }}
    {%- elif message.content is none %}{% continue %}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- generation %}{{ message['content'] | trim }}{% endgeneration %}
    {{- '<|end|>\\n' }}
{%- endfor %}
{{- {"turns": ns.turns, "u": "\u00fc<"} | tojson }}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""
CHAT = [
    {"role": "system", "content": " You are terse. "},
    {"role": "user", "content": "def f(x): \u4f60\u597d"},
    {"role": "assistant", "content": "return <b>x</b> & 'y'\n"},
    {"role": "user", "content": "for i in range(10)"},
]


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_the_default_template(tokenizer):
    def text(content: str) -> list[int]:
        return tokenizer.encode(content).ids

    bos, _, person, assistant, system, end = (tokenizer.token_to_id(special) for special in SPECIALS)
    messages = [{"role": "system", "content": "return"}, *user("def f")]
    expected = [bos, system, *text("return"), end, person, *text("def f"), end, assistant]
    assert Template(tokenizer).encode(messages) == expected
    assert Template(tokenizer).encode([*messages, {"role": "assistant", "content": "x"}, *user("i")]) == [
        *expected, *text("x"), end, person, *text("i"), end, assistant
    ]  # fmt: skip


def test_tokens_are_those_of_hugging_face(tokenizer):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    chat = Template(tokenizer, TEMPLATE)
    for messages in (CHAT, CHAT[1:], CHAT[:2], user("")):
        expected = reference.apply_chat_template(
            messages, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
        )
        assert chat.encode(messages) == expected


def test_the_default_template_with_tools_is_as_hugging_face_reads_it(tokenizer):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    function = {"name": "f", "description": "def f(x): \u4f60", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "\u00fc"]}}}
    made = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    result = {"role": "tool", "content": "return", "tool_call_id": "1"}
    for messages in (CHAT, CHAT[1:], [*user("a"), made, result], [*user("a"), {**made, "content": "x"}, result]):
        for tools in ([], [{"type": "function", "function": function}] * 2):
            expected = reference.apply_chat_template(
                messages, tools=tools or None, chat_template=DEFAULT, add_generation_prompt=True, return_dict=False
            )
            assert Template(tokenizer).encode(messages, tools) == expected


pieces = st.lists(
    st.sampled_from([*SPECIALS, "a", " ", "<|", "end|>", "|>", "<|en", "\n", "\ufdd0", "\u4f60"]), max_size=8
)


@settings(max_examples=100, deadline=None)
@given(contents=st.lists(pieces.map("".join), min_size=1, max_size=3))
def test_spelled_special_tokens_stay_text(tokenizer, contents):
    ids = {tokenizer.token_to_id(special) for special in SPECIALS}
    chat, quiet = Template(tokenizer), ["a"] * len(contents)
    turns = [[{"role": "user", "content": content} for content in some] for some in (contents, quiet)]
    tokens, plain = (chat.encode(some) for some in turns)
    assert [token for token in tokens if token in ids] == [token for token in plain if token in ids]
    assert tokenizer.decode(tokens) == "".join(contents)


@settings(max_examples=50, deadline=None)
@given(content=st.text("ab \n<|>\u4f60", max_size=20))
def test_marks_do_not_change_the_tokens_around_them(tokenizer, content):
    """Where a special token is spelled, the turns before and after it are what they were."""
    chat = Template(tokenizer, TEMPLATE)
    quiet = chat.encode([*user(content), *user("x")])
    spelled = chat.encode([*user(content), *user("<|end|>")])
    end = tokenizer.token_to_id("<|end|>")
    assert spelled[: spelled.index(end) + 1] == quiet[: quiet.index(end) + 1]
    assert spelled.count(end) == quiet.count(end) and spelled[-3:] == quiet[-3:]


def test_templates_that_refuse_break_or_reach_out(tokenizer):
    for template, message in [
        ("{{ raise_exception('roles must\n alternate') }}", "refuses them: roles must alternate$"),
        ("{{ ''.__class__.__mro__ }}", "refuses them: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses them: "),
        ("{{ messages[0].content + 1 }}", "refuses them: "),
        ("{{ nothing.at_all }}", "refuses them: 'nothing' is undefined"),
    ]:
        with pytest.raises(ValueError, match=f"^messages: the model's chat template .*{message}") as error:
            Template(tokenizer, template).encode(user("a"))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^the model's chat template is broken at line 2: "):
        Template(tokenizer, "a\n{% if %}")
    with pytest.raises(ValueError, match="^messages: .*System messages come first$"):
        Template(tokenizer, TEMPLATE).encode([*user("a"), {"role": "system", "content": "b"}])


def test_what_a_folder_says(tmp_path, decoder, tokenizer):
    from models import hub

    def make(name: str, **files: str) -> str:
        path = str(tmp_path / name)
        contents = hub.contents(decoder, tokenizer.to_str().encode())
        folder.write(path, contents | {file.replace("__", "."): text.encode() for file, text in files.items()})
        return path

    config = {
        "bos_token": {"content": "<|system|>", "special": True},
        "eos_token": "<|assistant|>",
        "pad_token": None,
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"},
        ],
    }
    special = tokenizer.token_to_id
    path = make("config", tokenizer_config__json=json.dumps(config))
    assert Template.load(path, tokenizer).encode(user("def")) == [
        special("<|system|>"), *tokenizer.encode("def").ids, special("<|assistant|>")
    ]  # fmt: skip
    assert load(path).ends == {special("<|eos|>"), special("<|end|>"), special("<|assistant|>")}
    path = make("file", tokenizer_config__json=json.dumps(config), chat_template__jinja="{{ bos_token }}")
    assert Template.load(path, tokenizer).encode(user("def")) == [special("<|system|>")]
    path = make("none")
    assert Template.load(path, tokenizer).encode(user("")) == Template(tokenizer).encode(user(""))
    assert load(path).ends == {special("<|eos|>"), special("<|end|>")}
    assert Template.load(path, None) is None


def test_without_a_template_the_special_tokens_are_needed(model_folder, tokenizer):
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] != "<|end|>"]
    partly = Tokenizer.from_str(json.dumps(stored))
    with pytest.raises(ValueError, match=r"^the model has no chat template, and its tokenizer has no <\|end\|>$"):
        Template(partly)
    other = Tokenizer.from_str(tokenizer.to_str().replace("<|assistant|>", "<|other|>"))
    assert Template.load(str(model_folder), other) is None and Template.load(str(model_folder), tokenizer) is not None
