"""Tokenizers of GGUF files: SentencePiece's against its definition, byte-level ones by example."""

import random
import re

import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from aigc_fast.io import load_tokenizer, save_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def write_tokenizer(path, model, tokens, kinds, **more):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.model", model)
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", kinds)
    for key, value in more.items():
        add = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool}
        add.get(type(value), writer.add_uint32)(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentence_piece_vocab():
    """Random pieces over a few letters, each put together from two that came before."""
    rng = random.Random(0)
    pieces = list("▁abcdé")
    while len(pieces) < 60:
        piece = rng.choice(pieces) + rng.choice(pieces)
        if piece not in pieces and len(piece) < 9:
            pieces.append(piece)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "<sep>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), USER]
    # Scores in an order of their own; some are equal, as of merges in a byte-level list none is.
    scores = [0.0] * 259 + [-float(rng.randrange(40)) for _ in pieces] + [0.0]
    return tokens, kinds, scores


def by_definition(text, tokens, kinds, scores):
    """SentencePiece's BPE: merge the neighbours whose join scores best, the leftmost of equals."""
    ids = {token: i for i, token in enumerate(tokens)}
    pieces = list(text)
    while True:
        best = None
        for i in range(len(pieces) - 1):
            token = ids.get(pieces[i] + pieces[i + 1])
            if token is not None and kinds[token] == NORMAL:
                if best is None or scores[token] > best[0]:
                    best = scores[token], i
        if best is None:
            break
        pieces[best[1] : best[1] + 2] = [pieces[best[1]] + pieces[best[1] + 1]]
    found = []
    for piece in pieces:
        known = piece in ids
        found += [ids[piece]] if known else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_merges_the_best_first(tmp_path, prefix):
    tokens, kinds, scores = sentence_piece_vocab()
    # Distinct scores: of equals SentencePiece takes the leftmost, the merge list the older piece.
    scores = [score - i * 1e-3 for i, score in enumerate(scores)]
    path = write_tokenizer(
        tmp_path / "t.gguf", "llama", tokens, kinds, scores=scores, add_space_prefix=prefix
    )
    tokenizer = load_tokenizer(path)
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("abcdé  xé🎉") for _ in range(rng.randrange(1, 40)))
        expected = by_definition("▁" * prefix + text.replace(" ", "▁"), tokens, kinds, scores)
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == text


def test_special_tokens_of_sentence_piece(tmp_path):
    tokens, kinds, scores = sentence_piece_vocab()
    ids = {token: i for i, token in enumerate(tokens)}
    more = dict(scores=scores, bos_token_id=1, eos_token_id=2)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", "llama", tokens, kinds, **more))
    assert tokenizer.stop_tokens == (2,)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.encode("a", add_special_tokens=True) == [1, *tokenizer.encode("a")]
    assert tokenizer.encode("a</s>")[-1] == 2
    assert ids["<sep>"] in tokenizer.encode("a<sep>b")
    path = write_tokenizer(tmp_path / "u.gguf", "llama", tokens, kinds, add_bos_token=False, **more)
    assert 1 not in load_tokenizer(path).encode("a", add_special_tokens=True)


def byte_level(path, pre, **more):
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters, "ab", "abc"]
    kinds = [CONTROL, CONTROL, *[NORMAL] * (len(letters) + 2)]
    return write_tokenizer(
        path, "gpt2", tokens, kinds, pre=pre, merges=["a b"], bos_token_id=0, **more
    )


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("gpt-2", ["I", "'m", " 12345", " o", "'", "clock", "!", "\n\n ", " (", "x", ")"]),
        ("smollm", ["I", "'m", " ", *"12345", " o", "'", "clock", "!", "\n\n ", " (", "x", ")"]),
        ("qwen2", ["I", "'m", " ", *"12345", " o", "'clock", "!\n\n", " ", " (", "x", ")"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " o", "'clock", "!\n\n", " ", " (", "x", ")"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(tmp_path, pre, pieces):
    tokenizer = load_tokenizer(byte_level(tmp_path / "t.gguf", pre))
    text = "I'm 12345 o'clock!\n\n  (x)"
    cut = tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in cut] == pieces
    assert tokenizer.decode(tokenizer.encode("naïve 日本 🎉")) == "naïve 日本 🎉"


def test_only_llama_3_takes_whole_words_and_a_first_token(tmp_path):
    llama = load_tokenizer(byte_level(tmp_path / "l.gguf", "llama-bpe"))
    qwen = load_tokenizer(byte_level(tmp_path / "q.gguf", "qwen2"))
    whole = llama.tokenizer.token_to_id("abc")
    assert llama.encode("abc") == [whole] and len(qwen.encode("abc")) == 2
    assert llama.encode("abc", add_special_tokens=True) == [0, whole]
    assert qwen.encode("abc", add_special_tokens=True) == qwen.encode("abc")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": [1.0]}, "scores has 1 values for"),
        ({"scores": None}, "'tokenizer.ggml.scores' is missing"),
        ({"unknown_token_id": 9999}, "unknown_token_id is 9999 of"),
        ({"tokens": "x" * 300}, "a piece has 300 characters"),
    ],
)
def test_bad_sentence_piece_gives_one_clear_error(tmp_path, changes, message):
    tokens, kinds, scores = sentence_piece_vocab()
    if "tokens" in changes:
        tokens[-1] = changes.pop("tokens")
    more = {"scores": scores} | changes
    more = {key: value for key, value in more.items() if value is not None}
    path = write_tokenizer(tmp_path / "t.gguf", "llama", tokens, kinds, **more)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_runs_of_spaces_are_tokens_of_gemma(tmp_path):
    tokens, kinds, scores = sentence_piece_vocab()
    tokens[-1] = "▁▁▁"
    path = write_tokenizer(
        tmp_path / "t.gguf", "llama", tokens, kinds, scores=scores, add_space_prefix=False
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("a   b").count(len(tokens) - 1) == 1
    assert tokenizer.decode(tokenizer.encode("a   b")) == "a   b"


@pytest.mark.parametrize("kind", ["llama", "gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_saved_to_a_folder_it_is_the_same(tmp_path, kind):
    path = tmp_path / "t.gguf"
    if kind == "llama":
        tokens, kinds, scores = sentence_piece_vocab()
        write_tokenizer(path, "llama", tokens, kinds, scores=scores, bos_token_id=1, eos_token_id=2)
    else:
        byte_level(path, kind, eos_token_id=1)
    tokenizer = load_tokenizer(path)
    save_tokenizer(tokenizer, tmp_path / "folder")
    again = load_tokenizer(tmp_path / "folder")
    assert again.stop_tokens == tokenizer.stop_tokens != ()
    assert again.special_tokens == tokenizer.special_tokens
    for text in ("I'm 12345 o'clock!\n\n  (x)</s>", "abc dé 🎉", ""):
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert again.encode(text, add_special_tokens=True) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
