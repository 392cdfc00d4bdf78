"""The whole configuration of a run: frozen dataclasses with their checks (recipe.py, running.py, together in
whole.py; preparing.py, profile.py) and named presets (presets.py).

The command line changes fields of a preset, and `config.json` in the run directory holds every one of them. Fields are
named on the command line as here, with hyphens: `Config.align.t_max` is `--align.t-max`.
"""

from sra_fast.config.checks import from_dict, refuse_unless, to_dict
from sra_fast.config.commands import (
    EvaluateCommand,
    ExportCommand,
    InspectCommand,
    PrepareConfig,
    ProfileCommand,
    ProfileConfig,
    SampleCommand,
)
from sra_fast.config.presets import DIGITS_FOLDER, PRESETS, SIZES, preset
from sra_fast.config.recipe import AlignConfig, ModelConfig, ObjectiveConfig, OptimConfig
from sra_fast.config.run import (
    PUBLISHED_TAPS,
    SAMPLERS,
    Config,
    DataConfig,
    EvaluateConfig,
    KernelsConfig,
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
    "EvaluateCommand",
    "EvaluateConfig",
    "ExportCommand",
    "InspectCommand",
    "KernelsConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PrepareConfig",
    "ProfileCommand",
    "ProfileConfig",
    "RunConfig",
    "SampleCommand",
    "SampleConfig",
    "TrainConfig",
    "from_dict",
    "preset",
    "refuse_unless",
    "to_dict",
]
