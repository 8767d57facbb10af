"""Steps of stage 2 and its times, against numbers that the authors' code gave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rae.models.config import DecoderConfig, DiTConfig, DiTDHConfig, from_dict
from rae.models.dit import DiT
from rae.models.dit_dh import DiTDH
from rae.models.rae import RAE
from rae.training.batch import Batch
from rae.training.distributed import World
from rae.training.learner import Learner
from rae.training.stage2.dit_dh import DiTTask, FlowMatching, StepDraws
from rae.training.stage2.presets import DIT_PRESETS, DiTRecipe

GOLDEN = Path(__file__).parents[1] / "golden"
NUM_STEPS = 3
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class GivenDraws(FlowMatching):
    """Those of the recording. A sample's position is its place in it."""

    t: Tensor
    dropped: Tensor
    noise: Tensor

    def draw(
        self, positions: Tensor, latent_shape: Sequence[int], device: torch.device
    ) -> StepDraws:
        return StepDraws(self.t[positions], self.dropped[positions], self.noise[positions])


class Recorded:
    """A recorded run, and ours set up to repeat it."""

    def __init__(self, name: str) -> None:
        path = GOLDEN / f"{name}.safetensors"
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            facts = file.metadata()
        values = json.loads(facts["config"])
        config = from_dict(DiTDHConfig if "head_depth" in values else DiTConfig, values)
        self.recipe = DiTRecipe(model=config, **json.loads(facts["recipe"]))
        model = DiTDH(config) if isinstance(config, DiTDHConfig) else DiT(config)
        model.load_state_dict(self.those("weights"))
        self.learner = Learner[nn.Module](
            model,
            World(0, 1, CPU),
            self.recipe.adamw,
            self.recipe.lr_schedule(self.recipe.batch_size),
            ema_decay=self.recipe.ema_decay,
        )
        self.objective = GivenDraws(
            shift=self.recipe.time_shift,
            null_label=config.null_label,
            class_dropout_prob=config.class_dropout_prob,
            seed=0,
            **{key: self.tensors[key].flatten(0, 1) for key in ("t", "dropped", "noise")},
        )
        self.task = DiTTask(self.learner, self.objective, identity_rae(config))

    def those(self, kind: str) -> dict[str, Tensor]:
        prefix = f"{kind}."
        return {n.removeprefix(prefix): v for n, v in self.tensors.items() if n.startswith(prefix)}

    def batches(self, step: int, micro_batch: int) -> list[Batch]:
        positions = torch.arange(self.recipe.batch_size) + step * self.recipe.batch_size
        return [
            Batch(
                positions=some,
                class_labels=self.tensors["class_labels"].flatten()[some],
                latents=self.tensors["latents"].flatten(0, 1)[some],
            )
            for some in positions.split(micro_batch)
        ]


def identity_rae(config: DiTDHConfig | DiTConfig) -> RAE:
    decoder = DecoderConfig(
        latent_channels=config.latent_channels,
        hidden_size=4,
        depth=1,
        num_heads=1,
        intermediate_size=4,
        grid=config.latent_size,
    )
    rae = RAE(decoder, image_mean=(0, 0, 0), image_std=(1, 1, 1), has_mean=False)
    rae.eps.zero_()
    return rae


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative, of the tensor that is worst."""
    assert ours.keys() == theirs.keys()
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in ours)


@pytest.fixture(params=["train_ditdh", "train_dit"])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(request.param)


def test_a_step_has_the_recorded_loss_and_gradients(recorded: Recorded) -> None:
    (batch,) = recorded.batches(0, recorded.recipe.batch_size)
    assert batch.latents is not None
    draws = recorded.objective.draw(batch.positions, batch.latents.shape[1:], CPU)
    assert 0 < draws.dropped.sum() < len(batch)
    model = recorded.learner.module
    loss = recorded.objective.loss(model, batch.latents, batch.class_labels, draws)
    loss.backward()
    assert loss.item() == pytest.approx(recorded.tensors["losses"][0].item(), rel=1e-5)
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert error(ours, recorded.those("gradients")) < 1e-5


@pytest.mark.parametrize("micro_batch", [6, 2])
def test_three_steps_end_in_the_recorded_weights_and_averages(
    recorded: Recorded, micro_batch: int
) -> None:
    """Under clipping and a rate that falls. Theirs have no accumulation that adds gradients up: it
    is held against their whole batch."""
    for step in range(NUM_STEPS):
        metrics = recorded.task.train_step(recorded.batches(step, micro_batch), step)
        expected = recorded.tensors["losses"][step].item()
        assert metrics["loss"].item() == pytest.approx(expected, rel=1e-5)
        assert metrics["grad_norm"] > 1
    before, after = recorded.those("weights"), recorded.those("after")
    ours, averages = dict(recorded.learner.module.named_parameters()), recorded.learner.ema
    assert averages is not None
    assert error({n: p.detach() for n, p in ours.items()}, after) < 1e-5
    assert error(averages.averages, recorded.those("ema")) < 1e-5
    # What Adam moves little is compared, too: the way, not only its end.
    way = {n: p.detach() - before[n] for n, p in ours.items()}
    assert error(way, {n: after[n] - before[n] for n in after}) < 1e-3


def test_times_of_positions_have_the_recorded_quantiles() -> None:
    """The recorded draw's own error is 2e-3; a uniform τ or no shift is off by 3e-2."""
    recorded = load_file(GOLDEN / "train_time_logit_normal.safetensors")
    recipe = DIT_PRESETS["DiTDH-XL-256"]
    assert recipe.time_shift == pytest.approx(float(recorded["shift"]))
    objective = FlowMatching(
        shift=recipe.time_shift, null_label=1000, class_dropout_prob=0.1, seed=0
    )
    draws = objective.draw(torch.arange(50_000), (1,), CPU)
    quantiles = torch.quantile(draws.t, recorded["q"])
    torch.testing.assert_close(quantiles, recorded["t_shifted"], rtol=0.01, atol=1e-3)
    assert draws.t.mean().item() == pytest.approx(float(recorded["mean_shifted"]), abs=3e-3)
    assert draws.dropped.float().mean().item() == pytest.approx(0.1, abs=5e-3)
