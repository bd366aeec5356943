"""How SAEs learn: the optimizer, the resampling of dead latents, and the loop."""

from gsae_core.config import TrainConfig
from gsae_core.training.learner import SAEReport
from gsae_core.training.trainer import StepReport, Trainer, train

__all__ = ["SAEReport", "StepReport", "TrainConfig", "Trainer", "train"]
