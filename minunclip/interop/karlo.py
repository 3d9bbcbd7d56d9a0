"""diffusers' unCLIP, and so Karlo's published weights (kakaobrain/karlo-v1-alpha), in this package's modules, and back.

The models are the same but for names, and for what is folded into the weights here, so that nothing else needs to know of it: queries, keys and
values lie in one matrix; embeddings come scaled by sqrt(d). What cannot be folded is a field of the config, with Karlo's name beside it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minunclip.config import DiffusionConfig, DiffusionPriorConfig, TransformerConfig
from minunclip.loading import require_tensors
from minunclip.models.diffusion_prior import LATENT_CLIP, DiffusionPrior

State = Mapping[str, Tensor]
Layers = dict[str, tuple[str, ...]]  # a layer here, and those there whose weights and biases, one below the other, are its own

FAMILY = "another family, or a shard is missing"
OBJECTIVES = {"epsilon": "epsilon", "sample": "x0"}

PRIOR: Layers = {
    "condition.text": ("encoder_hidden_states_proj",),
    "condition.embedding": ("embedding_proj",),
    "timestep.0": ("time_embedding.linear_1",),
    "timestep.2": ("time_embedding.linear_2",),
    "noised": ("proj_in",),
    "norm": ("norm_out",),
    "to_embedding": ("proj_to_clip_embeddings",),
}
PRIOR_BLOCK: Layers = {
    "norm1": ("norm1",),
    "attention.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.to_out": ("attn1.to_out.0",),
    "norm2": ("norm3",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.2": ("ff.net.2",),
}


# ---- names, and what a config must say ----


def _under(here: str, there: str, layers: Layers) -> Layers:
    return {here + ours: tuple(there + name for name in theirs) for ours, theirs in layers.items()}


def _to_theirs(state: State, layers: Layers) -> dict[str, Tensor]:
    """Those layers that there are, with their names."""
    theirs: dict[str, Tensor] = {}
    for layer, names in layers.items():
        for kind in ("weight", "bias"):
            if f"{layer}.{kind}" in state:
                parts = state[f"{layer}.{kind}"].chunk(len(names))
                theirs |= {f"{name}.{kind}": part for name, part in zip(names, parts)}
    return theirs


def _to_ours(state: State, layers: Layers) -> dict[str, Tensor]:
    """The inverse of `_to_theirs`."""
    ours: dict[str, Tensor] = {}
    for layer, names in layers.items():
        for kind in ("weight", "bias"):
            if f"{names[0]}.{kind}" in state:
                parts = [state[f"{name}.{kind}"] for name in names]
                ours[f"{layer}.{kind}"] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ours


def _require(where: str, config: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """ValueError unless a config of diffusers' has these values; a field that it does not name has diffusers' default, which is the one needed."""
    for name, value in needed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name} is {config[name]!r}, but this package's models have {value!r}: it belongs to another family than Karlo's")


def _process(where: str, scheduler: Mapping[str, Any], sampling_steps: int, clip: float) -> DiffusionConfig:
    """The diffusion process of a config of diffusers' UnCLIPScheduler."""
    _require(where, scheduler, {"_class_name": "UnCLIPScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "clip_sample_range": clip})
    if (prediction := scheduler["prediction_type"]) not in OBJECTIVES:
        raise ValueError(f"{where}: prediction_type is {prediction!r}, must be one of {', '.join(OBJECTIVES)}")
    objective: Any = OBJECTIVES[prediction]
    learned = scheduler["variance_type"] == "learned_range"
    return DiffusionConfig("cosine", objective, learned, "ancestral", sampling_steps, scheduler["num_train_timesteps"])


# ---- the prior ----


def _prior_layers(config: DiffusionPriorConfig) -> Layers:
    layers = dict(PRIOR)
    for i in range(config.transformer.layers):
        layers |= _under(f"transformer.blocks.{i}.", f"transformer_blocks.{i}.", PRIOR_BLOCK)
    return layers


def _prior_to_theirs(state: State, config: DiffusionPriorConfig) -> dict[str, Tensor]:
    theirs = _to_theirs(state, _prior_layers(config))
    theirs["embedding_proj.weight"] = theirs["embedding_proj.weight"] * config.embedding_dim**0.5  # z_t is scaled here, not there
    theirs["positional_embedding"] = torch.cat([state["condition.positions"], state["positions"]])[None]
    theirs["prd_embedding"] = state["final"][None, None]
    return theirs | {"clip_mean": state["mean"][None], "clip_std": state["std"][None]}


def prior_from_diffusers(
    state: State, config: Mapping[str, Any], scheduler: Mapping[str, Any], sampling_steps: int = 25, where: str = "the prior's state dict"
) -> DiffusionPrior:
    """diffusers' PriorTransformer and the UnCLIPScheduler that goes with it, as this package's prior, from state dict and configs.

    What stands for a dropped caption is all zeros, since diffusers reads an empty caption there: see `say_nothing_by_an_empty_caption`.
    ValueError names the first field, key or shape that does not fit, before anything is built.
    """
    fixed = {"added_emb_type": "prd", "additional_embeddings": 4, "encoder_hid_proj_type": "linear", "time_embed_act_fn": "silu"}
    absent = ("norm_in_type", "embedding_proj_norm_type", "time_embed_dim", "embedding_proj_dim", "clip_embed_dim")
    _require(where, config, fixed | dict.fromkeys(absent))
    dim, heads = config["embedding_dim"], config["num_attention_heads"]
    ours = DiffusionPriorConfig(
        embedding_dim=dim,
        text_width=dim,
        context_length=config["num_embeddings"],
        transformer=TransformerConfig(heads * config["attention_head_dim"], config["num_layers"], heads),
        diffusion=_process(where, scheduler, sampling_steps, LATENT_CLIP),
        latent="standardised",
        null_tokens=2,
        candidates=1,
    )
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
        model = DiffusionPrior(ours)
    require_tensors(where, state, _prior_to_theirs(model.state_dict(), ours), "PriorTransformer", FAMILY)
    tensors = _to_ours(state, _prior_layers(ours))
    tensors["condition.embedding.weight"] = tensors["condition.embedding.weight"] / dim**0.5
    positions, width = state["positional_embedding"][0], ours.transformer.width
    tensors |= {"condition.positions": positions[:-3], "positions": positions[-3:], "final": state["prd_embedding"][0, 0]}
    tensors |= {"condition.null_text": positions.new_zeros(2, width), "condition.null_embedding": positions.new_zeros(width)}
    model.load_state_dict(tensors | {"mean": state["clip_mean"][0], "std": state["clip_std"][0]}, assign=True)
    return model.eval()
