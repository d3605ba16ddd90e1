"""What a GAN minimises, and how: the options of well-known papers."""

from dataclasses import dataclass
from numbers import Integral

from aigc_fast.ops._checks import check_choice
from aigc_fast.ops.gan_loss import LOSSES

from .trainer import check_not_negative, check_share

PENALTIES = ("gradient", "r1", "r2", "r1+r2")


@dataclass(frozen=True)
class GANRecipe:
    """What is minimised, and how; see RECIPES for those of well-known papers.

    loss:             one of aigc_fast.ops.gan_loss.LOSSES.
    penalty:          "gradient" (of WGAN-GP), "r1", "r2" or "r1+r2" on the discriminator, or None.
    penalty_weight:   its factor.
    penalty_interval: steps from one penalty to the next; its weight is then that many times as
                      large (lazy regularisation, arXiv:1912.04958).
    path_length_weight: factor of the generator's path length penalty (arXiv:1912.04958, where it is
                      2); 0 for none. For generators with styles, such as StyleGAN2Generator.
    path_length_interval: updates of the generator from one such penalty to the next, as above.
    n_critic:         updates of the discriminator for each one of the generator.
    weight_clip:      limit on the magnitude of the discriminator's weights (the first WGAN); None
                      for no limit.
    g_lr, d_lr, betas: of the Adam optimizers of generator and discriminator.
    lr_falls_from:    share of the training, 0 to 1, after which both learning rates fall to zero
                      linearly (arXiv:1703.10593, 7.2); 1 for never.
    max_norm:         the norm that gradients are clipped to; None for no clipping.
    instance_noise:   standard deviation of the noise added to all that the discriminator sees
                      (arXiv:1610.04490), so that it judges shapes and not single pixels.
    ema_decay:        of the generator's averaged weights; less in the first steps.
    bf16:             run the networks under bfloat16 autocast; weights stay as they are.
    """

    loss: str = "non_saturating"
    penalty: str | None = None
    penalty_weight: float = 10.0
    penalty_interval: int = 1
    path_length_weight: float = 0.0
    path_length_interval: int = 4
    n_critic: int = 1
    weight_clip: float | None = None
    g_lr: float = 2e-4
    d_lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    lr_falls_from: float = 1.0
    max_norm: float | None = None
    instance_noise: float = 0.0
    ema_decay: float = 0.995
    bf16: bool = False

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        if self.penalty is not None:
            check_choice("penalty", self.penalty, PENALTIES)
        for name in ("penalty_interval", "path_length_interval", "n_critic"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value}")
        check_not_negative(self, "penalty_weight", "path_length_weight")
        check_not_negative(self, "g_lr", "d_lr", "instance_noise")
        check_share(self, "lr_falls_from")
        if self.weight_clip is not None and not self.weight_clip > 0:
            raise ValueError(f"weight_clip must be positive, got {self.weight_clip}")


#: The options of well-known papers. Learning rates are for small images and batches of 64.
RECIPES = {
    "non-saturating": GANRecipe(),
    "instance-noise": GANRecipe(instance_noise=0.5),
    "least-squares": GANRecipe("least_squares"),
    "hinge": GANRecipe("hinge", betas=(0.0, 0.9)),
    "wgan": GANRecipe("wasserstein", n_critic=5, weight_clip=0.01, g_lr=5e-5, d_lr=5e-5),
    "wgan-gp": GANRecipe(
        "wasserstein",
        "gradient",
        n_critic=2,
        g_lr=4e-4,
        d_lr=4e-4,
        betas=(0.0, 0.9),
        lr_falls_from=0.5,
    ),
    "r1": GANRecipe(penalty="r1", penalty_interval=4, betas=(0.0, 0.99)),
    "r3gan": GANRecipe("relativistic", "r1+r2", penalty_weight=1.0, betas=(0.0, 0.99)),
}
