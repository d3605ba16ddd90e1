"""Fine-tuning a language model: checkpoints, a log, perplexity and samples of held-out text."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from aigc_fast._devices import default_device
from aigc_fast.io import (
    TextTokenizer,
    find_smollm2,
    load_python_reference,
    load_texts,
    load_tokenizer,
)
from aigc_fast.io._whole import written_whole
from aigc_fast.models.autoregressive import DecoderLM, Sampling, generate
from aigc_fast.training import (
    LanguageRecipe,
    LanguageStep,
    LanguageTrainer,
    TensorBoardLog,
    perplexity,
    windows_of,
)

from .train import TextOptions
from .training_session import TrainingSession

_HELD_OUT = 10  # every tenth window is kept aside,
_MOST = 50  # but hardly more than these: they are read at every checkpoint
_SAMPLES, _PROMPT, _NEW = 3, 32, 64  # continuations of so many tokens


class Session(TrainingSession):
    """OUTPUT/model is what `aigc-fast generate` and transformers read.

    notes: perplexity of the held-out windows and the samples, "before" and "after".
    """

    options: TextOptions
    losses = ("loss",)
    loss_label = "nats of a token"
    unit = "windows"
    log_every = 1  # a step takes seconds

    def __init__(self, options: TextOptions) -> None:
        self.options = options
        recipe = LanguageRecipe(
            lr=options.lr, micro_batches=options.micro_batches, ema_decay=options.ema,
            bf16=options.bf16, gradient_checkpointing=options.gradient_checkpointing,
        )  # fmt: skip
        path = find_smollm2() if options.model is None else options.model
        self.tokenizer = load_tokenizer(path)
        model = DecoderLM.from_pretrained(path)
        if options.seq > (longest := model.config.max_position_embeddings):
            raise ValueError(f"seq must be at most {longest}, the context of the model")
        windows = _windows(options, self.tokenizer, model.config.vocab_size).to(default_device())
        aside = torch.zeros(len(windows), dtype=torch.bool)
        aside[:: max(_HELD_OUT, len(windows) // _MOST)] = True
        self.samples, self.held_out, self.labels = windows[~aside], windows[aside], None
        tokens = hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()
        self.networks = {**asdict(model.config), "seq": options.seq, "tokens": tokens}
        self.prompt = min(_PROMPT, options.seq // 2)
        self.new_tokens = min(_NEW, longest - self.prompt)
        self.trainer = LanguageTrainer(
            model.to(windows.device), recipe, done=self.share_done, seed=options.seed
        )
        self.open()

    def losses_of(self, state: LanguageStep) -> tuple[Tensor, ...]:
        return (state.loss,)

    def _train(self, console: Console) -> None:
        if not self.trainer.steps_done:
            with console.status("the model as it is"):
                self.notes["before"] = self._look()
        console.print(
            f"{len(self.samples)} windows of {self.options.seq} tokens, {len(self.held_out)} held "
            f"out: perplexity {self.notes['before']['perplexity']:.4g}"
        )
        super()._train(console)
        after = self.notes["after"]["perplexity"]
        console.print(f"perplexity of the held-out windows: {after:.4g}")

    def _look(self) -> dict[str, Any]:
        """What the model is worth, and what it writes."""
        model: Any = self.trainer.average
        prompts = self.held_out[:_SAMPLES, : self.prompt].tolist()
        found = generate(
            model, prompts, self.new_tokens, tokenizer=self.tokenizer,
            sampling=Sampling(temperature=0.7, top_p=0.9, seed=self.options.seed),
            stop_tokens=self.tokenizer.stop_tokens,
        )  # fmt: skip
        return {
            "perplexity": perplexity(model, self.held_out),
            "texts": [request.text for request in found],
        }

    def keep_samples(self) -> None:
        self.notes["after"] = self._look()  # first: a model that came to nothing is not kept
        self.trainer.average.save_pretrained(self.options.output / "model", self.tokenizer)
        with written_whole(self.options.output / "samples.txt") as partial:
            partial.write_text(self._report(), encoding="utf-8")

    def show_samples(self, board: TensorBoardLog) -> None:
        # Indented, Markdown leaves it as it is.
        text = "".join(f"    {line}\n" for line in self._report().splitlines())
        board.add_text(self.trainer.steps_done, "samples", text)

    def _report(self) -> str:
        before, after = self.notes["before"], self.notes["after"]
        parts = [
            f"{len(self.held_out)} held-out windows: perplexity {before['perplexity']:.4g} before, "
            f"{after['perplexity']:.4g} after {self.trainer.steps_done} steps"
        ]
        for window, *texts in zip(self.held_out, before["texts"], after["texts"], strict=False):
            ids = window[: self.prompt + self.new_tokens].tolist()
            parts.append(f"====== the text\n{self.tokenizer.decode(ids[: self.prompt])}")
            goes_on = self.tokenizer.decode(ids[self.prompt :])
            for name, text in zip(("goes on", "before", "after"), (goes_on, *texts), strict=True):
                parts.append(f"------ {name}\n{text}")
        return "\n\n".join(parts) + "\n"


def _windows(options: TextOptions, tokenizer: TextTokenizer, vocab_size: int) -> Tensor:
    """int64 (count, seq), at least two, of all texts one after another."""
    if options.data == "python":
        texts = load_python_reference()
    elif Path(options.data).exists():
        texts = load_texts(options.data)
    else:
        raise ValueError(
            f"data must be python, a text file or a folder of .txt files, got {options.data!r}"
        )
    end = tokenizer.special_tokens.get("eos_token")
    between = [] if end is None else tokenizer.encode(end)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=True) + between
    if max(ids) >= vocab_size:
        raise ValueError(
            f"model must have the tokens of its tokenizer, which gives {max(ids)} in data: "
            f"vocab_size is {vocab_size}"
        )
    windows = windows_of(torch.tensor(ids), options.seq)
    if len(windows) < 2:
        raise ValueError(
            f"seq must be at most {len(ids) // 2}: data has {len(ids)} tokens, and one window is "
            "held out"
        )
    return windows
