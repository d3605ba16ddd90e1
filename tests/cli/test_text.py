"""`aigc-fast train text`, as a user runs it, on a small model."""

import csv

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from typer.testing import CliRunner

from aigc_fast.cli import train_text
from aigc_fast.cli.app import app
from aigc_fast.io import TextTokenizer, load_python_reference, load_texts, load_tokenizer
from aigc_fast.models.autoregressive import DecoderConfig, DecoderLM
from aigc_fast.training import load_checkpoint, perplexity, windows_of

TEXT = "the cat sat on the mat, and the dog lay on the log. " * 40
END = "<|end|>"


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "100"})


def bytes_tokenizer():
    """256 bytes, and the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return TextTokenizer("", tokenizer, (256,), special_tokens={"eos_token": END})


def save_model(folder, vocab_size=257, length=128):
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size, 32, 2, 2, 1, 16, 64, max_position_embeddings=length)
    model = DecoderLM(config)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.02)
    model.save_pretrained(folder, bytes_tokenizer())
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def train(model, data, output, *more):
    options = ("--model", model, "--data", data, "--output", output, "--seq", 64, "--lr", 1e-2)
    return run("train", "text", *options, *more)


def test_train_resume_and_generate(model, text, tmp_path):
    out = tmp_path / "out"
    every = ("--every", 10, "--micro-batches", 2)
    first = train(model, text, out, "--steps", 20, *every)
    assert first.exit_code == 0, first.output
    again = train(model, text, out, "--steps", 40, *every)
    assert again.exit_code == 2 and "--resume goes on from it" in again.output.replace("\n", "")
    resumed = train(model, text, out, "--steps", 40, *every, "--resume")
    assert resumed.exit_code == 0, resumed.output
    output = " ".join(resumed.output.split())
    assert "28 windows of 64 tokens, 4 held out: perplexity 2" in output
    assert "40 steps of 4 windows" in output and "Perplexity: " in output
    with (out / "log.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [int(row["step"]) for row in found] == list(range(1, 41))
    assert float(found[-1]["loss"]) < float(found[0]["loss"]) - 2
    for file in ("checkpoint.pt", "losses.png"):
        assert (out / file).exists()

    # What was saved is what the figures say, on windows that no step saw.
    tokenizer = load_tokenizer(out / "model")
    windows = windows_of(torch.tensor(tokenizer.encode(TEXT + END)), 64)
    before, after = (
        perplexity(DecoderLM.from_pretrained(folder), windows[::10])
        for folder in (model, out / "model")
    )
    assert before > 200 and after < 20
    notes = load_checkpoint(out / "checkpoint.pt")["notes"]
    assert notes["before"]["perplexity"] == pytest.approx(before, rel=1e-5)
    assert notes["after"]["perplexity"] == pytest.approx(after, rel=1e-5)
    assert f"perplexity of the held-out windows: {after:.4g}" in output
    samples = (out / "samples.txt").read_text()
    assert f"perplexity {before:.4g} before, {after:.4g} after 40 steps" in samples
    assert samples.count("====== the text\n") == samples.count("------ after\n") == 3
    assert TEXT[:32] in samples  # the first held-out window begins the text

    answer = run("generate", "--model", out / "model", "--prompt", "the cat", "--raw", "--exact",
                 "--max-tokens", 8)  # fmt: skip
    assert answer.exit_code == 0 and "8 new" in answer.output


def test_options_reach_the_recipe(model, text, tmp_path):
    options = ("--bf16", "--ema", 0.9, "--gradient-checkpointing", "--batch", 3)
    result = train(model, text, tmp_path / "out", *options, "--steps", 2)
    assert result.exit_code == 0, result.output
    state = load_checkpoint(tmp_path / "out" / "checkpoint.pt")["trainer"]
    recipe = state["recipe"]
    assert recipe["bf16"] and recipe["gradient_checkpointing"]
    assert (recipe["ema_decay"], recipe["lr"]) == (0.9, 1e-2)
    saved = DecoderLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert all(torch.equal(saved[key], value) for key, value in state["average"].items())


def test_samples_go_to_tensorboard(model, text, tmp_path):
    pytest.importorskip("tensorboard")
    assert train(model, text, tmp_path / "out", "--steps", 2, "--tensorboard").exit_code == 0
    [events] = (tmp_path / "out" / "tensorboard").iterdir()
    assert b"====== the text" in events.read_bytes()


def test_a_resumed_training_is_the_same(model, text, tmp_path):
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        for i, stop in enumerate(stops):
            resume = ("--resume",) if i else ()
            options = ("--steps", 6, "--every", stop, *resume)
            with pytest.MonkeyPatch.context() as patched:
                if stop < 6:
                    _stop_after(patched, stop)
                result = train(model, text, tmp_path / name, *options)
            assert result.exit_code == (0 if stop == 6 else 1), result.output
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert len(logs[0]) == 7
    losses = [[line.split(",")[:2] for line in log] for log in logs]
    assert losses[0] == losses[1]


def _stop_after(patched, step):
    """As if the process were killed at that step, its checkpoint written."""
    run_step = train_text.LanguageTrainer._run_step

    def killed(self, *arguments):
        if self.steps_done == step:
            raise RuntimeError("killed")
        return run_step(self, *arguments)

    patched.setattr(train_text.LanguageTrainer, "_run_step", killed)


def test_texts_of_a_folder_end_with_their_token(model, tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    for name, content in (("b.txt", "bb" * 40), ("more/a.txt", "aa" * 40), ("empty.txt", "\n")):
        (tmp_path / "texts" / name).write_text(content)
    (tmp_path / "texts" / "c.md").write_text("cc" * 40)
    (tmp_path / "texts" / "folder.txt").mkdir()
    (tmp_path / "texts" / "b.txt").write_text("bb" * 40, encoding="utf-8-sig")
    assert load_texts(tmp_path / "texts") == ["bb" * 40, "aa" * 40]
    result = train(model, tmp_path / "texts", tmp_path / "out", "--steps", 1, "--batch", 1)
    assert result.exit_code == 0, result.output
    assert "1 windows of 64 tokens, 1 held out" in " ".join(result.output.split())


def test_the_reference_says_nothing_twice():
    texts = load_python_reference()
    paragraphs = [part for text in texts for part in text.split("\n\n")]
    assert len(texts) > 70 and len(paragraphs) == len(set(paragraphs)) > 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "nowhere"), "data must be python, a text file or a folder of .txt files, got"),
        (("--seq", 129), "seq must be at most 128, the context of the model"),
        (("--seq", 1), "--seq"),
        (("--batch", 30), "batch must be at most 28, the windows there are"),
        (("--micro-batches", 0), "--micro-batches"),
        (("--ema", 1.0), "decay must be in"),
        (("--model", "nowhere"), "--model"),
        (("--resume",), "checkpoint.pt"),
    ],
)
def test_refuses(model, text, tmp_path, options, words):
    result = train(model, text, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"caf\xe9 " * 100, "text.txt: not UTF-8 text"),
        (b"too short", "seq must be at most 5: data has 10 tokens, and one window is held out"),
        (b"  \n", "text.txt: holds no text"),
    ],
)
def test_refuses_texts(model, tmp_path, content, words):
    (tmp_path / "text.txt").write_bytes(content)
    for data in (tmp_path / "text.txt", tmp_path):
        result = train(model, data, tmp_path / "out")
        assert result.exit_code == 2
        assert words.replace("text.txt: holds no text", "holds no text") in " ".join(
            result.output.split()
        )


def test_refuses_a_folder_without_texts(model, tmp_path):
    result = train(model, tmp_path, tmp_path / "out")
    assert result.exit_code == 2 and "holds no .txt files" in " ".join(result.output.split())


def test_refuses_a_tokenizer_of_another_model(text, tmp_path):
    result = train(save_model(tmp_path / "model", vocab_size=100), text, tmp_path / "out")
    assert result.exit_code == 2
    words = (
        "model must have the tokens of its tokenizer, which gives 256 in data: vocab_size is 100"
    )
    assert words in " ".join(result.output.split())


def test_a_checkpoint_of_another_model_is_refused(model, text, tmp_path):
    out = tmp_path / "out"
    assert train(model, text, out, "--steps", 1).exit_code == 0
    result = train(model, text, out, "--steps", 2, "--resume", "--seq", 32)
    assert result.exit_code == 2 and "is of other networks" in " ".join(result.output.split())
