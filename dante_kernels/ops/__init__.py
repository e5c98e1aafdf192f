"""The operators, also to be had as ``torch.ops.dante.*``; a trailing underscore means that weights are changed in place."""

from .forward import layer_forward
from .gradient import layer_gradient
from .layer import Layer
from .many import sngd_epochs_
from .sngd import sngd_epoch_, sngd_step_

__all__ = ["Layer", "layer_forward", "layer_gradient", "sngd_epoch_", "sngd_epochs_", "sngd_step_"]
