"""The tokenizer and the chat template that a GGUF file carries.

Two kinds are known: `gpt2`, BPE over bytes with its list of merges, and `llama`, SentencePiece's
BPE, which has a score for every piece instead. Sources: llama-vocab.cpp of llama.cpp for what the
keys mean; Sennrich et al. 2016 (arXiv:1508.07909) and Kudo and Richardson 2018 (arXiv:1808.06226).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from .gguf import GGUFFile, read_gguf
from .text_tokenizer import TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# ggml's token types that text may name as a whole.
_CONTROL, _USER_DEFINED = 3, 4
# SentencePiece keeps pieces to 16 characters, Gemma's longest is 31; all their splits are tried.
_LONGEST_PIECE = 256

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# How text is cut before the merges: by this pattern, or (None) by GPT-2's.
_PATTERNS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}


def read_gguf_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
    """Builds the tokenizer that a GGUF file describes."""
    try:
        from tokenizers import AddedToken, processors
    except ImportError as error:
        raise ImportError("this needs the package tokenizers: pip install tokenizers") from error

    file = read_gguf(path)
    kind = file.get("tokenizer.ggml.model", str)
    tokens = file.get("tokenizer.ggml.tokens", list)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.tokens holds a token twice")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(file, vocab)
    elif kind == "llama":
        tokenizer = _sentence_piece_bpe(file, vocab)
    else:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}; only 'gpt2' and 'llama' are supported"
        )

    kinds = _values(file, "token_type", len(tokens))
    whole = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if token]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in whole if kind == _CONTROL]
    )
    # Gemma's runs of spaces are such tokens: they stand in text where a space has become its sign.
    # With a prefix the tokenizer would look for that before each of them too.
    normalized = file.metadata.get("tokenizer.ggml.add_space_prefix", True) is False
    tokenizer.add_tokens(
        [AddedToken(token, normalized=normalized) for token, kind in whole if kind == _USER_DEFINED]
    )

    special: dict[str, int] = {}
    for name in ("bos", "eos", "eot"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in file.metadata:
            special[name] = file.get(key, int)
            if not 0 <= special[name] < len(tokens):
                raise ValueError(f"{file.path}: {key} is {special[name]} of {len(tokens)} tokens")
    add_bos = file.metadata.get("tokenizer.ggml.add_bos_token", _adds_bos_by_default(file))
    if add_bos is True and "bos" in special:
        bos = tokens[special["bos"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            [bos, "$A"], None, [(bos, special["bos"])]
        )
    template_key = "tokenizer.chat_template"
    return TextTokenizer(
        path=file.path,
        tokenizer=tokenizer,
        stop_tokens=tuple(sorted({special[name] for name in ("eos", "eot") if name in special})),
        chat_template=file.get(template_key, str) if template_key in file.metadata else None,
        special_tokens={
            f"{name}_token": tokens[special[name]] for name in ("bos", "eos") if name in special
        },
    )


def _adds_bos_by_default(file: GGUFFile) -> bool:
    names = file.metadata["tokenizer.ggml.model"], file.metadata.get("tokenizer.ggml.pre")
    return names[0] == "llama" or names[1] == "llama-bpe"


def _values(file: GGUFFile, key: str, count: int) -> np.ndarray:
    """A number for every token."""
    values = file.get(f"tokenizer.ggml.{key}", np.ndarray)
    if len(values) != count:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.{key} has {len(values)} values for {count} tokens"
        )
    return values


def _byte_level_bpe(file: GGUFFile, vocab: dict[str, int]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = file.get("tokenizer.ggml.pre", str)
    if pre not in _PATTERNS:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre is {pre!r}; supported are {sorted(_PATTERNS)}"
        )
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", list)]
    for merge in merges:
        if len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)}:
            raise ValueError(
                f"{file.path}: tokenizer.ggml.merges: {' '.join(merge)!r} is not a pair of tokens "
                "whose join is a token"
            )
    # Llama 3 takes a word that is a token as it is, whether merges lead to it or not.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    pattern = _PATTERNS[pre]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece_bpe(file: GGUFFile, vocab: dict[str, int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _values(file, "scores", len(vocab))
    # Every way to put a piece together, the best piece first, as SentencePiece merges.
    merges: list[tuple[float, int, tuple[str, str]]] = []
    for piece, index in vocab.items():
        if len(piece) > _LONGEST_PIECE:
            raise ValueError(
                f"{file.path}: tokenizer.ggml.tokens: a piece has {len(piece)} characters, "
                f"at most {_LONGEST_PIECE} are supported"
            )
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in vocab and pair[1] in vocab:
                merges.append((-float(scores[index]), index, pair))
    merges.sort(key=lambda merge: merge[:2])
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    names = list(vocab)
    if type(unknown) is not int or not 0 <= unknown < len(names):
        raise ValueError(
            f"{file.path}: tokenizer.ggml.unknown_token_id is {unknown!r} of {len(names)} tokens"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [pair for _, _, pair in merges],
            unk_token=names[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space, prefix = normalizers.Replace(" ", "▁"), []
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True) is True:
        prefix = [normalizers.Prepend("▁")]
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([*prefix, space])
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer
