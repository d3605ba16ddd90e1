"""Writes the generators of Real-ESRGAN as ncnn files, as its converter would."""

import struct
from pathlib import Path

from torch import Tensor, nn

from aigc_fast.models.gan import RRDBNet, SRVGGNetCompact


class Writer:
    """Collects the lines of a .param file and the bytes of its .bin."""

    def __init__(self, *, half: bool = True) -> None:
        self.half, self.lines, self.weights, self.blobs = half, [], b"", 0

    def add(self, kind: str, inputs: tuple[str, ...] = (), params: str = "", outputs: int = 1):
        names = [f"blob{self.blobs + i}" for i in range(outputs)]
        self.blobs += outputs
        words = [kind, f"layer{len(self.lines)}", str(len(inputs)), str(outputs)]
        self.lines.append(" ".join([*words, *inputs, *names, params]))
        return names[0] if outputs == 1 else names

    def flagged(self, values: Tensor) -> None:
        values = values.detach().numpy().ravel()
        if self.half:
            data = values.astype("<f2").tobytes()
            self.weights += struct.pack("<I", 0x01306B47) + data + bytes(-len(data) % 4)
        else:
            self.weights += struct.pack("<I", 0) + values.astype("<f4").tobytes()

    def plain(self, values: Tensor) -> None:
        self.weights += values.detach().numpy().astype("<f4").tobytes()

    def conv(self, module: nn.Conv2d, x: str, params: str = "") -> str:
        params = f"0={module.out_channels} 1=3 4=1 5=1 6={module.weight.numel()} {params}"
        self.flagged(module.weight)
        self.plain(module.bias)
        return self.add("Convolution", (x,), params)

    def save(self, stem: Path) -> Path:
        text = ["7767517", f"{len(self.lines)} {self.blobs}", *self.lines]
        Path(f"{stem}.param").write_text("\n".join(text) + "\n")
        Path(f"{stem}.bin").write_bytes(self.weights)
        return stem


LEAKY = "9=2 -23310=1,2.000000e-01"
SUM = "0=1 -23301=2,2.000000e-01,1.000000e+00"


def write_compact(stem: Path, model: SRVGGNetCompact, *, half: bool = True) -> Path:
    file = Writer(half=half)
    x, y = file.add("Split", (file.add("Input"),), outputs=2)
    for module in model.body:
        if isinstance(module, nn.PReLU):
            file.plain(module.weight)
            y = file.add("PReLU", (y,), f"0={module.num_parameters}")
        else:
            y = file.conv(module, y)
    y = file.add("PixelShuffle", (y,), f"0={model.upscale}")
    near = file.add("Interp", (x,), f"0=1 1={model.upscale:e} 2={model.upscale:e}")
    y = file.add("BinaryOp", (y, near))
    if model.scale != model.upscale:
        file.add("Interp", (y,), "0=3 1=5.000000e-01 2=5.000000e-01")
    return file.save(stem)


def write_rrdb(stem: Path, model: RRDBNet) -> Path:
    file = Writer(half=True)
    first = y = file.conv(model.conv_first, file.add("Input", params="0=8 1=8 2=3"))
    for block in model.body:
        start = y
        for dense in block.children():
            *convs, last = dense.children()
            parts = (y,)
            for conv in convs:
                x = file.add("Concat", parts) if len(parts) > 1 else y
                parts += (file.conv(conv, x, LEAKY),)
            y = file.add("Eltwise", (file.conv(last, file.add("Concat", parts)), y), SUM)
        y = file.add("Eltwise", (y, start), SUM)
    y = file.add("BinaryOp", (first, file.conv(model.conv_body, y)), "0=0")
    for conv in (model.conv_up1, model.conv_up2):
        y = file.conv(conv, file.add("Interp", (y,), "0=1 1=2.0 2=2.0"), LEAKY)
    file.conv(model.conv_last, file.conv(model.conv_hr, y, LEAKY))
    return file.save(stem)


def rounded(model: nn.Module, *, half: bool = True) -> dict[str, Tensor]:
    """The state dict as the file keeps it: convolutions' weights as float16."""
    return {
        name: value.half().float() if half and value.ndim == 4 else value
        for name, value in model.state_dict().items()
    }
