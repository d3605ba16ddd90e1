"""What the table of samples does not say of apply_rotary."""

import pytest
import torch

import aigc_fast
from aigc_fast import ops
from tests.op_samples import rand
from tests.op_samples.rotary import angles
from tests.ops.test_every_op import DEVICE


def test_halves_are_transformers_llama() -> None:
    modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, (cos, sin) = rand(2, 7, 3, 16), angles(2, 7, 8)
    theirs, _ = modeling_llama.apply_rotary_pos_emb(
        x, x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), unsqueeze_dim=2
    )
    torch.testing.assert_close(ops.apply_rotary(x, cos, sin), theirs)


def test_pairs_are_complex_numbers() -> None:
    x, (cos, sin) = rand(2, 7, 3, 16), angles(2, 7, 8)
    turned = torch.view_as_complex(x.view(2, 7, 3, 8, 2)) * torch.complex(cos, sin)[:, :, None]
    ours = ops.apply_rotary(x, cos, sin, interleaved=True)
    torch.testing.assert_close(ours, torch.view_as_real(turned).flatten(-2))


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_angles_of_float32_are_used_as_they_are(backend, dtype, interleaved) -> None:
    if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16")
    if backend == "native":
        backend = "cpu" if DEVICE == "cpu" else "triton"
    x, (cos, sin) = rand(2, 7, 3, 40).to(dtype), (t.float() for t in angles(7, 18))
    with aigc_fast.backend("reference"):
        exact = ops.apply_rotary(
            x.double(), cos.double(), sin.double(), interleaved=interleaved
        ).to(dtype)
    with aigc_fast.backend(backend):
        ours = ops.apply_rotary(*(t.to(DEVICE) for t in (x, cos, sin)), interleaved=interleaved)
    # One rounding; of two values nearly half way between, fp32 may choose the other one.
    assert (ours.cpu() != exact).double().mean() < 0.01
    torch.testing.assert_close(ours.cpu(), exact)


def test_angles_take_no_gradient() -> None:
    x, (cos, sin) = rand(1, 3, 2, 8), angles(3, 4)
    with pytest.raises(RuntimeError, match="no derivative with respect to cos and sin"):
        ops.apply_rotary(x, cos.requires_grad_(), sin)
    with torch.no_grad():
        ops.apply_rotary(x, cos, sin)
