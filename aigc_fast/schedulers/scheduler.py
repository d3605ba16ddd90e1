"""What all schedulers share: the loop."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast.schedulers.configuration import Configured
from aigc_fast.schedulers.linear import Row
from aigc_fast.schedulers.noise import Generator, draw_noise
from aigc_fast.schedulers.tables import once, plainly, version_of


@dataclass
class Scheduler(Configured):
    """The loop; a solver adds its schedule (`lay_out`), its rows and its step.

    Fields have the names, the meaning and the defaults of diffusers' constructor arguments.
    Coefficients are computed in fp32 in diffusers' order of operations: its published results
    depend on how they round. All rows of a schedule are made at once, in the first step of it, and
    found again by every scheduler that has the same. A step is one call of ops.scheduler_step,
    does no arithmetic on scalars and never waits for the device.

    `advance(scheduler, index, sample, output, generator, return_x0, guidance, **options)` is the
    solver: (sample at the next timestep, x0 or None). It reads and keeps its history in attributes
    that diffusers' class of the same name has too, so that the same function runs those.
    """

    num_train_timesteps: int = 1000

    #: the model is asked this often for one step
    order: ClassVar[int] = 1
    #: what diffusers calls the second output of a step, where its class has one
    second_output: ClassVar[str | None] = None
    #: set_timesteps takes lists beside their length
    counts_lists: ClassVar[bool] = False
    #: solvers without history: rows(scheduler, *key), and the key
    rows: ClassVar[Callable[..., Row] | None] = None
    advance: ClassVar[Callable[..., tuple[Tensor, Tensor | None]]]
    #: lay_out(steps, **custom) sets num_inference_steps, timesteps and sigmas, on the CPU
    lay_out: ClassVar[Callable[..., None]]

    def __post_init__(self) -> None:
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self._keep([])
        self.set_begin_index(0)

    def forget(self) -> None:
        """Empties the history."""

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the sample that the loop begins with."""
        return 1.0

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The sample as the model takes it at `timestep`."""
        return sample

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of training at each of the timesteps (batch,)."""
        raise NotImplementedError(f"{type(self).__name__} adds no noise for training")

    # ---- the loop -----------------------------------------------------------------------------

    @plainly()
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        **custom: Any,
    ) -> None:
        """Lays out the schedule.

        num_inference_steps: from 1 to num_train_timesteps; or None with a list of timesteps or
            sigmas in `custom`.
        device: of `timesteps`; None for the CPU.
        custom: what diffusers' class takes beside: timesteps, sigmas, mu,
            original_inference_steps, strength.

        Raises TypeError or ValueError for a number or list that will not do, and for an argument
        that the class does not have.
        """
        if num_inference_steps is not None:
            try:
                num_inference_steps = operator.index(num_inference_steps)
            except TypeError:
                kind = type(num_inference_steps).__name__
                raise TypeError(f"num_inference_steps must be an integer, got {kind}") from None
        if num_inference_steps is not None and not (
            0 < num_inference_steps <= self.num_train_timesteps
        ):
            raise ValueError(
                f"num_inference_steps must be in [1, {self.num_train_timesteps}], "
                f"got {num_inference_steps}"
            )
        given = [name for name, value in custom.items() if value is not None]
        lists = [name for name in ("timesteps", "sigmas") if name in given]
        for name in lists:
            if len(custom[name]) == 0:
                raise ValueError(f"{name} must not be empty")
        lengths = {len(custom[name]) for name in lists}
        if num_inference_steps is not None:
            lengths.add(num_inference_steps)
        if not lengths or (num_inference_steps is not None and lists and not self.counts_lists):
            raise ValueError(
                "set_timesteps takes either num_inference_steps or a list of timesteps or "
                f"sigmas, got num_inference_steps={num_inference_steps} and {given or 'none'}"
            )
        if len(lengths) > 1:
            raise ValueError(
                "sigmas, timesteps and num_inference_steps must be of one length, "
                f"got {sorted(lengths)}"
            )
        try:
            self.lay_out(num_inference_steps, **{name: custom[name] for name in given})
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise TypeError(f"{type(self).__name__}.set_timesteps: {error}") from None
        steps = self.timesteps.tolist()
        if not steps:  # of sigmas that are one more
            raise ValueError("sigmas must be at least two, got one")
        self.timesteps = self.timesteps.to(device)
        self._keep(steps)
        self.set_begin_index(0)

    def _keep(self, steps: list[float]) -> list[float]:
        """`steps` are the timesteps as numbers, for as long as those stay the same."""
        version = version_of(self.timesteps)
        # Of a tensor that does not count its changes they are read each time.
        self._steps = (self.timesteps if version is not None else None, version, steps)
        return steps

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The next step is that of timesteps[begin_index], with no history."""
        self._step_index = begin_index
        self.forget()

    @property
    def timestep_values(self) -> list[float]:
        """`timesteps` as numbers; their device is waited for only if they were changed by hand."""
        timesteps = self.timesteps
        of, version, steps = self._steps
        if timesteps is of and timesteps._version == version:
            return steps
        return self._keep(timesteps.tolist())

    @property
    def step_index(self) -> int:
        """The step that is next in order."""
        return self._step_index

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        return_x0: bool = False,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """The sample at the next timestep, or (that sample, the predicted x0).

        timestep: one of self.timesteps. One that lies on another device than the CPU is not read
            (that would wait for the device): the call takes the next step in order. A solver
            without history takes a tensor (batch,) too, with a timestep for each sample.
        generator: draws the noise of stochastic solvers, on its own device; or one each sample; or
            generator(like, dtype) is the noise, as `draw_noise` would draw it.
        return_dict: for code written for diffusers, what its class of the same name returns: with
            False a tuple, (sample,) or (sample, `second_output`); with True an object with these
            as attributes, prev_sample and so on.
        options: those of diffusers' step (eta, s_churn, order, ...).
        For the other arguments see ops.scheduler_step.
        """
        guidance: dict[str, Any] = {}
        if uncond_output is not None or guidance_scale != 1 or guidance_rescale != 0:
            guidance = {
                "uncond_output": uncond_output,
                "guidance_scale": guidance_scale,
                "guidance_rescale": guidance_rescale,
            }
        both = return_x0 or (return_dict is not None and self.second_output is not None)
        if isinstance(timestep, Tensor) and timestep.dim() == 1 and self.rows is not None:
            result = self._step_each(
                model_output, timestep, sample, generator, both, guidance, options
            )
        else:
            index = self._locate(timestep)
            if index != self._step_index:  # a new start: the history belongs to other steps
                self.set_begin_index(index)
            # Through the class: a field of the same name as an option stays a field.
            result = type(self).advance(
                self, index, sample, model_output, generator, both, guidance, **options
            )
            self._step_index = index + 1
        if return_dict is None:
            return result if return_x0 else result[0]
        outputs = result if both else result[:1]
        names = ("prev_sample", self.second_output or "pred_original_sample")
        return (
            SimpleNamespace(**dict(zip(names, outputs, strict=False))) if return_dict else outputs
        )

    def _check_laid_out(self) -> None:
        if not self.timestep_values:
            raise ValueError(f"{type(self).__name__} has no timesteps: call set_timesteps first")

    def _locate(self, timestep: float | Tensor) -> int:
        index, steps = self._step_index, self.timestep_values
        if isinstance(timestep, Tensor):
            if timestep.device.type != "cpu" and index < len(steps):
                return index
            timestep = timestep.item()
        if index < len(steps) and steps[index] == timestep:
            return index
        self._check_timesteps([timestep])
        return steps.index(timestep)

    def _check_timesteps(self, timesteps: list[float]) -> None:
        """ValueError unless all of them are in the schedule."""
        self._check_laid_out()
        steps = self.timestep_values
        if missing := set(timesteps).difference(steps):
            raise ValueError(
                f"timestep must be one of the {len(steps)} of set_timesteps, got {min(missing)}"
            )

    def _step_each(
        self,
        output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        generator: Generator,
        return_x0: bool,
        guidance: dict,
        options: dict,
    ) -> Any:
        self._check_laid_out()
        if timesteps.device.type == "cpu":
            self._check_timesteps(timesteps.tolist())
            timesteps = timesteps.long()
        table, index_of, noisy = self._table_for_each(sample.device, tuple(options.items()))
        result = ops.scheduler_step(
            sample,
            output,
            table[index_of[timesteps]],
            noise=draw_noise(output, generator) if noisy else None,
            return_x0=return_x0,
            **guidance,
        )
        return result if return_x0 else (result,)

    def _table_for_each(self, device: torch.device, options: tuple) -> Any:
        def build() -> tuple[Tensor, Tensor, bool]:
            row: Row = type(self).rows(self, **dict(options))  # type: ignore[misc]
            steps = self.timestep_values
            table = torch.from_numpy(row.table(len(steps)))
            # Behind the table for all others: on a GPU, where they are not read, the index fails.
            index_of = torch.full((self.num_train_timesteps,), len(steps))
            index_of[torch.tensor(steps)] = torch.arange(len(steps))
            noisy = bool((table[:, 6] != 0).any())
            return table.to(device), index_of.to(device), noisy

        return once(self, ("each", device, options), build)

    # ---- training -----------------------------------------------------------------------------

    def add_noise(
        self, sample: Tensor, noise: Tensor, timesteps: Tensor, *, return_velocity: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """sample at the noise level of each of the timesteps (batch,), and the v target of it.

        The noise levels are those of training, whatever set_timesteps was given.
        """
        alpha, sigma = self.levels(timesteps)
        return ops.add_noise(sample, noise, alpha, sigma, return_velocity=return_velocity)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v target: alpha * noise - sigma * sample."""
        return self.add_noise(sample, noise, timesteps, return_velocity=True)[1]


def is_as_returned(sample: Tensor, returned: Tensor | None) -> bool:
    """Whether `sample` is the very tensor that the last step returned, not changed in place since:
    what that was computed from need not be read again then. New tensors have version 0."""
    return sample is returned and not sample.is_inference() and sample._version == 0


def shift_in(history: list, newest: Any) -> None:
    """Keeps `newest` for the oldest."""
    del history[0]
    history.append(newest)
