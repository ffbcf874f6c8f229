"""A plain transcription of the released tokenizer: its key names and shapes, and what it computes from them.

Written from the description of the released checkpoints with nothing of the package under test. On a tiny
model it agrees with what the released code itself gave: all codes, and the other outputs up to rounding.
"""

import copy
import math

import torch
import torch.nn.functional as F

BACKBONE = {
    "model_type": "siglip",
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 20,
        "patch_size": 4,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 30,
        "max_position_embeddings": 6,
        "projection_size": 32,
        "layer_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": 1,
    },
}
_BRANCH = {
    "bottleneck_type": "rq",
    "ckpt_path": None,
    "code_shape": [5, 5, 3],
    "decay": 0.99,
    "embed_dim": 8,
    "latent_shape": [5, 5, 8],
    "n_embed": 24,
    "restart_unused_codes": True,
    "shared_codebook": True,
}
CONFIG = {
    "model_type": "rqvaesigliptransformer_model",
    "hidden_size": 32,
    "rqvaesiglip": {
        "model_type": "rqvaesiglip_model",
        "hidden_size": 32,
        "layer_recon": 2,
        "layer_sem": 3,
        "layer_shortcut": 1,
        "weight_shortcut": 0.6,
        "ddconfig": {
            "attn_resolutions": [6],
            "ch": 32,
            "ch_mult": [1, 2, 2],
            "decoder_in_channels": 64,
            "double_z": False,
            "dropout": 0.0,
            "in_channels": 3,
            "num_res_blocks": 1,
            "out_ch": 3,
            "resolution": 24,
        },
        "decoder_latent_shape": [6, 6],
        "vq_sem": {**_BRANCH, "bottleneck_type": "rq_ema"},
        "vq_pix": _BRANCH,
        "pretrained_model": "siglip",
    },
}


def config(shortcut=True, latent_shape=True):
    """Return a released config, with or without its optional parts."""
    result = copy.deepcopy(CONFIG)
    inner = result["rqvaesiglip"]
    if not shortcut:
        inner["layer_shortcut"] = None
    if not latent_shape:
        del inner["decoder_latent_shape"]
        inner["ddconfig"] |= {"resolution": 20, "attn_resolutions": [5]}
    return result


def shapes(released):
    """Return name -> shape of every tensor of a released checkpoint of this config."""
    inner, found = released["rqvaesiglip"], {}

    def affine(name, *shape):
        found[f"{name}.weight"] = shape
        found[f"{name}.bias"] = shape[:1]

    def layers(name, tower):
        width, hidden = tower["hidden_size"], tower["intermediate_size"]
        for i in range(tower["num_hidden_layers"]):
            layer = f"{name}.encoder.layers.{i}"
            for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                affine(f"{layer}.self_attn.{part}", width, width)
            affine(f"{layer}.mlp.fc1", hidden, width)
            affine(f"{layer}.mlp.fc2", width, hidden)
            affine(f"{layer}.layer_norm1", width)
            affine(f"{layer}.layer_norm2", width)

    def projection(name, a, b):
        wide = max(a, b)
        affine(f"{name}.norm1", a)
        affine(f"{name}.norm3", a)
        affine(f"{name}.norm2", b)
        for bias in ("q_bias", "v_bias", "zero_k_bias"):
            found[f"{name}.attn.{bias}"] = (wide,)
        found[f"{name}.attn.qkv.weight"] = (3 * wide, a)
        affine(f"{name}.attn.proj", b, b)
        affine(f"{name}.proj", b, a)
        affine(f"{name}.mlp.norm", b)
        affine(f"{name}.mlp.w0", 2 * b, b)
        affine(f"{name}.mlp.w1", 2 * b, b)
        affine(f"{name}.mlp.w2", b, 2 * b)

    def block(name, a, b, kernel=3):
        affine(f"{name}.norm1", a)
        affine(f"{name}.conv1", b, a, kernel, kernel)
        affine(f"{name}.norm2", b)
        affine(f"{name}.conv2", b, b, 3, 3)
        if a != b:
            affine(f"{name}.nin_shortcut", b, a, 1, 1)

    def attention(name, width):
        affine(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            affine(f"{name}.{part}", width, width, 1, 1)

    vision, text = BACKBONE["vision_config"], BACKBONE["text_config"]
    width, positions = vision["hidden_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    found |= {"siglip_model.logit_scale": (1,), "siglip_model.logit_bias": (1,)}
    name = "siglip_model.text_model"
    found[f"{name}.embeddings.token_embedding.weight"] = (text["vocab_size"], width)
    found[f"{name}.embeddings.position_embedding.weight"] = (text["max_position_embeddings"], width)
    layers(name, text)
    affine(f"{name}.final_layer_norm", width)
    affine(f"{name}.head", width, width)
    name = "siglip_model.vision_model"
    affine(f"{name}.embeddings.patch_embedding", width, 3, vision["patch_size"], vision["patch_size"])
    found[f"{name}.embeddings.position_embedding.weight"] = (positions, width)
    layers(name, vision)
    affine(f"{name}.post_layernorm", width)
    found[f"{name}.head.probe"] = (1, 1, width)
    found[f"{name}.head.attention.in_proj_weight"] = (3 * width, width)
    found[f"{name}.head.attention.in_proj_bias"] = (3 * width,)
    affine(f"{name}.head.attention.out_proj", width, width)
    affine(f"{name}.head.layernorm", width)
    affine(f"{name}.head.mlp.fc1", vision["intermediate_size"], width)
    affine(f"{name}.head.mlp.fc2", width, vision["intermediate_size"])
    branch = inner["vq_pix"]
    dim, size = branch["embed_dim"], branch["n_embed"]
    for each in ("sem", "pix"):
        projection(f"prequant_{each}", width, dim)
        projection(f"postquant_{each}", dim, width)
        for depth in range(branch["code_shape"][-1]):
            book = f"quantizer_{each}.codebooks.{depth}"
            found[f"{book}.weight"] = (size + 1, dim)
            found[f"{book}.cluster_size_ema"] = (size,)
            found[f"{book}.embed_ema"] = (size, dim)
    if inner["layer_shortcut"] is not None:
        projection("prequant_shortcut", width, dim)
    decoder = inner["ddconfig"]
    block("post_quant_conv", width, decoder["decoder_in_channels"], kernel=1)
    widths = [decoder["ch"] * m for m in decoder["ch_mult"]]
    affine("decoder.conv_in", widths[-1], decoder["decoder_in_channels"], 3, 3)
    block("decoder.mid.block_1", widths[-1], widths[-1])
    attention("decoder.mid.attn_1", widths[-1])
    block("decoder.mid.block_2", widths[-1], widths[-1])
    previous = widths[-1]
    for level in reversed(range(len(widths))):
        resolution = decoder["resolution"] // 2**level
        for i in range(decoder["num_res_blocks"] + 1):
            block(f"decoder.up.{level}.block.{i}", previous, widths[level])
            previous = widths[level]
            if resolution in decoder["attn_resolutions"]:
                attention(f"decoder.up.{level}.attn.{i}", previous)
        if level:
            affine(f"decoder.up.{level}.upsample.conv", previous, previous, 3, 3)
    affine("decoder.norm_out", widths[0])
    affine("decoder.conv_out", 3, widths[0], 3, 3)
    return found


def random_state(released, seed=0):
    """Return a released state dict with random values; the depths of a codebook are one tensor."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(released).items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
        state[name] = torch.randn(shape, generator=generator) / fan_in**0.5
        if "embedding.weight" in name:
            state[name] = torch.randn(shape, generator=generator)  # so unlike that many codes are used
        if "norm" in name and name.endswith("weight"):
            state[name] += 1.0
        if name.endswith("zero_k_bias"):
            state[name].zero_()
        if name.startswith("quantizer_"):
            book, _, kind = name.rpartition(".")
            if kind == "weight":
                state[name] = torch.randn(shape, generator=generator) * 0.5
                state[name][-1] = 0.0
            if kind == "cluster_size_ema":
                state[name] = torch.rand(shape, generator=generator) * 9
            state[name] = state[f"{book.rpartition('.')[0]}.0.{kind}"]
    return state


class Released:
    """Computes what the released code computes, from a released state dict alone."""

    def __init__(self, released, state, backbone=BACKBONE):
        self.config, self.state, self.backbone = released["rqvaesiglip"], state, backbone

    def affine(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def conv(self, name, x):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def group_norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    @staticmethod
    def attend(q, k, v, causal=False):
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores.softmax(-1) @ v

    def mlp(self, name, x):
        return self.affine(f"{name}.fc2", F.gelu(self.affine(f"{name}.fc1", x), approximate="tanh"))

    def layer(self, name, x, heads):
        def split(t):
            return t.unflatten(-1, (heads, -1)).transpose(1, 2)

        n = self.norm(f"{name}.layer_norm1", x, 1e-6)
        q, k, v = (split(self.affine(f"{name}.self_attn.{p}_proj", n)) for p in "qkv")
        x = x + self.affine(f"{name}.self_attn.out_proj", self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.layer_norm2", x, 1e-6))

    def projection(self, name, x, causal):
        state = self.state
        a, b = x.shape[-1], state[f"{name}.proj.bias"].shape[0]
        heads = max(a, b) // min(a, b)
        n = self.norm(f"{name}.norm1", x, 1e-5)
        q_bias, v_bias = state[f"{name}.attn.q_bias"], state[f"{name}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros(max(a, b)), v_bias])
        qkv = F.linear(n, state[f"{name}.attn.qkv.weight"], bias)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        out = self.attend(q, k, v, causal)
        out = out.mean(1) if a > b else out.transpose(1, 2).flatten(2)
        y = self.affine(f"{name}.proj", self.norm(f"{name}.norm3", x, 1e-5))
        y = y + self.affine(f"{name}.attn.proj", out)
        n = self.norm(f"{name}.mlp.norm", self.norm(f"{name}.norm2", y, 1e-5), 1e-6)
        gated = F.gelu(self.affine(f"{name}.mlp.w0", n), approximate="tanh") * self.affine(
            f"{name}.mlp.w1", n
        )
        return y + self.affine(f"{name}.mlp.w2", gated)

    def quantize(self, name, z):
        """Return codes [B, N, D], the quantized latents and the commitment loss."""
        residual, total, codes, losses = z.clone(), torch.zeros_like(z), [], []
        for depth in range(self.config["vq_pix"]["code_shape"][-1]):
            book = self.state[f"{name}.codebooks.{depth}.weight"][:-1]
            distance = (residual.double().unsqueeze(-2) - book.double()).square().sum(-1)
            codes.append(distance.argmin(-1))
            residual = residual - book[codes[-1]]
            total = total + book[codes[-1]]
            losses.append((z - total).square().mean())
        return torch.stack(codes, -1), total, torch.stack(losses).mean()

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.group_norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.group_norm(f"{name}.norm2", h)))
        shortcut = f"{name}.nin_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.state else x)

    def spatial_attention(self, name, x):
        n = self.group_norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{p}", n).flatten(2).transpose(1, 2) for p in "qkv")
        return x + self.conv(f"{name}.proj_out", self.attend(q, k, v).transpose(1, 2).reshape(x.shape))

    def decode(self, x):
        decoder = self.config["ddconfig"]
        x = self.block("decoder.mid.block_1", self.conv("decoder.conv_in", x))
        x = self.block("decoder.mid.block_2", self.spatial_attention("decoder.mid.attn_1", x))
        for level in reversed(range(len(decoder["ch_mult"]))):
            for i in range(decoder["num_res_blocks"] + 1):
                x = self.block(f"decoder.up.{level}.block.{i}", x)
                if f"decoder.up.{level}.attn.{i}.norm.weight" in self.state:
                    x = self.spatial_attention(f"decoder.up.{level}.attn.{i}", x)
            if level:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.up.{level}.upsample.conv", x)
        return self.conv("decoder.conv_out", F.silu(self.group_norm("decoder.norm_out", x)))

    def pool(self, x):
        name = "siglip_model.vision_model.head"
        state, heads = self.state, self.backbone["vision_config"]["num_attention_heads"]
        weights = state[f"{name}.attention.in_proj_weight"].chunk(3)
        biases = state[f"{name}.attention.in_proj_bias"].chunk(3)
        probe = state[f"{name}.probe"].expand(len(x), -1, -1)
        q, k, v = (
            F.linear(t, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for t, w, b in zip((probe, x, x), weights, biases)
        )
        x = self.affine(f"{name}.attention.out_proj", self.attend(q, k, v).transpose(1, 2).flatten(2))
        return (x + self.mlp(f"{name}.mlp", self.norm(f"{name}.layernorm", x, 1e-6)))[:, 0]

    def forward(self, images):
        """Return what the released code makes of images [B, 3, H, W]."""
        config, vision = self.config, self.backbone["vision_config"]
        name, heads = "siglip_model.vision_model", vision["num_attention_heads"]
        patches = F.conv2d(
            images,
            self.state[f"{name}.embeddings.patch_embedding.weight"],
            self.state[f"{name}.embeddings.patch_embedding.bias"],
            stride=vision["patch_size"],
        )
        side = patches.shape[-1]
        x = patches.flatten(2).transpose(1, 2) + self.state[f"{name}.embeddings.position_embedding.weight"]
        hidden = [x]
        for i in range(vision["num_hidden_layers"]):
            hidden.append(self.layer(f"{name}.encoder.layers.{i}", hidden[-1], heads))
        pixel = self.projection("prequant_pix", hidden[config["layer_recon"]], causal=False)
        if config["layer_shortcut"] is not None:
            shallow = self.projection("prequant_shortcut", hidden[config["layer_shortcut"]], causal=False)
            pixel = pixel + config["weight_shortcut"] * shallow
        semantic = self.projection("prequant_sem", hidden[config["layer_sem"]], causal=False)
        codes_pixel, pixel, loss_pixel = self.quantize("quantizer_pix", pixel)
        codes_semantic, semantic, loss_semantic = self.quantize("quantizer_sem", semantic)
        grid = self.projection("postquant_pix", pixel, causal=True).transpose(1, 2)
        grid = grid.unflatten(2, (side, side))
        if "decoder_latent_shape" in config:
            grid = F.interpolate(grid, config["decoder_latent_shape"], mode="bilinear")
        features = self.projection("postquant_sem", semantic, causal=True)
        last = features
        for i in range(config["layer_sem"], vision["num_hidden_layers"]):
            last = self.layer(f"{name}.encoder.layers.{i}", last, heads)
        return {
            "codes_pixel": codes_pixel,
            "codes_semantic": codes_semantic,
            "reconstruction": self.decode(self.block("post_quant_conv", grid)),
            "semantic_features": features,
            "pooled": self.pool(self.norm(f"{name}.post_layernorm", last, 1e-6)),
            "commitment_loss_pixel": loss_pixel,
            "commitment_loss_semantic": loss_semantic,
        }

    def encode_text(self, ids):
        """Return the text vectors of token ids [B, T]."""
        name, heads = "siglip_model.text_model", self.backbone["text_config"]["num_attention_heads"]
        x = self.state[f"{name}.embeddings.token_embedding.weight"][ids]
        x = x + self.state[f"{name}.embeddings.position_embedding.weight"][: ids.shape[1]]
        for i in range(self.backbone["text_config"]["num_hidden_layers"]):
            x = self.layer(f"{name}.encoder.layers.{i}", x, heads)
        return self.affine(f"{name}.head", self.norm(f"{name}.final_layer_norm", x, 1e-6)[:, -1])
