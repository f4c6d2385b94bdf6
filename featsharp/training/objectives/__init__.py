"""Objectives of training.

Adding one is a module with a ``@register_objective`` class, a line of import here and
``featsharp/configs/objective/<name>.yaml``.
"""

from typing import Any

from featsharp.device import usual_defaults
from featsharp.model import SharpEncoder
from featsharp.training.objectives import (  # noqa: F401  (registers them)
    jafar,
    loftup,
    multi_view,
    reconstruction,
    regression,
)
from featsharp.training.objectives.base import OBJECTIVES, Losses, Objective, ObjectiveConfig, register_objective

__all__ = [
    "OBJECTIVES",
    "Losses",
    "Objective",
    "ObjectiveConfig",
    "config_type",
    "create_objective",
    "register_objective",
]


@usual_defaults()
def create_objective(encoder: SharpEncoder, config: ObjectiveConfig) -> Objective:
    """Build the objective that ``config`` describes, on the encoder's device.

    Raises:
        ConfigError: For an unknown name, a setting out of range, or an encoder that it cannot train.
    """
    objective = OBJECTIVES[config.name].factory(encoder.embed_dim, encoder.factor, config)
    objective.check(encoder)
    objective.begin(encoder)
    return objective.to(encoder.device)


def config_type(name: str) -> type[ObjectiveConfig]:
    """Return the class of the settings of an objective; raises ConfigError for a name that does not exist."""
    objective: Any = OBJECTIVES[name].factory
    kind: type[ObjectiveConfig] = objective.config_type
    return kind
