"""The chain as ONNX files, for programs that have no PyTorch: a browser, a phone, another language.

Five graphs: CLIP's text tower, the prior, the decoder and both upsamplers. Everything between them is arithmetic that `manifest.json` spells out,
and `draw` is that arithmetic in NumPy: what any program that draws with these files has to do, and the proof that they are enough.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minunclip.config import DiffusionConfig
from minunclip.data.tokenizer import Tokenizer
from minunclip.diffusion import Prediction, SeededNoise, sample, schedule_of, to_x_0
from minunclip.models.clip import CLIP
from minunclip.models.diffusion_prior import LATENT_CLIP, LatentScale
from minunclip.models.upsampler import Upsampler, degrade_blur, resize
from minunclip.pipeline import GUIDANCE, PRIOR_GUIDANCE, UnCLIP

TOLERANCE = 1e-4  # the largest difference from PyTorch that is let through
OPSET = 17
LONG = ("tokens", "mask", "encoded_text", "text_mask")  # inputs and outputs whose second axis is the text's length
FILES = {"clip": "clip-text", "prior": "prior", "decoder": "decoder", "upsampler1": "upsampler1", "upsampler2": "upsampler2"}


class TextTower(nn.Module):
    """CLIP without its image tower."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.clip.text_features(tokens, mask)


class BlurAndUpsample(nn.Module):
    """An upsampler that is given a picture as it is, and blurs and resizes it itself.

    Both are linear, and do the same to columns as to rows: a matrix on either side, which ONNX has, in place of a resize, whose details it lacks.
    """

    matrix: Tensor  # (high_size, low_size)

    def __init__(self, model: Upsampler):
        super().__init__()
        self.model = model
        low, high = model.config.low_size, model.config.high_size
        # picture i is 1 in row i and 0 elsewhere, so its column 0 becomes column i of the matrix; how wide it is does not matter
        rows = torch.eye(low)[:, None, :, None].expand(low, 1, low, 4)
        seen = resize(degrade_blur(rows) if model.config.degradation == "blur" else rows, (high, 4))
        self.register_buffer("matrix", seen[:, 0, :, 0].T.contiguous())

    def forward(self, x_t: Tensor, timestep: Tensor, low_resolution: Tensor) -> Tensor:
        return self.model(x_t, timestep, (self.matrix @ low_resolution @ self.matrix.T).clamp(-1, 1))


def _inputs(stage: str, model: Any, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """Random inputs by name: batch examples, captions of up to `length` tokens."""
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    def flips() -> Tensor:
        return torch.rand(batch, generator=generator) < 0.5

    timestep = torch.randint(1000, (batch,), generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
    if stage.startswith("upsampler"):
        low = normal(3, config.low_size, config.low_size).clamp(-1, 1)
        return {"x_t": normal(3, config.high_size, config.high_size), "timestep": timestep, "low_resolution": low}
    if stage == "prior":
        z_t, encoded = nn.functional.normalize(normal(config.embedding_dim)), normal(length, config.text_width)
        return {"x_t": normal(config.embedding_dim), "timestep": timestep, "encoded_text": encoded, "text_mask": mask, "text_embedding": z_t, "drop": flips()}
    text = {"tokens": torch.randint(config.vocabulary_size, (batch, length), generator=generator), "mask": mask}
    if stage == "clip":
        return text
    drops = {"drop_embedding": flips(), "drop_caption": flips()}
    return {"x_t": normal(3, config.image_size, config.image_size), "timestep": timestep, "image_embedding": normal(config.embedding_dim), **text, **drops}


def sampling_table(process: DiffusionConfig) -> list[dict[str, float]]:
    """What a deterministic sampler does, step by step, as numbers: x_0 = from_x_t x_t + from_output output, bounded; then the next
    x_t = keep x_t + add x_0 + previous x_0^previous.

    The numbers are asked of the sampler itself: it is linear, so it is run once on vectors that keep x_T and the x_0 of each step apart.
    """
    if process.sampler == "ancestral":
        raise ValueError('the sampler "ancestral" draws noise at every step, and cannot be exported: set it to "ddim" or "dpm" in the model\'s config.json')
    schedule = schedule_of(process)
    apart = torch.eye(process.sampling_steps + 1, dtype=torch.float64)
    states: list[Tensor] = []
    rows: list[dict[str, float]] = []

    def denoiser(x_t: Tensor, timestep: Tensor) -> Prediction:
        one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        from_x_t, from_output = (to_x_0(schedule, process.objective, output, x, timestep).item() for output, x in ((zero, one), (one, zero)))
        rows.append({"timestep": int(timestep), "from_x_t": from_x_t, "from_output": from_output})
        states.append(x_t[0])
        x_0, abar = apart[len(rows)][None], schedule.exact_alphas_bar[int(timestep)]
        return Prediction(x_0, (x_t - abar**0.5 * x_0) / (1 - abar) ** 0.5, None)

    states.append(sample(denoiser, schedule, apart[:1], process.sampler, process.sampling_steps)[0])
    for i, (row, here, after) in enumerate(zip(rows, states, states[1:])):
        keep = float(after[0] / here[0])
        row |= {"keep": keep, "add": float(after[i + 1]), "previous": float(after[i] - keep * here[i]) if i else 0.0}
    return rows


def _halve(path: Path) -> None:
    """Weights that half precision holds exactly, as all that ship, are stored so: half the file, the same numbers."""
    import onnx

    file = onnx.load(path)
    casts = []
    for tensor in file.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halved = values.astype(np.float16) if values.dtype == np.float32 and values.size > 64 else None
        if halved is not None and np.array_equal(halved, values):
            casts.append(onnx.helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=onnx.TensorProto.FLOAT))
            tensor.CopyFrom(onnx.numpy_helper.from_array(halved, f"{tensor.name}.half"))
    nodes = [*casts, *file.graph.node]
    file.graph.ClearField("node")
    file.graph.node.extend(nodes)
    onnx.save(file, path)


def _write(graph: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    axes = {name: {0: "batch", **({1: "length"} if name in LONG else {})} for name in (*inputs, *outputs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by tracing, of which torch warns: its newer exporter takes twenty times as long
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    _halve(path)


def _difference(graph: nn.Module, session: Any, inputs: Mapping[str, Tensor]) -> float:
    """The largest between PyTorch and onnxruntime."""
    expected = graph(*inputs.values())
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    pairs = zip(expected if isinstance(expected, tuple) else (expected,), found)
    return max(float((ours - torch.from_numpy(theirs)).abs().max()) for ours, theirs in pairs)


def open_session(path: Path) -> Any:
    """An ONNX file, ready to run on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@torch.no_grad()
def export_onnx(model: UnCLIP, folder: Path) -> dict[str, float]:
    """Writes the chain to a folder, with tokenizer and manifest, and returns each file's largest difference from PyTorch.

    Batch and length of the text are free in every graph; sizes of pictures are fixed. ValueError, and nothing written, where a graph differs
    by more than TOLERANCE, a sampler draws noise, the embeddings are Karlo's, or a model or an extra is missing.
    """
    if not (find_spec("onnx") and find_spec("onnxruntime")):
        raise ValueError("ONNX files need an extra: pip install -e '.[onnx]'")
    lacking = [stage for stage in FILES if stage not in model.models]
    if lacking:
        raise ValueError(f"the weights have no {lacking[0]}, without which the chain cannot be exported: train it, or add it to the folder")
    clip, prior = model.models["clip"].config, model.models["prior"].config
    if not clip.unit_norm or prior.latent != "scaled":
        raise ValueError("the prior diffuses embeddings that are not of unit norm, as Karlo's does: `draw` and the manifest know no such thing yet")
    manifest: dict[str, Any] = {
        "tokenizer": "tokenizer.json",
        "context_length": clip.context_length,
        "latent_scale": LatentScale.for_dim(clip.embedding_dim).factor,
        "candidates": prior.candidates,
        "guidance": GUIDANCE,
        "prior_guidance": PRIOR_GUIDANCE,
        "models": {},
    }
    differences = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        for stage, name in FILES.items():
            own, path = model.models[stage], Path(temporary) / f"{name}.onnx"
            graph = TextTower(own) if stage == "clip" else BlurAndUpsample(own) if stage.startswith("upsampler") else own
            entry: dict[str, Any] = {"file": path.name}
            if stage != "clip":
                entry |= {"bound": LATENT_CLIP if stage == "prior" else 1.0, "steps": sampling_table(own.config.diffusion)}
            _write(graph, _inputs(stage, own, 2, 2, seed=0), ["encoded_text", "text_embedding"] if stage == "clip" else ["output"], path)
            session = open_session(path)
            tries = [_inputs(stage, own, batch, length, seed=batch) for batch, length in ((1, 1), (3, clip.context_length))]
            differences[path.name] = max(_difference(graph, session, inputs) for inputs in tries)
            if not differences[path.name] < TOLERANCE:
                raise ValueError(f"{path.name} differs from PyTorch by {differences[path.name]:.1e}, more than {TOLERANCE:.0e}: nothing was exported")
            for side, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
                entry[side] = {value.name: {"type": value.type, "shape": value.shape} for value in values}
            manifest["models"][name] = entry
        model.tokenizer.save(Path(temporary) / manifest["tokenizer"])
        (Path(temporary) / "manifest.json").write_text(json.dumps(manifest, indent=1))
        folder.mkdir(exist_ok=True)
        for path in Path(temporary).iterdir():
            os.replace(path, folder / path.name)
    return differences


def draw(folder: Path, captions: Sequence[str], seeds: Sequence[int], guidance: float = GUIDANCE, prior_guidance: float = PRIOR_GUIDANCE) -> list[np.ndarray]:
    """Pictures of an exported chain, by NumPy and onnxruntime alone: float32 (B, 3, S, S) in [-1, 1], of the decoder and of both upsamplers.

    Noise and seeds are those of `UnCLIP.generate`, so the pictures are the same.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    sessions = {name: open_session(folder / entry["file"]) for name, entry in manifest["models"].items()}

    def noise(stage: int, *shape: int) -> np.ndarray:
        return SeededNoise([4 * seed + stage for seed in seeds])(shape).numpy()

    def descend(name: str, x_t: np.ndarray, told: Mapping[str, np.ndarray], untold: Mapping[str, np.ndarray] | None = None, scale: float = 1.0) -> np.ndarray:
        """From noise to data. `untold`: the same inputs without the condition, for guidance by `scale`."""
        bound, previous = manifest["models"][name]["bound"], 0 * x_t
        for row in manifest["models"][name]["steps"]:
            feed = {"x_t": x_t, "timestep": np.full(len(x_t), row["timestep"], np.int64)}
            output = sessions[name].run(None, {**feed, **told})[0]
            if untold is not None and scale != 1:
                without = sessions[name].run(None, {**feed, **untold})[0]
                output = without + scale * (output - without)
            x_0 = (row["from_x_t"] * x_t + row["from_output"] * output[:, : x_t.shape[1]]).clip(-bound, bound).astype(np.float32)
            x_t = (row["keep"] * x_t + row["add"] * x_0 + row["previous"] * previous).astype(np.float32)
            previous = x_0
        return x_t

    batch, candidates = len(captions), manifest["candidates"]
    tokens, mask = (tensor.numpy() for tensor in Tokenizer.load(folder / manifest["tokenizer"])(list(captions), manifest["context_length"]))
    encoded, z_t = sessions["clip-text"].run(None, {"tokens": tokens, "mask": mask})

    # the prior: several candidates a caption, of which the one nearest to z_t is kept
    text = {"encoded_text": encoded, "text_mask": mask, "text_embedding": z_t}
    text = {name: value.repeat(candidates, axis=0) for name, value in text.items()}
    told, untold = ({**text, "drop": np.full(batch * candidates, drop)} for drop in (False, True))
    drawn = noise(0, candidates, z_t.shape[1]).reshape(-1, z_t.shape[1])
    z_i = descend("prior", drawn, told, untold, prior_guidance).reshape(batch, candidates, -1)
    z_i = z_i / np.linalg.norm(z_i, axis=2, keepdims=True)
    best = z_i[np.arange(batch), (z_i * z_t[:, None]).sum(axis=2).argmax(axis=1)]

    condition = {"image_embedding": manifest["latent_scale"] * best, "tokens": tokens, "mask": mask}
    told, untold = ({**condition, "drop_embedding": np.full(batch, drop), "drop_caption": np.full(batch, drop)} for drop in (False, True))
    shape = [manifest["models"][name]["inputs"]["x_t"]["shape"][1:] for name in ("decoder", "upsampler1", "upsampler2")]
    pictures = [descend("decoder", noise(1, *shape[0]), told, untold, guidance)]
    for number, name in enumerate(("upsampler1", "upsampler2")):
        pictures.append(descend(name, noise(2 + number, *shape[1 + number]), {"low_resolution": pictures[-1]}))
    return pictures
