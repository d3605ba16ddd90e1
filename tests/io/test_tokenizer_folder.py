"""Tokenizers and chat templates of Hugging Face folders, against transformers' own reading."""

import json
import re

import pytest

pytest.importorskip("tokenizers")

from aigc_fast.io import load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "  {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
    "<{{ m.role }}>{{ m.content }}{{ {'é': 1} | tojson }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": r, "content": c} for r, c in [("user", "Hi"), ("skip", ""), ("bot", "Yes")]]


def write_folder(folder, **configs):
    """A byte-level BPE tokenizer with <s> before every text; `configs` are the JSON files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters, "lo"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("l", "o")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "__type": "AddedToken"},
            "chat_template": TEMPLATE,
        }
    }
    for name, content in (defaults | configs).items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_reads_what_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path)
    ours = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("hello lo", "naïve 日本語 🎉\n\tx", "a</s>b"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert "".join(ours.decode_stream(ids)) == ours.decode(ids)
    assert ours.stop_tokens == (1,)
    assert ours.chat_prompt(MESSAGES) == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )


def test_template_file_comes_first(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}é", encoding="utf-8")
    assert load_tokenizer(folder).chat_prompt(MESSAGES) == "Hié"


def test_named_templates(tmp_path):
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = write_folder(tmp_path, tokenizer_config={"chat_template": templates})
    assert load_tokenizer(folder).chat_prompt(MESSAGES) == "yes"


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": [1, 7]}, {"eos_token_id": 3}, (1, 7)),
        ({}, {"eos_token_id": 3}, (3,)),
        ({}, {"eos_token_id": None}, (1,)),
    ],
)
def test_stop_tokens(tmp_path, generation, config, expected):
    folder = write_folder(tmp_path, generation_config=generation, config=config)
    assert load_tokenizer(folder).stop_tokens == expected


def test_without_a_config_there_is_no_template(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_config=None))
    assert tokenizer.stop_tokens == () and tokenizer.special_tokens == {}
    with pytest.raises(ValueError, match="there is no chat template"):
        tokenizer.chat_prompt(MESSAGES)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda t: t.encode(None), TypeError, "text must be a str, got NoneType"),
        (lambda t: t.encode(b"a"), TypeError, "text must be a str, got bytes"),
        (lambda t: t.encode("\ud800"), ValueError, "text must be Unicode"),
        (lambda t: t.decode(None), TypeError, "token_ids must hold token ids, got NoneType"),
        (lambda t: t.decode("a"), TypeError, "token_ids must hold token ids, got str"),
        (lambda t: t.decode([1.5]), TypeError, "each id of token_ids must be an integer"),
        (lambda t: t.decode([-1]), ValueError, "token_ids must lie in [0, 2**32), got -1"),
        (lambda t: t.decode([2**32]), ValueError, "token_ids must lie in [0, 2**32)"),
        (lambda t: t.stream_decoder()(None), TypeError, "token_id must be an integer"),
    ],
)
def test_bad_arguments_are_not_called_a_bad_file(tmp_path, call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(load_tokenizer(write_folder(tmp_path)))


@pytest.mark.parametrize(
    "configs, message",
    [
        ({"tokenizer_config": []}, "must hold a JSON object, got list"),
        ({"tokenizer_config": {"bos_token": 3}}, "'bos_token' must be a string, got 3"),
        ({"tokenizer_config": {"chat_template": 3}}, "'chat_template' must be a string, got int"),
        ({"generation_config": {"eos_token_id": 999}}, "'eos_token_id' must be token ids below"),
        ({"generation_config": {"eos_token_id": [True]}}, "'eos_token_id' must be token ids below"),
        ({"tokenizer": {"model": 3}}, "not a sound tokenizer"),
    ],
)
def test_bad_folder_gives_one_clear_error(tmp_path, configs, message):
    folder = write_folder(tmp_path, **configs)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


def test_hostile_template_stays_in_its_box(tmp_path):
    for template in ("{{ ''.__class__.__mro__ }}", "{{ 1 // 0 }}", "{% for"):
        folder = write_folder(tmp_path, tokenizer_config={"chat_template": template})
        with pytest.raises(ValueError, match="the chat template fails"):
            load_tokenizer(folder).chat_prompt(MESSAGES)


def test_missing_tokenizer_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
