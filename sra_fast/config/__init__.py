"""The configuration: frozen dataclasses that check their values, and named presets.

recipe.py says what is computed, run.py everything else of a training run, commands.py the options of the other
commands, presets.py the presets. The command line changes fields of a preset, and `config.json` in the run directory
holds all of them. The option of the field `Config.align.t_max` is `--align.t-max`.
"""

from sra_fast.config.checks import from_dict, to_dict
from sra_fast.config.commands import (
    EvaluateCommand,
    ExportCommand,
    InspectCommand,
    PrepareCommand,
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
    "PrepareCommand",
    "ProfileCommand",
    "ProfileConfig",
    "RunConfig",
    "SampleCommand",
    "SampleConfig",
    "TrainConfig",
    "from_dict",
    "preset",
    "to_dict",
]
