"""Encode images to latents and decode them, with diffusers' AutoencoderKL (a posterior) or AutoencoderTiny (a point).

diffusers is imported only here, and only when a VAE is opened. Weights are read from safetensors, never from a pickle,
which can run code.
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

from sra_fast.errors import Damaged, Refused, is_out_of_memory
from sra_fast.files import read_json

KINDS = ("AutoencoderKL", "AutoencoderTiny")
MOST_BLOCKS, MOST_LAYERS, WIDEST = 64, 256, 65_536  # of a configuration
Factor = float | tuple[float, ...]  # one for all channels, or one for each
# What diffusers, huggingface_hub and safetensors raise for files that are missing, damaged or of another kind.
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    SafetensorError,
)


def per_channel(factor: Factor, channels: int) -> np.ndarray:
    """(channels,) float64."""
    return np.broadcast_to(np.asarray(factor, dtype=np.float64), channels)


def check_factors(scale: Factor, shift: Factor, channels: int) -> None:
    """Raise ValueError unless latents of C channels can be scaled and shifted by these."""
    for name, factor in (("scale", scale), ("shift", shift)):
        values = np.asarray(factor, dtype=np.float64)
        if values.ndim and values.shape != (channels,):
            raise ValueError(f"{len(values)} factors of {name} for {channels} channels")
        if not np.isfinite(values).all() or (name == "scale" and not values.all()):
            raise ValueError(f"{name} is {factor}")


class Vae:
    """A frozen autoencoder. The network is trained on x = (z - shift) * scale.

    Attributes:
        name: the folder or hub id it was opened with.
        kind: one of `KINDS`.
        channels: C, of z.
        posterior: whether `encode` returns a mean and a standard deviation; otherwise it returns z itself.
        scale, shift: a number, or one for each channel.
        downsampling: pixels per latent along each axis.
        fingerprint: SHA-256, in hex, of its configuration and its weights in the dtype it runs in.
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """config: the content of config.json; model.config also has the defaults."""
        kind, settings = config["_class_name"], model.config
        self.name, self.kind, self.posterior = name, kind, kind == "AutoencoderKL"
        self.channels = int(settings.latent_channels)
        self.scale, self.shift = _factors(settings)
        check_factors(self.scale, self.shift, self.channels)
        blocks = settings.block_out_channels if self.posterior else settings.encoder_block_out_channels
        self.downsampling = 2 ** (len(blocks) - 1)  # every block except one halves the sides
        self.device, self.dtype = device, dtype
        self.fingerprint = _fingerprint(config, model)
        # Tensor cores need channels last; on a CPU it only changes the last bits.
        self._layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._model = model.requires_grad_(False).eval().to(device, memory_format=self._layout)
        self._try()

    def _try(self) -> None:
        """Encode and decode a small image, because a configuration may load whose layers do not fit together."""
        images = torch.zeros(1, 3, 4 * self.downsampling, 4 * self.downsampling)
        encoded = self.encode(images)
        if encoded.shape != (1, self.channels * (2 if self.posterior else 1), 4, 4):
            raise ValueError(f"an image of {tuple(images.shape)} is encoded to {tuple(encoded.shape)}")
        decoded = self.decode(encoded[:, : self.channels])
        if decoded.shape != images.shape:
            raise ValueError(f"latents of an image of {tuple(images.shape)} are decoded to {tuple(decoded.shape)}")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images to the latent space, before scaling.

        Args:
            images: (B, 3, H, W) in [-1, 1], sides divisible by `downsampling`.

        Returns:
            float32 on the device, with h = H / downsampling and w likewise: (B, 2C, h, w) with a posterior, means and
            then standard deviations (not logarithms of variances); otherwise (B, C, h, w).
        """
        encoded = self._model.encode(self._to_model(images))
        if not self.posterior:
            return encoded.latents.float()
        mean, logvar = encoded.latent_dist.parameters.float().chunk(2, dim=1)
        # As diffusers computes it, but in float32 whatever the dtype of the network.
        return torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))], dim=1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) before scaling to images (B, 3, H, W) float32 in about [-1, 1], not clamped."""
        return self._model.decode(self._to_model(z)).sample.float()

    def _to_model(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype, memory_format=self._layout)


def absolute_name(name: str) -> str:
    """A VAE's name that is valid from any working folder: an absolute path, or the hub id as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def open_vae(name: str, device: torch.device, dtype: torch.dtype) -> Vae:
    """Open a VAE on a device.

    Args:
        name: a folder with config.json and safetensors weights, the folder of a pipeline that has such a folder as
            vae/, an id on the Hugging Face hub, or an id and a subfolder: owner/name/vae.
        dtype: of weights and activations.

    Raises:
        Refused: if it cannot be found or loaded, or is another kind of model: which file or id, and how to get it.
    """
    diffusers = _import_diffusers()
    place, subfolder, config_file = _locate(name)
    config = _read_config(diffusers, name, place, subfolder, config_file)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise Refused("vae", name, f"{config_file} is of class {kind!r}; must be one of {', '.join(KINDS)}")
    if too_large := _first_beyond(config):
        raise Refused("vae", name, f"{config_file}: {too_large} is too large")
    if config.get("in_channels", 3) != 3:
        raise Refused("vae", name, "must take 3 channels, RGB")
    options = {"subfolder": subfolder} if subfolder else {}
    try:
        with _quiet(diffusers):
            # low_cpu_mem_usage would need another package, and diffusers warns about it in every run.
            model, info = getattr(diffusers, kind).from_pretrained(
                place,
                torch_dtype=dtype,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                **options,
            )
    except LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise Refused("vae", name, f"its weights cannot be loaded ({_one_line(error)}){_hint(place)}") from error
    # diffusers initialises tensors that a file lacks with random numbers.
    missing = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
    if missing:
        raise Refused("vae", name, f"its weights lack {len(missing)} tensors, the first {missing[0]}")
    try:
        return Vae(name, config, model, device, dtype)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise Refused("vae", name, f"{config_file} cannot be used ({_one_line(error)})") from error


def _first_beyond(config: dict[str, Any]) -> str:
    """The first setting that is beyond any autoencoder: diffusers builds its layers before it looks at the weights. ''
    if there is none."""
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        largest = MOST_LAYERS if "layers" in name or "num_" in name else WIDEST
        if len(numbers) > MOST_BLOCKS or any(isinstance(one, int) and one > largest for one in numbers):
            return name
    return ""


def _import_diffusers() -> Any:
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # it warns about missing packages when it is imported
    try:
        import diffusers
    except ImportError as error:
        raise Refused(f"vae: needs diffusers, which cannot be imported ({error}): pip install diffusers") from error
    return diffusers


def _locate(name: str) -> tuple[str, str, str]:
    """(folder or hub id, subfolder of the id, name of the configuration file for messages)."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise Refused("vae", name, "there is no such user") from error
    if name and path.is_dir():
        if not (path / "config.json").exists() and (path / "vae" / "config.json").exists():
            path = path / "vae"
        config = path / "config.json"
        if not config.is_file():
            raise Refused("vae", name, f"{config} is missing: must be a folder that diffusers saved a VAE to")
        return str(path), "", str(config)
    owner, _, rest = name.partition("/")
    repository, _, subfolder = rest.partition("/")
    place = f"{owner}/{repository}"
    is_id = bool(owner and repository) and not name.startswith((".", "~")) and not name.endswith("/")
    if not is_id or Path(place).exists():
        rule = "there is no such folder; must be one that diffusers saved a VAE to, or an id on the Hugging Face hub"
        raise Refused("vae", name, f"{rule}, such as stabilityai/sd-vae-ft-mse")
    return place, subfolder, f"config.json of {name}"


def _read_config(diffusers: Any, name: str, place: str, subfolder: str, config_file: str) -> Any:
    if Path(place).is_dir():
        try:
            return read_json(Path(config_file))
        except Damaged as error:
            raise Refused("vae", name, f"{config_file} cannot be read ({error.reason})") from error
    try:
        with _quiet(diffusers):
            return diffusers.AutoencoderKL.load_config(place, **({"subfolder": subfolder} if subfolder else {}))
    except LOAD_ERRORS as error:
        rule = "there is no such folder, and the Hugging Face hub has no such id, requires a login or is unreachable"
        raise Refused("vae", name, f"{rule}{_hint(place, subfolder)}") from error


def _hint(place: str, subfolder: str = "") -> str:
    """How to get a VAE from the hub; empty for a folder."""
    if Path(place).is_dir():
        return ""
    option, folder = (f" --include '{subfolder}/*'", f"/{subfolder}") if subfolder else ("", "")
    return f"; on a machine with a network: `hf download {place}{option} --local-dir DIR`, then give DIR{folder}"


class _quiet(warnings.catch_warnings):
    """Silences diffusers and huggingface_hub; we report failures in one line."""

    def __init__(self, diffusers: Any) -> None:
        super().__init__()  # pyright: ignore[reportCallIssue]
        self._loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub")]

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.CRITICAL)

    def __exit__(self, *exception: Any) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
        super().__exit__(*exception)


def _factors(config: Any) -> tuple[Factor, Factor]:
    """(scale, shift) as diffusers' pipelines apply them: latents_mean and latents_std, if there are any, replace
    shift_factor and are combined with scaling_factor."""
    scale = config.get("scaling_factor")
    scale = 1.0 if scale is None else float(scale)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return tuple(scale / float(s) for s in std), tuple(map(float, mean))
    return scale, float(config.get("shift_factor") or 0.0)


def _fingerprint(config: dict[str, Any], model: torch.nn.Module) -> str:
    # Other private keys, such as diffusers' version, do not change any number.
    relevant = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
