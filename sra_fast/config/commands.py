"""Options of the commands other than train."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from sra_fast.config.checks import Section
from sra_fast.config.run import Config, DataConfig, EvaluateConfig, SampleConfig
from sra_fast.errors import Refused


@dataclass(frozen=True)
class PrepareCommand(Section):
    """Encode images into the packed set that training reads. After an interruption, the same command continues where it
    stopped. Several processes may share the work, on one machine or, under torchrun, on several."""

    section: ClassVar[str] = ""
    limits: ClassVar[dict[str, float]] = {
        "resolution": 65_536,
        "batch": 1 << 20,
        "rows_per_shard": 1 << 30,
        "max_pixels": 1 << 40,
    }

    out: str
    """Folder of the packed set."""
    images: str = ""
    """Folder of class folders, folder of webdataset .tar files, or a quoted glob of such files."""
    from_public: str = ""
    """Convert the public SiT-SRA layout instead of images: a folder with vae-sd/dataset.json, which holds its own
    resolution."""
    vae: str = ""
    """diffusers' AutoencoderKL or AutoencoderTiny: a folder, a Hugging Face hub id, or owner/name/subfolder. With
    --from-public, the VAE that encoded the set, for scale, shift and previews; empty = Stable Diffusion's scale."""
    no_vae: bool = False
    """Pack pixels (uint8) instead of latents."""
    resolution: int = 256
    """Side length in pixels after the ADM center crop."""
    flips: bool = False
    """Also encode every image mirrored; takes twice the time and space."""
    batch: int = 64
    """Images per call of the VAE on a GPU, and per call of the decoder."""
    rows_per_shard: int = 4096
    """Images per shard."""
    strict: bool = False
    """Stop at the first undecodable image instead of leaving it out and listing it in the manifest."""
    verify: bool = False
    """Also verify all checksums of a complete set and make damaged files again. Missing and truncated files are always
    made again."""
    exif: bool = False
    """Rotate images by their EXIF orientation (ADM does not)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of the VAE; auto = bf16 on GPUs that have it, fp32 elsewhere."""
    reader: Literal["auto", "dali", "pillow"] = "auto"
    """Image decoder; auto = DALI if installed, else Pillow."""
    max_pixels: int = DataConfig.max_pixels
    """Larger images are left out as undecodable; see data.max-pixels of training."""

    def check(self) -> None:
        self.need_positive("resolution", "batch", "rows_per_shard", "max_pixels")
        self.need(self.out != "", "out", "must be a folder")
        exactly_one = "must be given unless {} is, and only then"
        self.need(bool(self.images) != bool(self.from_public), "images", exactly_one.format("from-public"))
        if self.images:
            self.need(self.no_vae != bool(self.vae), "vae", exactly_one.format("no-vae"))
        else:
            self.need(not self.no_vae, "no_vae", "must not be given with from-public, which is encoded")
            self.need(not self.flips, "flips", "must not be given with from-public: mirrored latents need the images")


@dataclass(frozen=True)
class ProfileConfig(Section):
    """Which steps are traced, what is recorded, and where it is written."""

    section: ClassVar[str] = "profile"
    limits: ClassVar[dict[str, float]] = {"steps": 100_000, "warmup": 1_000_000, "top": 1_000_000}

    steps: int = 5
    """Steps that are averaged. Two more are traced, one before and one after them."""
    warmup: int = 3
    """Steps before tracing starts, for compilation, autotuning and growth of the allocator."""
    out: str = "profile"
    """Folder of profile.json and the traces; view them with `tensorboard --logdir FOLDER`."""
    top: int = 20
    """Number of kernels to list."""
    nvtx: bool = False
    """Write no files, but run the steps with NVTX ranges between cudaProfilerStart and cudaProfilerStop, for
    `nsys profile --capture-range=cudaProfilerApi --cuda-graph-trace=node sra-fast profile ... --profile.nvtx`."""
    shapes: bool = False
    """Record the shapes of every op's inputs."""
    stack: bool = False
    """Record the Python stack of every op. Large and slow."""
    memory: bool = False
    """Record every allocation, for the plugin's memory view."""

    def check(self) -> None:
        self.need_positive("steps", "warmup", "top")
        self.need(self.out != "", "out", "must be a folder")


@dataclass(frozen=True)
class InspectCommand(Section):
    """Describe a data set (counts, classes, statistics, sample images) and check all of it for damage."""

    section: ClassVar[str] = ""
    limits: ClassVar[dict[str, float]] = {"rows": 1 << 30, "images": 100_000}

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A packed set, the public code's moments, or a folder of class folders."""
    out: str = ""
    """PNG file for sample images; empty = inspect-<name>.png beside the set."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Also write the results to this file, as one JSON object. If the set is refused, the file is not changed."""
    checksums: bool = True
    """Read every file and compare its checksum; files without checksums are checked for completeness."""
    vae: str = ""
    """VAE for the sample images: a folder or a Hugging Face hub id; empty = the one named by the set."""
    rows: int = 1024
    """Rows used for the statistics, spread evenly; at most 128 images of a folder."""
    images: int = 36
    """Sample images on the PNG, spread evenly over the classes; 0 = no PNG."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the VAE; auto = the GPU if there is one."""

    def check(self) -> None:
        self.need(self.data != "", "data", "must be a folder")
        self.need_positive("rows")
        self.need_not_negative("images")


@dataclass(frozen=True)
class SampleCommand(Section):
    """Generate images and write them as a PNG grid, one PNG each, and the .npz that the ADM evaluation suite reads; or
    write the latents they would be decoded from."""

    section: ClassVar[str] = ""
    limits: ClassVar[dict[str, float]] = {"grid": 1_000_000}

    weights: str
    """A run, one of its checkpoints, a .safetensors or a public .pt file."""
    weights_key: Literal["ema", "model"] = "ema"
    """Use the EMA or the raw weights."""
    weights_family: Literal["auto", "sit", "sit-original", "dit"] = "auto"
    """What a public file holds, if it does not say: sit (SiT-SRA, REPA: t = 1 is noise), sit-original (the first SiT: t
    = 1 is data; it is converted), or dit."""
    out: str = "generated"
    """Output folder for grid.png, images/ and samples.npz, or latents.npz."""
    classes: tuple[str, ...] = ()
    """Classes to generate, one after the other, by number or by name; empty = all. A number is a number, even if a
    class has such a name. Names are those of the class folders, in whose sorted order classes are numbered."""
    overwrite: bool = False
    """Replace the samples in the output folder if they are of other weights or other options. Those of the same job are
    replaced anyway, and other files stay."""
    grid: int = 100
    """Number of images in the grid; 0 = no grid."""
    images: bool = True
    """Write one PNG per image."""
    npz: bool = True
    """Write samples.npz: arr_0, uint8 (N, H, W, 3). Grey images are repeated to three channels."""
    latents: bool = False
    """Write latents.npz instead of images: z, float32 (N, C, h, w), the input of the VAE's decoder, and labels, int64
    (N,). Weights of a run need no VAE for this, others need --vae. --grid, --images and --npz then have no effect."""
    path: Literal["", "linear", "cosine"] = ""
    """Interpolant that a sit was trained with; empty = the one stored with the weights, or linear if none is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU if there is one."""
    vae: str = ""
    """VAE that decodes the latents: a folder or a Hugging Face hub id; empty = the one named by the run's data. For
    weights outside a run, the VAE's own scale and shift are used."""
    tf32: bool = True
    """Use TF32 for matrix products on a GPU, as the published samplers do; otherwise full fp32."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Defaults are the run's own settings."""

    def check(self) -> None:
        self.need_not_negative("grid")
        self.need(self.weights != "", "weights", "must be a run, one of its checkpoints, or a file")
        self.need(self.out != "", "out", "must be a folder; . is the current one")


@dataclass(frozen=True)
class EvaluateCommand(Section):
    """Compare a run's samples with its real images; exits with 1 if a threshold is missed."""

    section: ClassVar[str] = ""

    weights: str
    """A run."""
    weights_key: Literal["ema", "model"] = "ema"
    """Use the EMA or the raw weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU if there is one."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Defaults are the run's own settings."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Defaults are the run's own settings."""


@dataclass(frozen=True)
class ExportCommand(Section):
    """Write the newest weights of a run to a file for other programs."""

    section: ClassVar[str] = ""

    weights: str
    """A run, or one of its checkpoints."""
    out: str
    """Output file: .safetensors (one set of weights) or .pt (both sets, in the public SiT-SRA and DiT-SRA layout)."""
    weights_key: Literal["ema", "model"] = "ema"
    """Set of weights for a .safetensors file."""
    weights_family: Literal["auto", "sit", "sit-original", "dit"] = "auto"
    """What a public file holds, if it does not say; see sample."""

    def check(self) -> None:
        path = Path(self.out)
        if path.suffix not in (".safetensors", ".pt"):
            raise Refused("out", self.out, "must end in .safetensors or .pt")
        if not path.parent.is_dir():
            raise Refused("out", self.out, f"the folder {path.parent} does not exist")


@dataclass(frozen=True)
class ProfileCommand:
    """Trace some training steps on random images, and report where their time goes."""

    config: Annotated[Config, tyro.conf.arg(name="")]  # options without prefix, as in train
    profile: ProfileConfig = field(default_factory=ProfileConfig)
