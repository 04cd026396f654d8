"""The shape of a model, apart from how it is trained: read from the JSON files of a Hugging Face folder, and written back to them.

Everything that builds modules, maps weights or counts FLOPs reads these classes, never the raw JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_bagel.common.json_files import read_json, read_json_as
from megatron_bagel.config.whole_numbers import require_sizes

LAYER_MODULES = ("Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer")


def _require(config: dict[str, Any], names: tuple[str, ...], what: str) -> None:
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ValueError(f"{what} config lacks {', '.join(missing)}; it has {', '.join(sorted(config))}")


@dataclass
class LLMArch:
    """Qwen2-style decoder. ``layer_module`` says which parts exist twice, once per expert."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    layer_module: str = "Qwen2MoTDecoderLayer"
    attention_bias: bool = True
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    #: Width of a head where it is not hidden size over heads (Qwen3).
    kv_channels: int | None = None
    #: Keys of the source file that this code does not interpret; written back unchanged.
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
        require_sizes(self, sizes if self.kv_channels is None else (*sizes, "kv_channels"), "LLM")
        if self.layer_module not in LAYER_MODULES:
            raise ValueError(f"layer_module {self.layer_module!r} is not one of {', '.join(LAYER_MODULES)}")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} must be even for rotary positions")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def has_gen_mlp(self) -> bool:
        """Whether VAE tokens have an MLP of their own (the MoE and the MoT layer)."""
        return self.layer_module != "Qwen2DecoderLayer"

    @property
    def has_gen_attention(self) -> bool:
        """Whether VAE tokens have attention weights and layer norms of their own (the MoT layer)."""
        return self.layer_module == "Qwen2MoTDecoderLayer"

    @classmethod
    def from_hf(cls, config: dict[str, Any], **override: Any) -> LLMArch:
        """From the content of a ``config.json`` of Qwen2 or an ``llm_config.json`` of BAGEL.

        ``override`` (``layer_module``, ``qk_norm``, ``tie_word_embeddings``, ...) wins over the file: a plain Qwen2 folder
        knows nothing of experts. A ``head_dim`` key counts in Qwen3's files alone: the original does not use it in Qwen2's.
        """
        known = {f.name for f in fields(cls)} - {"extra"}
        config = dict(config)
        # transformers 5 writes rope_theta inside rope_parameters.
        rope = config.get("rope_parameters") or {}
        if config.get("rope_theta") is None and rope.get("rope_theta") is not None:
            config["rope_theta"] = rope["rope_theta"]
        scaling = config.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
        if scaling:
            raise ValueError(f"LLM config asks for rope scaling {scaling}; only unscaled rotary positions are supported")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"LLM config has hidden_act {config['hidden_act']!r}; the decoder's MLP is SwiGLU (silu)")
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        _require(config, sizes, "LLM")
        if str(config.get("model_type", "")).startswith("qwen3"):
            config.setdefault("kv_channels", config.get("head_dim"))
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        # A plain Qwen2 folder has no qk_norm key and no such weights; whoever adds them says so through ``override``.
        config.setdefault("qk_norm", False)
        config.setdefault("layer_module", "Qwen2DecoderLayer")
        config.update({key: value for key, value in override.items() if value is not None})
        values = {key: value for key, value in config.items() if key in known and value is not None}
        return cls(**values, extra={key: value for key, value in config.items() if key not in known})

    def to_hf(self) -> dict[str, Any]:
        """The ``llm_config.json`` of the released folder layout."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        if self.attention_bias:
            ours.pop("attention_bias")  # Qwen2 always has it; its config has no such key
        kv_channels = ours.pop("kv_channels")
        if kv_channels is not None:
            ours |= {"model_type": "qwen3", "head_dim": kv_channels}
        defaults = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "attention_dropout": 0.0}
        return {**defaults, **self.extra, **ours}


@dataclass
class ViTArch:
    """SigLIP vision transformer as its own file describes it: ``num_hidden_layers`` counts the layers before ``vit_select_layer``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    rope: bool = False
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size")
        require_sizes(self, sizes, "ViT")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"ViT hidden_size {self.hidden_size} is not a multiple of its num_attention_heads {self.num_attention_heads}")
        if self.hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"ViT config has hidden_act {self.hidden_act!r}; SigLIP's gelu_pytorch_tanh is supported")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_positions(self) -> int:
        """Rows of the learned position table."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, config: dict[str, Any], **override: Any) -> ViTArch:
        """From a ``vit_config.json`` of BAGEL or a SigLIP ``config.json`` (a full SigLIP config's ``vision_config`` is found)."""
        known = {f.name for f in fields(cls)} - {"extra"}
        config = dict(config.get("vision_config") or config)
        _require(config, ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), "ViT")
        config.update({key: value for key, value in override.items() if value is not None})
        values = {key: value for key, value in config.items() if key in known and value is not None}
        return cls(**values, extra={key: value for key, value in config.items() if key not in known})

    def to_hf(self) -> dict[str, Any]:
        """The ``vit_config.json`` of the released folder layout."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {"model_type": "siglip_vision_model", "attention_dropout": 0.0, **self.extra, **ours}


@dataclass
class AutoencoderArch:
    """FLUX autoencoder; the defaults are the released one's. A file ``ae_config.json`` beside the weights overrides them."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3
    resolution: int = 256
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        require_sizes(self, ("ch", "num_res_blocks", "z_channels", "in_channels", "out_ch"), "autoencoder")
        self.ch_mult = tuple(self.ch_mult)
        if self.ch % 32:
            raise ValueError(f"autoencoder ch {self.ch} must be a multiple of 32, the number of GroupNorm groups")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> AutoencoderArch:
        """From the content of an ``ae_config.json``; a ``downsample`` key is checked, not stored. Raises on unknown keys."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(config) - known - {"downsample"})
        if unknown:
            raise ValueError(f"autoencoder config has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        arch = cls(**{key: value for key, value in config.items() if key in known})
        if config.get("downsample", arch.downsample) != arch.downsample:
            raise ValueError(f"autoencoder config says downsample {config['downsample']}; ch_mult {arch.ch_mult} gives {arch.downsample}")
        return arch

    def to_dict(self) -> dict[str, Any]:
        """The content of an ``ae_config.json``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "ch_mult": list(self.ch_mult), "downsample": self.downsample}

    @classmethod
    def beside(cls, weights: Path) -> AutoencoderArch:
        """Shape of the autoencoder whose weights are the file ``weights``: its ``ae_config.json``, or FLUX's without one."""
        path = Path(weights).parent / "ae_config.json"
        return read_json_as(cls.from_dict, path, "autoencoder") if path.is_file() else cls()


@dataclass
class BagelArch:
    """The whole model. ``vit`` is None without image understanding, ``autoencoder`` is None without image generation."""

    llm: LLMArch
    vit: ViTArch | None = None
    autoencoder: AutoencoderArch | None = None
    latent_patch_size: int = 2
    max_latent_size: int = 32
    vit_max_num_patch_per_side: int = 70
    vit_select_layer: int = -2
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    vit_rope: bool = False
    timestep_shift: float = 1.0

    def __post_init__(self) -> None:
        require_sizes(self, ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side"), "model")
        if self.connector_act != "gelu_pytorch_tanh":
            raise ValueError(f"connector_act {self.connector_act!r} is not supported; the released connector uses gelu_pytorch_tanh")
        if self.vit is not None:
            self._check_vit(self.vit)
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift is {self.timestep_shift}; it must be positive (1 leaves timesteps as drawn)")

    def _check_vit(self, vit: ViTArch) -> None:
        if not 1 <= self.n_vit_layers <= vit.num_hidden_layers:
            raise ValueError(
                f"vit_select_layer {self.vit_select_layer} of a ViT of {vit.num_hidden_layers} layers leaves {self.n_vit_layers} layers"
            )
        side = vit.image_size // vit.patch_size
        if not (self.vit_rope or vit.rope) and side != self.vit_max_num_patch_per_side:
            raise ValueError(
                f"vit_max_num_patch_per_side is {self.vit_max_num_patch_per_side}, but the ViT's learned positions form a grid of "
                f"side {side} (image_size {vit.image_size} / patch_size {vit.patch_size}); set --vit_max_num_patch_per_side {side}"
            )

    @property
    def n_vit_layers(self) -> int:
        """Vision layers that are built: a select layer of -1 keeps all, -2 drops the last one."""
        if self.vit is None:
            return 0
        n = self.vit.num_hidden_layers
        return n + 1 + self.vit_select_layer if self.vit_select_layer < 0 else self.vit_select_layer

    @property
    def latent_token_dim(self) -> int:
        """Channels of one latent token: a patch of ``latent_patch_size``² cells of ``z_channels``."""
        return self.latent_patch_size**2 * (self.autoencoder.z_channels if self.autoencoder else 0)

    @property
    def vae_token_pixels(self) -> int:
        """Pixels covered by one latent token along one side."""
        return self.latent_patch_size * (self.autoencoder.downsample if self.autoencoder else 8)

    @classmethod
    def from_hf_folder(
        cls, folder: str | Path, llm: dict[str, Any] | None = None, unstated: dict[str, Any] | None = None, **override: Any
    ) -> BagelArch:
        """From a folder in the released layout: ``llm_config.json``, ``vit_config.json`` and, where present, ``config.json``.

        ``override`` holds the settings of this class that flags give (``max_latent_size``, ...) and wins over ``config.json``,
        as the original takes them from flags alone; ``llm`` does the same for the decoder. ``unstated`` holds values for the settings
        that ``config.json`` does not mention. A folder that does not say which layer it has is taken for the released one: MoT
        layers with QK-norm. Raises ValueError naming the file that is missing or wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"model folder {folder} does not exist")
        top = read_json(folder / "config.json", "model folder") if (folder / "config.json").is_file() else {}
        known = {f.name for f in fields(cls)} - {"llm", "vit", "autoencoder"}
        values = {key: top[key] for key in known if top.get(key) is not None}
        values.update({key: value for key, value in (unstated or {}).items() if key not in top and value is not None})
        values.update({key: value for key, value in override.items() if value is not None})
        vit_file, ae_file = folder / "vit_config.json", folder / "ae.safetensors"
        has_vit, has_ae = top.get("visual_und", True) and vit_file.is_file(), top.get("visual_gen", True) and ae_file.is_file()
        released = {"layer_module": "Qwen2MoTDecoderLayer", "qk_norm": True}
        vit = read_json_as(ViTArch.from_hf, vit_file, "model folder") if has_vit else None
        if vit is not None and not (vit.rope or values.get("vit_rope")):
            values.setdefault("vit_max_num_patch_per_side", vit.image_size // vit.patch_size)
        return cls(
            llm=read_json_as(
                lambda config: LLMArch.from_hf({**released, **config}, **(llm or {})), folder / "llm_config.json", "model folder"
            ),
            vit=vit,
            autoencoder=AutoencoderArch.beside(ae_file) if has_ae else None,
            **values,
        )

    def to_hf(self) -> dict[str, Any]:
        """The top-level ``config.json`` of the released folder layout."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("llm", "vit", "autoencoder")}
        ae = self.autoencoder
        return {
            "model_type": "bagel",
            "architectures": ["Bagel"],
            "visual_gen": ae is not None,
            "visual_und": self.vit is not None,
            "llm_config": self.llm.to_hf(),
            "vit_config": self.vit.to_hf() if self.vit else None,
            "vae_config": {"z_channels": ae.z_channels, "downsample": ae.downsample} if ae else None,
            **own,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a training checkpoint; ``from_dict`` reads it back."""
        return {**self.to_hf(), "autoencoder": self.autoencoder.to_dict() if self.autoencoder else None}

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> BagelArch:
        """Inverse of ``to_dict``."""
        known = {f.name for f in fields(cls)} - {"llm", "vit", "autoencoder"}
        vit, ae = config.get("vit_config"), config.get("autoencoder")
        return cls(
            llm=LLMArch.from_hf(config["llm_config"]),
            vit=ViTArch.from_hf(vit) if vit else None,
            autoencoder=AutoencoderArch.from_dict(ae) if ae else None,
            **{key: config[key] for key in known if key in config},
        )
