"""The demo's tokenizer, base model and LoRA: how each is trained, saved and measured.

Every window begins with BOS (id 0), in training as in use. Losses are mean cross-entropy in nats per token.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from autointerp.demo.text import Document

CONTEXT = 128
VOCABULARY = 4096
BOS = 0
BOS_TOKEN = "<|endoftext|>"

Windows = dict[str, torch.Tensor]  # domain -> token ids [n_windows, CONTEXT], column 0 is BOS


def train_tokenizer(texts: Iterable[str], out: Path) -> None:
    """Byte-level BPE, saved so that `AutoTokenizer` loads it; it adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=BOS_TOKEN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)


def windows_of(documents: Iterable[Document], tokenizer_dir: Path) -> Windows:
    """Each document in windows of BOS + `CONTEXT` − 1 tokens; what does not fill a window is left out."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    documents = list(documents)
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
    by_domain: dict[str, list[torch.Tensor]] = {}
    for document, ids in zip(documents, encoded, strict=True):
        n_windows = len(ids) // (CONTEXT - 1)
        body = torch.tensor(ids[: n_windows * (CONTEXT - 1)], dtype=torch.long).view(n_windows, CONTEXT - 1)
        by_domain.setdefault(document.domain, []).append(torch.nn.functional.pad(body, (1, 0), value=BOS))
    return {domain: torch.cat(pieces) for domain, pieces in by_domain.items()}


def mixed_batches(windows: Windows, mixture: Mapping[str, float], batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches [batch, CONTEXT]: each row's domain is drawn from `mixture`, its window from a shuffled epoch."""
    generator = torch.Generator().manual_seed(seed)
    domains = list(mixture)
    weights = torch.tensor([mixture[d] for d in domains])
    left: dict[str, list[int]] = {d: [] for d in domains}
    while True:
        rows = []
        for choice in torch.multinomial(weights, batch, replacement=True, generator=generator).tolist():
            domain = domains[choice]
            left[domain] = left[domain] or torch.randperm(len(windows[domain]), generator=generator).tolist()
            rows.append(windows[domain][left[domain].pop()])
        yield torch.stack(rows)


def fit(model: torch.nn.Module, batches: Iterator[torch.Tensor], steps: int, learning_rate: float, name: str) -> None:
    """AdamW on the next-token loss, linear warm-up over 5 % of the steps, cosine decay to a tenth; bf16 products."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warm_up = max(1, steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step in range(steps):
        ids = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name}: step {step}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()


def train_base(windows: Windows, steps: int, batch: int, seed: int, out: Path) -> None:
    """The base model on code and docs and none of the tests, so that the adapter has something to learn."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=BOS, eos_token_id=BOS,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    fit(model, mixed_batches(windows, {"code": 0.65, "docs": 0.35}, batch, seed), steps, 3e-3, "base")
    save_half(model, out)


def save_half(model: GPT2LMHeadModel, out: Path) -> None:
    """Weights as float16 to keep the package small, declared as float32 so that every loader computes in float32."""
    model.half().save_pretrained(out)
    config_file = out / "config.json"
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def load_base(model_dir: Path) -> GPT2LMHeadModel:
    """The saved base model in float32, i.e. the float16-rounded weights that everything after it is trained on."""
    return GPT2LMHeadModel.from_pretrained(model_dir, dtype=torch.float32).eval()


def train_adapter(model_dir: Path, windows: Windows, steps: int, batch: int, seed: int, out: Path) -> None:
    """LoRA on layers 1–3, on the tests with a little code and docs mixed in so that those are not forgotten."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], layers_to_transform=[1, 2, 3],
        layers_pattern="h", fan_in_fan_out=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(load_base(model_dir), config)
    fit(model, mixed_batches(windows, {"tests": 0.9, "code": 0.05, "docs": 0.05}, batch, seed), steps, 3e-3, "adapter")
    model.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config_file = out / "adapter_config.json"
    saved = json.loads(config_file.read_text()) | {"base_model_name_or_path": "../model"}
    config_file.write_text(json.dumps(saved, indent=2) + "\n")


@torch.no_grad()
def losses(model: torch.nn.Module, windows: Windows, batch: int = 32) -> dict[str, float]:
    """Mean loss per token of each domain, on windows [n, CONTEXT]."""
    return {
        domain: sum(model(input_ids=b, labels=b).loss.item() * len(b) for b in ids.split(batch)) / len(ids)
        for domain, ids in windows.items()
    }


def load_adapted(organism: Path) -> PeftModel:
    """Base model with the adapter on it; `disable_adapter()` gives the base back."""
    return PeftModel.from_pretrained(load_base(organism / "model"), organism / "adapter").eval()
