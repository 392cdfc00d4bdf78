"""The whole configuration of a run: frozen dataclasses with their checks (sections.py) and named presets (presets.py).

The command line changes fields of a preset, and `config.json` in the run directory holds every one of them. Fields are
named on the command line as here, with hyphens: `Config.align.t_max` is `--align.t-max`.
"""

from sra_fast.config.checks import Refused, from_dict, refuse_unless, to_dict
from sra_fast.config.presets import DIGITS_FOLDER, PRESETS, SIZES, preset
from sra_fast.config.sections import (
    PUBLISHED_TAPS,
    SAMPLERS,
    AlignConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    KernelsConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "DIGITS_FOLDER",
    "PRESETS",
    "PUBLISHED_TAPS",
    "SAMPLERS",
    "SIZES",
    "AlignConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "KernelsConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Refused",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "from_dict",
    "preset",
    "refuse_unless",
    "to_dict",
]
