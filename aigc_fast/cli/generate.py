"""`aigc-fast generate` and `aigc-fast chat`: a decoder from disk on the terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from aigc_fast.io import TextTokenizer, load_tokenizer
from aigc_fast.models.autoregressive import DecoderLM, Engine, Request, Sampling

__all__ = ["Sampling", "Session"]

PAGE_SIZE = 16


class Session:
    """An engine, which remembers what it has computed, and the messages so far."""

    def __init__(
        self,
        console: Console,
        engine: Engine,
        tokenizer: TextTokenizer,
        max_tokens: int,
        **how: Any,
    ) -> None:
        """`how` goes to `Engine.add` with every prompt."""
        self.console, self.engine, self.tokenizer = console, engine, tokenizer
        self.max_tokens, self.how = max_tokens, how
        self.messages: list[dict[str, str]] = []

    @classmethod
    def open(
        cls,
        console: Console,
        path: Path,
        *,
        exact: bool,
        context: int,
        cache_dtype: str = "auto",
        **options: Any,
    ) -> Session:
        """Reads model and tokenizer.

        cache_dtype: the name of a dtype; auto is the model's, and float16 where activations are
        rounded too.
        """
        on_gpu = torch.cuda.is_available()
        with console.status("reading the model"):
            packed = not path.is_dir() and not on_gpu
            dtype = torch.bfloat16 if on_gpu else torch.float32
            model = DecoderLM.from_pretrained(
                path, dtype, packed=packed, quantize_activations=packed and not exact
            ).to("cuda" if on_gpu else "cpu")
            tokenizer = load_tokenizer(path)
        pages = -(-min(context, model.config.max_position_embeddings) // PAGE_SIZE)
        if cache_dtype == "auto":
            dtype = dtype if exact or on_gpu else torch.float16
        else:
            dtype = getattr(torch, cache_dtype)
        engine = Engine(
            model,
            tokenizer,
            num_pages=pages,
            page_size=PAGE_SIZE,
            max_batch_size=1,
            cache_dtype=dtype,
        )
        return cls(console, engine, tokenizer, stop_tokens=tokenizer.stop_tokens, **options)

    def answer(self, prompt: str, *, raw: bool = False) -> None:
        """Streams one answer and what it took."""
        room = self.engine.max_length
        if raw:
            ids = self.tokenizer.encode(prompt)
        else:
            self.messages.append({"role": "user", "content": prompt})
            ids = self._ids_of_messages()
            while len(ids) > room and len(self.messages) > 1:  # the oldest are forgotten
                del self.messages[:2]
                ids = self._ids_of_messages()
        if not 0 < len(ids) <= room:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; with this --context it must have 1 to {room}"
            )
        request = self.engine.add(ids, min(self.max_tokens, room - len(ids) + 1), **self.how)
        times = [time.perf_counter()]
        try:
            while not self.engine.idle:
                for update in self.engine.step():
                    times.append(time.perf_counter())
                    self.console.print(update.text, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            self.engine.cancel(request)
        self.console.print()
        self.console.print(f"[dim]{len(ids)} tokens of prompt, {_speed(request, times)}[/]")
        if not raw:
            self.messages.append({"role": "assistant", "content": request.text})

    def _ids_of_messages(self) -> list[int]:
        return self.tokenizer.encode(self.tokenizer.chat_prompt(self.messages))

    def converse(self) -> None:
        """Until an empty line. ValueError at once where messages cannot be laid out."""
        self.tokenizer.chat_prompt([{"role": "user", "content": "Hello"}])
        while line := self.console.input("[bold]> [/]").strip():
            self.answer(line)


def _speed(request: Request, times: list[float]) -> str:
    """What came when: `times` are of the start and of every update."""
    text = f"{len(request.tokens)} new"
    if len(times) > 1:
        text += f", the first after {(times[1] - times[0]) * 1e3:.0f} ms"
    if len(times) > 2:
        text += f", {(len(request.tokens) - 1) / (times[-1] - times[1]):.1f} tokens/s"
    return text
