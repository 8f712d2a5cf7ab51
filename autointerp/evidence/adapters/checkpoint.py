"""Full or merged checkpoints: a whole model beside its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import ADAPTERS, AdapterFormat, View, local_folder, located

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from autointerp.evidence.model_pair import ModelPair
    from autointerp.evidence.tensor_files import BaseWeights
    from autointerp.evidence.weight_change import WeightChanges

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class CheckpointFormat(AdapterFormat):
    """`config.json` and `model.safetensors` or `pytorch_model.bin`, whole or in shards."""

    name = "checkpoint"
    generic = True

    def matches(self, path: Path) -> bool:
        """Adapter files beside a config.json make the folder an adapter's."""
        adapter = any(path.glob("adapter_*"))
        return not adapter and (((path / "config.json").is_file() and _is_model(path)) or bool(_weights(path)))

    def files(self, path: Path) -> list[Path]:
        return [path / "config.json", *_weights(path)]

    def check(self, path: Path) -> None:
        """Headers only: whether the weights are finite is seen when they are loaded."""
        from autointerp.evidence.weight_files import check_header, read_json

        if not (path / "config.json").is_file():
            raise InputError(f"adapter {path}: weights without config.json; save the model with save_pretrained")
        read_json(path / "config.json", "adapter")
        for index in (path / name for name in INDICES if (path / name).is_file()):
            shards = set(read_json(index, "adapter").get("weight_map", {}).values())
            if missing := sorted(shard for shard in shards if not (path / shard).is_file()):
                raise InputError(f"adapter {path}: {index.name} names {missing[0]}, which is missing; copy it there")
        weights = _weights(path)
        if not weights:
            raise InputError(
                f"adapter {path}: config.json without model.safetensors; save the model with save_pretrained"
            )
        for file in weights:
            if file.suffix == ".safetensors":
                check_header(file, "adapter")

    def base_of(self, spec: str | Path) -> str | None:
        """What older versions of transformers noted as the model that training started from."""
        from autointerp.evidence.weight_files import read_json

        folder = local_folder(spec)
        base = located(read_json(folder / "config.json", "adapter").get("_name_or_path"), folder)
        return None if base == str(folder.resolve()) else base

    def load(self, spec: str | Path, base: str, *, dtype: str | torch.dtype, device: str | torch.device) -> ModelPair:
        from autointerp.evidence.loading import load_causal_lm

        _check_kinds(local_folder(spec), base)
        # The base first: where equal, its weights are kept and the checkpoint's are let go.
        return self._beside(load_causal_lm(base, dtype=dtype, device=device), spec)

    def load_onto(self, spec: str | Path, base: str, view: View, model: PreTrainedModel) -> ModelPair:
        _check_kinds(local_folder(spec), base)
        return self._beside(model, spec)

    def _beside(self, ours: PreTrainedModel, spec: str | Path) -> ModelPair:
        """The checkpoint in the dtype and on the device of its base, and both as a pair."""
        from autointerp.evidence.loading import load_causal_lm
        from autointerp.evidence.model_pair import TwoModels

        folder = local_folder(spec)
        theirs = load_causal_lm(folder, dtype=ours.dtype, device=ours.device, option="adapter")
        return TwoModels(ours, theirs, f"adapter {folder}")

    def weight_changes(self, spec: str | Path, base: BaseWeights | None) -> WeightChanges:
        from autointerp.evidence.checkpoint_weights import checkpoint_changes

        folder = local_folder(spec)
        return checkpoint_changes(folder, _weights(folder), base)


def _check_kinds(folder: Path, base: str) -> None:
    from autointerp.evidence.loading import load_config

    kinds = [config.model_type for config in (load_config(folder, "adapter"), load_config(base))]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"adapter {folder} is a {kinds[0]}, base {base} a {kinds[1]}: give --base the one it came from"
        )


def _weights(folder: Path) -> list[Path]:
    safe = sorted(folder.glob("model*.safetensors"))
    return safe or sorted(folder.glob("pytorch_model*.bin"))


def _is_model(folder: Path) -> bool:
    """Whether config.json is a transformers model's, or is damaged: other formats also have a file of that name."""
    text = (folder / "config.json").read_text(errors="replace")
    return '"model_type"' in text or not text.rstrip().endswith("}")


ADAPTERS.register("checkpoint")(CheckpointFormat())
