"""Tiny random models of every architecture, saved to disk with a tokenizer: real transformers and peft, no mocks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB, WIDTH, DEPTH, POSITIONS = 320, 32, 4, 64
_GPT2 = {"n_embd": WIDTH, "n_head": 2, "n_layer": DEPTH, "n_positions": POSITIONS}
_ROPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 2,
    "num_hidden_layers": DEPTH,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = _ROPE | {"num_key_value_heads": 1, "head_dim": 16}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt_neox": _ROPE,
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 4},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma2": _GROUPED | _SLIDING | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": _GROUPED | _SLIDING | {"query_pre_attn_scalar": 16},
}
FAMILIES = list(CONFIGS)
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
"""Paths of the block lists that are not `model.layers`."""
LINEAR = {
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
}
"""Names of one linear map of the attention and one of the MLP, where they are not `q_proj` and `up_proj`."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, 320 tokens, any text round-trips; BOS and EOS are `<|bos|>` and `<|eos|>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|eos|>", "<|bos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the cat sat on the mat and the dog ran to the other house"] * 8, trainer)
    while (n := bpe.get_vocab_size()) < VOCAB:
        bpe.add_tokens([f"<|{n}|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|eos|>")


def model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal LM of the family: d = 32, 4 layers, 320 tokens; every weight random, norms and biases too."""
    settings = CONFIGS[family] | {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **(settings | overrides))
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


def save_model(path: Path, family: str, seed: int = 0, **overrides: Any) -> Path:
    """The model and a tokenizer at `path`."""
    model(family, seed, **overrides).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def add_lora(base: PreTrainedModel, layers: list[int], targets: list[str] | None = None, **options: Any) -> PeftModel:
    """`base` with a LoRA of rank 2 on these layers, B not zero, so that it changes something."""
    family = base.config.model_type
    options = {"r": 2, "lora_alpha": 4, "layers_to_transform": layers, "task_type": "CAUSAL_LM"} | options
    targets = targets or LINEAR.get(family, ["q_proj", "up_proj"])
    peft = get_peft_model(base, LoraConfig(target_modules=targets, **options))  # pyright: ignore
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft


def save_lora(path: Path, base: Path, layers: list[int], targets: list[str] | None = None, **options: Any) -> Path:
    """A LoRA folder at `path` that names `base` as its base."""
    add_lora(AutoModelForCausalLM.from_pretrained(base), layers, targets, **options).save_pretrained(str(path))
    return path


def token_ids(n_sequences: int = 3, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Random ids [n_sequences, length], the second sequence right-padded by half."""
    draw = random.Random(seed)
    ids = torch.tensor([[draw.randrange(2, VOCAB) for _ in range(length)] for _ in range(n_sequences)])
    ids[1, length // 2 :] = 0
    return ids
