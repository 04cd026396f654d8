# SPDX-License-Identifier: Apache-2.0
"""Why a program that serves BAGEL cannot take a model folder, by what the loader of vllm-omni 0.30.0 builds and asks for.

It builds one model: the released one with other sizes. docs/serving.md tells how far the server was run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch

SERVER = "vllm-omni 0.30.0"
_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_RELEASED_VIT_LAYERS, _USED_VIT_LAYERS = 27, 26  # the server builds 26 layers where the config says 27


def serving_problems(arch: BagelArch, kinds: Collection[str], tokens: Mapping[str, int]) -> list[str]:
    """Return what keeps a server from loading a folder with these ``kinds`` of weights and ``tokens`` of the tokenizer, by their ids."""
    problems = list(_model_problems(arch))
    if len(kinds) > 1:
        problems.append(f"it holds {' and '.join(kinds)} weights, and servers load one over the other; they need one kind (--weights ema)")
    missing_tokens = [token for token in _TOKENS if token not in tokens]
    if missing_tokens:
        problems.append(f"its tokenizer files lack {', '.join(missing_tokens)}")
    if (count := max(tokens.values(), default=-1) + 1) > arch.llm.vocab_size:
        problems.append(f"its tokenizer has {count} ids and its table {arch.llm.vocab_size} rows, and servers build the larger table")
    return problems


def _model_problems(arch: BagelArch) -> Iterator[str]:
    llm, vit = arch.llm, arch.vit
    if llm.layer_module != "Qwen2MoTDecoderLayer":
        yield f"its layers are {llm.layer_module}, and servers build Qwen2MoTDecoderLayer"
    if llm.sparse is not None:
        yield "its decoder has sparse experts, and servers build dense MLPs"
    if not llm.qk_norm or not llm.attention_bias:
        yield "its attention lacks QK-norm or biases, which servers build"
    if llm.kv_channels is not None and llm.kv_channels * llm.num_attention_heads != llm.hidden_size:
        yield f"its head size {llm.kv_channels} is not hidden size over heads"
    if arch.autoencoder is None:
        yield "it has no autoencoder and generates no images"
    elif arch.autoencoder != AutoencoderArch():
        yield "its autoencoder is not of FLUX's shape, the only one that servers build"
    if vit is None:
        yield "it has no vision tower"
        return
    if arch.vit_rope or vit.rope:
        yield "its vision tower has rotary positions, and servers build learned ones"
    built_layers = _USED_VIT_LAYERS if vit.num_hidden_layers == _RELEASED_VIT_LAYERS else vit.num_hidden_layers
    if built_layers != arch.n_vit_layers:
        yield f"its number of vision layers is {arch.n_vit_layers}, and servers build {built_layers} from vit_config.json"
