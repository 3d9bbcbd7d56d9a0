"""The words and symbols of the course, in one place: `notebooks/GLOSSARY.md` is made from here (a test compares them)."""

from typing import NamedTuple


class Term(NamedTuple):
    """A word of the field: the paper's symbol, the name in this code, what it means, and the notebook where it is met."""

    name: str
    symbol: str
    code: str
    meaning: str
    notebook: str


TERMS = (
    Term("caption", "$y$", "`captions`, `tokens`", "the sentence that goes with a picture", "01"),
    Term("scene", "", "`Scene`", "what a picture of this world shows, as data: one to three things, a background, perhaps a word", "01"),
    Term("token", "", "`tokens`", "a piece of a sequence: of a caption a whole number, in a network the vector that stands for it", "01"),
    Term("embedding", "", "`z_i`, `z_t`", "a vector that stands for a picture or a sentence: near means alike", "02"),
    Term("cosine", "", "`cosine`", "how alike two directions are: 1 the same, 0 at right angles; of vectors of length one their dot product", "02"),
    Term("GLIDE", "", "`glide`", "a system that unCLIP is compared with: the decoder's network, told the caption alone", "11"),
    Term("DALL-E", "", "`sample_dalle`", "a system that unCLIP is compared with: a picture as 64 codes, written one after the other", "11"),
    Term("byte-pair encoding", "", "`Tokenizer`", "words as pieces that occur often, learned from bytes upwards; reversible on any text", "01"),
    Term("image", "$x$", "`images`", "a picture, (B, 3, H, W), from -1 to 1", "03"),
    Term("noised image", "$x_t$", "`x_t`", "the picture with the noise of timestep t", "03"),
    Term("image embedding", "$z_i$", "`z_i`", "what CLIP makes of a picture: d numbers of length one", "02"),
    Term(
        "text embedding",
        "$z_t$",
        "`z_t`",
        "what CLIP makes of a caption: d numbers of length one, nearer to the z_i of pictures that it fits than to other pictures'",
        "02",
    ),
    Term("contrastive loss", "", "`contrastive_loss`", "asks each picture for its caption among those of the batch, and each caption for its picture", "02"),
    Term(
        "scale",
        "$s$",
        "`logit_scale`, `scale()`",
        "the inverse of a temperature: by how much cosines are multiplied before the softmax; learned, at most 100",
        "02",
    ),
    Term("logits", "$\\ell$", "`logits`", "cosines of all pictures with all captions of a batch, times the scale", "02"),
    Term(
        "attention",
        "$q_n,\\ k_m,\\ v_m,\\ \\text{out}_n$",
        "`Attention`",
        "each token takes a mean of others' values, weighed by how well their keys fit its query",
        "02",
    ),
    Term("attention weight", "$w_{nm}$", "`Attention`", "which share of the mean token n takes of what token m gives; the shares add up to 1", "02"),
    Term("head", "$c$", "`heads`", "one of several attentions side by side, each with queries, keys and values of its own, of c numbers", "02"),
    Term("patch", "", "`patch_size`", "a square of pixels that becomes one token", "02"),
    Term("class token", "", "`class_token`", "a learned token beside those of the patches, in whose place CLIP's answer is gathered", "02"),
    Term("position", "", "`positions`", "a learned vector, added to a token, that tells where it stands", "02"),
    Term("tower", "", "`encode_image`, `encode_text`", "one of CLIP's two transformers: one for pictures, one for captions", "02"),
    Term(
        "twin",
        "",
        "`twin`",
        "a scene that differs from another in one fact alone (a colour, who is where); in CLIP's training they stand in one batch",
        "02",
    ),
    Term("zero-shot", "", "`zero_shot`", "classifying by the captions of the classes, without training for it", "02"),
    Term(
        "Fréchet distance",
        "$\\mu,\\ \\Sigma,\\ \\mathrm{tr}$",
        "`frechet_distance`",
        "FID: how far two sets of pictures lie apart, as two Gaussians in a space of features, with mean and covariance (tr: the sum of a diagonal)",
        "11",
    ),
    Term(
        "precision and recall",
        "",
        "`precision_recall`",
        "the share of drawn pictures that lie where real ones do, and of real ones that lie where drawn ones do (of a filter, in 12: of what is flagged, "
        "how much is right, and of what is there, how much is flagged)",
        "11",
    ),
    Term("floor", "", "`fid_floor`", "what a measure gives for two sets of true pictures: no system can be expected below it", "11"),
    Term("level", "", "`LEVELS`", "how much of a scene a caption says: terse, some, most, full", "01"),
    Term("held-out combination", "", "`is_held_out`", "a texture, colour and shape that never stand together in training, for tests", "01"),
    Term("preset", "", "`Preset`", "sizes of all models and how each is trained: tiny, course, cpu, long, gpu, paper", "02"),
    Term("crop", "", "`crop`", "the part of a picture that an upsampler learns from; in use it sees the whole", "07"),
    Term("diversity", "", "`diversity`", "one minus the mean cosine between the embeddings of two pictures of one caption: 0 if all are alike", "11"),
    Term("CLIP score", "", "", "the mean cosine between the embeddings of pictures and of their captions", "11"),
    Term("checker", "", "`SceneReader`", "a network that reads what a picture shows, and is compared with the caption; trained apart from all others", "00"),
    Term("PSNR", "", "`psnr`", "how near a picture is to another, in dB: ten more is a tenth of the square error", "07"),
    Term("modality gap", "", "`modality_gap`", "the distance of the mean picture from the mean caption in CLIP's space", "02"),
    Term("probe", "", "`report.probe`", "a linear map that reads a label off an embedding; to be tried on pictures that it was not fitted to", "10"),
    Term("forward process", "$q,\\ q(x_t \\mid x_0)$", "`q_sample`", "adding noise, in one jump to any timestep", "03"),
    Term("timestep", "$t$", "`timestep`", "how noisy: 0 nearly clean, T - 1 nothing but noise", "03"),
    Term("signal that is left", "$\\bar\\alpha_t$", "`alphas_bar`", "the share of the variance that is still picture at timestep t", "03"),
    Term(
        "signal and noise",
        "$\\sqrt{\\bar\\alpha_t},\\ \\sqrt{1-\\bar\\alpha_t}$",
        "`signal`, `noise`",
        "how much of the picture and how much of the noise make up x_t",
        "03",
    ),
    Term("schedule", "$\\beta_t$", "`Schedule`", "how the noise grows: cosine, or linear for the second upsampler", "03"),
    Term(
        "network",
        "$\\epsilon_\\theta(x_t, t),\\ \\epsilon_\\theta,\\ x_\\theta,\\ f_\\theta$",
        "`network`",
        "what is learned: it answers the noise or the clean thing, told the noised one and the timestep",
        "03",
    ),
    Term(
        "objective",
        "$\\epsilon,\\ x_0,\\ v$",
        "`Objective`",
        "what a network answers: noise, clean picture, or a mixture; each follows from each",
        "03",
    ),
    Term("learned variance", "$\\Sigma_\\theta$", "`learned_variance`", "further channels that say how sure the step is, between two bounds", "03"),
    Term(
        "posterior",
        "$\\tilde\\mu_t,\\ \\tilde\\beta_t$",
        "`posterior`",
        "mean and variance of one step back, of x_{t-1}, where x_t and x_0 are known",
        "03",
    ),
    Term(
        "timestep embedding",
        "",
        "`timestep_embedding`",
        "a timestep as sines and cosines of many periods, which a network can tell apart",
        "03",
    ),
    Term(
        "U-Net",
        "",
        "`UNet`",
        "a network that goes down to a coarse grid and up again, with skips between equal sizes",
        "03",
    ),
    Term("residual block", "", "`ResidualBlock`", "convolutions whose answer is added to what they were given; told the timestep by a scale and a shift", "03"),
    Term("hybrid loss", "", "`training_loss`", "the squared error, and a thousandth of the loss that teaches the learned variance", "03"),
    Term("ancestral sampling", "", "`sample_ancestral`", "DDPM: a little noise is drawn anew in each step", "03"),
    Term(
        "DDIM",
        "$\\eta,\\ \\sigma$",
        "`sample_ddim`",
        "a sampler of fewer steps; eta says how much new noise each adds, of the deviation sigma: at 0 none, and the way can be walked backwards",
        "03",
    ),
    Term("inversion", "$x_T$", "`invert_ddim`", "from a picture back to the noise from which DDIM would draw it", "09"),
    Term("bipartite latent", "$(z_i, x_T)$", "`invert_ddim`", "the two halves of a picture: what CLIP sees of it, and the noise that holds the rest", "09"),
    Term(
        "DPM-Solver++",
        "$\\lambda,\\ h,\\ h_{\\text{last}},\\ s,\\ n,\\ s',\\ n',\\ x_0^{\\text{last}}$",
        "`sample_dpm`",
        "a sampler of second order: fewer steps for the same picture; lambda is its clock, h a step on it, s and n how much of picture and noise there is",
        "03",
    ),
    Term("expectation", "$\\mathbb{E}$", "", "the average over all that is drawn", "03"),
    Term("KL divergence", "", "", "how much likelier one distribution makes what it draws than another does, as a logarithm, on average", "03"),
    Term("moving average", "", "`update_ema`", "EMA: weights averaged over the last steps; what is sampled from, and what ships", "03"),
    Term("prior", "$P(z_i \\mid y)$", "`DiffusionPrior`, `AutoregressivePrior`", "from a caption to one of the embeddings of pictures that fit it", "05"),
    Term("principal components", "$k$", "`fit_pca`", "directions in which embeddings vary, by how much they do; k of them are kept", "04"),
    Term("bucket", "", "`Quantiser`", "a range of values that counts as one token", "04"),
    Term("sequence", "$b_0 \\ldots b_k$", "`tokens`", "an embedding as whole numbers: the dot-product token, then a bucket for each component", "04"),
    Term("temperature", "$T$", "`temperature`", "what logits are divided by before the softmax: a small one makes it sharp", "04"),
    Term("causal mask", "", "`causal=True`", "each token sees itself and those before it", "02"),
    Term("prefix", "$y,\\ z_t$", "`condition`", "what a sequence starts with and is not asked to write: the encoded caption and z_t", "04"),
    Term("encoded caption", "", "`encoded`", "the outputs of CLIP's text transformer, one for each token", "04"),
    Term("cross-entropy", "", "`F.cross_entropy`", "minus the logarithm of the chance given to what came: in nats, of which one is 1.44 bits", "04"),
    Term(
        "dropping the caption",
        "$\\varnothing$",
        "`text_drop`, `caption_drop`",
        "hiding it in some training examples, so that guidance has an answer without it",
        "04",
    ),
    Term(
        "dot-product token",
        "$z_i \\cdot z_t$",
        "`dot_quantiser`",
        "how well picture and caption fit; drawn from the top half when sampling",
        "04",
    ),
    Term("latent scale", "", "`LatentScale`", "by how much unit-length embeddings are multiplied before noise is added: $\\sqrt d$", "05"),
    Term("noised embedding", "$z_i^{(t)}$", "`noised`", "a scaled image embedding with the noise of timestep t", "05"),
    Term("decoder", "$P(x \\mid z_i, y)$", "`Decoder`", "the diffusion model that draws a picture for an embedding and a caption", "06"),
    Term("Muon", "", "`Muon`", "an optimiser that makes the update of each weight matrix nearly orthogonal; not of the paper, which uses AdamW", "06"),
    Term(
        "guidance", "$w,\\ \\hat\\epsilon,\\ \\hat f$", "`guide`", "exaggerating the difference between the answer with the condition and the one without", "05"
    ),
    Term("whitening", "", "`Whitener`", "bringing the directions in which embeddings vary to about the same loudness", "10"),
    Term("upsampler", "", "`Upsampler`", "a diffusion model that draws a picture of four times the side, told the small one", "07"),
    Term("degradation", "", "`degrade`", "spoiling the small picture in training, so that the upsampler mends rather than trusts", "07"),
    Term("slerp", "", "`slerp`", "from one vector to another along the circle between them", "09"),
    Term(
        "turn between two spaces",
        "$R,\\ A,\\ B,\\ U,\\ S,\\ V,\\ I$",
        "",
        "the rotation R that brings the rows of A nearest to those of B, from a singular value decomposition (Procrustes)",
        "08",
    ),
    Term("variation", "", "`variations`", "another picture of the same embedding", "09"),
    Term("text diff", "$z_d,\\ z_{t_0}$", "`text_diff`", "turning a picture's embedding by the difference of two captions' embeddings", "09"),
    Term("theta", "$\\theta$", "`theta`", "which share of the way along the circle a text diff goes (no angle); the paper up to 0.5", "09"),
    Term("provenance", "", "`read_facts`", "what a picture says of how it was made", "12"),
    Term("detector", "", "`fit_detector`", "a linear probe that scores an embedding; what lies above a threshold is stopped", "12"),
    Term("total variation", "", "`total_variation`", "how far two lists of shares lie apart: half the sum of the differences", "12"),
    Term("accumulation", "", "`accumulation`", "a batch in parts, one step for all", "13"),
    Term("parameters", "$P$", "`parameters`", "the numbers that are learned; in training each costs 20 bytes", "13"),
    Term("activations", "$A$", "`activations`", "bytes that one example leaves in memory until the backward pass", "13"),
    Term("part of a batch", "$b$", "`accumulation`", "examples that are in memory at once", "13"),
    Term("bfloat16", "", "`bf16`", "bf16: a float of two bytes, as large as one of four but coarser; autocast computes in it where that is safe", "13"),
    Term(
        "ring",
        "$t_N,\\ c,\\ N,\\ G,\\ r$",
        "`step_seconds`",
        "how N processes add up their gradients, of G bytes: each sends to the next alone, r bytes a second",
        "13",
    ),
)


def as_markdown() -> str:
    """The glossary as a page, by the alphabet."""
    lines = ["# Words and symbols", "", "Made from `minunclip/glossary.py`.", "", "| word | paper | here | what it means | notebook |", "|---|---|---|---|---|"]
    lines += [f"| {t.name} | {t.symbol} | {t.code} | {t.meaning} | {t.notebook} |" for t in sorted(TERMS, key=lambda term: term.name.lower())]
    return "\n".join(lines) + "\n"
