"""Whole loops as one CUDA graph, against the same loops launched kernel by kernel. On a GPU alone.

Prediction: all three are bound by launches, about 5 us of Python and driver for each kernel, and a
graph launches a kernel in about 1 us; so 4 times or more, less where a kernel takes longer.
"""

import pytest
import torch

from aigc_fast._timing import interleaved
from aigc_fast.models.autoregressive import DecoderConfig, DecoderLM, Engine
from aigc_fast.models.diffusion import Sampler, SmallUNet
from aigc_fast.models.gan import MLPDiscriminator, MLPGenerator
from aigc_fast.schedulers import DDIMScheduler
from aigc_fast.training import GANTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def compare(benchmark, quick, make) -> None:
    """make(cuda_graph) is the call to measure."""
    calls = {"eager": make(False), "ours": make(True)}
    times = interleaved(calls, seconds=1.0 if quick else 5.0)
    benchmark.extra_info.update(
        milliseconds={name: seconds * 1e3 for name, seconds in times.items()},
        eager_over_ours=times["eager"] / times["ours"],
    )
    benchmark.pedantic(calls["ours"], rounds=2)


def bench_decoding_step(benchmark, quick) -> None:
    """One token of one sequence: the shape of SmolLM2-135M, bfloat16, random weights."""
    config = DecoderConfig(
        vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        intermediate_size=1536, max_position_embeddings=8192,
    )  # fmt: skip
    model = DecoderLM(config).to("cuda", torch.bfloat16).eval()

    def make(cuda_graph):
        engine = Engine(model, cuda_graph=cuda_graph)
        engine.add([1], 8000)
        engine.step()
        return engine.step

    compare(benchmark, quick, make)


def bench_sampling_loop(benchmark, quick) -> None:
    """50 steps of DDIM with guidance, 16 digits."""
    model = SmallUNet().cuda().eval()
    labels = torch.arange(16, device="cuda") % 10

    def make(cuda_graph):
        sampler = Sampler(
            model, DDIMScheduler(), num_steps=50, guidance_scale=2.0, null_label=10,
            cuda_graph=cuda_graph,
        )  # fmt: skip
        return lambda: sampler((16, 1, 28, 28), labels=labels)

    compare(benchmark, quick, make)


def bench_mlp_gan_step(benchmark, quick) -> None:
    """Both networks of the MLP GAN, 64 digits."""
    real = torch.rand(64, 784, device="cuda") * 2 - 1

    def make(cuda_graph):
        networks = MLPGenerator().cuda(), MLPDiscriminator().cuda()
        trainer = GANTrainer(*networks, 100, cuda_graph=cuda_graph)
        return lambda: trainer.step(real)

    compare(benchmark, quick, make)
