"""Which tokens a document has and which of them are learned, against masks made by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tokenizers
import transformers

from easydel.training.data import IGNORED, DataConfig, make_loader

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{%- for m in messages -%}\n{{- '<|im_start|>' + m['role'] + '\n' -}}\n"
    "{%- if m['role'] == 'assistant' -%}\n{%- generation -%}{{- m['content'] + '<|im_end|>' -}}{%- endgeneration -%}\n"
    "{%- else -%}{{- m['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}\n{%- endfor -%}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
         "<end_of_turn>", "[INST]", "[/INST]"]  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "def f"},
    {"role": "assistant", "content": "return 1"},
    {"role": "user", "content": "and g?"},
    {"role": "assistant", "content": "naïve 😀"},  # ends in a character of several tokens
]


def chatml(*turns):
    """Return the pieces of a conversation and whether each is learned."""
    for role, content in turns:
        yield f"<|im_start|>{role}\n", False
        yield f"{content}<|im_end|>", role == "assistant"
        yield "\n", False


SPOKEN = [(turn["role"], turn["content"]) for turn in TURNS]
BY_HAND = {
    "chatml": (CHATML, [SYSTEM, *TURNS], list(chatml(("system", "Be brief."), *SPOKEN))),
    "chatml_marked": (CHATML_MARKED, [SYSTEM, *TURNS], list(chatml(("system", "Be brief."), *SPOKEN))),
    "chatml_open": (CHATML, TURNS[:3], list(chatml(*SPOKEN[:3]))),
    "chatml_silent": (
        CHATML, [*TURNS[:3], {"role": "assistant", "content": ""}], list(chatml(*SPOKEN[:3], ("assistant", ""))),
    ),
    "chatml_two_answers": (CHATML, [*TURNS[:2], TURNS[3]], list(chatml(*SPOKEN[:2], SPOKEN[3]))),
    "llama3": (
        LLAMA3,
        [SYSTEM, *TURNS],
        [
            ("<|begin|><|start_header_id|>system<|end_header_id|>\n", False), ("\n", False),
            ("Be brief.<|eot_id|>", False),
            ("<|start_header_id|>user<|end_header_id|>\n", False), ("\n", False), ("def f<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n", False), ("\n", False), ("return 1<|eot_id|>", True),
            ("<|start_header_id|>user<|end_header_id|>\n", False), ("\n", False), ("and g?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n", False), ("\n", False), ("naïve 😀<|eot_id|>", True),
        ],
    ),
    "gemma": (
        GEMMA,
        TURNS,
        [
            ("<|begin|><start_of_turn>user\n", False), ("def f<end_of_turn>\n", False),
            ("<start_of_turn>model\n", False), ("return 1<end_of_turn>", True), ("\n", False),
            ("<start_of_turn>user\n", False), ("and g?<end_of_turn>\n", False),
            ("<start_of_turn>model\n", False), ("naïve 😀<end_of_turn>", True), ("\n", False),
        ],
    ),
    "mistral": (
        MISTRAL,
        TURNS,
        [
            ("<|begin|>[INST] def f [/INST]", False), (" return 1<|end|>", True),
            ("[INST] and g? [/INST]", False), (" naïve 😀<|end|>", True),
        ],
    ),
    "no_marks": (
        PLAIN,
        TURNS,
        [
            ("user: def f\n", False), ("assistant:", False), (" return 1\n", True),
            ("user: and g?\n", False), ("assistant:", False), (" naïve 😀\n", True),
        ],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def marked(tokenizer):
    """The tokenizer with the usual marks as tokens of their own, so that pieces are tokenised as in the whole.

    Of several blanks before a word it takes the last by itself: there a piece must end too.
    """
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": MARKS})
    return other


def only_row(examples, tokenizer, **fields):
    config = DataConfig(**{"sequence_length": 256, "epochs": 1, "prefetch": 0, "packing": False} | fields)
    (batch,) = make_loader(examples, tokenizer, batch_size=1, config=config)
    used = int(batch["attention_mask"].sum())
    return batch["input_ids"][0, :used].tolist(), batch["labels"][0, :used].tolist()


def by_hand(pieces, tokenizer):
    ids, labels = [], []
    for text, learned in pieces:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return ids, labels


@pytest.mark.parametrize("name", BY_HAND)
def test_the_assistants_turns_are_learned_and_nothing_else(name, marked):
    template, messages, pieces = BY_HAND[name]
    ids, labels = only_row([{"messages": messages}], marked, chat_template=template)
    assert (ids, labels) == by_hand(pieces, marked)
    assert ids == marked.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False)


def test_marks_may_be_plain_text(tokenizer):
    """A tokenizer that does not know the marks splits them; the mask is as exact."""
    ids, labels = only_row([{"messages": TURNS[:2]}], tokenizer, chat_template=CHATML)
    learned = [token for token in labels if token != IGNORED]
    assert tokenizer.decode(learned) == "return 1<|im_end|>"
    assert tokenizer.decode(ids).endswith("return 1<|im_end|>\n")


def test_a_marked_template_gives_transformers_own_mask(marked):
    messages = [SYSTEM, *TURNS[:2]]
    _, labels = only_row([{"messages": messages}], marked, chat_template=CHATML_MARKED)
    options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    theirs = marked.apply_chat_template(messages, chat_template=CHATML_MARKED, **options)
    assert [int(label != IGNORED) for label in labels] == theirs["assistant_masks"]


def test_the_tokenizers_own_template_serves(marked):
    own = copy.deepcopy(marked)
    own.chat_template = CHATML
    assert only_row([{"messages": TURNS}], own) == only_row([{"messages": TURNS}], marked, chat_template=CHATML)


def test_all_of_a_conversation_can_be_learned(marked):
    ids, labels = only_row([{"messages": TURNS}], marked, chat_template=CHATML, completion_only=False)
    assert labels == [IGNORED, *ids[1:]]


def test_tools_reach_the_template(marked):
    template = "{% if tools %}{{ tools[0]['name'] + '\n' }}{% endif %}" + CHATML
    with_tools, _ = only_row([{"messages": TURNS, "tools": [{"name": "look"}]}], marked, chat_template=template)
    assert marked.decode(with_tools).startswith("look\n<|im_start|>")


FORGETFUL = (  # as some templates leave out earlier thoughts
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + ('(thinks) ' if loop.last and "
    "m['role'] == 'assistant' else '') + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (FORGETFUL, TURNS, "renders message 1 otherwise when more follows"),
        (NO_PROMPT, TURNS, "has no generation prompt"),
        (GEMMA, [SYSTEM, *TURNS], "refuses the messages: System role not supported"),
        (
            CHATML,
            [TURNS[0], {"role": "assistant", "content": ["yo"]}],
            "refuses the messages: can only concatenate str",
        ),
        (CHATML, TURNS[:1], "no trainable token"),
        (CHATML_MARKED, TURNS[:1], "no trainable token"),
        (CHATML, [], "list of messages is empty"),
        (CHATML, ["hi"], "message 0 must be a mapping"),
        (CHATML, [{"role": "user"}], "message 0 .* has no 'content'"),
    ],
)
def test_conversations_that_cannot_be_masked_are_refused_by_place(template, messages, message, marked):
    with pytest.raises(ValueError, match=rf"example 0: .*{message}"):
        only_row([{"messages": messages}], marked, chat_template=template)


def test_the_last_turn_of_a_forgetful_template_can_be_masked(marked):
    ids, labels = only_row([{"messages": TURNS[:2]}], marked, chat_template=FORGETFUL)
    assert marked.decode([label for label in labels if label != IGNORED]) == "(thinks) return 1<|im_end|>"
    assert marked.decode(ids).count("(thinks)") == 1


def test_chats_need_a_template(tokenizer):
    with pytest.raises(ValueError, match="has no chat template: give one by DataConfig"):
        make_loader([{"messages": TURNS}], tokenizer, batch_size=1)


def test_a_prompt_is_not_learned(tokenizer):
    example = {"prompt": "def f(x):", "completion": "\n    return x"}
    ids, labels = only_row([example], tokenizer)
    prompt = tokenizer.encode("def f(x):")  # with its begin token, as for generation
    completion = [*tokenizer.encode("\n    return x", add_special_tokens=False), tokenizer.eos_token_id]
    assert (ids, labels) == (prompt + completion, [IGNORED] * len(prompt) + completion)
    _, all_of_it = only_row([example], tokenizer, completion_only=False)
    assert all_of_it == [IGNORED, *ids[1:]]


def test_a_prompt_keeps_its_tokens_whatever_follows(tokenizer):
    """Behind `prin`, `t` would make another token of both; in generation it would not."""
    whole = tokenizer.encode("import")
    start = tokenizer.encode("imp")
    assert whole[: len(start)] != start
    ids, labels = only_row([{"prompt": "imp", "completion": "ort"}], tokenizer, add_eos=False)
    assert ids[: len(start)] == start
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "ort"


@pytest.mark.parametrize(
    ("example", "fields", "error", "message"),
    [
        ({"prompt": "a", "completion": ""}, {}, ValueError, "no trainable token: the completion is empty"),
        ({"prompt": "a", "completion": 3}, {}, TypeError, "'completion' must be str, got int"),
        ({"prompt": "a b c d e f g", "completion": "x"}, {"truncate": "error", "sequence_length": 4}, ValueError,
         "tokens do not fit rows of 4"),
        ({"prompt": "a b c d e f g", "completion": "x"}, {"sequence_length": 4}, ValueError,
         "no trainable token is left in any of the 1 records"),
        ("abc", {"completion_only": True}, ValueError, "completion_only=True is for chats and prompts"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused(example, fields, error, message, tokenizer):
    with pytest.raises(error, match=message):
        only_row([example], tokenizer, **fields)


def test_windows_without_a_label_are_left_out_and_counted(tokenizer):
    example = {"prompt": "a " * 40, "completion": "x y z"}
    config = DataConfig(sequence_length=16, truncate="split", epochs=1, prefetch=0)
    loader = make_loader([example], tokenizer, batch_size=1, config=config)
    labels = np.concatenate([batch["labels"].ravel() for batch in loader])
    learned = tokenizer.decode(labels[labels != IGNORED])
    assert learned == "x y z<|end|>"
    total = len(tokenizer.encode("a " * 40)) + (labels != IGNORED).sum()
    assert 0 < loader.statistics.dropped_tokens < total
    assert loader.statistics.documents == 1


def test_texts_begin_as_the_tokenizer_begins_them_and_end_once(tokenizer):
    for end in ("", "<|end|>"):
        ids, _ = only_row(["x = 1" + end], tokenizer)
        assert ids == [tokenizer.bos_token_id, *tokenizer.encode("x = 1", add_special_tokens=False), 1]
    ids, _ = only_row(["x = 1"], tokenizer, add_eos=False)
    assert ids == tokenizer.encode("x = 1")


def test_special_tokens_on_both_sides_are_followed():
    """As BERT's and T5's tokenizers put them."""
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5, "c": 6}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    both = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
    assert only_row(["a b"], both, add_eos=False)[0] == [1, 4, 5, 2]
    ids, labels = only_row([{"prompt": "a", "completion": " b c"}], both, add_eos=False)
    assert (ids, labels) == ([1, 4, 5, 6, 2], [IGNORED, IGNORED, 5, 6, 2])


@pytest.mark.parametrize(
    ("missing", "fields", "message"),
    [("eos_token", {}, "add_eos=False"), ("bos_token", {"window_start": "bos"}, "window_start='overlap'")],
)
def test_a_token_the_tokenizer_lacks_is_named(missing, fields, message, tokenizer):
    without = copy.deepcopy(tokenizer)
    setattr(without, missing, None)
    with pytest.raises(ValueError, match=message):
        only_row(["abc"], without, **fields)
