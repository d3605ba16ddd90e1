"""`aigc-fast generate` and `aigc-fast chat`: a decoder from disk on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from aigc_fast.io import load_tokenizer
from aigc_fast.models.autoregressive import DecoderLM, Sampling, stream_tokens


class Session:
    """A model, its tokenizer and the messages so far."""

    def __init__(
        self,
        console: Console,
        model: DecoderLM,
        tokenizer: Any,
        max_tokens: int,
        sampling: Sampling,
    ) -> None:
        self.console, self.model, self.tokenizer = console, model, tokenizer
        self.max_tokens, self.sampling = max_tokens, sampling
        self.messages: list[dict[str, str]] = []

    @classmethod
    def open(
        cls, console: Console, path: Path, max_tokens: int, options: dict[str, Any], exact: bool
    ) -> Session | None:
        """Reads model and tokenizer; None, with the reason on the console, where it cannot."""
        try:
            with console.status(f"reading {path.name}"):
                packed = not path.is_dir() and not torch.cuda.is_available()
                dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
                model = DecoderLM.from_pretrained(
                    path, dtype, packed=packed, quantize_activations=packed and not exact
                )
                tokenizer = load_tokenizer(path)
        except (OSError, ValueError, ImportError) as error:
            console.print(str(error), style="red", markup=False)
            return None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(console, model.to(device), tokenizer, max_tokens, Sampling(**options))

    def answer(self, prompt: str, *, raw: bool = False) -> int:
        """Streams one answer and what it took; the exit code."""
        if not raw:
            self.messages.append({"role": "user", "content": prompt})
            prompt = self.tokenizer.chat_prompt(self.messages)
        ids = self.tokenizer.encode(prompt)
        room = self.model.config.max_position_embeddings - len(ids) + 1
        if not ids or room < 1:
            self.console.print(
                f"the prompt has {len(ids)} tokens; it must have 1 to "
                f"{self.model.config.max_position_embeddings}",
                style="red",
            )
            return 2
        clock = _Clock()
        stream = stream_tokens(
            self.model,
            [ids],
            min(self.max_tokens, room),
            sampling=self.sampling,
            stop_tokens=self.tokenizer.stop_tokens,
        )
        text = ""
        for piece in self.tokenizer.decode_stream(clock.ticks(stream)):
            self.console.print(piece, end="", markup=False, soft_wrap=True)
            text += piece
        self.console.print()
        self.console.print(f"[dim]{len(ids)} tokens of prompt, {clock}[/]")
        if not raw:
            self.messages.append({"role": "assistant", "content": text})
        return 0

    def converse(self) -> int:
        while line := self.console.input("[bold]> [/]").strip():
            if code := self.answer(line):
                return code
        return 0


class _Clock:
    """When the tokens of a stream came."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def ticks(self, stream: Iterator[Tensor]) -> Iterator[int]:
        for token in stream:
            self.times.append(time.perf_counter())
            yield int(token)

    def __str__(self) -> str:
        start, *times = self.times
        text = f"{len(times)} new, the first after {(times[0] - start) * 1e3:.0f} ms"
        if len(times) > 1:
            text += f", {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s"
        return text
