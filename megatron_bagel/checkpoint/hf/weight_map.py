# SPDX-License-Identifier: Apache-2.0
"""One table maps our parameters to the tensors of the released BAGEL format; both directions and every layer kind read it.

Terms: a *row* is a pattern over layers ``{i}``, expert kinds (``{e}`` = und|gen in our names, ``{x}`` = ""|"_moe_gen" in the Hugging
Face names) and the sparse experts ``{j}`` of an MLP, which have the names of Qwen3-MoE. An *entry* is a row expanded for one layer and
expert of a given architecture. Tensors here are always full; shard.py slices them for tensor parallelism.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_bagel.config.architecture import BagelArch

TIMESTEP_FREQUENCIES = 256  # width of the timestep sinusoid
EXPERT_SUFFIX = {"und": "", "gen": "_moe_gen"}


class Part(NamedTuple):
    """One Hugging Face tensor of a row: name pattern and shape in the symbols of ``dimensions``."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A row of the table: our ``name`` and its Hugging Face ``parts``.

    ``op`` is copy, qkv or gate_up. ``separate_in`` is the part that a layer kind must have once per expert for {e} to include gen.
    """

    name: str
    parts: tuple[Part, ...]
    op: str = "copy"
    separate_in: str = "never"  # never | attention (MoT only) | mlp (MoT and MoE)
    when: Callable[[BagelArch], bool] = lambda arch: True
    layers: str = "none"  # none | llm | vit
    mlp: str = "any"  # any | dense | sparse: the MLPs that a row belongs to; sparse rows with {j} exist once per sparse expert


def _has_generation(arch: BagelArch) -> bool:
    return arch.autoencoder is not None


def _has_vision(arch: BagelArch) -> bool:
    return arch.vit is not None


def _has_learned_vit_positions(arch: BagelArch) -> bool:
    return arch.vit is not None and not (arch.vit_rope or arch.vit.rope)


def _has_shared_expert(arch: BagelArch) -> bool:
    return arch.llm.sparse is not None and arch.llm.sparse.shared_expert_intermediate_size is not None


def _has_shared_expert_gate(arch: BagelArch) -> bool:
    return arch.llm.sparse is not None and arch.llm.sparse.shared_expert_gate


def _copy(name: str, hf: str, *shape: str, **kw: Any) -> Row:
    return Row(name, (Part(hf, shape),), **kw)


def _same(name: str, *shape: str, **kw: Any) -> Row:
    return _copy(name, name, *shape, **kw)


_L, _H = "decoder.layers.{i}.", "language_model.model.layers.{i}."
_ATT = {"separate_in": "attention", "layers": "llm"}
_MLP = {"separate_in": "mlp", "layers": "llm"}
_SPARSE: dict[str, Any] = {**_MLP, "mlp": "sparse"}
_V = "vit_model.vision_model."
_VL = _V + "encoder.layers.{i}."
_VIT = {"when": _has_vision}
_VIT_LAYER = {"when": _has_vision, "layers": "vit"}
_GEN = {"when": _has_generation}

ROWS: tuple[Row, ...] = (
    _copy("embedding.word_embeddings.weight", "language_model.model.embed_tokens.weight", "V", "D"),
    _copy(_L + "input_layernorm.{e}.weight", _H + "input_layernorm{x}.weight", "D", **_ATT),
    Row(
        _L + "self_attention.{e}.linear_qkv.weight",
        (
            Part(_H + "self_attn.q_proj{x}.weight", ("Q", "D")),
            Part(_H + "self_attn.k_proj{x}.weight", ("K", "D")),
            Part(_H + "self_attn.v_proj{x}.weight", ("K", "D")),
        ),
        op="qkv",
        separate_in="attention",
        layers="llm",
    ),
    Row(
        _L + "self_attention.{e}.linear_qkv.bias",
        (
            Part(_H + "self_attn.q_proj{x}.bias", ("Q",)),
            Part(_H + "self_attn.k_proj{x}.bias", ("K",)),
            Part(_H + "self_attn.v_proj{x}.bias", ("K",)),
        ),
        op="qkv",
        separate_in="attention",
        layers="llm",
        when=lambda arch: arch.llm.attention_bias,
    ),
    _copy(_L + "self_attention.{e}.q_layernorm.weight", _H + "self_attn.q_norm{x}.weight", "d", when=lambda a: a.llm.qk_norm, **_ATT),
    _copy(_L + "self_attention.{e}.k_layernorm.weight", _H + "self_attn.k_norm{x}.weight", "d", when=lambda a: a.llm.qk_norm, **_ATT),
    _copy(_L + "self_attention.{e}.linear_proj.weight", _H + "self_attn.o_proj{x}.weight", "D", "Q", **_ATT),
    _copy(_L + "pre_mlp_layernorm.{e}.weight", _H + "post_attention_layernorm{x}.weight", "D", **_ATT),
    Row(
        _L + "mlp.{e}.linear_fc1.weight",
        (Part(_H + "mlp{x}.gate_proj.weight", ("I", "D")), Part(_H + "mlp{x}.up_proj.weight", ("I", "D"))),
        op="gate_up",
        mlp="dense",
        separate_in="mlp",
        layers="llm",
    ),
    _copy(_L + "mlp.{e}.linear_fc2.weight", _H + "mlp{x}.down_proj.weight", "D", "I", mlp="dense", **_MLP),
    _copy(_L + "mlp.{e}.router.weight", _H + "mlp{x}.gate.weight", "E", "D", **_SPARSE),
    Row(
        _L + "mlp.{e}.experts.local_experts.{j}.linear_fc1.weight",
        (Part(_H + "mlp{x}.experts.{j}.gate_proj.weight", ("F", "D")), Part(_H + "mlp{x}.experts.{j}.up_proj.weight", ("F", "D"))),
        op="gate_up",
        **_SPARSE,
    ),
    _copy(_L + "mlp.{e}.experts.local_experts.{j}.linear_fc2.weight", _H + "mlp{x}.experts.{j}.down_proj.weight", "D", "F", **_SPARSE),
    Row(
        _L + "mlp.{e}.shared_experts.linear_fc1.weight",
        (Part(_H + "mlp{x}.shared_expert.gate_proj.weight", ("S", "D")), Part(_H + "mlp{x}.shared_expert.up_proj.weight", ("S", "D"))),
        op="gate_up",
        when=_has_shared_expert,
        **_SPARSE,
    ),
    _copy(
        _L + "mlp.{e}.shared_experts.linear_fc2.weight",
        _H + "mlp{x}.shared_expert.down_proj.weight",
        "D",
        "S",
        when=_has_shared_expert,
        **_SPARSE,
    ),
    _copy(
        _L + "mlp.{e}.shared_experts.gate_weight",
        _H + "mlp{x}.shared_expert_gate.weight",
        "1",
        "D",
        when=_has_shared_expert_gate,
        **_SPARSE,
    ),
    _copy("final_layernorm.{e}.weight", "language_model.model.norm{x}.weight", "D", separate_in="mlp"),
    _copy("output_layer.weight", "language_model.lm_head.weight", "V", "D", when=lambda arch: not arch.llm.tie_word_embeddings),
    _same("time_embedder.mlp.0.weight", "D", "T", **_GEN),
    _same("time_embedder.mlp.0.bias", "D", **_GEN),
    _same("time_embedder.mlp.2.weight", "D", "D", **_GEN),
    _same("time_embedder.mlp.2.bias", "D", **_GEN),
    _same("vae2llm.weight", "D", "P", **_GEN),
    _same("vae2llm.bias", "D", **_GEN),
    _same("llm2vae.weight", "P", "D", **_GEN),
    _same("llm2vae.bias", "P", **_GEN),
    _same(_V + "embeddings.patch_embedding.weight", "v", "p", **_VIT),
    _same(_V + "embeddings.patch_embedding.bias", "v", **_VIT),
    _same(_V + "embeddings.position_embedding.weight", "s", "v", when=_has_learned_vit_positions),
    *(
        row
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj")
        for row in (
            _same(_VL + f"self_attn.{proj}.weight", "v", "v", **_VIT_LAYER),
            _same(_VL + f"self_attn.{proj}.bias", "v", **_VIT_LAYER),
        )
    ),
    *(_same(_VL + f"layer_norm{n}.{kind}", "v", **_VIT_LAYER) for n in (1, 2) for kind in ("weight", "bias")),
    _same(_VL + "mlp.fc1.weight", "w", "v", **_VIT_LAYER),
    _same(_VL + "mlp.fc1.bias", "w", **_VIT_LAYER),
    _same(_VL + "mlp.fc2.weight", "v", "w", **_VIT_LAYER),
    _same(_VL + "mlp.fc2.bias", "v", **_VIT_LAYER),
    _same(_V + "post_layernorm.weight", "v", **_VIT),
    _same(_V + "post_layernorm.bias", "v", **_VIT),
    _same("connector.fc1.weight", "D", "v", **_VIT),
    _same("connector.fc1.bias", "D", **_VIT),
    _same("connector.fc2.weight", "D", "D", **_VIT),
    _same("connector.fc2.bias", "D", **_VIT),
)


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the Hugging Face tensors that it consists of, with full shapes."""

    name: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    op: str
    kv_groups: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the full shape of our parameter: its parts concatenated along dimension 0."""
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])

    @property
    def vocabulary(self) -> bool:
        """Return whether rows are token ids, in which case the parameter may have padding rows past the file's last row."""
        return self.name in ("embedding.word_embeddings.weight", "output_layer.weight")

    def fuse(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Build our parameter from Hugging Face tensors (order of ``hf``). Fused QKV is Megatron's [q.. k v] per key/value group."""
        if self.op == "copy":
            return tensors[0]
        if self.op in ("gate_up", "stack"):
            return torch.cat(list(tensors), dim=0)
        tail = tensors[0].shape[1:]
        grouped = [t.reshape(self.kv_groups, t.shape[0] // self.kv_groups, *tail) for t in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *tail)

    def unfuse(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Invert ``fuse``; the results are contiguous."""
        return tuple(part.flatten(0, 1).contiguous() if self.op == "qkv" else part.contiguous() for part in self.parts(tensor))

    def parts(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the places of the Hugging Face tensors in our parameter ``tensor``: views, if it is contiguous.

        A part of fused QKV is [groups, rows of a group, ..], since its groups lie apart.
        """
        if self.op == "copy":
            return (tensor,)
        rows = [shape[0] for shape in self.hf_shapes]
        if self.op in ("gate_up", "stack"):
            return tensor.split(rows, dim=0)
        return tensor.reshape(self.kv_groups, -1, *tensor.shape[1:]).split([n // self.kv_groups for n in rows], dim=1)


@dataclass(frozen=True)
class Table:
    """A fixed position table, stored in the released format (fp32) but computed here: ``side`` rows and columns, ``width`` channels.

    ``rotary`` is empty for a sin-cos table that is added to tokens. Otherwise it names one of the four rotary tables of the vision
    tower: "cos_h", "sin_h", "cos_w" or "sin_w".
    """

    hf: str
    side: int
    width: int
    rotary: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Return rows and channels of the table."""
        return (self.side * self.side, self.width)


class WeightMap:
    """``ROWS`` expanded for one architecture.

    ``entries`` maps our names to entries, ``by_hf`` Hugging Face names to entries, and ``tables`` Hugging Face names to tables.
    ``copies`` maps Hugging Face names whose tensor repeats an entry's to that entry: the head of a model that ties it to the embedding.
    The original's state dict holds such a tensor too, and servers build an untied head.
    """

    def __init__(self, arch: BagelArch) -> None:
        self.arch = arch
        self.entries = {entry.name: entry for row in ROWS if row.when(arch) for entry in _expand(row, arch)}
        self.by_hf = {name: entry for entry in self.entries.values() for name in entry.hf}
        width = arch.llm.hidden_size
        tables = []
        if _has_generation(arch):
            tables.append(Table("latent_pos_embed.pos_embed", arch.max_latent_size, width))
        if _has_vision(arch):
            tables.append(Table("vit_pos_embed.pos_embed", arch.vit_max_num_patch_per_side, width))
        self.tables = {table.hf: table for table in (*tables, *_rotary_tables(arch))}
        embedding = self.entries["embedding.word_embeddings.weight"]
        self.copies = {"language_model.lm_head.weight": embedding} if arch.llm.tie_word_embeddings else {}

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor name of the released format with its shape, copies and position tables included."""
        shapes = {n: s for entry in self.entries.values() for n, s in zip(entry.hf, entry.hf_shapes, strict=True)}
        shapes |= {name: entry.shape for name, entry in self.copies.items()}
        return shapes | {name: table.shape for name, table in self.tables.items()}


def _rotary_tables(arch: BagelArch) -> list[Table]:
    """Return the buffers of a rotary vision tower. Their grid is that of ``image_size``, as in the original."""
    if arch.vit is None or not (arch.vit_rope or arch.vit.rope):
        return []
    side, width = arch.vit.image_size // arch.vit.patch_size, arch.vit.head_dim // 2
    return [Table(f"{_V}rope.{name}", side, width, rotary=name) for name in ("cos_h", "sin_h", "cos_w", "sin_w")]


def _expand(row: Row, arch: BagelArch) -> list[Entry]:
    sizes = dimensions(arch)
    count = {"none": 1, "llm": arch.llm.num_hidden_layers, "vit": arch.n_vit_layers if arch.vit else 0}[row.layers]
    duplicated = {
        "never": False,
        "attention": arch.llm.has_gen_attention,
        "mlp": arch.llm.has_gen_mlp,
    }[row.separate_in]
    experts = ("und", "gen") if duplicated else ("und",)
    if row.mlp == "sparse" and arch.llm.sparse is None:
        return []
    shapes = tuple(tuple(sizes[symbol] for symbol in part.shape) for part in row.parts)
    entries = []
    for i, expert in itertools.product(range(count), experts):
        if row.mlp != "any" and (row.mlp == "sparse") != arch.llm.is_sparse(i, expert):
            continue
        for j in range(arch.llm.sparse.num_experts) if "{j}" in row.name and arch.llm.sparse is not None else (0,):
            names = tuple(part.name.format(i=i, j=j, x=EXPERT_SUFFIX[expert]) for part in row.parts)
            entries.append(Entry(row.name.format(i=i, j=j, e=expert), names, shapes, row.op, arch.llm.num_key_value_heads))
    return entries


def dimensions(arch: BagelArch) -> dict[str, int]:
    """Return the values of the shape symbols in ``ROWS`` for this architecture."""
    llm = arch.llm
    sizes = {
        "V": llm.vocab_size,
        "D": llm.hidden_size,
        "I": llm.intermediate_size,
        "Q": llm.num_attention_heads * llm.head_dim,
        "K": llm.num_key_value_heads * llm.head_dim,
        "d": llm.head_dim,
        "T": TIMESTEP_FREQUENCIES,
    }
    if llm.sparse is not None:
        shared = llm.sparse.shared_expert_intermediate_size or 0
        sizes |= {"E": llm.sparse.num_experts, "F": llm.sparse.moe_intermediate_size, "S": shared, "1": 1}
    if arch.autoencoder is not None:
        sizes["P"] = arch.latent_token_dim
    if arch.vit is not None:
        vit = arch.vit
        sizes |= {
            "v": vit.hidden_size,
            "w": vit.intermediate_size,
            "p": vit.num_channels * vit.patch_size**2,
            "s": vit.num_positions,
        }
    return sizes
