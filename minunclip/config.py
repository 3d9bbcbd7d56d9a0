"""Every size and setting of unCLIP, as frozen dataclasses, and six presets side by side.

Paper: Tab. 3 and App. C. A preset is literal: what you read here is what is built.
`tiny` is for tests (seconds), `course` for a first look at every curve (a minute a stage), `cpu` trains the whole chain on two cores in two hours,
`long` is `cpu` trained further on a GPU, `gpu` fits one 24 GB card, `paper` has the paper's sizes and is only ever built on the meta device.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

Objective = Literal["epsilon", "x0", "v"]
Activation = Literal["gelu", "quick_gelu"]
Stem = Literal["patches", "convolutions"]


@dataclass(frozen=True)
class TransformerConfig:
    width: int
    layers: int
    heads: int
    activation: Activation = "gelu"  # quick_gelu: x sigmoid(1.702 x), for OpenAI's CLIP, whose weights know it


@dataclass(frozen=True)
class CLIPConfig:
    """The two towers of CLIP (App. C): a vision transformer and a causal text transformer."""

    image_size: int
    patch_size: int
    vision: TransformerConfig | None  # None: the text tower alone, as in Karlo's folder
    text: TransformerConfig
    context_length: int  # text tokens, the end token included
    vocabulary_size: int
    embedding_dim: int
    # how pixels become image tokens. The paper: a linear map of each patch; few strided convolutions learn shapes from far fewer pictures
    stem: Stem = "patches"
    unit_norm: bool = True  # of the embeddings; Karlo's prior and decoder were trained on the projections as they are


@dataclass(frozen=True)
class DiffusionConfig:
    """One diffusion process. The paper: 1,000 steps everywhere; cosine schedule but for the second upsampler (linear)."""

    schedule: Literal["cosine", "linear"]
    objective: Objective  # what the network predicts; the paper: epsilon for images, x0 for the prior
    learned_variance: bool  # extra channels that interpolate the log-variance; the paper: True for the decoder, of its upsamplers it does not say
    sampler: Literal["ancestral", "ddim", "dpm"]
    sampling_steps: int
    steps: int = 1000


@dataclass(frozen=True)
class DiffusionPriorConfig:
    """Section 2.2, the diffusion prior: a causal transformer over text, z_t, timestep, noised z_i, and a final token."""

    embedding_dim: int
    text_width: int  # width of the encoded text: that of CLIP's text transformer
    context_length: int
    transformer: TransformerConfig
    diffusion: DiffusionConfig
    text_drop: float = 0.1  # the paper: 10 %
    # what is diffused. "scaled": sqrt(d) z_i of unit norm; "standardised": (z_i - mean) / std in every dimension, as Karlo does
    latent: Literal["scaled", "standardised"] = "scaled"
    null_tokens: int = 1  # tokens in the place of a dropped caption; Karlo: 2, those of an empty caption
    candidates: int = 2  # embeddings drawn a caption, of which the one nearest to z_t is kept; the paper: 2, Karlo: 1


@dataclass(frozen=True)
class AutoregressivePriorConfig:
    """Section 2.2, the autoregressive prior: z_i as a sequence of quantised principal components."""

    embedding_dim: int
    text_width: int
    context_length: int
    components: int  # principal components at most; those kept are fewer (under 1 % error). The paper: 319 of 1,024
    buckets: int  # the paper: 1,024
    transformer: TransformerConfig
    text_drop: float = 0.1  # the paper: 10 %


@dataclass(frozen=True)
class UNetConfig:
    """The ADM U-Net. Resolutions are those of the grid on which it works: the image's, divided by `patch_size`."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int  # residual blocks a level; the paper's "depth"
    attention_at: tuple[int, ...]  # grid sizes that have attention (the middle too, if any has); the paper: 32, 16, 8 (decoder), none (upsamplers)
    head_channels: int
    patch_size: int = 1  # pixels a side folded into channels; the paper: 1. On a CPU a wide net on a coarse grid learns faster
    fine: int = 0  # channels of the convolutions on single pixels behind the net, which fit the patches together; 0: none, as in the paper
    dropout: float = 0.0
    # how a block is told the timestep. "scale_shift": of its second norm (ADM, the paper); "add": before that norm, as in Karlo's upsamplers
    timestep: Literal["scale_shift", "add"] = "scale_shift"


@dataclass(frozen=True)
class DecoderConfig:
    """Section 2.1, the decoder: an ADM U-Net that is shown the CLIP image embedding twice, and the caption."""

    image_size: int
    embedding_dim: int
    vocabulary_size: int
    context_length: int
    text: TransformerConfig  # the decoder's own text transformer (GLIDE's)
    unet: UNetConfig
    diffusion: DiffusionConfig
    context_tokens: int = 4  # extra tokens that the embedding is projected into
    embedding_drop: float = 0.1  # section 2.1 says 10 %; section 5.1 says 5 %: the paper disagrees with itself
    caption_drop: float = 0.5
    # where the text transformer starts. The paper: from scratch. "clip": from CLIP's own weights (causal then, as CLIP is); a short training
    # learns hardly any words beside an embedding that already says nearly all of them
    text_start: Literal["scratch", "clip"] = "scratch"
    # the paper: no. Which of two things is the red one lies in directions of z_i that vary little; whitened, all directions count alike
    whiten: bool = False
    context_width: int | None = None  # of the tokens that attention sees. None: the text's own; else it is projected and normed, as in Karlo
    null_tokens: int = 0  # tokens that attention sees in the place of a dropped caption; Karlo: 2, those of an empty caption


@dataclass(frozen=True)
class UpsamplerConfig:
    """Section 2.1, the upsamplers: no attention, no caption, trained on crops."""

    low_size: int
    high_size: int
    degradation: Literal["blur", "bsr", "none"]  # the paper: blur, then bsr; Karlo: none
    unet: UNetConfig
    diffusion: DiffusionConfig
    # the picture's side over that of the crops. The paper's crops are "one-fourth the target size"; of a picture as small as ours that is too
    # little to show a whole thing, and then half the side, a fourth of the area, teaches more
    crop: int = 4
    # most noise (a deviation, drawn anew for each picture) on the low resolution in training. The paper: none beyond BSR's own; a small decoder errs
    # more than the paper's, and what an upsampler has learned to trust it draws, large and sharp
    noise: float = 0.0
    clamp: bool = True  # the enlarged low resolution to [-1, 1]; Karlo lets it overshoot, as bicubic does
    last_step: bool = False  # a second network for the last step of sampling, which Karlo tuned for sharpness


@dataclass(frozen=True)
class DiscreteVAEConfig:
    """The discrete VAE of DALL-E: pictures as a grid of codes."""

    image_size: int
    codes: int  # DALL-E: 8,192
    grid: int  # codes a side; DALL-E: 32
    width: int


@dataclass(frozen=True)
class DALLEConfig:
    """The baseline of Tab. 2 that came first: a causal transformer over the caption's tokens and the picture's codes."""

    vae: DiscreteVAEConfig
    vocabulary_size: int
    context_length: int
    transformer: TransformerConfig


@dataclass(frozen=True)
class CheckerConfig:
    """The reader of pictures that checks captions: no part of unCLIP, but its examiner."""

    width: int


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training run, with warm-up and cosine decay, as everywhere in this package."""

    steps: int
    batch_size: int  # examples that the optimiser sees a step (accumulation included)
    learning_rate: float
    warmup: int = 100
    final_learning_rate: float = 0.02  # as a share of the peak, at the end of the cosine
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices and kernels; all else, and the paper, AdamW
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    ema_decay: float = 0.995
    accumulation: int = 1  # forward and backward passes a step, each of batch_size / accumulation
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    # how the same numbers come about; like accumulation, a run may go on with another
    recompute: bool = False  # the backward pass computes each layer's activations again in place of keeping them: less memory, a third more work
    compile: bool = False  # torch.compile; off on a CPU
    sharded: bool = False  # under torchrun each process keeps a share of the model; CLIP, the VAE and the checker stay whole
    checkpoint_every: int = 200
    sample_every: int = 500
    validate_every: int = 100


@dataclass(frozen=True)
class WorldConfig:
    """How many scenes of the captioned world are drawn for training, for the upsamplers, and for validation."""

    training_scenes: int
    upsampler_scenes: int
    validation_scenes: int


@dataclass(frozen=True)
class Preset:
    world: WorldConfig
    clip: CLIPConfig
    prior: DiffusionPriorConfig
    ar_prior: AutoregressivePriorConfig
    decoder: DecoderConfig
    upsampler1: UpsamplerConfig
    upsampler2: UpsamplerConfig
    checker: CheckerConfig
    dalle: DALLEConfig
    training: dict[str, TrainingConfig]  # by stage

    @property
    def models(self) -> dict[str, Any]:
        """The config of every model of the chain, by stage."""
        return dict(zip(STAGES, (self.clip, self.prior, self.ar_prior, self.decoder, self.upsampler1, self.upsampler2, self.checker)))

    @property
    def glide(self) -> DecoderConfig:
        """The baseline GLIDE (Nichol et al. 2021): the decoder's own network, never told of an embedding, the caption dropped in 20 %."""
        return replace(self.decoder, embedding_drop=1.0, caption_drop=0.2, whiten=False)

    @property
    def baselines(self) -> dict[str, Any]:
        """The config of every model that unCLIP is compared with, by stage."""
        return dict(zip(BASELINES, (self.glide, self.dalle.vae, self.dalle)))


STAGES = ("clip", "prior", "ar-prior", "decoder", "upsampler1", "upsampler2", "checker")
BASELINES = ("glide", "dalle-vae", "dalle")
LEARNS_FROM = {"prior": "clip", "ar-prior": "clip", "decoder": "clip", "dalle": "dalle-vae"}  # stages on another's frozen outputs, and that other

TINY = Preset(
    world=WorldConfig(training_scenes=512, upsampler_scenes=64, validation_scenes=64),
    clip=CLIPConfig(32, 8, TransformerConfig(32, 2, 2), TransformerConfig(32, 2, 2), 32, 512, 32),
    prior=DiffusionPriorConfig(32, 32, 32, TransformerConfig(32, 2, 2), DiffusionConfig("cosine", "x0", False, "dpm", 8)),
    ar_prior=AutoregressivePriorConfig(32, 32, 32, 32, 64, TransformerConfig(32, 2, 2)),
    decoder=DecoderConfig(
        image_size=16,
        embedding_dim=32,
        vocabulary_size=512,
        context_length=32,
        text=TransformerConfig(32, 2, 2),
        unet=UNetConfig(32, (1, 2), 1, (4,), 16, patch_size=2, fine=4),
        diffusion=DiffusionConfig("cosine", "v", False, "dpm", 8),
        text_start="clip",
    ),
    upsampler1=UpsamplerConfig(16, 32, "blur", UNetConfig(16, (1, 2), 1, (), 16, patch_size=2), DiffusionConfig("cosine", "x0", False, "ddim", 4)),
    upsampler2=UpsamplerConfig(32, 64, "bsr", UNetConfig(16, (1, 2), 1, (), 16, patch_size=4), DiffusionConfig("linear", "x0", False, "ddim", 4)),
    checker=CheckerConfig(width=8),
    dalle=DALLEConfig(DiscreteVAEConfig(16, 16, 4, 16), 512, 32, TransformerConfig(32, 2, 2)),
    training={
        stage: TrainingConfig(steps=12, batch_size=16, learning_rate=1e-3, warmup=4, precision="fp32", checkpoint_every=4, sample_every=8, validate_every=4)
        for stage in STAGES + BASELINES
    },
)

COURSE = Preset(  # what `data/expected` was trained with: each stage in about a minute
    world=WorldConfig(training_scenes=3000, upsampler_scenes=256, validation_scenes=256),
    clip=CLIPConfig(32, 8, TransformerConfig(64, 3, 4), TransformerConfig(64, 3, 4), 32, 512, 64, stem="convolutions"),
    prior=DiffusionPriorConfig(64, 64, 32, TransformerConfig(64, 3, 2), DiffusionConfig("cosine", "x0", False, "dpm", 15)),
    ar_prior=AutoregressivePriorConfig(64, 64, 32, 64, 64, TransformerConfig(64, 3, 2)),
    decoder=DecoderConfig(
        image_size=16,
        embedding_dim=64,
        vocabulary_size=512,
        context_length=32,
        text=TransformerConfig(64, 3, 4),
        unet=UNetConfig(64, (1,), 1, (4,), 32, patch_size=4),
        diffusion=DiffusionConfig("cosine", "x0", False, "dpm", 15),
        text_start="clip",
    ),
    upsampler1=UpsamplerConfig(16, 32, "blur", UNetConfig(16, (1, 2), 1, (), 16, patch_size=2), DiffusionConfig("cosine", "x0", False, "ddim", 10)),
    upsampler2=UpsamplerConfig(32, 64, "bsr", UNetConfig(16, (1, 2), 1, (), 16, patch_size=4), DiffusionConfig("linear", "x0", False, "ddim", 10)),
    checker=CheckerConfig(width=8),
    dalle=DALLEConfig(DiscreteVAEConfig(16, 64, 4, 32), 512, 32, TransformerConfig(64, 3, 2)),
    training={
        stage: TrainingConfig(240, size, 2e-3, warmup=30, precision="fp32", ema_decay=0.98, validate_every=30)
        for stage, size in zip(STAGES + BASELINES, (64, 64, 32, 32, 16, 16, 64, 32, 32, 32))
    },
)

CPU = Preset(
    world=WorldConfig(training_scenes=60_000, upsampler_scenes=6_000, validation_scenes=256),
    clip=CLIPConfig(
        image_size=64,
        patch_size=8,
        vision=TransformerConfig(128, 4, 4),
        text=TransformerConfig(128, 4, 4),
        context_length=32,
        vocabulary_size=512,
        embedding_dim=128,
        stem="convolutions",
    ),
    prior=DiffusionPriorConfig(
        embedding_dim=128,
        text_width=128,
        context_length=32,
        transformer=TransformerConfig(160, 6, 5),
        diffusion=DiffusionConfig("cosine", "x0", learned_variance=False, sampler="dpm", sampling_steps=25),
    ),
    ar_prior=AutoregressivePriorConfig(
        embedding_dim=128, text_width=128, context_length=32, components=128, buckets=128, transformer=TransformerConfig(160, 6, 5)
    ),
    decoder=DecoderConfig(
        image_size=32,
        embedding_dim=128,
        vocabulary_size=512,
        context_length=32,
        text=TransformerConfig(128, 4, 4),
        unet=UNetConfig(width=128, multipliers=(1, 1), blocks=2, attention_at=(8,), head_channels=32, patch_size=4, fine=32),
        diffusion=DiffusionConfig("cosine", "x0", learned_variance=False, sampler="dpm", sampling_steps=25),
        embedding_drop=0.3,
        caption_drop=0.3,
        text_start="clip",
        whiten=True,
    ),
    upsampler1=UpsamplerConfig(
        low_size=32,
        high_size=128,
        degradation="blur",
        unet=UNetConfig(width=32, multipliers=(1, 2, 2), blocks=1, attention_at=(), head_channels=32, patch_size=2),
        diffusion=DiffusionConfig("cosine", "x0", learned_variance=False, sampler="ddim", sampling_steps=27),
        crop=2,
        noise=0.1,
    ),
    upsampler2=UpsamplerConfig(
        low_size=128,
        high_size=512,
        degradation="bsr",
        unet=UNetConfig(width=32, multipliers=(1, 2, 2), blocks=1, attention_at=(), head_channels=32, patch_size=4),
        diffusion=DiffusionConfig("linear", "x0", learned_variance=False, sampler="ddim", sampling_steps=15),
    ),
    checker=CheckerConfig(width=32),
    dalle=DALLEConfig(DiscreteVAEConfig(image_size=32, codes=512, grid=8, width=128), 512, 32, TransformerConfig(256, 6, 8)),
    training={
        "clip": TrainingConfig(steps=2000, batch_size=256, learning_rate=1e-3, optimizer="muon", beta2=0.98, weight_decay=0.1),
        "prior": TrainingConfig(steps=1300, batch_size=256, learning_rate=6e-4, weight_decay=0.06),
        "ar-prior": TrainingConfig(steps=900, batch_size=128, learning_rate=6e-4, weight_decay=0.04),
        "decoder": TrainingConfig(steps=3400, batch_size=64, learning_rate=1e-3, optimizer="muon", ema_decay=0.998, sample_every=1000),
        "upsampler1": TrainingConfig(steps=1500, batch_size=8, learning_rate=1e-3, optimizer="muon"),
        "upsampler2": TrainingConfig(steps=1500, batch_size=16, learning_rate=1e-3, optimizer="muon"),
        "checker": TrainingConfig(steps=4000, batch_size=64, learning_rate=4e-3, warmup=600),
        "glide": TrainingConfig(steps=3400, batch_size=64, learning_rate=1e-3, optimizer="muon", ema_decay=0.998, sample_every=1000),
        "dalle-vae": TrainingConfig(steps=1500, batch_size=64, learning_rate=1e-3, sample_every=1000),
        "dalle": TrainingConfig(steps=3000, batch_size=64, learning_rate=6e-4, weight_decay=0.1, beta2=0.95, sample_every=1000),
    },
)

LONG = replace(  # the models of `cpu`, trained on four times the scenes, for eleven to fifteen times as many examples: minutes on a GPU
    CPU,
    world=replace(CPU.world, training_scenes=240_000),
    training={
        **CPU.training,
        "prior": replace(CPU.training["prior"], steps=10_000, batch_size=512, ema_decay=0.999),
        "ar-prior": replace(CPU.training["ar-prior"], steps=5000, batch_size=256, ema_decay=0.998),
        "upsampler1": replace(CPU.training["upsampler1"], steps=5000, batch_size=32, ema_decay=0.998),
        "decoder": replace(CPU.training["decoder"], steps=5250, batch_size=512, ema_decay=0.999, compile=True, checkpoint_every=2000),
        "glide": replace(CPU.training["glide"], steps=5250, batch_size=512, ema_decay=0.999, compile=True, checkpoint_every=2000),
        "dalle-vae": replace(CPU.training["dalle-vae"], steps=4000, batch_size=256),
        "dalle": replace(CPU.training["dalle"], steps=9000, batch_size=256, ema_decay=0.999),
    },
)

GPU = Preset(
    world=WorldConfig(training_scenes=500_000, upsampler_scenes=50_000, validation_scenes=256),
    clip=CLIPConfig(
        image_size=128,
        patch_size=16,
        vision=TransformerConfig(512, 8, 8),
        text=TransformerConfig(512, 8, 8),
        context_length=77,
        vocabulary_size=49_408,
        embedding_dim=512,
    ),
    prior=DiffusionPriorConfig(
        embedding_dim=512,
        text_width=512,
        context_length=77,
        transformer=TransformerConfig(768, 12, 12),
        diffusion=DiffusionConfig("cosine", "x0", learned_variance=False, sampler="dpm", sampling_steps=25),
    ),
    ar_prior=AutoregressivePriorConfig(
        embedding_dim=512, text_width=512, context_length=77, components=512, buckets=1024, transformer=TransformerConfig(768, 12, 12)
    ),
    decoder=DecoderConfig(
        image_size=64,
        embedding_dim=512,
        vocabulary_size=49_408,
        context_length=77,
        text=TransformerConfig(512, 8, 8),
        unet=UNetConfig(width=192, multipliers=(1, 2, 3, 4), blocks=2, attention_at=(16, 8), head_channels=64, dropout=0.1),
        diffusion=DiffusionConfig("cosine", "v", learned_variance=False, sampler="dpm", sampling_steps=25),
        text_start="clip",
        whiten=True,
    ),
    upsampler1=UpsamplerConfig(
        low_size=64,
        high_size=256,
        degradation="blur",
        unet=UNetConfig(width=128, multipliers=(1, 2, 3, 4), blocks=2, attention_at=(), head_channels=64),
        diffusion=DiffusionConfig("cosine", "v", learned_variance=False, sampler="ddim", sampling_steps=27),
    ),
    upsampler2=UpsamplerConfig(
        low_size=256,
        high_size=1024,
        degradation="bsr",
        unet=UNetConfig(width=64, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention_at=(), head_channels=64),
        diffusion=DiffusionConfig("linear", "v", learned_variance=False, sampler="ddim", sampling_steps=15),
    ),
    checker=CheckerConfig(width=64),
    dalle=DALLEConfig(DiscreteVAEConfig(image_size=64, codes=2048, grid=16, width=256), 49_408, 77, TransformerConfig(768, 12, 12)),
    training={
        "clip": TrainingConfig(steps=20_000, batch_size=768, learning_rate=5e-4, warmup=1000, beta2=0.98, weight_decay=0.1),
        "prior": TrainingConfig(steps=50_000, batch_size=512, learning_rate=3e-4, warmup=1000, weight_decay=0.06, ema_decay=0.9995),
        "ar-prior": TrainingConfig(50_000, 256, 3e-4, warmup=1000, weight_decay=0.04, ema_decay=0.999, accumulation=4),
        "decoder": TrainingConfig(steps=100_000, batch_size=128, learning_rate=2e-4, warmup=1000, ema_decay=0.9995, accumulation=4),
        "upsampler1": TrainingConfig(steps=50_000, batch_size=64, learning_rate=2e-4, warmup=1000, ema_decay=0.9995, accumulation=2),
        "upsampler2": TrainingConfig(steps=50_000, batch_size=16, learning_rate=2e-4, warmup=1000, ema_decay=0.9995, accumulation=4),
        "checker": TrainingConfig(steps=20_000, batch_size=128, learning_rate=4e-3, warmup=1000),
        "glide": TrainingConfig(steps=100_000, batch_size=128, learning_rate=2e-4, warmup=1000, ema_decay=0.9995, accumulation=4),
        "dalle-vae": TrainingConfig(steps=50_000, batch_size=128, learning_rate=3e-4, warmup=1000, ema_decay=0.9995),
        "dalle": TrainingConfig(50_000, 128, 3e-4, warmup=1000, weight_decay=0.1, beta2=0.95, ema_decay=0.9995, accumulation=4),
    },
)

PAPER = Preset(  # Tab. 3 and App. C; vocabulary and text context of CLIP's own tokenizer where the paper is silent
    world=CPU.world,
    clip=CLIPConfig(
        image_size=256,
        patch_size=16,
        vision=TransformerConfig(1280, 32, 16),
        text=TransformerConfig(1024, 24, 16),
        context_length=256,
        vocabulary_size=49_408,
        embedding_dim=1024,
    ),
    prior=DiffusionPriorConfig(
        embedding_dim=1024,
        text_width=1024,
        context_length=256,
        transformer=TransformerConfig(2048, 24, 32),
        diffusion=DiffusionConfig("cosine", "x0", learned_variance=False, sampler="dpm", sampling_steps=64),
    ),
    ar_prior=AutoregressivePriorConfig(
        embedding_dim=1024, text_width=1024, context_length=256, components=319, buckets=1024, transformer=TransformerConfig(1664, 24, 26)
    ),
    decoder=DecoderConfig(
        image_size=64,
        embedding_dim=1024,
        vocabulary_size=49_408,
        context_length=256,
        text=TransformerConfig(2048, 24, 32),
        unet=UNetConfig(width=512, multipliers=(1, 2, 3, 4), blocks=3, attention_at=(32, 16, 8), head_channels=64, dropout=0.1),
        diffusion=DiffusionConfig("cosine", "epsilon", learned_variance=True, sampler="ancestral", sampling_steps=250),
    ),
    upsampler1=UpsamplerConfig(
        low_size=64,
        high_size=256,
        degradation="blur",
        unet=UNetConfig(width=320, multipliers=(1, 2, 3, 4), blocks=3, attention_at=(), head_channels=64, dropout=0.1),
        diffusion=DiffusionConfig("cosine", "epsilon", learned_variance=True, sampler="ddim", sampling_steps=27),
    ),
    upsampler2=UpsamplerConfig(
        low_size=256,
        high_size=1024,
        degradation="bsr",
        unet=UNetConfig(width=192, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention_at=(), head_channels=64),
        diffusion=DiffusionConfig("linear", "epsilon", learned_variance=True, sampler="ddim", sampling_steps=15),
    ),
    checker=CheckerConfig(width=32),
    dalle=DALLEConfig(DiscreteVAEConfig(image_size=256, codes=8192, grid=32, width=256), 16_384, 256, TransformerConfig(3968, 64, 62)),
    training={  # Tab. 3; CLIP's rate from App. C, its batch from Radford et al. 2021 (section 2.5), its steps those of one pass over 650 million pairs
        "clip": TrainingConfig(steps=20_000, batch_size=32_768, learning_rate=3e-4),
        "prior": TrainingConfig(600_000, 4096, 1.1e-4, weight_decay=6e-2, beta2=0.96, epsilon=1e-6, ema_decay=0.9999),
        "ar-prior": TrainingConfig(1_000_000, 4096, 1.6e-4, weight_decay=4e-2, beta2=0.91, epsilon=1e-10, ema_decay=0.999),
        "decoder": TrainingConfig(800_000, 2048, 1.2e-4, weight_decay=0.0, beta2=0.999, ema_decay=0.9999),
        "upsampler1": TrainingConfig(1_000_000, 1024, 1.2e-4, weight_decay=0.0, beta2=0.999, ema_decay=0.9999),
        "upsampler2": TrainingConfig(1_000_000, 512, 1.0e-4, weight_decay=0.0, beta2=0.999, ema_decay=0.9999),
        # not of the paper, which compares with systems that were trained before it
        **{stage: CPU.training[stage] for stage in ("checker", *BASELINES)},
    },
)

PRESETS = {"tiny": TINY, "course": COURSE, "cpu": CPU, "long": LONG, "gpu": GPU, "paper": PAPER}
