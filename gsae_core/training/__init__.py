"""How SAEs learn: the optimiser, the revival of dead latents, and the loop."""

from gsae_core.config import TrainConfig
from gsae_core.training.report import SAEReport, StepReport
from gsae_core.training.trainer import Trainer, train

__all__ = ["SAEReport", "StepReport", "TrainConfig", "Trainer", "train"]
