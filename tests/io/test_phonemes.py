"""Text to phonemes, and to the ids of voices."""

import json
import random
import sys

import pytest

from aigc_fast.io import load_voice_tokenizer, phonemize
from tests.io.test_fuzz import damage_json

TABLE = {"_": [0], "^": [1], "$": [2], " ": [3], "a": [4], "ɪ": [5, 6], "ˈ": [7], ".": [8]}


@pytest.fixture
def espeak():
    pytest.importorskip("espeakng_loader")


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Rain, again! Why?", ["ɹˈeɪn, ɐɡˈɛn!", "wˈaɪ?"]),
        ("no end", ["nˈoʊ ˈɛnd"]),
        ("Wait: this; that.", ["wˈeɪt: ðˈɪs; ðˈæt."]),
        ("Mr. Smith and J. R. Dunn. Who?", ["mˈɪstɚ smˈɪθ ænd dʒˈeɪ ˈɑːɹ dˈʌn.", "hˈuː?"]),
        ('He said "Stop!" Then (3.14): yes...', [
            "hiː sˈɛd stˈɑːp!", "ðˈɛn θɹˈiː pɔɪnt wˈʌn fˈɔːɹ: jˈɛs.",
        ]),
        ("Rain\n\nTwo\nThree", ["ɹˈeɪn", "tˈuː θɹˈiː"]),
        ("", []),
        (" ... ", []),
        ("a\0b", ["ɐ bˈiː"]),
    ],
)  # fmt: skip
def test_sentences(espeak, text, sentences):
    assert phonemize(text) == sentences


def test_other_languages_and_scripts(espeak):
    assert phonemize("Guten Tag, Herr Müller. Ja!", "de") == ["ɡˈuːtən tˈɑːk, hˈɛɾ mˈʏlɜ.", "jˈɑː!"]
    # English within French, whose name eSpeak puts in brackets; a nasal vowel is two characters.
    (sentence,) = phonemize("Bonjour le weekend", "fr")
    assert "(" not in sentence and sentence.startswith("bɔ̃ʒˈuʁ") and "õ" not in sentence
    assert [s[-1] for s in phonemize("你好。再见！")] == [".", "!"]


def test_every_text_is_read_to_its_end(espeak):
    rng = random.Random(0)
    letters = "ab Z.,:;!?()\"'-\n\t3€é你\U0001f600\ud800\0\u202e"
    for _ in range(200):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(60)))
        (last,) = phonemize(f"{text}\n\nrain.")[-1:]
        assert last == "ɹˈeɪn."
    assert len(phonemize("Rain. " * 500)) == 500
    assert phonemize("." * 20000) == []


@pytest.mark.parametrize("voice", ["zz-qq", "../x", "", "en us", "en-us\0", "é"])
def test_unknown_voices(espeak, voice):
    with pytest.raises(ValueError, match="eSpeak has no voice"):
        phonemize("a", voice)


def test_without_espeak_it_is_named(monkeypatch):
    from aigc_fast.io import phonemes

    phonemes._library.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match="package espeakng-loader: pip install espeakng-loader"):
        phonemize("a")


def write_piper(path, **changes):
    described = dict(phoneme_id_map=TABLE, espeak=dict(voice="en-us")) | changes
    path.with_name(f"{path.name}.json").write_text(json.dumps(described))
    return path


def test_ids_of_a_piper_voice(tmp_path, espeak):
    tokenizer = load_voice_tokenizer(write_piper(tmp_path / "voice.onnx"))
    eye = [1, 0, 7, 0, 4, 0, 5, 6, 0, 8, 0, 2]
    assert tokenizer.encode("Eye.") == [eye]
    with pytest.warns(UserWarning, match="the voice does not know 'b', 'd': skipped") as found:
        assert tokenizer.encode("Eye. Bide.") == [eye, eye]
    assert len(found) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(phoneme_type="text"), "'phoneme_type' must be 'espeak', got 'text'"),
        (dict(phoneme_map={"a": ["b"]}), "a 'phoneme_map' is not supported"),
        (dict(espeak=None), "'espeak' must be an object with a 'voice'"),
        (dict(phoneme_id_map=[]), "table of symbols must be an object that is not empty"),
        (dict(phoneme_id_map={"_": [0], "^": [1]}), r"'phoneme_id_map' must have '\$'"),
        (dict(phoneme_id_map={"_": 0}), "the ids of '_' must be a list of integers, got 0"),
        (dict(phoneme_id_map={"_": [-1]}), "the ids of '_' must be a list of integers"),
    ],
)
def test_refused_piper_voices(tmp_path, changes, message):
    path = write_piper(tmp_path / "voice.onnx", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_voice_tokenizer(path)
    assert str(path) in str(error.value)


def write_folder(folder, symbols, **config):
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(symbols)}))
    config = dict(phonemize=False) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("add_blank", [True, False])
@pytest.mark.parametrize("language", ["eng", "ron"])
def test_characters_are_those_of_transformers(tmp_path, add_blank, language):
    transformers = pytest.importorskip("transformers")
    folder = write_folder(
        tmp_path, "_ abcdeţI.'", add_blank=add_blank, language=language, normalize=True
    )
    stock = transformers.VitsTokenizer.from_pretrained(folder)
    ours = load_voice_tokenizer(folder)
    for text in ("Abba c", " DEAD I I", "b.b", "ţa ţ" if language == "eng" else "ța ţ"):
        assert ours.encode(text) == [stock(text)["input_ids"]]


def test_sentences_of_characters(tmp_path):
    tokenizer = load_voice_tokenizer(write_folder(tmp_path, "_ ab", add_blank=False))
    with pytest.warns(UserWarning, match=r"does not know '!', '\.', 'c': skipped"):
        assert tokenizer.encode("Ab. c!  ba\nb b") == [[2, 3], [3, 2], [3, 1, 3]]


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(phonemize=True), "'phonemize' is not supported"),
        (dict(is_uroman=True), "'is_uroman' is not supported"),
        (dict(add_blank=3), "'add_blank' must be true or false, got 3"),
    ],
)
def test_refused_folders(tmp_path, config, message):
    with pytest.raises(ValueError, match=message) as error:
        load_voice_tokenizer(write_folder(tmp_path, "ab", **config))
    assert str(tmp_path) in str(error.value)


def test_damaged_tokenizers(tmp_path):
    path = write_piper(tmp_path / "voice.onnx")
    beside = tmp_path / "voice.onnx.json"
    sound, rng, loaded = json.loads(beside.read_text()), random.Random(0), 0
    for _ in range(500):
        beside.write_text(json.dumps(damage_json(rng, sound)))
        try:
            load_voice_tokenizer(path)
            loaded += 1
        except ValueError as error:
            assert str(path) in str(error)
    assert 0 < loaded < 500
    with pytest.raises(OSError):
        load_voice_tokenizer(tmp_path / "none.onnx")
