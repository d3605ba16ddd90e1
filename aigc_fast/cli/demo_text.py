"""The demo's text: a pretrained decoder answers a question."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console

import aigc_fast
from aigc_fast.io import find_smollm2, load_tokenizer
from aigc_fast.models.autoregressive import DecoderLM, Update, stream

QUESTION = "What is a rainbow, and how does it form?"


@dataclass
class TextResult:
    """Seconds a token of each implementation, and whether they chose the same tokens."""

    ours: float
    reference: float
    same_tokens: bool


def run(console: Console, device: torch.device, *, tokens: int) -> TextResult:
    path = find_smollm2()
    with console.status("reading the weights"):
        tokenizer = load_tokenizer(path)
        dense = DecoderLM.from_pretrained(path).to(device)
        # The file's own 4- and 8-bit codes, activations as they are: the same tokens.
        model = DecoderLM.from_pretrained(path, packed=True) if device.type == "cpu" else dense
    prompt = tokenizer.encode(tokenizer.chat_prompt([{"role": "user", "content": QUESTION}]))
    stop = tokenizer.stop_tokens
    for _ in stream(model, [prompt], 4):
        pass  # the first tokens of a process are slower

    console.print(f"[bold]{QUESTION}[/]")
    ours = _Clocked(stream(model, [prompt], tokens, tokenizer=tokenizer, stop_tokens=stop))
    for piece in ours:
        console.print(piece, end="", markup=False, soft_wrap=True)
    console.print()
    with console.status("the same in plain PyTorch"), aigc_fast.backend("reference"):
        reference = _Clocked(stream(dense, [prompt], tokens, stop_tokens=stop))
        for _ in reference:
            pass
    same = reference.tokens == ours.tokens
    console.print(
        f"[dim]{1 / ours.seconds:.1f} tokens/s, plain PyTorch on the dequantised weights "
        f"{1 / reference.seconds:.1f}; "
        f"{len(ours.tokens)} tokens, {'the same in both' if same else 'NOT the same'}[/]"
    )
    return TextResult(ours.seconds, reference.seconds, same)


class _Clocked:
    """Iterates over the text of one sequence; `seconds` is the mean time of a token."""

    def __init__(self, updates: Iterator[Update]) -> None:
        self._updates = updates
        self.tokens: list[int] = []
        self.seconds = float("nan")

    def __iter__(self) -> Iterator[str]:
        busy = 0.0
        while True:
            start = time.perf_counter()
            update = next(self._updates, None)
            if update is None:
                return
            # Neither the prompt, which comes with the first token, nor what the caller does.
            if self.tokens:
                busy += time.perf_counter() - start
                self.seconds = busy / len(self.tokens)
            self.tokens += update.tokens
            yield update.text
