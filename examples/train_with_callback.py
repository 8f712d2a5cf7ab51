"""Trains a LoRA on the demo's language model and asks, in the same breath, what the training changed.

    python examples/train_with_callback.py

All that autointerp adds to a training script is the callback; TRL's SFTTrainer takes it likewise. The LoRA learns
unittest code from the demo's own corpus. Half a minute on two cores; nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import autointerp
from autointerp.demo import ORGANISM

CONTEXT = 128


def trainer(out: Path, steps: int, callbacks: list[TrainerCallback], **arguments: Any) -> Trainer:
    """An ordinary training: a LoRA on the demo's unittest documents. `arguments` go to TrainingArguments."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM / "model")
    model = AutoModelForCausalLM.from_pretrained(ORGANISM / "model", dtype=torch.float32)
    modules = ["c_attn", "c_proj", "c_fc"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=modules, fan_in_fan_out=True, task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        **arguments,
    }
    return Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(**settings),
        train_dataset=windows(tokenizer),  # pyright: ignore[reportArgumentType]
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def windows(tokenizer: Any) -> list[dict[str, list[int]]]:
    """The unittest documents of the demo's corpus, in windows of CONTEXT tokens."""
    lines = (ORGANISM / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row["text"] for row in map(json.loads, lines) if row["domain"] == "tests"]
    ids = [token for encoded in tokenizer(texts, verbose=False)["input_ids"] for token in encoded]
    cut = [ids[at : at + CONTEXT] for at in range(0, len(ids) - CONTEXT, CONTEXT)]
    return [{"input_ids": window, "labels": window} for window in cut]


def main(out: Path = Path("results/train_with_callback"), steps: int = 40, max_tokens: int = 40_000, top: int = 10):
    """Trains, and prints the latents that changed."""
    torch.set_num_threads(1)  # for a model this small, the threads would only wait for each other
    labels = autointerp.LabelCallback(
        sae=ORGANISM / "sae",
        corpus=ORGANISM / "corpus.jsonl",
        max_tokens=max_tokens,
        top=top,
        db=out / "labels.duckdb",
    )
    trainer(out, steps, [labels]).train()
    if labels.results is not None:
        print(labels.results.sql("SELECT rank, latent, label, effect FROM changed_latents ORDER BY rank"))


if __name__ == "__main__":
    main()
