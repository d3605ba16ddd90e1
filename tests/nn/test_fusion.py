"""fuse and fold_batch_norm on models as GAN code bases write them, against the stock models."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from aigc_fast.nn import fold_batch_norm, fuse, unfuse


def dcgan_generator() -> nn.Module:
    def up(a: int, b: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]

    return nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU(True), *up(16, 8),
        nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def dcgan_discriminator() -> nn.Module:
    def down(a: int, b: int, norm: nn.Module) -> nn.Module:
        conv = parametrizations.spectral_norm(nn.Conv2d(a, b, 3, 2, 1, padding_mode="reflect"))
        return nn.Sequential(conv, nn.Dropout2d(0.25), nn.LeakyReLU(0.2, inplace=True), norm)

    blocks = down(3, 8, nn.Identity()), down(8, 16, nn.BatchNorm2d(16, 0.8))
    return nn.Sequential(*blocks, nn.InstanceNorm2d(16, affine=True), nn.SiLU(), nn.Flatten())


def mlp_gan() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 32), nn.LeakyReLU(0.2), nn.Linear(32, 64), nn.BatchNorm1d(64, 0.8),
        nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(64, 12), nn.Sigmoid(),
    )  # fmt: skip


def group_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv1d(8, 6, 3, groups=2),
        nn.ELU(0.7),
    )  # fmt: skip


class BasicBlock(nn.Module):
    """As torchvision writes it: the activation is called twice."""

    def __init__(self, acts: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.ReLU() if acts == 2 else self.relu

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.drop(self.conv2(out))
        out = self.bn2(out)
        return self.last(out + x)


class Residual(nn.Module):
    """Pre-activation, activations in a list, a dropout, a second input; the last activation has no
    layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.acts = nn.GroupNorm(2, 4), nn.ModuleList([nn.SiLU(), nn.LeakyReLU(0.1)])
        self.block, self.drop = BasicBlock(2), nn.Dropout(0.3)
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x, shift):
        h = self.acts[0](self.norm(x))
        h = self.drop(self.conv(self.block(h) + shift))
        return self.act(self.acts[1](h) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_act = nn.Conv2d(3, 4, 3), nn.Tanh()
        self.residual = Residual()

    def forward(self, x):
        h = self.stem_act(self.stem(x))
        return self.residual(h, h.mean((2, 3), keepdim=True))


MODELS = {
    Net: ((2, 3, 7, 7), 4),
    dcgan_generator: ((3, 8, 1, 1), 3),
    dcgan_discriminator: ((4, 3, 16, 16), 3),
    mlp_gan: ((16, 10), 3),
    group_norms: ((3, 4, 9), 2),
}


def made(make) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for p in model.parameters():  # norms that are not all alike
        if p.dim() == 1:
            nn.init.normal_(p, 0.5)
    return model


def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients, and those of a gradient penalty."""
    torch.manual_seed(1)  # for dropout
    inputs = [x.clone().requires_grad_(), *model.parameters()]
    y = model(inputs[0])
    first = torch.autograd.grad(y.square().mean(), inputs, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), inputs, allow_unused=True)
    return [y, *first, *(t * 0 if g is None else g for t, g in zip(inputs, second, strict=True))]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_outputs_gradients_and_penalties_are_those_of_the_model(make, training) -> None:
    shape, pairs = MODELS[make]
    plain, x = made(make).double().train(training), torch.randn(shape).double()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert sum(n for n, _ in report.replaced.values()) == pairs, str(report)
    assert make is Net or not report.kept, str(report)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    # Float64 throughout: what differs is the order of a few additions.
    torch.testing.assert_close(run(fused, x), run(plain, x), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_results_lie_in_memory_as_those_of_the_model(last) -> None:
    """Which may `view` them, and whose dropout draws in that order."""
    order = torch.channels_last if last else torch.contiguous_format
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 4, 2, 1), nn.ReLU(),
    ).to(memory_format=order)  # fmt: skip
    x = torch.randn(4, 16, 16, 16).contiguous(memory_format=order)
    tokens = torch.randn(256, 1, 16).transpose(0, 1)  # of a batch of one: its stride is 16
    views = (
        x, x[:, :, 1:, ::2], x[:, :, :1].expand(-1, -1, 4, -1), x[0],
        tokens.transpose(1, 2).unflatten(2, (16, 16)),
    )  # fmt: skip
    want = [model(view).stride() for view in views]
    fuse(model)
    assert [model(view).stride() for view in views] == want


def test_unfuse_takes_all_back() -> None:
    model = made(dcgan_generator)
    before = [(m, type(m), dict(m.__dict__)) for m in model.modules()]
    text = str(model)
    fuse(model)
    assert fuse(model).replaced and "act=relu" in str(model)
    unfuse(model)
    assert str(model) == text
    for module, cls, state in before:
        assert type(module) is cls and module.__dict__ == state
    unfuse(model)


def test_copies_and_pickles_of_a_fused_model_are_fused_and_can_be_unfused() -> None:
    model, x = made(mlp_gan).eval(), torch.randn(5, 10)
    want = model(x)
    fuse(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        unfuse(twin)
        assert type(twin[0]) is nn.Linear and torch.equal(twin(x), want)
    assert type(model[0]) is not nn.Linear


def test_says_what_it_keeps_and_why() -> None:
    shared, hooked = nn.ReLU(), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.ReLU(), nn.Linear(4, 4), shared, nn.Linear(4, 4), shared, hooked, nn.Tanh(),
                nn.Linear(4, 4), nn.Dropout(), nn.Sigmoid(), nn.LazyLinear(4), nn.SiLU(),
                nn.LayerNorm(4), nn.ELU(), nn.Linear(4, 4), nn.GELU(), nn.InstanceNorm1d(
                    4, track_running_stats=True), nn.SELU(),
            )  # fmt: skip
            self.act = nn.LeakyReLU()

    report = fuse(Other())
    assert not report.replaced
    assert {why for _, reasons in report.kept.values() for why in reasons.split("; ")} >= {
        "the Linear has hooks",
        "a dropout stands before it",
        "the LazyLinear is not initialised",
        "a LayerNorm stands before it",
        "bias_act has no such activation",
        "the InstanceNorm1d keeps running statistics",
        "it stands in no nn.Sequential, and not once in a forward that torch.fx can trace",
    }
    reasons = str(fuse(nn.Sequential(nn.ReLU(), nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)))
    assert "no module stands right before it" in reasons and "used in several places" in reasons
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        fuse(1)


def test_what_a_forward_may_call_otherwise_is_kept() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), nn.ReLU()

    class Twice(Block):
        def forward(self, x):
            return self.layer(self.act(self.layer(x)))

    class Both(Block):
        def forward(self, x):
            h = self.layer(x)
            return self.act(h) + h

    class Optional(Block):
        def forward(self, x, raw=False):
            return self.layer(x) if raw else self.act(self.layer(x))

    class InTraining(Block):
        def forward(self, x):
            h = self.layer(x)
            return self.act(h) if self.training else h

    class OfData(Block):
        def forward(self, x):
            return self.act(self.layer(x)) if x.sum() > 0 else x

    for cls in (BasicBlock, Twice, Both, Optional, InTraining, OfData):
        model = nn.Sequential(cls())
        before = [type(m) for m in model.modules()]
        assert not fuse(model).replaced, cls
        assert [type(m) for m in model.modules()] == before


class Options(nn.Module):
    """Arguments that may be left out: some activations follow their layer with and without them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.acts = nn.ModuleList([nn.ReLU(), nn.Tanh(), nn.SiLU(), nn.Sigmoid()])

    def forward(self, x, skip=None, *, scale=1.0, raw=False):
        h = self.acts[0](self.layers[0](x))
        if skip is not None:
            h = h + skip
        h = self.acts[1](self.layers[1](h))
        h = self.layers[2](h * scale)
        if skip is not None:
            h = h * skip
        h = self.acts[2](h)
        y = self.layers[3](h)
        return (y, self.acts[3](h)) if raw else self.acts[3](y)


@pytest.mark.parametrize("options", [{}, {"skip": 0.7}, {"scale": 2.0}, {"raw": True, "skip": 3.0}])
def test_what_arguments_do_not_change_is_fused(options) -> None:
    model, x = Options(), torch.randn(3, 4)
    want = model(x, **options)
    report = fuse(model)
    assert report.replaced.keys() == {"Linear, ReLU", "Linear, Tanh"}, str(report)
    torch.testing.assert_close(model(x, **options), want)


def test_looking_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act, self.seen = nn.Linear(4, 4), nn.ReLU(), None
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen = x
            return self.act(self.layer(x) * torch.rand(1)) + self.act(self.layer(x))

    model = Counting().train()
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    assert not fuse(model).replaced
    assert torch.rand(1) == want and model.calls == 0 and model.seen is None and model.training


def test_under_autocast_and_compile() -> None:
    model, x = made(dcgan_generator).eval(), torch.randn(2, 8, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        fuse(model)
        got = model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("make", [dcgan_generator, mlp_gan], ids=lambda f: f.__name__)
def test_folded_batch_norms_are_gone_and_nothing_changes(make) -> None:
    model = made(make)
    with torch.no_grad():
        for _ in range(3):  # running statistics of their own
            model(torch.randn(16, *MODELS[make][0][1:]) * 2 + 1)
    model.eval()
    folded, x = fold_batch_norm(model), torch.randn(MODELS[make][0])
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    torch.testing.assert_close(folded(x), model(x))
    assert fuse(folded).replaced
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize("make", [Net, BasicBlock], ids=lambda f: f.__name__)
def test_folds_in_any_forward(make) -> None:
    model, x = made(make), torch.randn(2, 3 if make is Net else 4, 9, 9)
    with torch.no_grad():
        for _ in range(3):
            model(x * 2 + 1)
    folded = fold_batch_norm(model.train())
    norms = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1, "that behind a dropout, which is none in evaluation"
    model.eval()
    torch.testing.assert_close(folded(x), model(x))


def test_folds_nothing_that_is_seen_or_used_elsewhere() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x))))

    class Both(Twice):
        def forward(self, x):
            h = self.conv(x)
            return self.norm(h) + h

    class Optional(Twice):
        def forward(self, x, shift=None):
            h = self.conv(x)
            return self.norm(h if shift is None else h + shift)

    hooked = [nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)) for _ in range(2)]
    for i, model in enumerate(hooked):
        model[i].register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(3, 4, 5)
    for model in (Twice(), Both(), Optional(), *hooked):
        model(x)
        folded = fold_batch_norm(model)
        torch.testing.assert_close(folded(x), model.eval()(x))
        assert any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())


def test_folds_grouped_layers_and_leaves_shared_and_parametrized_ones() -> None:
    torch.manual_seed(0)
    for layer in (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3, groups=2, bias=False)):
        model = nn.Sequential(layer, nn.BatchNorm1d(6)).double()
        model(torch.randn(3, 4, 9).double())
        model.eval()
        x = torch.randn(3, 4, 9).double()
        torch.testing.assert_close(fold_batch_norm(model)(x), model(x))
    conv = parametrizations.spectral_norm(nn.Conv1d(4, 4, 3))
    model = nn.Sequential(conv, nn.BatchNorm1d(4))
    assert isinstance(fold_batch_norm(model)[1], nn.BatchNorm1d)
