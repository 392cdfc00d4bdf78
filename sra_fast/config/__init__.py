"""The whole configuration of a run: frozen dataclasses with their checks (recipe.py, running.py, together in
whole.py; preparing.py, profile.py) and named presets (presets.py).

The command line changes fields of a preset, and `config.json` in the run directory holds every one of them. Fields are
named on the command line as here, with hyphens: `Config.align.t_max` is `--align.t-max`.
"""

from sra_fast.config.checks import Refused, from_dict, refuse_unless, to_dict
from sra_fast.config.preparing import PrepareConfig
from sra_fast.config.presets import DIGITS_FOLDER, PRESETS, SIZES, preset
from sra_fast.config.profile import ProfileConfig
from sra_fast.config.recipe import AlignConfig, ModelConfig, ObjectiveConfig, OptimConfig
from sra_fast.config.running import DataConfig, EvaluateConfig, KernelsConfig, RunConfig, SampleConfig, TrainConfig
from sra_fast.config.whole import PUBLISHED_TAPS, SAMPLERS, Config

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
    "PrepareConfig",
    "ProfileConfig",
    "Refused",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "from_dict",
    "preset",
    "refuse_unless",
    "to_dict",
]
