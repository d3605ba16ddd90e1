"""Training a VAE: checkpoints, a log, pictures."""

import torch
from torch import Tensor

from aigc_fast._devices import default_device
from aigc_fast.training import VAERecipe, VAEStep, VAETrainer
from aigc_fast.training.vae import images_of

from .labels import labels_of
from .pictures import save_grid
from .train import VAEOptions
from .training_session import TrainingSession, load_data
from .vae_model import make_model, save_model

_GRID = 96  # samples of a picture, in rows of twelve
_HELD_OUT = 10  # every tenth image is kept aside


class Session(TrainingSession):
    """`model.safetensors` of the averaged weights is what `aigc-fast sample vae` reads."""

    losses = ("loss", "reconstruction", "kl")
    loss_label = "nats of an image"

    def __init__(self, options: VAEOptions) -> None:
        self.options = options
        recipe = VAERecipe(
            options.likelihood, options.beta, options.warm_up, options.free_bits, options.lr,
            bf16=options.bf16,
        )  # fmt: skip
        device = default_device()
        samples, labels = load_data(options.data, options.size)
        if samples.dim() != 4:
            raise ValueError(f"data must be images for a VAE, {options.data} are videos")
        classes = int(labels.max()) + 1 if options.conditional else None
        aside = held_out(len(samples))
        self.samples = samples[~aside].to(device)
        self.labels = labels[~aside].to(device) if options.conditional else None
        self.networks = {
            "size": options.size,
            "image_channels": samples.shape[1],
            "channels": options.channels,
            "latent_dim": options.latent_dim,
            "num_classes": classes,
            "likelihood": options.likelihood,
        }
        torch.manual_seed(options.seed)
        model = make_model(self.networks).to(device)
        self.trainer = VAETrainer(model, recipe, done=self.share_done, seed=options.seed)
        self.open()

    def losses_of(self, state: VAEStep) -> tuple[Tensor, ...]:
        return state.loss, state.reconstruction, state.kl

    @torch.no_grad()
    def keep_samples(self) -> None:
        output, model, device = self.options.output, self.trainer.average, self.samples.device
        save_model(output / "model.safetensors", model, self.networks)
        labels = labels_of(_GRID, None, self.networks["num_classes"], device)
        # The same latents in every picture: one sees them grow.
        random = torch.Generator(device).manual_seed(self.options.seed)
        drawn = model.sample(_GRID, labels, generator=random)
        images = images_of(drawn, self.networks["likelihood"]).cpu()
        save_grid(output / "samples.png", images, columns=12)


def held_out(count: int) -> Tensor:
    """Which of so many images no training sees: every tenth, from the first on."""
    return torch.arange(count) % _HELD_OUT == 0
