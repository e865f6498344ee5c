"""Small networks of many kinds, which no threshold of nw.find_invariances was tuned on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

__all__ = ["NETWORKS", "Network"]

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@dataclass
class Network:
    """How to build a network, its batches, and how it is called."""

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    forward: Forward = call


NETWORKS: dict[str, Network] = {}


# ---------------------------------------------------------------- transformers, from configurations

_SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "dim": 32,
    "emb_dim": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "n_inner": 48,
    "dff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "hidden_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "state_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 32,
    "patch_size": 8,
    "use_cache": False,
}


def _small(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, and small sizes for what they leave open."""
    import transformers

    cls = getattr(transformers, model).config_class
    known = vars(cls())
    small = {k: v for k, v in _SMALL.items() if k in known or k in getattr(cls, "attribute_map", {})}
    mapped = set(getattr(cls, "attribute_map", {}))
    small = {k: v for k, v in small.items() if k not in mapped or k in known}
    small = {k: v for k, v in small.items() if not isinstance(known.get(k), list)}
    return small | settings


def transformers_model(model: str, settings: dict[str, Any]) -> nn.Module:
    """Return a model of transformers with these settings, whose experts run in float64."""
    import transformers

    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, model)
    net: Any = cls(cls.config_class(**settings))
    if hasattr(net, "set_experts_implementation"):
        net.set_experts_implementation("eager")
    return net  # type: ignore[no-any-return]


def _build(model: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: transformers_model(model, _small(model, settings))


def token_ids() -> list[Any]:
    return [torch.randint(3, 60, (3, 8)) for _ in range(2)]


def _pixels(size: int, channels: int = 3) -> Callable[[], list[Any]]:
    return lambda: [torch.randn(4, channels, size, size) for _ in range(2)]


def logits(model: nn.Module, batch: Any) -> Any:
    return model(batch).logits


def hidden(model: nn.Module, batch: Any) -> Any:
    return model(batch).last_hidden_state


def translated(model: nn.Module, batch: Any) -> Any:
    return model(input_ids=batch, decoder_input_ids=batch.flip(0)).logits


def text(model: str, forward: Forward = logits, **settings: Any) -> None:
    NETWORKS[model] = Network(_build(model, settings), token_ids, forward)


def image(model: str, size: int = 32, forward: Forward = logits, **settings: Any) -> None:
    NETWORKS[model] = Network(_build(model, settings), _pixels(size), forward)


_SPECIAL: dict[str, dict[str, Any]] = {
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "DeepseekV3ForCausalLM": {"num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 1},
}
for _name in [
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "ElectraForMaskedLM",
    "MPNetForMaskedLM",
    "DebertaV2ForMaskedLM",
    "XLMRobertaForMaskedLM",
    "ModernBertForMaskedLM",
    "NomicBertModel",
    "XLNetLMHeadModel",
    "GPTNeoForCausalLM",
    "GPTJForCausalLM",
    "OPTForCausalLM",
    "CodeGenForCausalLM",
    "BioGptForCausalLM",
    "CTRLLMHeadModel",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma3ForCausalLM",
    "PhiForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "OlmoForCausalLM",
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "GlmForCausalLM",
    "Glm4ForCausalLM",
    "GraniteForCausalLM",
    "HeliumForCausalLM",
    "SmolLM3ForCausalLM",
    "PersimmonForCausalLM",
    "NemotronForCausalLM",
    "XGLMForCausalLM",
    "ArceeForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "MptForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "OlmoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GraniteMoeForCausalLM",
    "PhimoeForCausalLM",
    "GptOssForCausalLM",
    "Glm4MoeForCausalLM",
    "MambaForCausalLM",
    "FalconMambaForCausalLM",
    "RecurrentGemmaForCausalLM",
]:
    text(_name, hidden if _name == "NomicBertModel" else logits, **_SPECIAL.get(_name, {}))
text("Mamba2ForCausalLM", expand=2, head_dim=16, num_heads=4, n_groups=2, chunk_size=4)
text("FunnelForMaskedLM", block_sizes=[1, 1, 1], num_decoder_layers=1, d_head=8, d_inner=48)
text("SqueezeBertForMaskedLM")
for _name in [
    "BartForConditionalGeneration",
    "MBartForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "MarianMTModel",
    "M2M100ForConditionalGeneration",
    "BlenderbotForConditionalGeneration",
    "UMT5ForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration",
]:
    text(_name, translated, decoder_start_token_id=1)

_CLASSIFY = "ForImageClassification"
image(f"ViT{_CLASSIFY}")
image(f"DeiT{_CLASSIFY}")
image(f"Beit{_CLASSIFY}")
image(f"ViTMSN{_CLASSIFY}")
image("Dinov2Model", forward=hidden)
image(f"Swinv2{_CLASSIFY}", embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, patch_size=2)
image(f"ConvNextV2{_CLASSIFY}", 64, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], patch_size=4)
image(f"MobileNetV1{_CLASSIFY}", depth_multiplier=0.25)
image(f"PoolFormer{_CLASSIFY}", 64, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], patch_size=7)
image(
    f"PvtV2{_CLASSIFY}",
    64,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 2, 2, 4],
)
image(f"EfficientNet{_CLASSIFY}", 64, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320)
image(f"FocalNet{_CLASSIFY}", 32, embed_dim=12, depths=[1, 1], patch_size=2, hidden_sizes=[12, 24])
image(f"Bit{_CLASSIFY}", 64, embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4)
image(f"SwiftFormer{_CLASSIFY}", 64, depths=[1, 1, 1, 1], embed_dims=[8, 12, 16, 20])
image(f"MobileViT{_CLASSIFY}", 64, hidden_sizes=[16, 16, 24], neck_hidden_sizes=[8, 8, 12, 12, 16, 16, 24])
image(
    "SegformerForSemanticSegmentation",
    64,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1] * 4,
    decoder_hidden_size=16,
    num_attention_heads=[1, 1, 2, 2],
)


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    words = small | {"vocab_size": 61, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    net: nn.Module = CLIPModel(
        CLIPConfig(
            text_config=words, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16
        )
    )
    return net


NETWORKS["CLIPModel"] = Network(
    _clip,
    lambda: [(torch.randint(3, 60, (4, 8)), torch.randn(4, 3, 32, 32)) for _ in range(2)],
    lambda model, b: model(input_ids=b[0], pixel_values=b[1]).logits_per_image,
)


# ---------------------------------------------------------------- written here


def add(batches: Callable[[], list[Any]]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def named(cls: type[nn.Module]) -> type[nn.Module]:
        NETWORKS[cls.__name__] = Network(cls, batches)
        return cls

    return named


def vectors(*shape: int) -> Callable[[], list[Any]]:
    return lambda: [torch.randn(shape) for _ in range(2)]


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


@add(vectors(4, 3, 16, 16))
class VGGWithNorm(nn.Sequential):
    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for i, o in ((3, 8), (8, 12), (12, 12)):
            layers += [conv(i, o), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5))


class PreActivation(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(i), conv(i, o, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(o), conv(o, o, bias=False)
        self.skip = conv(i, o, 1, bias=False) if i != o else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.n1(x))
        y: Tensor = self.c2(F.relu(self.n2(self.c1(h))))
        return y + (x if self.skip is None else self.skip(h))


@add(vectors(4, 3, 8, 8))
class PreActivationResNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 6, bias=False),
            PreActivation(6, 6),
            PreActivation(6, 10),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(10, 4),
        )


@add(vectors(4, 3, 8, 8))
class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(4))
        self.convs = nn.ModuleList(conv(6 + 4 * i, 4, bias=False) for i in range(3))
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.convs, strict=False):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        out: Tensor = self.head(F.relu(self.norms[3](torch.cat(features, 1))).mean((2, 3)))
        return out


@add(vectors(4, 3, 8, 8))
class Fire(nn.Module):
    """SqueezeNet's module: two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.one, self.three, self.last = (
            conv(3, 4, 1),
            conv(4, 6, 1),
            conv(4, 8),
            conv(14, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        out: Tensor = self.last(torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1))
        return out.mean((2, 3))


@add(vectors(4, 3, 8, 8))
class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b1, self.b2, self.c = conv(3, 4, 1), conv(3, 4, 1), conv(4, 6, 5), conv(3, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.a(x)), F.relu(self.norm(self.b2(F.relu(self.b1(x)))))
        c = F.relu(self.c(F.max_pool2d(x, 3, 1, 1)))
        out: Tensor = self.head(torch.cat([a, b, c], 1).mean((2, 3)))
        return out


@add(vectors(4, 3, 8, 8))
class ShuffleUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = conv(3, 8, bias=False), conv(4, 4, 1, bias=False)
        self.d, self.b = conv(4, 4, groups=4, bias=False), conv(4, 4, 1, bias=False)
        self.n0, self.n1, self.n2, self.n3 = (nn.BatchNorm2d(c) for c in (8, 4, 4, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        kept, x = F.relu(self.n0(self.stem(x))).chunk(2, 1)
        x = F.relu(self.n3(self.b(self.n2(self.d(F.relu(self.n1(self.a(x))))))))
        x = torch.stack([kept, x], 2).flatten(1, 2)  # channel shuffle
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@add(vectors(4, 3, 8, 8))
class InvertedResidual(nn.Module):
    """Expansion, depthwise, squeeze-excite, projection; swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = conv(3, 6, bias=False), nn.BatchNorm2d(6)
        self.up, self.n1 = conv(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.deep, self.n2 = conv(12, 12, groups=12, bias=False), nn.BatchNorm2d(12)
        self.s1, self.s2 = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.down, self.n3, self.head = conv(12, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.n0(self.stem(x)))
        h = F.silu(self.n2(self.deep(F.silu(self.n1(self.up(x))))))
        h = h * self.s2(F.silu(self.s1(h.mean((2, 3), keepdim=True)))).sigmoid()
        out: Tensor = self.head((x + self.n3(self.down(h))).mean((2, 3)))
        return out


class TimeBlock(nn.Module):
    """The residual block of a diffusion U-Net."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.n1, self.c1, self.time = nn.GroupNorm(2, i), conv(i, o), nn.Linear(8, o)
        self.n2, self.c2, self.skip = nn.GroupNorm(2, o), conv(o, o), conv(i, o, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.c1(F.silu(self.n1(x))) + self.time(F.silu(t))[:, :, None, None]
        out: Tensor = self.skip(x) + self.c2(F.silu(self.n2(h)))
        return out


def noised() -> list[Any]:
    return [(torch.randn(4, 3, 8, 8), torch.rand(4, 1)) for _ in range(2)]


@add(noised)
class DiffusionUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2, self.stem = nn.Linear(2, 8), nn.Linear(8, 8), conv(3, 6)
        self.down, self.mid, self.up = TimeBlock(6, 8), TimeBlock(8, 8), TimeBlock(14, 6)
        self.norm, self.out = nn.GroupNorm(2, 6), conv(6, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.t2(F.silu(self.t1(torch.cat([t.sin(), t.cos()], 1))))
        x = self.stem(x)
        h = self.mid(self.down(F.avg_pool2d(x, 2), t), t)
        h = self.up(torch.cat([F.interpolate(h, scale_factor=2), x], 1), t)
        out: Tensor = self.out(F.silu(self.norm(h)))
        return out


@add(noised)
class ReluUNet(nn.Module):
    """Shortcuts that are sums of a stem and a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.r1, self.r2, self.down = conv(3, 6), conv(6, 6), conv(6, 6), conv(6, 8)
        self.mid, self.up, self.out = conv(8, 8), conv(14, 5), conv(5, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.stem(x * t[:, :, None, None])
        x = F.relu(x + self.r2(F.relu(self.r1(x))))
        h = F.relu(self.mid(F.relu(self.down(F.avg_pool2d(x, 2)))))
        out: Tensor = self.out(F.relu(self.up(torch.cat([F.interpolate(h, scale_factor=2), x], 1))))
        return out


@add(lambda: [(torch.randn(4, 6, 12), torch.rand(4, 1)) for _ in range(2)])
class DiT(nn.Module):
    """A diffusion transformer: adaptive layer norm, zero-initialised as published."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.t, self.ada = nn.Linear(12, 16), nn.Linear(1, 16), nn.Linear(16, 96)
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.f1, self.f2, self.last = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 12)
        nn.init.zeros_(self.ada.weight)
        nn.init.zeros_(self.ada.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.x(x)
        s1, b1, g1, s2, b2, g2 = self.ada(F.silu(self.t(t)))[:, None].chunk(6, -1)
        q, k, v = (
            p.unflatten(-1, (2, 8)).transpose(1, 2)
            for p in self.qkv(F.layer_norm(x, (16,)) * (1 + s1) + b1).chunk(3, -1)
        )
        x = x + g1 * self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + g2 * self.f2(F.gelu(self.f1(F.layer_norm(x, (16,)) * (1 + s2) + b2)))
        out: Tensor = self.last(F.layer_norm(x, (16,)))
        return out


@add(vectors(16, 5))
class FlowMatching(nn.Module):
    """The time is drawn inside."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.t, self.h, self.o = (
            nn.Linear(5, 12),
            nn.Linear(1, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        t = torch.rand(len(x), 1)
        noise = torch.randn_like(x)
        h = F.relu(self.x((1 - t) * noise + t * x) + self.t(t))
        out: Tensor = self.o(F.relu(self.h(h))) - (x - noise)
        return out


def pairs() -> list[Any]:
    return [(torch.randn(8, 6), torch.randn(8, 6)) for _ in range(2)]


class Tower(nn.Sequential):
    def __init__(self, last: int) -> None:
        super().__init__(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, last))


@add(pairs)
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Tower(4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = (self.f(a) - self.f(b)).square().sum(-1)
        return out


@add(pairs)
class Contrastive(nn.Module):
    """Two towers, cosines, a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.scale = Tower(4), Tower(4), nn.Parameter(torch.tensor(2.6))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scale.exp() * F.normalize(self.f(a), dim=-1) @ F.normalize(self.g(b), dim=-1).T


@add(pairs)
class RewardModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.n, self.r = Tower(8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.r(self.n(self.f(a))) - self.r(self.n(self.f(b)))
        return F.logsigmoid(out)


@add(pairs)
class Triplet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(self.f(a), self.f(b))


@add(vectors(8, 6))
class VariationalAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.mu, self.var = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)
        self.d, self.o = nn.Linear(3, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.e(x))
        mu, var = self.mu(h), self.var(h)
        z = mu + torch.randn_like(mu) * (0.5 * var).exp()
        return self.o(F.relu(self.d(z))), (mu.square() + var.exp() - var).sum(-1)


@add(vectors(4, 3, 8, 8))
class SpectralDiscriminator(nn.Sequential):
    def __init__(self) -> None:
        sn = parametrizations.spectral_norm
        super().__init__(
            sn(conv(3, 6)),
            nn.LeakyReLU(0.2),
            sn(conv(6, 8)),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            sn(nn.Linear(512, 1)),
        )


@add(vectors(4, 3, 8, 8))
class StyleGenerator(nn.Module):
    """Modulated, demodulated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.style = nn.Linear(3, 8), nn.Linear(8, 4)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.zeros(6))
        self.first, self.rgb = conv(3, 4), conv(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        style = self.style(F.leaky_relu(self.map(x.mean((2, 3))), 0.2)) + 1
        w = self.weight * style[:, None, :, None, None]
        w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        h = F.leaky_relu(self.first(x), 0.2)
        h = F.conv2d(h.reshape(1, -1, 8, 8), w.flatten(0, 1), padding=1, groups=len(x)).view(len(x), 6, 8, 8)
        out: Tensor = self.rgb(F.leaky_relu(h + self.bias[:, None, None], 0.2))
        return out


def words() -> list[Any]:
    return [torch.randint(0, 13, (4, 7)) for _ in range(2)]


@add(words)
class RecurrentLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn, self.head = (
            nn.Embedding(13, 8),
            nn.LSTM(8, 10, 2, batch_first=True),
            nn.Linear(10, 13),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(self.emb(x))[0])
        return out


@add(words)
class BidirectionalGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn = nn.Embedding(13, 8), nn.GRU(8, 6, batch_first=True, bidirectional=True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.rnn(self.emb(x))[0]).amax(1))
        return out


@add(vectors(4, 3, 20))
class TemporalConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wn = parametrizations.weight_norm
        self.a, self.b = wn(nn.Conv1d(3, 8, 3, dilation=2)), wn(nn.Conv1d(8, 8, 3, padding=1))
        self.skip, self.head = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.a(x))))
        out: Tensor = self.head(F.relu(h + self.skip(x)[..., 2:-2]))
        return out


@add(vectors(4, 3, 32))
class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.both = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 12, 3, padding=1)
        self.res, self.skip, self.e1, self.e2 = (nn.Conv1d(6, 6, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.both(x).chunk(2, 1)
        z = a.tanh() * b.sigmoid()
        out: Tensor = self.e2(F.relu(self.e1(F.relu(self.skip(z) + self.res(z + x)))))
        return out


@add(vectors(4, 2, 12))
class FourierOperator(nn.Module):
    """Complex weights on the lowest modes."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.local, self.out = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 1), nn.Conv1d(6, 1, 1)
        self.modes = nn.Parameter(torch.randn(6, 6, 4, dtype=torch.cfloat) / 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        low = torch.einsum("bim,iom->bom", torch.fft.rfft(x)[..., :4], self.modes)
        out: Tensor = self.out(F.relu(torch.fft.irfft(F.pad(low, (0, 3)), n=12) + self.local(x)))
        return out


@add(vectors(3, 10, 4))
class DiagonalStateSpace(nn.Module):
    """A diagonal linear recurrence with gates."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6))
        self.b, self.c, self.gate, self.o = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        decay, h, states = self.a.sigmoid(), x.new_zeros(len(x), 6), []
        for u in self.b(x).unbind(1):
            h = decay * h + u
            states.append(h)
        out: Tensor = self.o(self.c(torch.stack(states, 1)) * F.silu(self.gate(x)))
        return out


@add(vectors(3, 6, 8))
class MLPMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.t1, self.t2 = nn.LayerNorm(8), nn.Linear(6, 12), nn.Linear(12, 6)
        self.n2, self.c1, self.c2, self.head = (
            nn.LayerNorm(8),
            nn.Linear(8, 16),
            nn.Linear(16, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.t2(F.gelu(self.t1(self.n1(x).mT))).mT
        x = x + self.c2(F.gelu(self.c1(self.n2(x))))
        out: Tensor = self.head(x.mean(1))
        return out


@add(vectors(3, 6, 8))
class SpatialGating(nn.Module):
    """gMLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate_norm = nn.LayerNorm(8), nn.Linear(8, 16), nn.LayerNorm(8)
        self.mix, self.down, self.head = nn.Linear(6, 6), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        x = x + self.down(u * self.mix(self.gate_norm(v).mT).mT)
        out: Tensor = self.head(x)
        return out


@add(vectors(3, 6, 8))
class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.relu(self.q(x)), F.relu(self.k(x)), self.v(x)
        out: Tensor = self.o((q @ (k.mT @ v)) / (q @ k.sum(1)[..., None] + 1e-6))
        return out


@add(vectors(3, 6, 8))
class PartialRotary(nn.Module):
    """Queries and keys of two projections, rotated in part."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.rope, self.o = (
            nn.Linear(8, 16),
            nn.Linear(8, 20),
            nn.Linear(8, 4),
            nn.Linear(12, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 10)).transpose(1, 2).split([4, 6], -1)
        place = torch.arange(6, dtype=x.dtype)[:, None]

        def turn(t: Tensor) -> Tensor:
            a, b = t[..., :2], t[..., 2:]
            return torch.cat([a * place.cos() - b * place.sin(), b * place.cos() + a * place.sin()], -1)

        shared = turn(self.rope(x))[:, None].expand(-1, 2, -1, -1)
        q, k = torch.cat([q[..., :4], turn(q[..., 4:])], -1), torch.cat([k, shared], -1)
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


@add(vectors(8, 6))
class LowRankAdapter(nn.Module):
    """A frozen base and LoRA, before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 8, bias=False).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(8, 2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.base(x) + x @ self.a.T @ self.b.T))
        return out


@add(vectors(8, 6))
class WeightDecomposedAdapter(nn.Module):
    """DoRA: a magnitude for each row of a normalised sum."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(8, 6), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 2) * 0.1)
        self.magnitude, self.head = nn.Parameter(torch.ones(8, 1)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.base + self.b @ self.a
        w = self.magnitude * w / w.norm(dim=1, keepdim=True)
        out: Tensor = self.head(F.relu(x @ w.T))
        return out


@add(lambda: [(torch.randint(0, 9, (8,)), torch.randint(0, 9, (8,)), torch.randn(8, 4)) for _ in range(2)])
class Recommender(nn.Module):
    """DLRM: dot products of embeddings and a bottom network."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(9, 6), nn.Embedding(9, 6)
        self.bottom, self.top1, self.top2 = nn.Linear(4, 6), nn.Linear(9, 8), nn.Linear(8, 1)

    def forward(self, user: Tensor, item: Tensor, x: Tensor) -> Tensor:
        u, i, d = self.users(user), self.items(item), F.relu(self.bottom(x))
        dots = torch.stack([(u * i).sum(1), (u * d).sum(1), (i * d).sum(1)], 1)
        out: Tensor = self.top2(F.relu(self.top1(torch.cat([d, dots], 1))))
        return out


@add(vectors(3, 6, 4))
class GraphAttention(nn.Module):
    """A complete graph; leaky ReLU in the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.left, self.right, self.head = (
            nn.Linear(4, 8, bias=False),
            nn.Linear(8, 1, bias=False),
            nn.Linear(8, 1, bias=False),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.w(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).mT, 0.2)
        out: Tensor = self.head(F.elu(scores.softmax(-1) @ h))
        return out


@add(vectors(3, 6, 4))
class DeepSet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Tower(8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.inner[0] = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(F.relu(self.inner(x)).sum(1))
        return out


@add(vectors(16, 3))
class RadianceField(nn.Module):
    """Fourier features, a shortcut in the middle, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.density, self.c, self.rgb = (
            nn.Linear(6, 12),
            nn.Linear(18, 12),
            nn.Linear(12, 1),
            nn.Linear(15, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = torch.cat([x.sin(), x.cos()], 1)
        h = F.relu(self.b(torch.cat([F.relu(self.a(f)), f], 1)))
        return self.density(h), self.rgb(F.relu(self.c(torch.cat([h, x], 1)))).sigmoid()


@add(vectors(16, 4))
class Sine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c((3 * self.b((3 * self.a(x)).sin())).sin())
        return out


@add(vectors(16, 6))
class SparseExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 10) / 3), nn.Parameter(torch.randn(4, 10, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2, -1)
        weights = torch.zeros(len(x), 4, dtype=x.dtype).scatter(
            1, chosen, gates / gates.sum(-1, keepdim=True)
        )
        y = F.relu(torch.einsum("bi,eih->ebh", x, self.up))
        return torch.einsum("ebh,eho,be->bo", y, self.down, weights)


@add(vectors(16, 6))
class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h, self.t, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.t(x).sigmoid()
        out: Tensor = self.out(gate * F.relu(self.h(x)) + (1 - gate) * x)
        return out


@add(vectors(16, 6))
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 24), nn.Linear(8, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).unflatten(-1, (8, 3)).amax(-1)
        out: Tensor = self.c(self.b(x).unflatten(-1, (6, 2)).amax(-1))
        return out


@add(vectors(16, 6))
class NormalisationFree(nn.Module):
    """Scaled weight standardisation with gains of shape (out, 1), and a skip gain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.ga, self.gb, self.skip = (
            nn.Parameter(torch.ones(8, 1)),
            nn.Parameter(torch.ones(8, 1)),
            nn.Parameter(torch.zeros(())),
        )

    def forward(self, x: Tensor) -> Tensor:
        def standard(w: Tensor, gain: Tensor) -> Tensor:
            w = w - w.mean(1, keepdim=True)
            return gain * w * torch.rsqrt(w.var(1, keepdim=True) * w.shape[1] + 1e-12)

        h = F.relu(F.linear(x, standard(self.a.weight, self.ga), self.a.bias))
        h = h + self.skip * F.relu(F.linear(h, standard(self.b.weight, self.gb), self.b.bias))
        out: Tensor = self.o(h)
        return out


@add(vectors(16, 4))
class OrdinaryDifferentialEquation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.time, self.g = nn.Linear(4, 8), nn.Linear(1, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        t = x.new_zeros(1, 1)
        for _ in range(10):
            x = x + 0.1 * self.g((self.f(x) + self.time(t)).tanh())
            t = t + 0.1
        return x


@add(vectors(8, 6))
class ArcFace(nn.Module):
    """Cosines against class centres, with a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = Tower(8), nn.BatchNorm1d(8, affine=False)
        self.centres, self.scale = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(self.norm(self.f(x)), dim=1) @ F.normalize(self.centres, dim=1).T


@add(vectors(4, 3, 16, 16))
class FeaturePyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.l1, self.l2, self.out = (
            conv(3, 6),
            conv(6, 8),
            conv(6, 5, 1),
            conv(8, 5, 1),
            conv(5, 4),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = F.relu(self.c1(x))
        b = F.relu(self.c2(F.avg_pool2d(a, 2)))
        top = self.l2(b)
        return self.out(F.relu(self.l1(a) + F.interpolate(top, scale_factor=2))), self.out(F.relu(top))


@add(vectors(8, 6))
class Ensemble(nn.Module):
    """Two copies averaged, one of them frozen (a teacher)."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Tower(4)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.student(x) - self.teacher(x).detach()
        return out


@add(vectors(3, 6, 8))
class TalkingHeads(nn.Module):
    """Heads mixed before and after the softmax; layer scale; QK-norm with gains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(8), nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.before, self.after = nn.Linear(2, 2), nn.Linear(2, 2)
        self.qn, self.kn, self.scale = nn.RMSNorm(4), nn.RMSNorm(4), nn.Parameter(1e-4 * torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).unbind(-3))
        scores = self.qn(q) @ self.kn(k).mT
        scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        scores = self.after(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = self.o((scores @ v).transpose(1, 2).flatten(2))
        return x + self.scale * out
