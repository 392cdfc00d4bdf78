"""Images to latents and back, by diffusers' AutoencoderKL (a posterior) or AutoencoderTiny (a point).

diffusers is imported here only, and only when a VAE is opened. Weights are read from safetensors: a pickle can run
code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from sra_fast.config import refuse_unless
from sra_fast.errors import Refused

KINDS = ("AutoencoderKL", "AutoencoderTiny")
Factor = float | tuple[float, ...]  # one for all channels, or one for each
# All that diffusers, huggingface_hub and safetensors raise for files that are missing, damaged or of another kind.
TROUBLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def per_channel(factor: Factor, channels: int) -> np.ndarray:
    """(channels,) float64."""
    return np.broadcast_to(np.float64(factor), channels)


class Vae:
    """An autoencoder, frozen. x of training = (z - shift) * scale.

    Attributes:
        name: the folder or hub id it was opened by.
        kind: one of `KINDS`.
        channels: C, of z.
        posterior: whether `encode` gives a mean and a standard deviation; otherwise it gives z itself.
        scale, shift: a number, or one for each channel.
        downsampling: pixels to a latent, along each axis.
        fingerprint: SHA-256, in hex, of its configuration and its weights at the dtype it runs in.
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        model: torch.nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`config` is what the file config.json holds; `model` has it filled up with defaults."""
        kind, full = config["_class_name"], model.config
        self.name, self.kind, self.posterior = name, kind, kind == "AutoencoderKL"
        self.channels = int(full.latent_channels)
        self.scale, self.shift = _factors(full)
        blocks = full.block_out_channels if self.posterior else full.encoder_block_out_channels
        self.downsampling = 2 ** (len(blocks) - 1)  # each block but one halves the sides
        self.device, self.dtype = device, dtype
        self.fingerprint = _fingerprint(config, model)
        # Tensor cores want channels last; on a CPU it changes little but the last bits.
        self._layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._model = model.requires_grad_(False).eval().to(device, memory_format=self._layout)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """What images are in the latent space, before scaling.

        Args:
            images: (B, 3, H, W) in [-1, 1], sides divisible by `downsampling`.

        Returns:
            float32, on the device, of h = H / downsampling, w alike: with a posterior (B, 2C, h, w), means and then
            standard deviations (not logarithms of variances); without (B, C, h, w).
        """
        encoded = self._model.encode(self._ready(images))
        if not self.posterior:
            return encoded.latents.float()
        mean, logvar = encoded.latent_dist.parameters.float().chunk(2, dim=1)
        # As diffusers does it, but not at the dtype that the network runs in.
        return torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))], dim=1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 around [-1, 1], not clamped, of latents (B, C, h, w) before scaling."""
        return self._model.decode(self._ready(z)).sample.float()

    def _ready(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype, memory_format=self._layout)


def from_anywhere(name: str) -> str:
    """The name by which a VAE is found from any working folder: a folder's whole path, or the hub id as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def open_vae(name: str, device: torch.device, dtype: torch.dtype) -> Vae:
    """A VAE, ready to run on a device.

    Args:
        name: a folder with config.json and safetensors weights, a folder of a whole pipeline with such a folder vae/ in
            it, an id on the Hugging Face hub, or an id and the subfolder: owner/name/vae.
        dtype: of weights and activations.

    Raises:
        Refused: if it cannot be had or is no VAE of these kinds: which file or id, and how to get it.
    """
    diffusers = _diffusers()
    place, subfolder, shown = _locate(name)
    config = _read_config(diffusers, name, place, subfolder, shown)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    refuse_unless(kind in KINDS, "vae", name, f"{shown} is of class {kind!r}; must be one of {', '.join(KINDS)}")
    refuse_unless(config.get("in_channels", 3) == 3, "vae", name, "must take 3 channels, RGB")
    options = {"subfolder": subfolder} if subfolder else {}
    try:
        with _quiet(diffusers):
            # Without low_cpu_mem_usage: it needs another package, and says so in every run.
            model, info = getattr(diffusers, kind).from_pretrained(
                place,
                torch_dtype=dtype,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                **options,
            )
    except TROUBLE as error:
        raise Refused(
            f"vae: {name!r} given; its weights cannot be loaded ({_one_line(error)}){_cure(place)}"
        ) from error
    # diffusers fills what a file lacks with random numbers, and goes on.
    lacking = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
    if lacking:
        raise Refused(f"vae: {name!r} given; its weights lack {len(lacking)} tensors, the first {lacking[0]}")
    return Vae(name, config, model, device, dtype)


def _diffusers() -> Any:
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # it speaks of missing packages while it is imported
    try:
        import diffusers
    except ImportError as error:
        raise Refused(f"vae: needs diffusers, which cannot be imported ({error}): pip install diffusers") from error
    return diffusers


def _locate(name: str) -> tuple[str, str, str]:
    """(folder or hub id, subfolder of the id, the configuration's place for messages)."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").exists() and (path / "vae" / "config.json").exists():
            path = path / "vae"
        here = path / "config.json"
        refuse_unless(here.is_file(), "vae", name, f"{here} is missing: must be a folder that diffusers saved a VAE to")
        return str(path), "", str(here)
    owner, _, rest = name.partition("/")
    repository, _, subfolder = rest.partition("/")
    place = f"{owner}/{repository}"
    is_id = bool(owner and repository) and not name.startswith((".", "~")) and not name.endswith("/")
    refuse_unless(
        is_id and not Path(place).exists(),
        "vae",
        name,
        "there is no such folder; must be one that diffusers saved a VAE to, or an id on the Hugging Face hub, such as "
        "stabilityai/sd-vae-ft-mse",
    )
    return place, subfolder, f"config.json of {name}"


def _read_config(diffusers: Any, name: str, place: str, subfolder: str, shown: str) -> Any:
    if Path(place).is_dir():
        try:
            return json.loads(Path(shown).read_text())
        except (OSError, ValueError) as error:
            raise Refused(f"vae: {name!r} given; {shown} cannot be read ({_one_line(error)})") from error
    try:
        with _quiet(diffusers):
            return diffusers.AutoencoderKL.load_config(place, **({"subfolder": subfolder} if subfolder else {}))
    except TROUBLE as error:
        raise Refused(
            f"vae: {name!r} given; there is no such folder, and the Hugging Face hub has no such id, wants a "
            f"login or cannot be reached{_cure(place, subfolder)}"
        ) from error


def _cure(place: str, subfolder: str = "") -> str:
    if Path(place).is_dir():
        return ""
    part, below = (f" --include '{subfolder}/*'", f"/{subfolder}") if subfolder else ("", "")
    return f"; where there is a network: `hf download {place}{part} --local-dir DIR`, then give DIR{below}"


class _quiet(warnings.catch_warnings):
    """diffusers and the hub's client hold their tongues: what went wrong is said by us, in one line."""

    def __init__(self, diffusers: Any) -> None:
        super().__init__()
        self._loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub")]

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.CRITICAL)

    def __exit__(self, *exception: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
        super().__exit__(*exception)


def _factors(config: Any) -> tuple[Factor, Factor]:
    """(scale, shift) as diffusers' pipelines apply them: where a VAE has latents_mean and latents_std, in place of
    shift_factor and beside scaling_factor."""
    scale = config.get("scaling_factor")
    scale = 1.0 if scale is None else float(scale)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return tuple(scale / float(s) for s in std), tuple(map(float, mean))
    return scale, float(config.get("shift_factor") or 0.0)


def _fingerprint(config: dict[str, Any], model: torch.nn.Module) -> str:
    # Its other notes, such as diffusers' version, change no number.
    told = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
